"""cria, the embedded model: a small Llama 3-style chat model, as the standard files beside this one.

README.md is its model card; examples/cria holds the scripts that made it. No torch here.
"""

from __future__ import annotations

from pathlib import Path

FOLDER: Path = Path(__file__).parent

SHA256 = "a088093d48190e958da9e1fcb840bb5edd1edb7ab8feee6512935ddc6fdec425"
"""The sha256 of model.safetensors."""
