"""What a model is asked next: the messages so far, made to fit into its context, or one text to continue.

Knows neither the terminal nor options. A `Conversation` needs something that streams text for token ids,
which `puna.session.Session` does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from puna.errors import ParameterError, PunaError

if TYPE_CHECKING:
    from puna.engine.sampling import SamplingParams
    from puna.session import Usage
    from puna.text.tokenizer import Tokenizer

Message = dict[str, str]

_ROOM_FOR_ANSWER = 256


class TextModel(Protocol):
    """What a conversation needs of a `puna.session.Session`."""

    tokenizer: Tokenizer
    usage: Usage

    @property
    def context_length(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces; with `continues` it goes on in the middle of a text."""
        ...


class Conversation:
    """Ask a model that has a chat format; keep what was said, and forget the oldest when it gets too long."""

    def __init__(
        self,
        model: TextModel,
        *,
        render: Callable[[list[Message]], list[int]],
        notice: Callable[[str], None],
        system: str | None = None,
    ) -> None:
        """Take how messages become token ids, and where to say that some were forgotten."""
        self.messages: list[Message] = []
        self.system = system
        self._model = model
        self._render_messages = render
        self._notice = notice

    def ask(self, text: str, params: SamplingParams) -> Iterator[str]:
        """Yield the answer in pieces. One that is cut off is not kept; the question is.

        Raises ParameterError if the message alone fills the context, TemplateError.
        """
        before = self.messages
        self.messages, prompt_ids = self._fitted(_with_question(before, text), params)
        pieces = []
        try:
            with closing(self._model.stream(prompt_ids, params)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
        except PunaError:
            self.messages = before
            raise
        self.messages = [*self.messages, {"role": "assistant", "content": "".join(pieces)}]

    def clear(self) -> None:
        """Forget what was said, but not the system message."""
        self.messages = []

    def _fitted(self, messages: list[Message], params: SamplingParams) -> tuple[list[Message], list[int]]:
        """Drop the oldest turns if the context leaves no room for an answer.

        Half of the context is freed then, so that the cache can be reused for some turns until the next time.
        """
        context = self._model.context_length
        room = min(params.max_tokens or _ROOM_FOR_ANSWER, context // 4)
        prompt_ids = self._render(messages)
        if len(prompt_ids) + room <= context:
            return messages, prompt_ids
        count = len(messages)
        while len(prompt_ids) > context // 2 and (rest := _without_oldest_turn(messages)):
            messages = rest
            prompt_ids = self._render(messages)
        if len(prompt_ids) >= context:
            raise ParameterError(
                f"the message is too long: {len(prompt_ids)} tokens with all that belongs to it; "
                f"the model's context is {context}"
            )
        if dropped := count - len(messages):
            self._notice(f"[the context of {context} tokens is full: {dropped} old messages are forgotten]")
        return messages, prompt_ids

    def _render(self, messages: list[Message]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self._render_messages([*system, *messages])


def continue_text(
    model: TextModel, text: str, params: SamplingParams, *, parse_special: bool = False
) -> Iterator[str]:
    """Yield what the model writes after `text`; an empty text is BOS alone.

    With `parse_special` the text may spell special tokens, and one BOS that it begins with is not doubled.
    """
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id
    prompt_ids = tokenizer.encode(text, parse_special=parse_special)
    if not prompt_ids and bos is not None:
        prompt_ids = [bos]
    if parse_special and bos is not None and prompt_ids[:2] == [bos, bos]:
        del prompt_ids[0]
    with closing(model.stream(prompt_ids, params, continues=bool(text))) as stream:
        yield from stream


def _with_question(messages: list[Message], text: str) -> list[Message]:
    """Add a message of the user; to one that got no whole answer it is joined, since templates want turns."""
    if messages and messages[-1]["role"] == "user":
        *messages, unanswered = messages
        text = f"{unanswered['content']}\n{text}"
    return [*messages, {"role": "user", "content": text}]


def _without_oldest_turn(messages: list[Message]) -> list[Message]:
    """Return the messages from the second one of the user on; [] if there is only one."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[1] :] if len(starts) > 1 else []
