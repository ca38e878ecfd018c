"""What a tokenizer returns for a batch: rows of ids cut, padded and made into tensors, with their mask.

Knows ids only. What `padding`, `truncation` and `max_length` mean together is as in Transformers 5.23.
"""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from puna.errors import ParameterError

Side = Literal["left", "right"]
Ids = list[int]
UNLIMITED = int(1e30)  # what Transformers says where a checkpoint names no length
_NO_LENGTH = int(1e20)  # from here on it is none


class BatchEncoding(UserDict[str, Any]):
    """Hold `input_ids` and `attention_mask`, by key or by attribute: lists, or tensors (batch, tokens)."""

    def __getattr__(self, name: str) -> Any:
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"the encoding has no {name!r}; it has {sorted(self.__dict__.get('data', ()))}")

    def to(self, device: str | int | torch.device, *, non_blocking: bool = False) -> Self:
        """Move the tensors to a device, in place."""
        if not isinstance(device, str | int | torch.device):
            raise ParameterError(f"an encoding moves to a device, not to {device!r}")
        for name, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[name] = value.to(device, non_blocking=non_blocking)
        return self


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Say how long rows may and must be."""

    cuts: bool
    max_length: int
    pads_to: Literal["longest", "max_length"] | None
    multiple_of: int

    @classmethod
    def of(
        cls,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        *,
        pad_to_multiple_of: int | None,
        limit: int,
    ) -> Shape:
        """Read the arguments of a tokenizer; `limit` is its model_max_length."""
        pads_to = _padding(padding)
        if truncation not in (None, True, False, "longest_first", "only_first", "do_not_truncate"):
            raise ParameterError(f"truncation must be True, False or 'longest_first', got {truncation!r}")
        cuts = truncation not in (None, False, "do_not_truncate")
        if truncation is None and max_length is not None and pads_to is None:
            cuts = True
        if max_length is not None and pads_to == "longest" and not cuts:
            warnings.warn(
                "max_length is not used with padding=True alone: padding='max_length' pads to it, "
                "truncation=True cuts at it",
                UserWarning,
                stacklevel=5,
            )
        if max_length is None and limit > _NO_LENGTH:
            cuts, pads_to = False, None if pads_to == "max_length" else pads_to
        length = limit if max_length is None else max_length
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        if multiple < 1 or (cuts and pads_to and length % multiple):
            raise ParameterError(
                f"pad_to_multiple_of is {multiple}: it must be at least 1, and divide {length}"
            )
        return cls(cuts=cuts, max_length=length, pads_to=pads_to, multiple_of=multiple)

    def cut(self, row: Ids, around: int, side: Side) -> Ids:
        """Cut a row so that with the `around` tokens to come it is not too long, on the side named."""
        if not self.cuts or len(row) + around <= self.max_length:
            return row
        room = self.max_length - around
        if room < 0:
            raise ParameterError(f"max_length {self.max_length} has no room for the {around} special tokens")
        return row[:room] if side == "right" else row[len(row) - room :]

    def pad(self, rows: list[Ids], pad_id: int | None, side: Side) -> tuple[list[Ids], list[Ids]]:
        """Fill short rows up; return rows and masks. Raises ParameterError where there is no pad token."""
        if self.pads_to is None:
            return rows, [[1] * len(row) for row in rows]
        if pad_id is None:
            raise ParameterError(
                "padding needs a pad token, and the tokenizer has none: "
                "set tokenizer.pad_token = tokenizer.eos_token, or another token of the vocabulary"
            )
        width = self.max_length if self.pads_to == "max_length" else max(map(len, rows), default=0)
        width = -(-width // self.multiple_of) * self.multiple_of
        ids, masks = [], []
        for row in rows:
            missing = max(width - len(row), 0)
            fill, blank, ones = [pad_id] * missing, [0] * missing, [1] * len(row)
            ids.append(fill + row if side == "left" else row + fill)
            masks.append(blank + ones if side == "left" else ones + blank)
        return ids, masks


def _padding(asked: bool | str) -> Literal["longest", "max_length"] | None:
    match asked:
        case False | "do_not_pad":
            return None
        case True | "longest":
            return "longest"
        case "max_length":
            return "max_length"
    raise ParameterError(
        f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {asked!r}"
    )


def require_side(name: str, value: str) -> Side:
    """Return a side, or raise ParameterError naming the setting."""
    if value == "left":
        return "left"
    if value == "right":
        return "right"
    raise ParameterError(f"{name} must be 'left' or 'right', got {value!r}")


def to_list(ids: Any) -> Any:
    """Return ids in a tensor, an array, or a list of them as plain numbers and lists."""
    if isinstance(ids, torch.Tensor | np.ndarray | np.integer):
        return ids.tolist()
    if isinstance(ids, list | tuple):
        return [to_list(item) for item in ids]
    return ids


def require_ids(ids: Any) -> Ids:
    """Return a list of token ids, or raise ParameterError for anything else."""
    if not isinstance(ids, Iterable) or isinstance(ids, str | bytes | Mapping):
        raise ParameterError(f"token ids are needed, got {type(ids).__name__}")
    listed = list(ids)
    if wrong := [item for item in listed if not isinstance(item, int)]:
        raise ParameterError(f"token ids are integers, got {wrong[0]!r}")
    return listed


def to_tensor(rows: list[Ids], kind: str | None) -> Any:
    """Return rows as a torch ("pt") or numpy ("np") matrix of 64-bit integers, or as they are (None)."""
    if kind is None:
        return rows
    if kind not in ("pt", "np"):
        raise ParameterError(f"return_tensors must be 'pt' or 'np', got {kind!r}")
    if len({len(row) for row in rows}) > 1:
        raise ParameterError(
            "rows of unequal length make no tensor: pass padding=True, truncation=True, or both"
        )
    return torch.tensor(rows, dtype=torch.long) if kind == "pt" else np.array(rows, dtype=np.int64)
