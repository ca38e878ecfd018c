"""cria, the embedded model: a small Llama 3-style chat model, as the standard files beside this one.

README.md is its model card; examples/cria holds the scripts that made it. No torch here.
"""

from __future__ import annotations

from pathlib import Path

FOLDER: Path = Path(__file__).parent

SHA256 = "df9235c3fcdaf92c82fa88818d8dd98bb250dda0bb7762973667988e498bf1e0"
"""The sha256 of model.safetensors."""
