"""Puna: run, serve and fine-tune Llama models.

The public names are loaded when first used, so that `import puna` and `puna --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna.async_llm import AsyncLLM as AsyncLLM
    from puna.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from puna.auto import AutoTokenizer as AutoTokenizer
    from puna.engine.sampling import BeamSearchParams as BeamSearchParams
    from puna.engine.sampling import SamplingParams as SamplingParams
    from puna.engine.sampling import StructuredOutputsParams as StructuredOutputsParams
    from puna.llm import LLM as LLM
    from puna.model.lora_config import LoraConfig as LoraConfig
    from puna.outputs import CompletionOutput as CompletionOutput
    from puna.outputs import RequestOutput as RequestOutput
    from puna.peft_model import PeftModel as PeftModel
    from puna.peft_model import get_peft_model as get_peft_model

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncLLM": "puna.async_llm",
    "AutoModelForCausalLM": "puna.auto",
    "AutoTokenizer": "puna.auto",
    "BeamSearchParams": "puna.engine.sampling",
    "CompletionOutput": "puna.outputs",
    "LLM": "puna.llm",
    "LoraConfig": "puna.model.lora_config",
    "PeftModel": "puna.peft_model",
    "RequestOutput": "puna.outputs",
    "SamplingParams": "puna.engine.sampling",
    "StructuredOutputsParams": "puna.engine.sampling",
    "get_peft_model": "puna.peft_model",
}

__all__ = [
    "AsyncLLM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BeamSearchParams",
    "CompletionOutput",
    "LLM",
    "LoraConfig",
    "PeftModel",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "get_peft_model",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
