"""Puna: run, serve and fine-tune Llama models.

The public names are loaded when first used, so that `import puna` and `puna --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from puna.auto import AutoTokenizer as AutoTokenizer

__version__ = "0.1.0"

_PUBLIC = {
    "AutoModelForCausalLM": "puna.auto",
    "AutoTokenizer": "puna.auto",
}

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
