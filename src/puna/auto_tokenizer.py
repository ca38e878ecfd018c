"""A tokenizer with Transformers' surface: batches, padding, truncation, chat templates, names of things.

The work is done by `puna.text`; this adds what code written for Transformers calls. Names, defaults and
precedence are those of Transformers 5.23 (`tokenization_utils_base.py`). One thing differs on purpose: in a
chat, the strings of special tokens inside messages stay text (Transformers: `sanitize_control_tokens=True`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from puna.auto_arguments import WithoutEffect, refuse
from puna.auto_encoding import (
    UNLIMITED,
    BatchEncoding,
    Ids,
    Shape,
    Side,
    require_ids,
    require_side,
    to_list,
    to_tensor,
)
from puna.auto_saving import save_tokenizer
from puna.errors import ParameterError, UnsupportedError
from puna.text.chat import encode_chat, render_chat_text
from puna.text.tokenizer import Tokenizer
from puna.text.tokenizer_config import read_json

logger = logging.getLogger(__name__)

_CALL_WITHOUT_EFFECT: WithoutEffect = {
    "is_split_into_words": (False,),
    "return_length": (False,),
    "return_offsets_mapping": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_token_type_ids": (False,),
    "stride": (0,),
    "text_pair": (),
    "text_pair_target": (),
    "text_target": (),
    "verbose": (True, False),
}


class PretrainedTokenizer:
    """A `Tokenizer`, which is `.tokenizer`, behind the methods that code written for Transformers calls."""

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int = UNLIMITED,
        name_or_path: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = model_max_length
        self.name_or_path = name_or_path
        self.chat_template: str | None = tokenizer.chat_template
        self._pad_token_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return self.tokenizer.vocab_size

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.name_or_path!r}, {len(self)} tokens, {self.special_tokens_map})"

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> tuple[str, ...]:
        """Copy the tokenizer's files into a folder, made if absent; return where they are.

        A template and a padding token set since are written too. Raises UnsupportedError for a tokenizer that
        came from another format.
        """
        changes: dict[str, str | None] = {}
        if self.chat_template != self.tokenizer.chat_template:
            changes["chat_template"] = self.chat_template
        if self._pad_token_id != self.tokenizer.pad_token_id:
            changes["pad_token"] = self.pad_token
        return save_tokenizer(self.name_or_path, save_directory, changes, options)

    # -- names and ids

    @property
    def padding_side(self) -> Side:
        """Return the side on which padding goes."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = require_side("padding_side", side)

    @property
    def truncation_side(self) -> Side:
        """Return the side on which long texts are cut."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self._truncation_side = require_side("truncation_side", side)

    @property
    def bos_token_id(self) -> int | None:
        """Return the id that begins a text."""
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """Return the id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def unk_token_id(self) -> int | None:
        """Return the id for what has no token."""
        return self.tokenizer.unk_token_id

    @property
    def pad_token_id(self) -> int | None:
        """Return the id that fills up; may be set to one of the vocabulary."""
        return self._pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, token_id: int | None) -> None:
        if token_id is not None:
            self.tokenizer.id_to_token(token_id)  # raises for an id outside the vocabulary
        self._pad_token_id = token_id

    @property
    def bos_token(self) -> str | None:
        """Return the token that begins a text."""
        return self._token(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        """Return the token that ends a text."""
        return self._token(self.eos_token_id)

    @property
    def unk_token(self) -> str | None:
        """Return the token for what has none."""
        return self._token(self.unk_token_id)

    @property
    def pad_token(self) -> str | None:
        """Return the token that fills up; may be set to one of the vocabulary."""
        return self._token(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        token_id = None if token is None else self.tokenizer.token_to_id(token)
        if token is not None and token_id is None:
            raise UnsupportedError(
                f"pad_token {token!r} is not in the vocabulary: adding tokens is not supported"
            )
        self._pad_token_id = token_id

    def _token(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokenizer.id_to_token(token_id)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Return the named special tokens that there are."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {name: token for name in names if (token := getattr(self, name)) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Return every special token, the named ones first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.tokenizer.special_tokens]))

    @property
    def all_special_ids(self) -> Ids:
        """Return the ids of `all_special_tokens`."""
        ids = self.convert_tokens_to_ids(self.all_special_tokens)
        assert isinstance(ids, list)
        return ids

    @property
    def vocab_size(self) -> int:
        """Count the tokens without those added to the vocabulary; `len()` counts all."""
        if self.tokenizer.path.name == "tokenizer.json":
            return len(read_json(self.tokenizer.path)["model"]["vocab"])
        special, size = set(self.tokenizer.special_tokens.values()), len(self)
        while size - 1 in special:
            size -= 1
        return size

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""
        return {self.tokenizer.id_to_token(token_id): token_id for token_id in range(len(self))}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | None | list[int]:
        """Return the id of a token, or of each; that of the unknown token, or None, for others."""
        if isinstance(tokens, str):
            return self._id(tokens)
        return [self._id(token) for token in _texts(tokens)]  # type: ignore[misc]

    def _id(self, token: str) -> int | None:
        token_id = self.tokenizer.token_to_id(token)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """Return the token of an id, or of each, as the vocabulary spells them."""
        ids = to_list(ids)
        if isinstance(ids, int):
            return self.tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.tokenizer.id_to_token(i) for i in require_ids(ids) if i not in skipped]

    def num_special_tokens_to_add(self) -> int:
        """Return how many tokens are put around a text."""
        return len(self.tokenizer.encode_parts([], add_special_tokens=True))

    # -- text to ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        split_special_tokens: bool = False,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Encode a text, or a batch of texts.

        The strings of special tokens become those tokens, as in Transformers, unless `split_special_tokens`.
        Raises ParameterError where padding is asked for without a pad token, or tensors of unequal rows.
        """
        refuse("tokenizer", unsupported, _CALL_WITHOUT_EFFECT)
        texts = _texts(text)
        rows = [
            self.tokenizer.encode(item, add_special_tokens=False, parse_special=not split_special_tokens)
            for item in texts
        ]
        return self._finish(
            rows,
            is_batch=not isinstance(text, str),
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
            return_attention_mask=return_attention_mask,
        )

    def encode(self, text: str | Sequence[str], **settings: Any) -> Any:
        """Return only the ids; settings as for calling the tokenizer."""
        return self(text, **settings)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text."""
        tokens = self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))
        assert isinstance(tokens, list)
        return tokens

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """Write one or several conversations as the checkpoint's template does, as ids or as text.

        `chat_template` is a template or the name of one of the checkpoint's. Special tokens in messages stay
        text: `sanitize_control_tokens=False` is refused. `template_variables`, such as `date_string`, go to
        the template. Returns an encoding; only the ids with `return_dict=False`; text with `tokenize=False`.
        """
        if not sanitize_control_tokens:
            raise UnsupportedError("sanitize_control_tokens=False: messages never become special tokens here")
        if return_assistant_tokens_mask:
            raise UnsupportedError("return_assistant_tokens_mask is not supported")
        conversations, is_batch = _conversations(conversation)
        settings = {
            **_chat_settings(tools, continue_final_message, template_variables),
            "add_generation_prompt": add_generation_prompt,
            "template": self._template(chat_template),
            **({} if documents is None else {"documents": documents}),
        }
        if not tokenize:
            texts = [render_chat_text(self.tokenizer, messages, **settings) for messages in conversations]
            return texts if is_batch else texts[0]
        shape = {
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "return_tensors": return_tensors,
            **(tokenizer_kwargs or {}),
        }
        rows = [encode_chat(self.tokenizer, messages, **settings) for messages in conversations]
        encoding = self._finish(rows, **{"is_batch": is_batch, "add_special_tokens": False, **shape})
        return encoding if return_dict else encoding["input_ids"]

    def _template(self, asked: str | None) -> str | None:
        """Return the template to use, None for the checkpoint's own choice."""
        if asked is not None:
            return self.tokenizer.chat_templates.get(asked, asked)
        return self.chat_template if self.chat_template != self.tokenizer.chat_template else None

    # -- rows to an encoding

    def _finish(
        self,
        rows: list[Ids],
        *,
        is_batch: bool,
        add_special_tokens: bool,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> BatchEncoding:
        shape = Shape.of(
            padding,
            truncation,
            max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            limit=self.model_max_length,
        )
        around = self.num_special_tokens_to_add() if add_special_tokens else 0
        kept = [shape.cut(row, around, self.truncation_side) for row in rows]
        if add_special_tokens:
            kept = [self.tokenizer.encode_parts(row, add_special_tokens=True) for row in kept]
        if not shape.cuts and any(len(row) > self.model_max_length for row in kept):
            logger.warning("a text is longer than model_max_length, %d tokens", self.model_max_length)
        side = self.padding_side if padding_side is None else require_side("padding_side", padding_side)
        ids, masks = shape.pad(kept, self.pad_token_id, side)
        columns = {"input_ids": ids}
        if return_attention_mask is not False:
            columns["attention_mask"] = masks
        if return_tensors is None and not is_batch:
            return BatchEncoding({name: column[0] for name, column in columns.items()})
        return BatchEncoding({name: to_tensor(column, return_tensors) for name, column in columns.items()})

    # -- ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Return the text of ids (a number, list, tensor or array), or a list of texts for a batch.

        Raises ParameterError for an id outside the vocabulary.
        """
        if clean_up_tokenization_spaces:
            raise UnsupportedError(
                "clean_up_tokenization_spaces=True is not supported: it would alter the text"
            )
        ids = to_list(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        return self.tokenizer.decode(require_ids(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **settings: Any) -> list[str]:
        """Return the texts of a batch of ids."""
        if isinstance(sequences, Sized) and len(sequences) == 0:
            return []
        texts = self.decode(sequences, skip_special_tokens, **settings)
        return [texts] if isinstance(texts, str) else texts

    def stream(self, *, skip_special_tokens: bool = True) -> Any:
        """Return a decoder for ids that come one by one; see `Tokenizer.stream`."""
        return self.tokenizer.stream(skip_special_tokens=skip_special_tokens)


def _chat_settings(
    tools: Sequence[Mapping[str, Any]] | None, continue_final_message: bool, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments for `encode_chat` that need a look first."""
    if tools is not None and not isinstance(tools, list | tuple):
        raise ParameterError(f"tools must be a list of JSON schemas, got {type(tools).__name__}")
    if any(callable(tool) for tool in tools or ()):
        raise UnsupportedError("tools must be JSON schemas: functions are not turned into them")
    if ours := {"template", "chat_format", "date"} & variables.keys():
        raise ParameterError(f"apply_chat_template has no parameter {min(ours)!r}")
    if not isinstance(continue_final_message, bool):
        raise UnsupportedError(
            f"continue_final_message must be True or False, got {continue_final_message!r}"
        )
    return {"tools": tools, "continue_final_message": continue_final_message, **variables}


def _texts(given: object) -> list[str]:
    """Return a text, or several in a list, as a list."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple):
        raise ParameterError(f"a text or a list of texts is needed, got {type(given).__name__}")
    if wrong := [item for item in texts if not isinstance(item, str)]:
        raise ParameterError(
            f"a text or a list of texts is needed, got a list with {type(wrong[0]).__name__}"
        )
    return list(texts)


def _conversations(given: Sequence[Any]) -> tuple[list[list[dict[str, Any]]], bool]:
    """Return a list of conversations, and whether several were given; keys with None are dropped."""
    if not isinstance(given, list | tuple):
        raise ParameterError(f"a conversation is a list of messages, not {type(given).__name__}")
    if not given:
        raise ParameterError("the conversation is empty: a chat template needs at least one message")
    is_batch = isinstance(given[0], list | tuple)
    conversations = given if is_batch else [given]
    for messages in conversations:
        if not isinstance(messages, list | tuple):
            raise ParameterError(f"in a batch each conversation is a list, not {type(messages).__name__}")
        for message in messages:
            if not isinstance(message, Mapping):
                kind = type(message).__name__
                raise ParameterError(
                    f"a message is a dict with role and content, not {kind}: {message!r:.80}"
                )
    return [
        [{key: value for key, value in message.items() if value is not None} for message in messages]
        for messages in conversations
    ], is_batch
