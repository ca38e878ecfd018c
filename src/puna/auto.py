"""The Transformers-style door: `AutoTokenizer` and `AutoModelForCausalLM`, each with `from_pretrained`.

Takes a folder in any of the three formats (Hugging Face, Meta, GGUF), a `.gguf` file, for a tokenizer also a
tokenizer file, and "cria" for the embedded model. Arguments have Transformers' names; one that asks for what
Puna does not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from puna.auto_arguments import WithoutEffect, refuse
from puna.auto_encoding import UNLIMITED
from puna.auto_generation import GenerationConfig
from puna.auto_model import CausalLM
from puna.auto_tokenizer import PretrainedTokenizer
from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from puna.locate import find_model
from puna.model import LlamaConfig
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text.tokenizer_config import read_json
from puna.weights.loader import load_model, open_checkpoint

# Names of Transformers' `from_pretrained` that change nothing with None or one of these values.
_WITHOUT_EFFECT: WithoutEffect = {
    "cache_dir": (),
    "code_revision": ("main",),
    "config": (),
    "force_download": (False,),
    "local_files_only": (True, False),
    "proxies": (),
    "resume_download": (),
    "revision": ("main",),
    "subfolder": ("",),
    "token": (),
    "trust_remote_code": (False,),
    "use_auth_token": (),
}
_TOKENIZER_WITHOUT_EFFECT: WithoutEffect = {
    **_WITHOUT_EFFECT,
    "add_bos_token": (),
    "add_eos_token": (),
    "add_prefix_space": (),
    "bos_token": (),
    "clean_up_tokenization_spaces": (False,),
    "eos_token": (),
    "from_slow": (False,),
    "legacy": (),
    "split_special_tokens": (False,),
    "tokenizer_type": (),
    "unk_token": (),
    "use_fast": (True,),
}
_MODEL_WITHOUT_EFFECT: WithoutEffect = {
    **_WITHOUT_EFFECT,
    "adapter_kwargs": (),
    "attn_implementation": ("sdpa",),
    "device_mesh": (),
    "distributed_config": (),
    "from_flax": (False,),
    "from_tf": (False,),
    "generation_config": (),
    "ignore_mismatched_sizes": (False,),
    "key_mapping": (),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "low_cpu_mem_usage": (True, False),
    "max_memory": (),
    "offload_buffers": (False,),
    "offload_folder": (),
    "offload_state_dict": (False,),
    "output_loading_info": (False,),
    "quantization_config": (),
    "state_dict": (),
    "tp_plan": (),
    "tp_size": (),
    "use_cache": (),
    "use_kernels": (False,),
    "variant": (),
    "weights_only": (True,),
}


class AutoTokenizer:
    """Loads tokenizers: `AutoTokenizer.from_pretrained(path)`."""

    def __init__(self) -> None:
        _refuse_instance("AutoTokenizer")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        gguf_file: str | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        **others: Any,
    ) -> PretrainedTokenizer:
        """Load a tokenizer from a folder, a `.gguf` file, a tokenizer.json or tokenizer.model, or "cria".

        Raises ModelNotFoundError, TokenizerError, UnsupportedError and ParameterError.
        """
        refuse("AutoTokenizer.from_pretrained", others, _TOKENIZER_WITHOUT_EFFECT)
        path = _local_path(pretrained_model_name_or_path, gguf_file)
        tokenizer = load_tokenizer(path)
        config = _tokenizer_config(path if path.is_dir() else path.parent, tokenizer)
        loaded = PretrainedTokenizer(
            tokenizer,
            padding_side=padding_side or config.get("padding_side") or _default_side(config, tokenizer),
            truncation_side=truncation_side or config.get("truncation_side") or "right",
            model_max_length=_max_length(model_max_length, config.get("model_max_length")),
            name_or_path=str(pretrained_model_name_or_path),
        )
        if pad_token is not None:
            loaded.pad_token = pad_token
        if chat_template is not None:
            loaded.chat_template = chat_template
        return loaded


class AutoModelForCausalLM:
    """Loads models: `AutoModelForCausalLM.from_pretrained(path)`."""

    def __init__(self) -> None:
        _refuse_instance("AutoModelForCausalLM")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        gguf_file: str | None = None,
        use_safetensors: bool | None = None,
        quantization: str | None = None,
        **others: Any,
    ) -> CausalLM:
        """Load a model from a folder, a `.gguf` file, or "cria".

        `dtype` (or its old name `torch_dtype`) is a torch dtype or its name; "auto", the default, is what
        the checkpoint declares. Quantised weights stay quantised; `quantization` ("q4_k_m", "q8_0", ...)
        quantises others while they are loaded. `device_map` is one device, or "auto": the
        first accelerator there is, else the CPU; nothing is split over several. `use_safetensors` insists on
        safetensors (True) or on .bin files (False). Raises ModelNotFoundError, CheckpointError, ConfigError,
        UnsupportedError and ParameterError.
        """
        refuse("AutoModelForCausalLM.from_pretrained", others, _MODEL_WITHOUT_EFFECT)
        path = _local_path(pretrained_model_name_or_path, gguf_file)
        if use_safetensors not in (None, True, False):
            raise ParameterError(f"use_safetensors must be True, False or None, got {use_safetensors!r}")
        checkpoint = open_checkpoint(path, use_safetensors=use_safetensors)
        llama = load_model(
            checkpoint,
            dtype=_as_dtype(torch_dtype if dtype is None else dtype),
            device=_as_device(device_map),
            quantize=quantization,
        )
        if checkpoint.format == "hf":
            config = GenerationConfig.from_folder(path)
        else:
            config = _generation_config_of_tokenizer(path, llama.config)
        return CausalLM(llama, config, name_or_path=str(pretrained_model_name_or_path))


def _refuse_instance(name: str) -> NoReturn:
    raise UnsupportedError(f"{name} is not made by calling it: use {name}.from_pretrained(path)")


def _max_length(given: int | None, declared: object) -> int:
    """Return the longest input: as given, else as the tokenizer's config says, else none."""
    if given is not None:
        if given < 1:
            raise ParameterError(f"model_max_length must be at least 1, got {given}")
        return given
    if isinstance(declared, int | float) and not isinstance(declared, bool) and declared >= 1:
        return int(declared)
    return UNLIMITED


def _local_path(name: str | Path, gguf_file: str | None) -> Path:
    """Return the path that a name stands for; names of the Hub are not downloaded yet."""
    if not isinstance(name, str | Path):
        raise ParameterError(f"a path is needed, got {type(name).__name__}")
    try:
        path = find_model(str(name))
    except ModelNotFoundError:
        raise ModelNotFoundError(
            f"no model {str(name)!r}: no such folder or file here, and downloads from the Hugging Face Hub "
            "come with a later release. Give a local folder, a .gguf file, or 'cria', the embedded model"
        ) from None
    return path if gguf_file is None else path / gguf_file


def _tokenizer_config(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() and tokenizer.path.suffix != ".gguf" else {}


def _default_side(config: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return what Transformers' classes have: left for `LlamaTokenizer` (SentencePiece), else right."""
    declared = str(config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast")
    is_sentencepiece = (
        tokenizer.token_to_id("\u2581") is not None or tokenizer.token_to_id("<0x0A>") is not None
    )
    return "left" if declared == "LlamaTokenizer" and is_sentencepiece else "right"


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | Literal["auto"]:
    if value is None or value == "auto":
        return "auto"
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ParameterError(
            f"dtype must be 'auto' or a floating point type such as 'bfloat16', got {value!r}"
        )
    return dtype


def _as_device(device_map: str | int | torch.device | Mapping[str, Any] | None) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise UnsupportedError("device_map can put the whole model on one device: {'': device}")
        return _as_device(device_map[""])
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise UnsupportedError(f"device_map={device_map!r} is not supported: a model is on one device")
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"device_map must be 'auto' or a device, got {device_map!r}") from error


def _generation_config_of_tokenizer(path: Path, model: LlamaConfig) -> GenerationConfig:
    """Make a config for checkpoints without one: a turn also ends where the tokenizer says."""
    bos, ends = model.bos_token_id, set(model.eos_token_ids)
    try:
        tokenizer = load_tokenizer(path)
    except ModelNotFoundError:  # weights alone are a model too
        pass
    else:
        bos = tokenizer.bos_token_id if bos is None else bos
        ends |= tokenizer.eos_token_ids
    return GenerationConfig(
        bos_token_id=bos, eos_token_id=sorted(ends) or None, pad_token_id=model.pad_token_id
    )
