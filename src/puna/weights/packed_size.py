"""How many values a packed weight stands for, whichever way it is packed."""

from __future__ import annotations

from torch import nn

from puna.weights.nf4 import FourBitLinear
from puna.weights.quant import QuantEmbedding, QuantExperts, QuantLinear


def num_packed(module: nn.Module) -> int:
    """Count the values of packed weights in a module itself, not in the modules inside it."""
    if isinstance(module, QuantLinear | QuantEmbedding | FourBitLinear):
        return module.quantized.shape.numel()
    if isinstance(module, QuantExperts):
        return 3 * module.num_experts * module.hidden_size * module.intermediate_size
    return 0
