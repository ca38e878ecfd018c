"""Find out what kind of checkpoint a path holds, and load it into a model.

`load_model` builds the model without memory (on the meta device) and gives it the tensors of the checkpoint
one by one: a tensor that already has the right type and device becomes the parameter itself, so that loading
costs the model's size and one tensor more. Every tensor is accounted for. It does not know the formats: the
readers yield the names of our modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from puna.errors import CheckpointError, ModelNotFoundError, ParameterError
from puna.gguf_header import is_gguf, list_ggufs
from puna.model.config import LlamaConfig
from puna.model.llama import Llama
from puna.weights.files import list_names
from puna.weights.gguf import open_gguf
from puna.weights.hf import WEIGHT_FILES, HfCheckpoint
from puna.weights.int8 import Int8Tensor
from puna.weights.meta import MetaCheckpoint, list_shards
from puna.weights.nf4 import FourBitTensor
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import ShapeError, swap_in, swap_in_bnb
from puna.weights.quantize_load import block_file_type, quantized_stream

logger = logging.getLogger(__name__)

Packed = QuantTensor | FourBitTensor | Int8Tensor


class Checkpoint(Protocol):
    """A model on disk, opened: its config, and its tensors as a stream."""

    path: Path
    config: LlamaConfig
    dtype: torch.dtype  # what "auto" means
    total_bytes: int  # of the tensors that `tensors` yields, as stored
    skipped: list[str]  # known and not used (a vision tower, saved RoPE frequencies); filled by `tensors`

    @property
    def format(self) -> Literal["hf", "meta", "gguf"]:
        """Name the file format."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Yield (name in our model, tensor), each once; the tensors belong to the caller."""
        ...


def open_checkpoint(path: Path | str, *, use_safetensors: bool | None = None) -> Checkpoint:
    """Open a folder in one of the three formats, or a `.gguf` file, after its config and headers are checked.

    `use_safetensors` says which weights a Hugging Face folder must have: safetensors (True; other formats
    have none), .bin files (False), or the first of both that is there (None). Raises ModelNotFoundError,
    CheckpointError, ConfigError, UnsupportedError.
    """
    path = Path(path)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a NUL, of no user (~x)
        raise ModelNotFoundError(f"{str(path)!r}: {error}") from error
    if is_folder:
        return _open_folder(path, use_safetensors)
    if not is_file:
        raise ModelNotFoundError(f"{path}: no such file or folder")
    if is_gguf(path):
        _require_other_than_safetensors(path, use_safetensors)
        return open_gguf(path)
    if path.suffix in (".safetensors", ".pth", ".bin", ".json"):
        raise CheckpointError(path, f"is one file of a checkpoint: give its folder, {path.parent}")
    raise CheckpointError(path, "is not a checkpoint: give a folder or a .gguf file")


def _open_folder(folder: Path, use_safetensors: bool | None) -> Checkpoint:
    hf_files = [name for name in WEIGHT_FILES if (folder / name).exists()]
    has_config, has_params = (folder / "config.json").exists(), (folder / "params.json").exists()
    shards = list_shards(folder)
    ggufs = list_ggufs(folder)
    found = {
        "Hugging Face": [f"config.json with {hf_files[0]}"] if has_config and hf_files else [],
        "Meta": [f"params.json with {shards[0].name}"] if has_params and shards else [],
        "GGUF": [path.name for path in ggufs],
    }
    choices = [choice for group in found.values() for choice in group]
    if len(choices) > 1:
        raise CheckpointError(
            folder, f"holds several models: {list_names(choices)}; give a .gguf file, or a folder of one"
        )
    if found["Hugging Face"]:
        return HfCheckpoint(folder, use_safetensors=use_safetensors)
    if choices:
        _require_other_than_safetensors(folder, use_safetensors)
    if found["Meta"]:
        return MetaCheckpoint(folder)
    if ggufs:
        return open_gguf(ggufs[0])
    raise ModelNotFoundError(_what_is_missing(folder, hf_files, bool(shards)))


def _require_other_than_safetensors(path: Path, use_safetensors: bool | None) -> None:
    if use_safetensors:
        raise ModelNotFoundError(f"{path}: use_safetensors=True, but this model is not in safetensors files")


def _what_is_missing(folder: Path, hf_files: list[str], has_shards: bool) -> str:
    parts = []
    if (folder / "config.json").exists():
        parts.append("config.json is there without weights")
    if hf_files:
        parts.append(f"{hf_files[0]} is there without config.json")
    if (folder / "params.json").exists() and not has_shards:
        parts.append("params.json is there without consolidated.00.pth")
    if has_shards:
        parts.append("consolidated files are there without params.json")
    hint = f" ({'; '.join(parts)})" if parts else ""
    wanted = "config.json with model.safetensors, params.json with consolidated.00.pth, or a .gguf file"
    return f"{folder}: no model: looked for {wanted}{hint}"


def load_model(
    source: Path | str | Checkpoint,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> Llama:
    """Load a checkpoint into a model in evaluation mode whose parameters need no gradient.

    `dtype` is for all but quantised weights; "auto" is what the checkpoint declares. `quantize` ("q4_k_m",
    "q8_0", ...) quantises a checkpoint of floats as it comes in. Takes the model's memory on `device`, and
    one tensor's on the host. Raises what `open_checkpoint` does, and one CheckpointError
    that lists every tensor that is missing, unexpected, doubled, or of a wrong shape.
    """
    checkpoint = open_checkpoint(source) if isinstance(source, Path | str) else source
    if dtype == "auto":
        dtype = checkpoint.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ParameterError(f"dtype must be 'auto' or a floating point type, not {dtype!r}")
    _require_device(device)
    wanted = None if quantize is None else block_file_type(quantize)
    model = empty_model(checkpoint.config).to(dtype)
    filling = _Filling(model=model, dtype=dtype, device=torch.device(device))
    tensors = checkpoint.tensors()
    if wanted is not None:
        tensors = quantized_stream(checkpoint.path, tensors, checkpoint.config, filling.expected, wanted)
    with tqdm(
        total=checkpoint.total_bytes,
        desc=f"loading {checkpoint.path.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
        leave=False,
    ) as progress:
        for name, value in tensors:
            filling.put(name, value)
            progress.update(_num_bytes(value))
            del value  # or it would live on while the next one is read
    filling.require_complete(checkpoint)
    other_parts = [name for name in checkpoint.skipped if not _is_computed(name)]
    if other_parts:
        logger.warning("%s: images are not read; not used: %s", checkpoint.path, list_names(other_parts))
    return model.to(filling.device).eval().requires_grad_(False)  # what is there already stays where it is


def empty_model(config: LlamaConfig) -> Llama:
    """Build a model for its shapes, on the meta device: it takes no memory."""
    with without_memory():
        return Llama(config)


@contextmanager
def without_memory() -> Iterator[None]:
    """Make modules for their shapes within the block, on the meta device; nothing is drawn for them."""
    with torch.device("meta"), _WithoutInit():
        yield


def _require_device(named: torch.device | str) -> None:
    """Raise ParameterError for a device that is not there."""
    try:
        device = torch.device(named)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ParameterError(f"device {str(named)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ParameterError("device 'meta' holds no weights")


def _is_computed(name: str) -> bool:
    """Say whether a tensor that is not used holds frequencies that are computed, or a doubled head."""
    return name.endswith(("inv_freq", "rope.freqs", "freq_cis", "lm_head.weight", "output.weight"))


class _WithoutInit(TorchFunctionMode):
    """Skip `torch.nn.init`: on the meta device it does nothing but import torch's compiler, for seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _num_bytes(value: Tensor | Packed) -> int:
    data = value if isinstance(value, Tensor) else value.data
    return data.numel() * data.element_size()


@dataclass(kw_only=True)
class _Filling:
    """A model on the meta device being given its tensors, and what was wrong with some of them."""

    model: Llama
    dtype: torch.dtype
    device: torch.device
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def put(self, name: str, value: Tensor | Packed) -> None:
        """Make a tensor the parameter of that name, or note why it cannot be."""
        if name in self.seen:
            self.doubled.append(name)
        elif not isinstance(value, Tensor):
            self._put_packed(name, value)
        elif name not in self.expected:
            self.unexpected.append(name)
        elif tuple(value.shape) != self.expected[name]:
            self._note_shape(name, value)
        else:
            owner, _, leaf = name.rpartition(".")
            converted = value.to(device=self.device, dtype=self.dtype).contiguous()
            parameter = nn.Parameter(converted, requires_grad=False)
            setattr(self.model.get_submodule(owner), leaf, parameter)
        self.seen.add(name)

    def _put_packed(self, name: str, value: Packed) -> None:
        try:
            if isinstance(value, QuantTensor):
                swap_in(self.model, name, value.to(self.device))
            else:
                swap_in_bnb(self.model, name, value.to(self.device))
        except ShapeError as error:
            self.misshapen.append(f"{name} ({error})")
        except ValueError as error:  # nothing there takes packed weights
            self.unexpected.append(f"{name} ({error})" if name in self.expected else name)

    def _note_shape(self, name: str, value: Tensor) -> None:
        wanted = list(self.expected[name])
        self.misshapen.append(f"{name} (expected {wanted}, got {list(value.shape)})")

    def require_complete(self, checkpoint: Checkpoint) -> None:
        """Raise one CheckpointError that lists all that was wrong."""
        empty = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        problems = {
            "missing": [name for name in empty if name not in self.seen],
            "unexpected": self.unexpected,
            "there twice": self.doubled,
            "of the wrong shape": self.misshapen,
        }
        text = [f"{kind}: {list_names(names)}" for kind, names in problems.items() if names]
        if text:
            raise CheckpointError(checkpoint.path, f"its tensors do not fit its config; {'; '.join(text)}")
