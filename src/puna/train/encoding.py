"""Turn rows into token ids with a mark on each that is trained; there is no search for substrings.

A chat is rendered once, by the renderer that serving uses. What an assistant's turn is follows from what
serving would do: it begins where the prompt for it ends and goes on to where the next message begins, its end
token included. A token across a border belongs to the prompt. Ids and marks are plain lists: no tensors.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from puna.errors import ParameterError, PunaError, TemplateError
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer
from puna.train.rows import ChatRow, PairRow, TextRow

logger = logging.getLogger(__name__)

Overlong = Literal["truncate", "drop", "split", "error"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """Hold the ids of a row, and which of them the model learns to write; never the first."""

    place: str
    ids: Sequence[int]
    trained: Sequence[bool]
    label: bool | None = None  # of KTO: whether the answer is desirable

    @property
    def num_trained(self) -> int:
        """Count the tokens that the loss is taken over."""
        return sum(self.trained)


@dataclass(frozen=True, kw_only=True)
class ChatRendering:
    """Say how chats are rendered: see `puna.text.chat.encode_chat`; the default is what serving does."""

    template: str | None = None
    chat_format: str | None = None
    date: datetime.date | None = None


def encode_rows(
    rows: Iterable[ChatRow | TextRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    rendering: ChatRendering | None = None,
) -> list[Example]:
    """Encode rows, none longer than `max_length` tokens.

    A longer one is cut at its end ("truncate"), left out ("drop"), cut into several ("split"), or an error.
    Raises ParameterError naming the place for a row that cannot be rendered or has nothing to train.
    """
    if overlong not in get_args(Overlong):
        raise ParameterError(f"overlong is {overlong!r}; known are {', '.join(get_args(Overlong))}")
    examples: list[Example] = []
    num_overlong = 0
    for row in rows:
        example = encode_row(row, tokenizer, rendering)
        if len(example.ids) > max_length:
            num_overlong += 1
            examples += _shorten(example, max_length, overlong)
        else:
            examples.append(example)
    if num_overlong:
        done = {"truncate": "cut at their end", "drop": "left out", "split": "cut into several"}[overlong]
        logger.warning("%d rows are longer than %d tokens, and are %s", num_overlong, max_length, done)
    if not examples:
        raise ParameterError(f"all rows are longer than {max_length} tokens and were left out")
    return examples


def encode_pairs(
    pairs: Iterable[PairRow],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    rendering: ChatRendering | None = None,
) -> list[Example]:
    """Encode pairs: the chosen answer, then the rejected one, and so on; see `encode_rows`.

    A pair is left out whole. Raises ParameterError for overlong "split" too.
    """
    if overlong == "split":
        raise ParameterError("overlong 'split' is not for pairs of answers")
    examples: list[Example] = []
    num_overlong = 0
    for pair in pairs:
        both = [encode_row(row, tokenizer, rendering) for row in (pair.chosen, pair.rejected)]
        if both[0].ids == both[1].ids:
            raise ParameterError(f"{pair.place}: chosen and rejected are the same")
        is_overlong = max(len(example.ids) for example in both) > max_length
        num_overlong += is_overlong
        if overlong == "drop" and is_overlong:
            continue
        for example in both:
            fits = len(example.ids) <= max_length
            examples += [example] if fits else _shorten(example, max_length, overlong)
    if num_overlong:
        done = "left out" if overlong == "drop" else "cut at their end"
        logger.warning("%d pairs are longer than %d tokens, and are %s", num_overlong, max_length, done)
    if not examples:
        raise ParameterError(f"all pairs are longer than {max_length} tokens and were left out")
    return examples


def encode_row(
    row: ChatRow | TextRow, tokenizer: Tokenizer, rendering: ChatRendering | None = None
) -> Example:
    """Encode one row. Raises ParameterError naming its place."""
    try:
        if isinstance(row, TextRow):
            example = _encode_text(row, tokenizer)
        else:
            example = _encode_messages(row, tokenizer, rendering or ChatRendering())
    except PunaError as error:
        raise ParameterError(f"{row.place}: {error}") from error
    if not example.num_trained:
        raise ParameterError(
            f"{row.place}: no token of this row is trained: there is no answer to learn from"
        )
    return example


def _shorten(example: Example, max_length: int, overlong: Overlong) -> list[Example]:
    size = len(example.ids)
    if overlong == "drop":
        return []
    if overlong == "error":
        raise ParameterError(f"{example.place}: {size} tokens, more than max_length {max_length}")
    starts = range(0, size, max_length) if overlong == "split" else range(1)
    parts = [
        Example(
            place=example.place,
            ids=example.ids[start : start + max_length],
            trained=[False, *example.trained[start + 1 : start + max_length]],  # nothing predicts the first
            label=example.label,
        )
        for start in starts
    ]
    kept = [part for part in parts if part.num_trained]
    if not kept:
        raise ParameterError(
            f"{example.place}: {size} tokens, and of the first {max_length} none is trained: "
            "give a larger max_length, or overlong 'drop'"
        )
    return kept


def _encode_text(row: TextRow, tokenizer: Tokenizer) -> Example:
    ids = tokenizer.encode(row.prompt + row.text)
    start = border(tokenizer.encode(row.prompt), ids, tokenizer) if row.prompt else 0
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    start = max(start, 1)  # nothing predicts the first token
    trained = [index >= start for index in range(len(ids))]
    return Example(place=row.place, ids=ids, trained=trained, label=row.label)


def _encode_messages(row: ChatRow, tokenizer: Tokenizer, rendering: ChatRendering) -> Example:
    def encode(count: int, *, opens_answer: bool) -> list[int]:
        return encode_chat(
            tokenizer,
            row.messages[:count],
            tools=row.tools,
            add_generation_prompt=opens_answer,
            template=rendering.template,
            chat_format=rendering.chat_format,
            date=rendering.date,
        )

    ids = encode(len(row.messages), opens_answer=False)
    trained = [False] * len(ids)
    for index, is_trained in enumerate(row.trained):
        if not is_trained:
            continue
        if index == 0:
            raise ParameterError("messages[0]: an answer needs a message before it")
        start = border(encode(index, opens_answer=True), ids, tokenizer)
        stop = len(ids)
        if index + 1 < len(row.messages):
            stop = border(encode(index + 1, opens_answer=False), ids, tokenizer)
        stop = _behind_last_end(ids, start, stop, tokenizer, index)
        trained[start:stop] = [True] * (stop - start)
    return Example(place=row.place, ids=ids, trained=trained, label=row.label)


def _behind_last_end(ids: Sequence[int], start: int, stop: int, tokenizer: Tokenizer, index: int) -> int:
    """Return the place behind the end token of a turn: what a template writes after it is not learnt."""
    for place in range(stop - 1, start - 1, -1):
        if ids[place] in tokenizer.eos_token_ids:
            return place + 1
    names = ", ".join(sorted(tokenizer.id_to_token(token) for token in tokenizer.eos_token_ids))
    raise TemplateError(
        f"messages[{index}]: the chat template ends the answer with no end token of the model "
        f"({names or 'it has none'}), so it would not learn to stop"
    )


def border(prefix: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Return the index of the first token of `ids` that lies wholly behind the text of `prefix`.

    Usually that is `len(prefix)`; it is more where a token of `ids` reaches across. Raises TemplateError if
    the text of `ids` does not begin with that of `prefix`.
    """
    common = 0
    for ours, theirs in zip(prefix, ids, strict=False):
        if ours != theirs:
            break
        common += 1
    rest = b"".join(map(tokenizer.token_bytes, prefix[common:]))
    place, seen = common, b""
    while len(seen) < len(rest) and place < len(ids):
        seen += tokenizer.token_bytes(ids[place])
        place += 1
    if not seen.startswith(rest):
        raise TemplateError(
            "the chat template writes the beginning of a conversation in another way once it goes on, so it "
            "cannot be told which tokens are the answer"
        )
    return place
