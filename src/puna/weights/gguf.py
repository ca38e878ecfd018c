"""Read Llama checkpoints in GGUF files: one file or several parts, architectures `llama` and `llama4`.

Tensors come under the model's own (Hugging Face) names, quantised ones still packed, all of them views of the
mapped file where their rows need no reordering. llama.cpp's converter reorders the rows of q and k of
`llama`, so that rotary pairs are neighbours; here they are put back, packed rows byte by byte. Names, orders
and split files: llama.cpp `src/llama-model.cpp`, `src/llama-model-loader.cpp` and `convert_hf_to_gguf.py`;
Llama 4 with vision tensors: Ollama's `convert/convert_llama4.go`. The container itself is read by
`gguf_header.py`, the blocks by `dequantize.py`.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, UnsupportedError
from puna.gguf_header import GGMLType, GgufHeader, TensorInfo, Value, read_header
from puna.gguf_header import read_metadata as read_metadata
from puna.model.config import LlamaConfig
from puna.weights.dequantize import require_supported
from puna.weights.packed_matrix import QuantTensor

_FLOATS = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
# Not in Python's mmap before 3.13. Without it Linux may refuse a private map that is larger than the memory.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_OTHER_KINDS = {
    "adapter": "a LoRA adapter, not a model",
    "mmproj": "the vision part of a model, not a model",
    "imatrix": "an importance matrix, not a model",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "{mlp}.gate_proj",
    "ffn_up": "{mlp}.up_proj",
    "ffn_down": "{mlp}.down_proj",
    "ffn_gate_inp": "{mlp}.router",
    "ffn_gate_shexp": "{mlp}.shared_expert.gate_proj",
    "ffn_up_shexp": "{mlp}.shared_expert.up_proj",
    "ffn_down_shexp": "{mlp}.shared_expert.down_proj",
}
EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BIASED = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z0-9_]+)\.(weight|bias)")
_ONE_EXPERT = re.compile(r"(blk\.[0-9]+\.ffn_(?:gate|up|down))\.(0|[1-9][0-9]*)\.weight")
_PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_SKIPPED = re.compile(r"(v|mm)\..*|blk\.[0-9]+\.attn_rot_embd\.weight", re.DOTALL)
_ROPE_FREQS = "rope_freqs.weight"


class GgufFile:
    """One GGUF file: its metadata without the vocabulary, where its tensors lie, and their data, mapped."""

    def __init__(self, path: Path | str) -> None:
        self.header: GgufHeader = read_header(path, vocabulary=False)
        self.path = self.header.path
        self.metadata = self.header.metadata
        self.tensors = self.header.tensors

    def read(self, name: str) -> Tensor | QuantTensor:
        """Return a tensor in torch's order of dimensions, as a view of the file: writes to it stay in memory.

        Raises UnsupportedError naming the tensor if it is neither float nor of a supported block type.
        """
        info = self.tensors[name]
        require_supported(info.type, f"{self.path}: tensor {name!r}")
        data = torch.frombuffer(self._content, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)
        dtype = _FLOATS.get(info.type)
        if dtype is None:
            return QuantTensor(data.view(*info.shape[:-1], -1), info.type)
        if info.offset % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(info.shape)

    def release(self, name: str) -> None:
        """Let go of the memory of a tensor's pages; who still looks at them reads the file again."""
        info = self.tensors[name]
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (info.offset + info.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._content.madvise(mmap.MADV_DONTNEED, first, size)

    @cached_property
    def _content(self) -> mmap.mmap:
        """Map the file privately and writable, since torch takes no read-only memory."""
        size = self.header.file_bytes
        try:
            with self.path.open("rb") as file:
                if sys.platform == "win32":
                    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except ValueError as error:
            raise CheckpointError(self.path, "became shorter while it was read") from error
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be mapped: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a tensor comes from: one place in a file, or one for each expert."""

    type: GGMLType
    shape: tuple[int, ...]
    places: tuple[tuple[GgufFile, str], ...]

    @property
    def num_bytes(self) -> int:
        """Return the size in the file."""
        return prod(self.shape) // self.type.block_size * self.type.type_size

    def read(self) -> Tensor | QuantTensor:
        """Return the tensor, experts stacked in front."""
        values = [file.read(name) for file, name in self.places]
        if len(values) == 1 and len(self.shape) == len(values[0].shape):
            return values[0]
        packed = torch.stack([value.data for value in values])
        return packed if self.type in _FLOATS else QuantTensor(packed, self.type)

    def release(self) -> None:
        """Let go of the memory of its pages."""
        for file, name in self.places:
            file.release(name)


def open_gguf(path: Path | str) -> GgufCheckpoint:
    """Open a GGUF file, or the first part of a split one, whose other parts lie beside it.

    Raises CheckpointError for a damaged file or a missing part, ConfigError for metadata that make no model,
    and UnsupportedError for what is no Llama; each names the file.
    """
    first = GgufFile(path)
    return GgufCheckpoint(first.path, [first, *_other_parts(first)])


class GgufCheckpoint:
    """A checkpoint whose tensors are read one at a time, under the names of our modules."""

    format: Literal["gguf"] = "gguf"

    def __init__(self, path: Path, files: list[GgufFile]) -> None:
        self.path = path
        self.files = files
        self.metadata = files[0].metadata
        _require_llama(path, self.metadata)
        self.skipped: list[str] = []
        self._sources = _sources(files)
        used = {name: source for name, source in self._sources.items() if not _is_left_out(name)}
        for name, source in used.items():
            require_supported(source.type, f"{path}: tensor {name!r}")
        self.total_bytes = sum(source.num_bytes for source in used.values())
        self.dtype = _compute_dtype(used.values())
        self.config = self._config()
        self._mlp = "feed_forward" if self.config.is_llama4 else "mlp"

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        """Yield every tensor under its name in the model, in the order of the file; unknown ones keep theirs.

        Fills `skipped` with the names of vision tensors and others that are deliberately left out.
        """
        self.skipped.clear()
        for name, source in self._sources.items():
            if not _is_left_out(name):
                yield from self._translated(name)
                source.release()  # by now the weight is in the model: packed anew, or looked at in place
            elif name != _ROPE_FREQS:
                self.skipped.append(name)
        yield from self._absent_biases()

    def _config(self) -> LlamaConfig:
        embedding = self._sources.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(self.path, "not a whole model: no 'token_embd.weight' of two dimensions")
        try:
            config = LlamaConfig.from_gguf(
                self.metadata,
                vocab_size=embedding.shape[0],
                rope_freqs=self._rope_freqs(),
                tie_word_embeddings="output.weight" not in self._sources,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.path}: {error}") from error
        attention_bias, mlp_bias = (self._has_bias(parts) for parts in _BIASED.values())
        return replace(config, attention_bias=attention_bias, mlp_bias=mlp_bias and not config.is_llama4)

    def _rope_freqs(self) -> list[float] | None:
        if _ROPE_FREQS not in self._sources:
            return None
        if len(self._sources[_ROPE_FREQS].shape) != 1:
            raise CheckpointError(self.path, f"tensor {_ROPE_FREQS!r} has more than one dimension")
        freqs: list[float] = _floats(self._sources[_ROPE_FREQS].read()).tolist()
        return freqs

    def _has_bias(self, parts: tuple[str, ...]) -> bool:
        wanted = (*parts, "attn_qkv") if "attn_q" in parts else parts
        matches = filter(None, map(_BLOCK.fullmatch, self._sources))
        return any(match[2] in wanted and match[3] == "bias" for match in matches)

    def _translated(self, name: str) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        source = self._sources[name]
        match = _BLOCK.fullmatch(name)
        if match is None:
            yield TOP_NAMES.get(name, name), _for_module(source.read())
            return
        layer, part, leaf = match.groups()
        prefix = f"model.layers.{layer}."
        if part == "attn_qkv":
            yield from self._split_qkv(name, prefix, leaf)
        elif part in EXPERT_NAMES and leaf == "weight":
            yield from self._experts(layer, part)
        elif part in BLOCK_NAMES:
            value = self._unpermuted(part, _for_module(source.read()))
            yield f"{prefix}{BLOCK_NAMES[part].format(mlp=self._mlp)}.{leaf}", value
        else:
            yield name, _for_module(source.read())

    def _unpermuted(self, part: str, value: Tensor | QuantTensor) -> Tensor | QuantTensor:
        """Put the rows of q or k back in Hugging Face's order: the halves of a head instead of rotary pairs.

        Other parts, and rows that are not whole heads (the loader will say so), stay as they are.
        """
        config = self.config
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        if config.is_llama4 or heads is None:
            return value
        rows = value.shape[0]
        if rows != heads * config.head_dim or len(value.shape) > 2:
            return value
        order = torch.arange(rows).view(heads, config.head_dim // 2, 2).transpose(1, 2).reshape(-1)
        return value.rows(order) if isinstance(value, QuantTensor) else value[order]

    def _split_qkv(self, name: str, prefix: str, leaf: str) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        config = self.config
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        value = _for_module(self._sources[name].read())
        if value.shape[0] != q + 2 * kv or len(value.shape) > 2:
            raise CheckpointError(
                self.path, f"tensor {name!r} is {list(value.shape)}; the rows of q, k and v are {q + 2 * kv}"
            )
        bounds = {"attn_q": slice(0, q), "attn_k": slice(q, q + kv), "attn_v": slice(q + kv, None)}
        for part, rows in bounds.items():
            piece = value.rows(rows) if isinstance(value, QuantTensor) else value[rows]
            yield f"{prefix}{BLOCK_NAMES[part]}.{leaf}", self._unpermuted(part, piece)

    def _experts(self, layer: str, part: str) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        """Yield stacked experts: packed as they are, but three of floats as `Experts` has them."""
        prefix = f"model.layers.{layer}.{self._mlp}.experts."
        names = {other: f"blk.{layer}.{other}.weight" for other in EXPERT_NAMES}
        stacks = {other: self._sources[name] for other, name in names.items() if name in self._sources}
        for other, source in stacks.items():
            if len(source.shape) != 3:
                raise CheckpointError(self.path, f"tensor {names[other]!r} does not have three dimensions")
        if any(source.type not in _FLOATS for source in stacks.values()):
            yield prefix + EXPERT_NAMES[part], _as_packed(stacks[part])
        elif part == "ffn_down_exps":
            yield prefix + "down_proj", _floats(stacks[part].read()).transpose(1, 2)
        elif "ffn_gate_exps" not in stacks or "ffn_up_exps" not in stacks:
            yield names[part], stacks[part].read()
        elif part == "ffn_gate_exps":
            yield prefix + "gate_up_proj", self._gate_up(names, stacks)

    def _gate_up(self, names: dict[str, str], stacks: dict[str, _Source]) -> Tensor:
        """Join gate and up to (experts, in, 2 * width)."""
        gate, up = _floats(stacks["ffn_gate_exps"].read()), _floats(stacks["ffn_up_exps"].read())
        if gate.shape != up.shape:
            raise CheckpointError(
                self.path,
                f"tensors {names['ffn_gate_exps']!r} and {names['ffn_up_exps']!r} differ in shape: "
                f"{list(gate.shape)} and {list(up.shape)}",
            )
        experts, width, hidden = gate.shape
        joined = torch.empty(experts, hidden, 2 * width, dtype=torch.promote_types(gate.dtype, up.dtype))
        joined[..., :width] = gate.transpose(1, 2)
        joined[..., width:] = up.transpose(1, 2)
        return joined

    def _absent_biases(self) -> Iterator[tuple[str, Tensor]]:
        """Yield zeros for a bias that some projections have and this one lacks: the model has all or none."""
        for switch, parts in _BIASED.items():
            if not getattr(self.config, switch):
                continue
            for name, source in self._sources.items():
                match = _BLOCK.fullmatch(name)
                if match is None or match[2] not in parts or match[3] != "weight":
                    continue
                if f"blk.{match[1]}.{match[2]}.bias" not in self._sources:
                    module = BLOCK_NAMES[match[2]].format(mlp=self._mlp)
                    yield f"model.layers.{match[1]}.{module}.bias", torch.zeros(source.shape[0])


def _require_llama(path: Path, metadata: Mapping[str, Value]) -> None:
    kind = _OTHER_KINDS.get(str(metadata.get("general.type")))
    if kind is not None:
        raise UnsupportedError(f"{path}: this GGUF file holds {kind}")
    arch = metadata.get("general.architecture")
    if arch is None:
        raise CheckpointError(path, "key 'general.architecture' is missing")
    if arch not in ("llama", "llama4"):
        raise UnsupportedError(
            f"{path}: architecture {str(arch)[:40]!r} is not supported ('llama' and 'llama4' are)"
        )
    if arch == "llama" and metadata.get("llama.expert_count", 0) != 0:
        raise UnsupportedError(f"{path}: a Mixtral (llama.expert_count is not 0) is not supported")


def _is_left_out(name: str) -> bool:
    return name == _ROPE_FREQS or _SKIPPED.fullmatch(name) is not None


def _sources(files: list[GgufFile]) -> dict[str, _Source]:
    """Say where each tensor comes from; those of single experts, as old files have them, become stacks."""
    sources: dict[str, _Source] = {}
    stacks: dict[str, dict[int, tuple[GgufFile, TensorInfo]]] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in sources:
                raise CheckpointError(file.path, f"tensor {name!r} is also in another part")
            match = _ONE_EXPERT.fullmatch(name)
            if match is None:
                sources[name] = _Source(type=info.type, shape=info.shape, places=((file, name),))
            else:
                stacks.setdefault(f"{match[1]}_exps.weight", {})[int(match[2])] = (file, info)
    for name, experts in stacks.items():
        if name in sources:
            raise CheckpointError(files[0].path, f"tensor {name!r} is there whole and expert by expert")
        sources[name] = _stacked(name, experts)
    return sources


def _stacked(name: str, experts: dict[int, tuple[GgufFile, TensorInfo]]) -> _Source:
    file, first = next(iter(experts.values()))
    same = all((info.type, info.shape) == (first.type, first.shape) for _, info in experts.values())
    if sorted(experts) != list(range(len(experts))) or not same:
        raise CheckpointError(file.path, f"the experts of {name!r} have holes or differ in type or shape")
    return _Source(
        type=first.type,
        shape=(len(experts), *first.shape),
        places=tuple((part, info.name) for _, (part, info) in sorted(experts.items())),
    )


def _compute_dtype(sources: Iterable[_Source]) -> torch.dtype:
    """Return the dtype of most elements, or float32 where some are quantised."""
    elements: Counter[GGMLType] = Counter()
    for source in sources:
        elements[source.type] += prod(source.shape)
    if not elements or any(kind not in _FLOATS for kind in elements):
        return torch.float32
    return _FLOATS[elements.most_common(1)[0][0]]


def _floats(value: Tensor | QuantTensor) -> Tensor:
    return value.dequantize() if isinstance(value, QuantTensor) else value


def _for_module(value: Tensor | QuantTensor) -> Tensor | QuantTensor:
    """Dequantise vectors: norms and biases are never computed with packed."""
    return _floats(value) if len(value.shape) == 1 else value


def _as_packed(source: _Source) -> QuantTensor:
    value = source.read()
    return value if isinstance(value, QuantTensor) else QuantTensor(value.view(torch.uint8), source.type)


def _other_parts(first: GgufFile) -> list[GgufFile]:
    """Open the rest of a split file, found by its name, and check that all parts belong together."""
    count = _split_key(first, "split.count") if "split.count" in first.metadata else 1
    if count <= 1:
        return []
    name = _PART_NAME.fullmatch(first.path.name)
    number = _split_key(first, "split.no")
    if number != 0:
        hint = f"; give the first: {_part_path(first.path, name[1], 0, count)}" if name else ""
        raise CheckpointError(first.path, f"is part {number + 1} of {count}{hint}")
    if name is None or int(name[2]) != 1 or int(name[3]) != count:
        raise CheckpointError(
            first.path, f"is part 1 of {count} and must be named like model-00001-of-{count:05d}.gguf"
        )
    paths = [_part_path(first.path, name[1], index, count) for index in range(1, count)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(first.path, f"{len(missing)} of {count} parts are missing beside it: {shown}")
    others = [GgufFile(path) for path in paths]
    for index, part in enumerate(others, start=1):
        found = _split_key(part, "split.no"), _split_key(part, "split.count")
        if found != (index, count):
            raise CheckpointError(part.path, f"split.no, split.count are {found}, expected {(index, count)}")
    total, expected = sum(len(f.tensors) for f in (first, *others)), _split_key(first, "split.tensors.count")
    if total != expected:
        raise CheckpointError(
            first.path, f"its parts hold {total} tensors, split.tensors.count is {expected}"
        )
    return others


def _part_path(path: Path, prefix: str, index: int, count: int) -> Path:
    return path.with_name(f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf")


def _split_key(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise CheckpointError(file.path, f"key {key!r} is {str(value)[:40]}, not a count")
    return value
