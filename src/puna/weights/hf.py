"""Read a Hugging Face folder: `config.json` with safetensors or, failing that, `pytorch_model.bin`.

Names are already those of our modules. What differs is settled here: the prefix and the vision tower of the
multimodal Llama 4, experts exported one by one, `inv_freq` of old files, a head beside a tied embedding.
File layout and index: Transformers 5.23; names of Llama 4: `modeling_llama4.py` and llm-compressor's exports.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from puna.model.config import LlamaConfig
from puna.weights.bnb_checkpoint import BnbWeights
from puna.weights.files import (
    StoredTensor,
    TensorFile,
    list_names,
    open_safetensors,
    open_torch_file,
    read_json_object,
)
from puna.weights.int8 import Int8Tensor
from puna.weights.nf4 import FourBitTensor

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_INV_FREQ = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_SPLIT_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<proj>gate|up|down)_proj\.weight"
)
_MAX_INDEX = 64 << 20  # bytes
_COMPARED_ROWS = 4096  # at a time, of a head and the embedding that it is tied to


class HfCheckpoint:
    """A folder in Hugging Face's layout; `tensors` yields fresh tensors under the names of our modules."""

    format: Literal["hf"] = "hf"

    def __init__(self, folder: Path | str, *, use_safetensors: bool | None = None) -> None:
        """Read the config and every header, and check them against the index.

        `use_safetensors` is as for `weight_files`. Raises ConfigError, CheckpointError, ModelNotFoundError,
        UnsupportedError (quantised; not a Llama).
        """
        self.path = Path(folder)
        self.skipped: list[str] = []
        self.config = _read_config(self.path)
        self._files = _open_weight_files(self.path, weight_files(use_safetensors))
        self.packed = BnbWeights(self._files)
        self._plan = _Plan.of(self._files, self.config, except_for=self.packed.names)
        _require_floats(self.path, self._plan)
        self.total_bytes = (
            sum(source.stored.num_bytes for source in self._plan.used()) + self.packed.num_bytes
        )
        if self.config.tie_word_embeddings and _HEAD in self._plan.plain:
            self.total_bytes -= self._plan.plain[_HEAD].stored.num_bytes
        self.stored_dtype = self._stored_dtype()
        self.dtype = self._declared_dtype()

    def tensors(self) -> Iterator[tuple[str, Tensor | FourBitTensor | Int8Tensor]]:
        """Yield (name, tensor), one at a time, in the order of the files; the tensors are the caller's.

        Fills `skipped`. Raises CheckpointError where a file ends early or experts are missing.
        """
        self.skipped = list(self._plan.skipped)
        for name, source in self._plan.plain.items():
            if name == _HEAD and self.config.tie_word_embeddings:
                self._skip_tied_head(source)
            else:
                yield name, source.file.read(source.name)
        for experts, parts in self._plan.experts.items():
            yield from self._join_experts(experts, parts)
        yield from self.packed.tensors()

    def _declared_dtype(self) -> torch.dtype:
        declared = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if self.config.dtype in declared:
            return declared[self.config.dtype]
        dtypes = [source.stored.dtype for source in self._plan.used()]
        return next((dtype for dtype in dtypes if dtype is not None), torch.float32)

    def _stored_dtype(self) -> torch.dtype:
        """Return the dtype that most of the bytes are in."""
        sizes: Counter[torch.dtype] = Counter()
        for source in self._plan.used():
            sizes[source.stored.dtype or torch.float32] += source.stored.num_bytes
        return max(sizes, key=sizes.__getitem__, default=torch.float32)

    def _skip_tied_head(self, head: _Source) -> None:
        self.skipped.append(head.name)
        embedding = self._plan.plain.get(_EMBEDDING)
        if embedding is not None and not _same_values(head, embedding):
            logger.warning(
                "%s: %s differs from %s, but config.json ties them: the embedding is used for both",
                self.path,
                head.name,
                embedding.name,
            )

    def _join_experts(self, prefix: str, parts: _Experts) -> Iterator[tuple[str, Tensor]]:
        """Stack experts stored one by one as (out, in) into our two (expert, in, out) tensors."""
        count = self.config.num_local_experts
        wanted = {(expert, proj) for expert in range(count) for proj in ("gate", "up", "down")}
        missing, extra = sorted(wanted - parts.keys()), sorted(parts.keys() - wanted)
        if missing or extra:
            lists = [("missing", missing), ("unexpected", extra)]
            text = [
                f"{kind}: {list_names(f'{prefix}.{e}.{p}_proj.weight' for e, p in keys)}"
                for kind, keys in lists
                if keys
            ]
            raise CheckpointError(self.path, f"the config has {count} experts; {'; '.join(text)}")
        hidden, width = self.config.hidden_size, self.config.intermediate_size
        yield f"{prefix}.gate_up_proj", _stack(parts, ("gate", "up"), (count, hidden, width))
        yield f"{prefix}.down_proj", _stack(parts, ("down",), (count, width, hidden))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One stored tensor: its file and its name there."""

    file: TensorFile
    name: str

    @property
    def stored(self) -> StoredTensor:
        return self.file.tensors[self.name]


_Experts = dict[tuple[int, str], _Source]  # by (number, "gate" | "up" | "down")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What becomes of each stored tensor: used as it is, part of an expert stack, or skipped."""

    plain: dict[str, _Source]
    experts: dict[str, _Experts]
    skipped: list[str]

    @classmethod
    def of(cls, files: list[TensorFile], config: LlamaConfig, except_for: Collection[str] = ()) -> _Plan:
        plan = cls(plain={}, experts={}, skipped=[])
        for file in files:
            plan.skipped.extend(file.others)
            for stored_name in sorted(file.tensors, key=lambda name: file.tensors[name].offset):
                if stored_name not in except_for:
                    plan._place(_Source(file=file, name=stored_name), config)
        return plan

    def _place(self, source: _Source, config: LlamaConfig) -> None:
        name = source.name.removeprefix("language_model.") if config.is_llama4 else source.name
        if _is_skipped(source.name, config):
            self.skipped.append(source.name)
        elif config.is_llama4 and (match := _SPLIT_EXPERT.fullmatch(name)):
            parts = self.experts.setdefault(match["experts"], {})
            _add(parts, (int(match["expert"]), match["proj"]), source)
        else:
            _add(self.plain, name, source)

    def used(self) -> Iterator[_Source]:
        yield from self.plain.values()
        for parts in self.experts.values():
            yield from parts.values()


def _add(places: dict[Any, _Source], place: Any, source: _Source) -> None:
    if place in places:
        first = places[place].name
        raise CheckpointError(source.file.path, f"{list_names([first, source.name])} name the same tensor")
    places[place] = source


def _is_skipped(name: str, config: LlamaConfig) -> bool:
    """Say whether a tensor is known and not needed: the vision part of Llama 4, saved RoPE frequencies."""
    if _INV_FREQ.fullmatch(name):
        return True
    return config.is_llama4 and name.startswith(("vision_model.", "multi_modal_projector."))


def _stack(parts: _Experts, projections: tuple[str, ...], shape: tuple[int, int, int]) -> Tensor:
    """Put the named projections of every expert side by side; shape: (experts, in, out of one)."""
    count, size_in, size_out = shape
    dtype = parts[0, projections[0]].stored.dtype
    out = torch.empty(count, size_in, size_out * len(projections), dtype=dtype)
    for expert in range(count):
        for i, proj in enumerate(projections):
            source = parts[expert, proj]
            if source.stored.shape != (size_out, size_in):
                got = list(source.stored.shape)
                reason = f"{source.name} has shape {got}, but the config asks for {[size_out, size_in]}"
                raise CheckpointError(source.file.path, reason)
            out[expert, :, i * size_out : (i + 1) * size_out] = source.file.read(source.name).t()
    return out


def _same_values(a: _Source, b: _Source) -> bool:
    if a.stored.shape != b.stored.shape or not a.stored.shape:
        return False
    for start in range(0, a.stored.shape[0], _COMPARED_ROWS):
        stop = start + _COMPARED_ROWS
        if not torch.equal(a.file.read_rows(a.name, start, stop), b.file.read_rows(b.name, start, stop)):
            return False
    return True


# ------------------------------------------------------------------------------------------------ the config


def _read_config(folder: Path) -> LlamaConfig:
    path = folder / "config.json"
    values = read_json_object(path)
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) and not (part is values and _is_bnb(part[key])):
                raise _quantised(path, part[key])
    try:
        return LlamaConfig.from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error


def _is_bnb(settings: Any) -> bool:
    """Say whether bitsandbytes packed the weights, which are read as they are."""
    return isinstance(settings, dict) and settings.get("quant_method") == "bitsandbytes"


def _quantised(path: Path, settings: Any) -> UnsupportedError:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    kind = settings.get("format") if isinstance(settings, dict) else None
    named = f"{method or 'unnamed'!s:.40}" + (f" ({kind!s:.40})" if kind else "")
    return UnsupportedError(
        f"{path}: weights quantised by {named} are not supported: use the bfloat16 checkpoint or a GGUF file"
    )


def _require_floats(folder: Path, plan: _Plan) -> None:
    odd = {s.name: s.stored.dtype_name for s in plan.used() if s.stored.dtype is None}
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        raise UnsupportedError(
            f"{folder}: tensors stored as {kinds} are not supported ({list_names(odd, limit=4)}): "
            "use the bfloat16 checkpoint or a GGUF file"
        )


# ------------------------------------------------------------------------------------------------- the files


def weight_files(use_safetensors: bool | None) -> tuple[str, ...]:
    """Return the names that weights may have, best first: only safetensors (True), only .bin (False), any."""
    return {None: WEIGHT_FILES, True: WEIGHT_FILES[:2], False: WEIGHT_FILES[2:]}[use_safetensors]


def _open_weight_files(folder: Path, names: tuple[str, ...]) -> list[TensorFile]:
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        if name.endswith(".index.json"):
            return _open_shards(path)
        return [_open(path)]
    raise ModelNotFoundError(f"{folder}: no weights: looked for {', '.join(names)}")


def _open(path: Path) -> TensorFile:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch_file(path)


def _open_shards(index: Path) -> list[TensorFile]:
    """Open every shard of an index; one CheckpointError lists all that does not agree with it."""
    weight_map = read_json_object(index, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "weight_map must map tensor names to file names")
    suffix = ".safetensors" if index.name.startswith("model.safetensors") else ".bin"
    odd = sorted({repr(name) for name in weight_map.values() if not _is_shard_name(name, suffix)})
    if odd:
        reason = f"shards must be {suffix} files beside the index, not {list_names(odd)}"
        raise CheckpointError(index, reason)
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    files = {name: _open(index.parent / name) for name in shards if name not in absent}
    wrong = [("missing files", absent), *_disagreements(weight_map, files)]
    if any(names for _, names in wrong):
        text = "; ".join(f"{kind}: {list_names(names)}" for kind, names in wrong if names)
        raise CheckpointError(index, f"the shards do not agree with it: {text}")
    return list(files.values())


def _disagreements(weight_map: dict[str, str], files: dict[str, TensorFile]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for file_name, file in files.items():
        for name in file.tensors:
            found.setdefault(name, []).append(file_name)
    listed_in_open = {name: shard for name, shard in weight_map.items() if shard in files}
    return [
        ("tensors not in their shard", [n for n, s in listed_in_open.items() if s not in found.get(n, [])]),
        ("tensors in two shards", [n for n, where in found.items() if len(where) > 1]),
        ("tensors not listed", [n for n in found if n not in weight_map and not _INV_FREQ.fullmatch(n)]),
    ]


def _is_shard_name(name: Any, suffix: str) -> bool:
    """Say whether a shard's name is a plain file name: no folder, drive, or character that hides one."""
    if not isinstance(name, str) or not name.endswith(suffix) or len(name) > 255:
        return False
    return name.isprintable() and not any(char in name for char in '/\\:*?"<>|') and not name.startswith(".")
