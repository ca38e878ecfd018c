"""One model in one conversation: text in, pieces of text out, with what it cost.

The door that the command line uses. The engine keeps the blocks of what was said, so a chat computes only
what is new.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from puna.engine.sampling import SamplingParams
    from puna.model import Llama
    from puna.text.tokenizer import Tokenizer
    from puna.weights.adapter_open import OpenedAdapter


@dataclass
class Usage:
    """Count one answer: tokens, seconds, and why it ended ("stop", "length", or None when cut off)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    output_tokens: int = 0
    output_seconds: float = 0.0
    finish_reason: str | None = None


class Session:
    """Hold a model, its tokenizer, and an engine for one request at a time."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, *, adapter: OpenedAdapter | None = None) -> None:
        """Take a model, and the adapter that all its answers shall have."""
        from puna.engine.llm_engine import EngineConfig
        from puna.served_adapters import put_in
        from puna.text_engine import TextEngine

        self._adapter = None if adapter is None else put_in(adapter, model)
        self.model = model
        self.tokenizer = tokenizer
        self.usage = Usage()
        self._engine = TextEngine(model, tokenizer, EngineConfig(max_num_seqs=1))

    @classmethod
    def prepare(
        cls,
        path: Path,
        *,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: str = "cpu",
        quantize: str | None = None,
        adapter: Path | str | None = None,
    ) -> Callable[[], Session]:
        """Read all but the weights of a path that `find_model` gave; return what loads those, and opens it.

        Most of what can be wrong with a model is found here, before any memory is needed. `quantize` is what
        `load_model` takes, `adapter` the folder of one.
        """
        from puna.text.tokenizer import load_tokenizer
        from puna.weights.adapter_open import open_adapter
        from puna.weights.loader import load_model, open_checkpoint
        from puna.weights.quantize_load import block_file_type

        if quantize is not None:
            block_file_type(quantize)  # raises for an unknown one
        tokenizer = load_tokenizer(path)
        checkpoint = open_checkpoint(path)
        opened = None if adapter is None else open_adapter(adapter, checkpoint.config)
        if adapter is not None and (trained := Path(adapter).expanduser() / "chat_template.jinja").is_file():
            tokenizer.chat_templates["default"] = trained.read_text(encoding="utf-8")
        return lambda: cls(
            load_model(checkpoint, dtype=dtype, device=device, quantize=quantize), tokenizer, adapter=opened
        )

    @property
    def context_length(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        return self._engine.engine.max_model_len

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces of whole characters; `usage` is right when it ends or is closed.

        With `continues` the answer goes on in the middle of a text, so a space that it begins with is kept.
        """
        self.usage = usage = Usage(prompt_tokens=len(prompt_ids))
        began = time.monotonic()
        request = self._engine.add_prepared(
            "session",
            dataclasses.replace(self._engine.prepare(prompt_ids, params), adapter=self._adapter),
            continues=continues,
        )
        shown = 0
        try:
            while self._engine.has_unfinished:
                for _ in self._engine.step():
                    text = request.sequences[0]
                    self._count(text.sequence.num_output, text.sequence.num_cached, began)
                    if piece := text.text[shown:]:
                        shown = len(text.text)
                        yield piece
                    usage.finish_reason = text.sequence.finish_reason
        finally:
            self._engine.abort("session")

    def _count(self, output_tokens: int, cached_tokens: int, began: float) -> None:
        usage, now = self.usage, time.monotonic()
        if usage.output_tokens == 0:
            usage.prompt_seconds, usage.cached_tokens = now - began, cached_tokens
        usage.output_tokens = output_tokens
        usage.output_seconds = now - began - usage.prompt_seconds
