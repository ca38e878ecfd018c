"""Find what an importance matrix holds: sums of the squares of what meets each weight while a text is read.

Each linear is watched from outside, and each expert by itself; what the model computes stays the same. As
in llama.cpp's `imatrix` the output head is left out. Knows token ids, no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from puna.errors import ParameterError
from puna.model.attention import PackedAttention
from puna.model.llama import Llama
from puna.model.moe import Experts
from puna.weights.gguf_export import gguf_shapes
from puna.weights.imatrix import Activations
from puna.weights.int8 import Int8Linear
from puna.weights.nf4 import FourBitLinear
from puna.weights.quant import QuantExperts, QuantLinear
from puna.weights.quantize_mix import is_quantized

_LINEARS = nn.Linear | QuantLinear | FourBitLinear | Int8Linear


def cut_rows(ids: Sequence[int], length: int, bos: int | None) -> list[list[int]]:
    """Cut the ids of a text into rows of at most `length` tokens, each with BOS in front where there is one.

    `ids` are without BOS. Raises ParameterError for a length that leaves no room beside BOS.
    """
    front = [] if bos is None else [bos]
    step = length - len(front)
    if step < 1:
        raise ParameterError(f"rows must have at least {len(front) + 1} tokens, got {length}")
    return [[*front, *ids[start : start + step]] for start in range(0, len(ids), step)]


class ActivationSums:
    """Sum squares over all rows that are read inside `with ActivationSums(model) as sums`."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}  # (matrices, columns), float64
        self._counts: dict[str, Tensor] = {}  # (matrices,)

    def __enter__(self) -> Self:
        """Begin to watch the model's linears and experts."""
        for name, module in self._model.named_modules():
            if isinstance(module, _LINEARS) and name != "lm_head":
                self._watch_linear(name, module)
            elif isinstance(module, Experts | QuantExperts):
                self._watch_experts(name, module)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.inference_mode()
    def read(self, row: Sequence[int]) -> None:
        """Let the model read one row of token ids, as a sequence of its own."""
        device = next(self._model.parameters()).device
        ids = torch.tensor(row, device=device)
        places = torch.arange(len(row), device=device)
        self._model.hidden_states(ids, places, PackedAttention([0, len(row)]), select=places[-1:])

    def found(self) -> dict[str, Activations]:
        """Return what was summed so far, by GGUF names. Raises ParameterError where it is not finite."""
        for name, sums in self._sums.items():
            if not bool(sums.isfinite().all()):
                raise ParameterError(f"what meets {name} is not finite: compute in float32")
        return {name: Activations(sums=s, counts=self._counts[name]) for name, s in self._sums.items()}

    def _make_room(self, name: str, matrices: int, columns: int) -> None:
        self._sums[name] = torch.zeros(matrices, columns, dtype=torch.float64)
        self._counts[name] = torch.zeros(matrices)

    def _add(self, name: str, matrix: int, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self._sums[name][matrix] += rows.double().square().sum(0).cpu()
        self._counts[name][matrix] += rows.shape[0]

    def _watch_linear(self, name: str, module: Any) -> None:
        ((theirs, _),) = gguf_shapes(f"{name}.weight", (module.out_features, module.in_features))
        if not is_quantized(theirs, 2):  # a router
            return
        self._make_room(theirs, 1, module.in_features)

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(theirs, 0, args[0])

        self._handles.append(module.register_forward_pre_hook(add))

    def _watch_experts(self, name: str, experts: Experts | QuantExperts) -> None:
        """Watch experts; what meets the last projection is computed once more for it."""
        if isinstance(experts, Experts):
            count, width, hidden = experts.down_proj.shape
        else:
            count, width, hidden = experts.num_experts, experts.intermediate_size, experts.hidden_size
        gate, up = _names(f"{name}.gate_up_proj", (count, hidden, 2 * width))
        (down,) = _names(f"{name}.down_proj", (count, width, hidden))
        for theirs, columns in ((gate, hidden), (up, hidden), (down, width)):
            self._make_room(theirs, count, columns)

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, scores, chosen = args
            for expert in set(chosen.flatten().tolist()):
                rows, place = (chosen == expert).nonzero(as_tuple=True)
                scaled = x[rows] * scores[rows, place, None]
                parts = _gate_and_up(experts, expert, scaled)
                self._add(gate, expert, scaled)
                self._add(up, expert, scaled)
                self._add(down, expert, functional.silu(parts[0]) * parts[1])

        self._handles.append(experts.register_forward_pre_hook(add))


def _gate_and_up(experts: Experts | QuantExperts, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(experts, Experts):
        gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return gate, up
    stacks: tuple[Any, Any] = experts.gate_proj, experts.up_proj
    return stacks[0][expert](x), stacks[1][expert](x)


def _names(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the GGUF names of a stack of experts."""
    return (theirs for theirs, _ in gguf_shapes(name, shape))
