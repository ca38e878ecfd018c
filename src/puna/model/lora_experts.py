"""Low-rank adapters on the stacked weights of a mixture of experts (PEFT's target_parameters).

PEFT keeps the factors of all experts in two matrices, and nests one wrapper around another where several
weights of the same module are targeted; names in files follow that nesting, so it is kept. Unlike PEFT, which
adds whole delta weights, only the chosen experts' factors are multiplied, with the tokens that they see.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from puna.errors import UnsupportedError
from puna.kernels.layer_ops import swiglu
from puna.model.lora_config import LoraConfig
from puna.model.lora_layers import LoraLayer
from puna.model.moe import Experts


class LoraExperts(LoraLayer):
    """Adapt one weight of an `Experts`, or of another `LoraExperts` around it."""

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name
        self.num_experts, self.out_features, self.in_features = self._weight().shape  # as PEFT calls the axes
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def add(self, name: str, config: LoraConfig, rank: int, alpha: float) -> None:
        """Create an adapter, drawing from torch's global generator as PEFT does."""
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower() != "gaussian":
            raise UnsupportedError(f"init_lora_weights={init!r} is not supported for target_parameters")
        a = nn.Linear(self.in_features, rank * self.num_experts, bias=False)
        b = nn.Linear(rank * self.num_experts, self.out_features, bias=False)
        if init is not False:
            if init is True:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            else:
                nn.init.normal_(a.weight, std=1 / rank)
            nn.init.zeros_(b.weight)
        weight = self._weight()
        self.lora_A[name] = a.to(device=weight.device, dtype=weight.dtype)
        self.lora_B[name] = b.to(device=weight.device, dtype=weight.dtype)
        self.scaling[name] = config.scaling(rank, alpha)

    def adapter_names(self) -> list[str]:
        """See `AdapterModule`."""
        return list(self.lora_A)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """See `AdapterModule`."""
        if name not in self.lora_A:
            return {}
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return {"lora_A.weight": cast(Tensor, a), "lora_B.weight": cast(Tensor, b)}

    def remove(self, name: str) -> None:
        """See `AdapterModule`."""
        if name in self.lora_A:
            del self.lora_A[name], self.lora_B[name]
        self.scaling.pop(name, None)

    def forward(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, (tokens, hidden); see `Experts.forward`."""
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            scaled = x[rows] * scores[rows, place, None]
            gate, up = self._multiply(scaled, "gate_up_proj", expert).chunk(2, dim=-1)
            out = out.index_add(0, rows, self._multiply(swiglu(gate, up), "down_proj", expert))
        return out

    def delta_weight(self, name: str) -> Tensor:
        """See `LoraLayer`; (experts, rows, columns)."""
        a, b = self._factors_of(name)
        return torch.einsum("ore,eri->eoi", b, a) * self.scaling[name]

    def innermost(self) -> Experts:
        """Return the experts inside all wrappers."""
        inner = self.base_layer
        while isinstance(inner, LoraExperts):
            inner = inner.base_layer
        if not isinstance(inner, Experts):
            raise UnsupportedError(
                f"adapters on {type(inner).__name__} are not supported: its weights are packed"
            )
        return inner

    def _multiply(self, x: Tensor, parameter: str, expert: int) -> Tensor:
        out: Tensor = x @ getattr(self.innermost(), parameter)[expert]
        layer: nn.Module = self
        while isinstance(layer, LoraExperts):
            if layer.parameter_name == parameter and layer.enabled and not layer.merged:
                for name in layer.active:
                    if name in layer.lora_A:
                        out = out + layer._low_rank(name, x, expert).to(out.dtype)
            layer = layer.base_layer
        return out

    def _low_rank(self, name: str, x: Tensor, expert: int) -> Tensor:
        a, b = self._factors_of(name)
        return (x.to(b.dtype) @ b[:, :, expert]) @ a[expert] * self.scaling[name]

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A, (experts, rank, columns), and B, (rows, rank, experts)."""
        a, b = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
        return (
            a.view(self.num_experts, -1, self.in_features),
            b.view(self.out_features, -1, self.num_experts),
        )

    def _weight(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.innermost(), self.parameter_name))
