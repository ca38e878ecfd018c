"""One model in one conversation: text in, pieces of text out, with what it cost.

The door that the command line uses; it ties the engine (ids) to a tokenizer (text). The cache stays between
calls, so a chat computes only what is new.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from puna.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    import torch

    from puna.engine.sampling import SamplingParams
    from puna.model import Llama
    from puna.text.tokenizer import Tokenizer


def find_model(name: str | None) -> Path:
    """Return the path of a model: a folder, a `.gguf` file, or `cria`, which is also what None means."""
    if name is None or name == "cria":
        from puna.cria import FOLDER

        return FOLDER
    path = Path(name).expanduser()
    if path.exists():
        return path
    raise ModelNotFoundError(
        f"no model {name!r}: give a folder with a checkpoint, a .gguf file, or 'cria', the embedded model"
    )


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
    """Hold a model, its tokenizer, and the cache of the last prompt."""

    def __init__(self, model: Llama, tokenizer: Tokenizer) -> None:
        from puna.engine.kv_cache import KVCache

        self.model = model
        self.tokenizer = tokenizer
        self.usage = Usage()
        weight = model.model.norm.weight
        self._cache = KVCache(model.config, dtype=weight.dtype, device=weight.device)

    @classmethod
    def open(
        cls, path: Path, *, dtype: torch.dtype | Literal["auto"] = "auto", device: str = "cpu"
    ) -> Session:
        """Load the model and the tokenizer of a path that `find_model` gave."""
        from puna.text.tokenizer import load_tokenizer
        from puna.weights.loader import load_model

        tokenizer = load_tokenizer(path)
        return cls(load_model(path, dtype=dtype, device=device), tokenizer)

    @property
    def context_length(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        return self.model.config.max_position_embeddings

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, continues: bool = False
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces of whole characters; `usage` is right when it ends or is closed.

        With `continues` the answer goes on in the middle of a text, so a space that it begins with is kept.
        """
        from puna.engine.generate import generate, start
        from puna.text.stop_strings import StopStrings

        sequence = start(self.model, prompt_ids, self._with_end_ids(params), cache=self._cache)
        self.usage = usage = Usage(prompt_tokens=len(prompt_ids), cached_tokens=self._cache.length)
        decoder, stop = self.tokenizer.stream(continues=continues), StopStrings(params.stop)
        began = time.monotonic()
        for _, token_id in generate(self.model, [sequence]):
            now = time.monotonic()
            usage.output_tokens += 1
            if usage.output_tokens == 1:
                usage.prompt_seconds, began = now - began, now
            usage.output_seconds = now - began
            if piece := stop.push(decoder.push(token_id)):
                yield piece
            if stop.found is not None:
                sequence.finish_reason = "stop"
        if rest := stop.push(decoder.flush()) + stop.flush():
            yield rest
        usage.finish_reason = sequence.finish_reason

    def _with_end_ids(self, params: SamplingParams) -> SamplingParams:
        """Add the ids that end a turn, from the tokenizer and the config, unless they are to be ignored."""
        if params.ignore_eos:
            return params
        ends = {*params.stop_token_ids, *self.tokenizer.eos_token_ids, *self.model.config.eos_token_ids}
        return dataclasses.replace(params, stop_token_ids=tuple(sorted(ends)))


def default_sampling(path: Path) -> dict[str, Any]:
    """Return the sampling settings that a checkpoint asks for, by the names of `SamplingParams`.

    They come from `generation_config.json` with Transformers' defaults, or from a GGUF's
    `general.sampling.*`; where there is neither, they are Ollama's: temperature 0.8, top-k 40, top-p 0.9.
    """
    if path.suffix == ".gguf":
        from puna.gguf_header import read_metadata

        values = _gguf_sampling(read_metadata(path))
    else:
        values = _hf_sampling(path / "generation_config.json")
    return values or {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


def _hf_sampling(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(file, "must hold a JSON object")
    if not config.get("do_sample", False):
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    defaults = {"temperature": 1.0, "top_k": 50}
    return defaults | {name: config[name] for name in names if config.get(name) is not None}


def _gguf_sampling(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in names.items()}
    return {name: value for name, value in found.items() if value is not None}
