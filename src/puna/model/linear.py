"""The linear layer of the network: an `nn.Linear` that computes with Puna's kernels where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from puna.kernels.dense_linear import linear


class Linear(nn.Linear):
    """Compute x @ weight.T + bias; everything but the way of computing is `nn.Linear`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


def apply_all(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return [layer(x) for layer in layers]; those of one kind with `apply_together` share the work on x."""
    kind = type(layers[0])
    together = getattr(kind, "apply_together", None)
    if together is None or any(type(layer) is not kind or is_watched(layer) for layer in layers):
        return [layer(x) for layer in layers]
    outs: list[Tensor] = together(x, layers)
    return outs


def is_watched(module: nn.Module) -> bool:
    """Say whether somebody wants to know when this module, or any, is called."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or backward or nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
