"""Facts about the Llama family that need no network, no weights and no torch."""

from __future__ import annotations

from puna.catalog.licences import LICENCES, Licence
from puna.catalog.lineup import LINEUP, LlamaModel, find_model

__all__ = ["LICENCES", "LINEUP", "Licence", "LlamaModel", "find_model"]
