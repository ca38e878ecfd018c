"""The linear layer of the network: an `nn.Linear` that computes with Puna's kernels where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from puna.kernels.dense_linear import linear


class Linear(nn.Linear):
    """Compute x @ weight.T + bias; everything but the way of computing is `nn.Linear`'s."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)
