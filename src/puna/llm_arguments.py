"""vLLM's arguments of `LLM`: which mean what Puna does anyway, which are translated, which are refused.

Nothing is ignored: an argument that would change something Puna does not have raises UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from puna.engine.pooling import Pooling
from puna.engine.sampling import check_integer
from puna.engine.speculative import DraftModelProposer, NgramProposer, Proposer
from puna.errors import ParameterError, UnsupportedError
from puna.gguf_header import list_ggufs
from puna.locate import find_model, listed_sampling
from puna.model.llama import Llama
from puna.served_adapters import AdapterStore
from puna.weights.loader import load_model
from puna.weights.quantize_load import block_file_type

# Arguments that mean no more than what Puna always does, with the values that say so.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "allowed_local_media_path": ("", None),
    "allowed_media_domains": (None,),
    "async_scheduling": (None, False),
    "attention_config": (None,),
    "compilation_config": (None,),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": (False, True),  # there is one device, so nothing to reduce
    "disable_log_stats": (True, False),  # nothing is logged; `get_metrics` has them
    "distributed_executor_backend": (None, "uni"),
    "download_dir": (None,),
    "enable_chunked_prefill": (True, None),
    "enable_sleep_mode": (False,),
    "enforce_eager": (True, False),  # there are no captured graphs to do without
    "fully_sharded_loras": (False,),
    "hf_overrides": (None, {}),
    "hf_token": (None,),
    "limit_mm_per_prompt": (None, {}),
    "load_format": ("auto",),
    "logits_processors": (None, []),
    "lora_dtype": ("auto", "float32"),
    "mm_processor_kwargs": (None, {}),
    "pipeline_parallel_size": (1,),
    "profiler_config": (None,),
    "quantization_config": (None,),
    "revision": (None,),
    "runner": ("auto", "generate", "pooling"),  # one model does both
    "skip_tokenizer_init": (False,),
    "swap_space": (0,),
    "tensor_parallel_size": (1,),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
}
_GENERATION_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


def refuse_unknown(others: Mapping[str, Any]) -> None:
    """Raise UnsupportedError naming an argument that Puna does not have, or a value that it cannot do."""
    for name, value in others.items():
        if name not in _HARMLESS:
            raise UnsupportedError(f"LLM has no argument {name!r}")
        if value not in _HARMLESS[name]:
            raise UnsupportedError(f"{name}={value!r} is not supported")


def check_quantization(quantization: str | None, path: Path) -> str | None:
    """Return what to quantise to while loading, None for nothing, as "gguf" says of a GGUF file.

    Raises UnsupportedError for vLLM's names of checkpoints that others quantised, which are not read.
    """
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and bool(list_ggufs(path)))
    if quantization is None or (quantization == "gguf" and is_gguf):
        return None
    try:
        return block_file_type(quantization).name
    except ParameterError as error:
        raise UnsupportedError(
            f"quantization={quantization!r} is not supported: {error}; those of a GGUF file stay as they are"
        ) from None


def check_structured_outputs(config: Mapping[str, Any] | None) -> None:
    """Refuse another back end for structured outputs than llguidance."""
    for name, value in (config or {}).items():
        if name != "backend":
            raise UnsupportedError(f"structured_outputs_config has no key {name!r}")
        if value not in ("auto", "guidance"):
            raise UnsupportedError(f"structured_outputs_config: backend {value!r}; 'guidance' is there")


def dtype_of(dtype: str | torch.dtype) -> Any:
    """Return the dtype under vLLM's name for it, "auto" as it is."""
    names = {"half": torch.float16, "float": torch.float32}
    names |= {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in names:
        raise ParameterError(f"dtype must be 'auto' or one of {', '.join(names)}, got {dtype!r}")
    return names[dtype]


def pooling_of(config: Mapping[str, Any] | None) -> tuple[Pooling, bool]:
    """Return how to pool and whether to normalise, from vLLM's `pooler_config`."""
    values = dict(config or {})
    kind = str(values.pop("pooling_type", values.pop("seq_pooling_type", None)) or "last").lower()
    normalize = values.pop("use_activation", values.pop("normalize", None))
    if values:
        raise UnsupportedError(f"pooler_config has no key {next(iter(values))!r}")
    if kind not in ("last", "mean"):
        raise UnsupportedError(f"pooler_config: pooling_type {kind!r}; 'LAST' and 'MEAN' are there")
    return cast(Pooling, kind), normalize is not False


def sampling_defaults(
    path: Path, generation_config: str, override: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the settings used where no params are given, by the names of `SamplingParams`.

    `generation_config` is "auto" (the checkpoint's), "vllm" (none), or a folder that holds one.
    """
    if generation_config == "auto":
        found = listed_sampling(path)
    elif generation_config == "vllm":
        found = {}
    elif (Path(generation_config) / "generation_config.json").is_file():
        found = listed_sampling(Path(generation_config))
    else:
        raise ParameterError(
            "generation_config must be 'auto', 'vllm' or a folder with a generation_config.json, "
            f"got {generation_config!r}"
        )
    for name, value in (override or {}).items():
        if name not in _GENERATION_SETTINGS:
            raise UnsupportedError(f"override_generation_config has no key {name!r}")
        found["max_tokens" if name == "max_new_tokens" else name] = value
    return found


def speculative_of(
    config: Mapping[str, Any] | None, method: str | None, model: str | None, tokens: int | None
) -> Mapping[str, Any] | None:
    """Return a `speculative_config` for the three short arguments, which do not go with a long one."""
    short = {"method": method, "model": model, "num_speculative_tokens": tokens}
    given = {name: value for name, value in short.items() if value is not None}
    if config is not None and given:
        raise ParameterError("give speculative_config or spec_method, spec_model and spec_tokens, not both")
    return config if config is not None else given or None


def make_adapters(
    network: Llama, enable_lora: bool, max_loras: int, max_lora_rank: int, max_cpu_loras: int | None
) -> AdapterStore | None:
    """Make what reads the adapters of requests, None where there shall be none."""
    if enable_lora:
        return AdapterStore(
            network, max_loras=max_loras, max_lora_rank=max_lora_rank, max_cpu_loras=max_cpu_loras
        )
    if (max_loras, max_lora_rank, max_cpu_loras) != (1, 16, None):
        raise ParameterError("max_loras, max_lora_rank and max_cpu_loras need enable_lora=True")
    return None


def make_proposer(config: Mapping[str, Any] | None, model: Llama, device: str) -> Proposer | None:
    """Make what speculates, from vLLM's `speculative_config`."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ParameterError(f"speculative_config must be a dict, not {config!r}")
    values = dict(config)
    count = values.pop("num_speculative_tokens", None)
    if count is None:
        raise ParameterError("speculative_config needs num_speculative_tokens")
    check_integer("num_speculative_tokens", count, 1)
    method = values.pop("method", "draft_model" if "model" in values else "ngram")
    if method == "ngram":
        longest = values.pop("prompt_lookup_max", None)
        shortest = values.pop("prompt_lookup_min", None)
        check_integer("prompt_lookup_max", longest, 1, optional=True)
        check_integer("prompt_lookup_min", shortest, 1, optional=True)
        lookup_max = longest or shortest or 5
        made: Proposer = NgramProposer(count, lookup_min=shortest or lookup_max, lookup_max=lookup_max)
    elif method == "draft_model":
        if values.get("model") is None:
            raise ParameterError("speculative_config with method 'draft_model' needs a model")
        draft = load_model(find_model(str(values.pop("model"))), dtype="auto", device=device)
        made = DraftModelProposer(draft, count, vocab_size=model.config.vocab_size)
    else:
        raise UnsupportedError(f"speculative method {method!r}: 'ngram' and 'draft_model' are there")
    if values:
        raise UnsupportedError(f"speculative_config has no key {next(iter(values))!r}")
    return made
