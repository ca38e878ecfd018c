"""Average the weights of two passes, and write the model.

    python -m examples.cria.average FIRST/checkpoint.pt SECOND/checkpoint.pt SHARE OUT

SHARE is that of the second, from 0 to 1. The second pass must have started from the first
(Wortsman et al., "Model soups", 2022).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from examples.cria.network import new_model, write_model


def main() -> None:
    """Read two checkpoints and write config.json and model.safetensors."""
    first, second = (torch.load(path, weights_only=True)["model"] for path in sys.argv[1:3])
    share = float(sys.argv[3])
    model = new_model(0)
    model.load_state_dict({name: first[name].lerp(second[name], share) for name in first})
    write_model(model, Path(sys.argv[4]))


if __name__ == "__main__":
    main()
