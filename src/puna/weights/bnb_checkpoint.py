"""Weights that bitsandbytes packed and Transformers saved: which stored tensors belong together, read back.

A four-bit "x.weight" has "x.weight.absmax", "x.weight.quant_state.bitsandbytes__nf4" and their like beside
it, an eight-bit one "x.SCB" and "x.weight_format". Names as of Transformers 5.23 and bitsandbytes 0.50. All
that these say is checked against the sizes of the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from puna.errors import CheckpointError
from puna.weights.files import TensorFile
from puna.weights.int8 import Int8Tensor
from puna.weights.nf4 import FourBitTensor

_FOUR_BIT = re.compile(
    r"(?P<weight>.+\.weight)(?P<part>\.(?:absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4)))"
)
_EIGHT_BIT = re.compile(r"(?P<module>.+\.)(?P<part>SCB|weight_format)")


class BnbWeights:
    """The packed weights of a folder, by the name of the weight: each with the places of its parts."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self.parts: dict[str, dict[str, tuple[TensorFile, str]]] = {}
        places = {name: file for file in files for name in file.tensors}
        for name, file in places.items():
            if match := _FOUR_BIT.fullmatch(name):
                self.parts.setdefault(match["weight"], {})[match["part"]] = (file, name)
            elif match := _EIGHT_BIT.fullmatch(name):
                self.parts.setdefault(f"{match['module']}weight", {})[match["part"]] = (file, name)
        for weight, parts in self.parts.items():
            first = next(iter(parts.values()))[0]
            if weight not in places:
                raise CheckpointError(first.path, f"{weight} is missing, but what belongs to it is there")
            parts["weight" if "SCB" in parts else ""] = (places[weight], weight)
        self.names = {name for parts in self.parts.values() for _, name in parts.values()}
        self.num_bytes = sum(places[name].tensors[name].num_bytes for name in self.names)

    @property
    def kind(self) -> str | None:
        """Name how the weights are packed: NF4, FP4 or INT8, several with a comma; None if none is."""
        kinds = {
            {"nf4": "NF4", "fp4": "FP4"}.get(part.rpartition("_")[2], "INT8")
            for parts in self.parts.values()
            for part in parts
            if part == "SCB" or "quant_state" in part
        }
        return ", ".join(sorted(kinds)) or None

    def tensors(self) -> Iterator[tuple[str, FourBitTensor | Int8Tensor]]:
        """Yield (name, packed weight), read one by one. Raises CheckpointError, UnsupportedError."""
        for weight, parts in self.parts.items():
            file, name = parts.get("", parts.get("weight", next(iter(parts.values()))))
            stored = {part: _read(*place) for part, place in parts.items()}
            try:
                if "SCB" in parts:
                    yield weight, Int8Tensor.from_saved(stored, torch.Size(file.tensors[name].shape))
                else:
                    yield weight, FourBitTensor.from_saved(stored)
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(file.path, f"{weight}: {error}") from error


def _read(file: TensorFile, name: str) -> Tensor:
    """Read the bytes of a tensor as its dtype, where that is one of those that bitsandbytes saves."""
    dtype = {"F32": torch.float32, "I8": torch.int8}.get(file.tensors[name].dtype_name, torch.uint8)
    raw = file.read_bytes(name)
    if raw.numel() % dtype.itemsize:
        raise CheckpointError(file.path, f"{name} has {raw.numel()} bytes")
    return raw.view(dtype)
