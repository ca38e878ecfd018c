"""Turn a stream of token ids into text that never holds half a character.

Works on bytes: each token's bytes go through an incremental UTF-8 decoder, so the parts always add up to the
text that decoding all ids at once gives. Knows no vocabulary beyond the table of bytes that it is handed.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection

from puna.text.vocabulary import Utf8Errors


class StreamDecoder:
    """Decode ids one at a time: `push` returns what is certain so far, `flush` what is left."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        skipped_ids: Collection[int] = (),
        drops_leading_space: bool = False,
        utf8_errors: Utf8Errors = "replace",
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._drops_leading_space = drops_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(utf8_errors)

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes, often "" in the middle of an emoji.

        A byte that can no longer become part of a character comes out as U+FFFD. Raises `ParameterError` for
        an id outside the vocabulary.
        """
        data = self._token_bytes(token_id)
        if token_id in self._skipped_ids:
            return ""
        if self._drops_leading_space and data:
            self._drops_leading_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD for a character that was left unfinished, else ""; the stream is then at an end."""
        return self._decoder.decode(b"", final=True)
