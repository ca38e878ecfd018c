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
    from puna.engine.pooling import PoolingParams as PoolingParams
    from puna.engine.sampling import BeamSearchParams as BeamSearchParams
    from puna.engine.sampling import RequestOutputKind as RequestOutputKind
    from puna.engine.sampling import SamplingParams as SamplingParams
    from puna.engine.sampling import StructuredOutputsParams as StructuredOutputsParams
    from puna.llm import LLM as LLM
    from puna.model.lora_config import LoraConfig as LoraConfig
    from puna.outputs import CompletionOutput as CompletionOutput
    from puna.outputs import EmbeddingOutput as EmbeddingOutput
    from puna.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from puna.outputs import PoolingOutput as PoolingOutput
    from puna.outputs import PoolingRequestOutput as PoolingRequestOutput
    from puna.outputs import RequestOutput as RequestOutput
    from puna.outputs import ScoringOutput as ScoringOutput
    from puna.outputs import ScoringRequestOutput as ScoringRequestOutput
    from puna.peft_model import PeftModel as PeftModel
    from puna.peft_model import get_peft_model as get_peft_model
    from puna.prompts import TextPrompt as TextPrompt
    from puna.prompts import TokensPrompt as TokensPrompt
    from puna.served_adapters import LoRARequest as LoRARequest
    from puna.train.train_config import TrainConfig as TrainConfig
    from puna.train.trainer import Trainer as Trainer

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncLLM": "puna.async_llm",
    "AutoModelForCausalLM": "puna.auto",
    "AutoTokenizer": "puna.auto",
    "BeamSearchParams": "puna.engine.sampling",
    "CompletionOutput": "puna.outputs",
    "EmbeddingOutput": "puna.outputs",
    "EmbeddingRequestOutput": "puna.outputs",
    "LLM": "puna.llm",
    "LoRARequest": "puna.served_adapters",
    "LoraConfig": "puna.model.lora_config",
    "PeftModel": "puna.peft_model",
    "PoolingOutput": "puna.outputs",
    "PoolingParams": "puna.engine.pooling",
    "PoolingRequestOutput": "puna.outputs",
    "RequestOutput": "puna.outputs",
    "RequestOutputKind": "puna.engine.sampling",
    "SamplingParams": "puna.engine.sampling",
    "ScoringOutput": "puna.outputs",
    "ScoringRequestOutput": "puna.outputs",
    "StructuredOutputsParams": "puna.engine.sampling",
    "TextPrompt": "puna.prompts",
    "TokensPrompt": "puna.prompts",
    "TrainConfig": "puna.train.train_config",
    "Trainer": "puna.train.trainer",
    "get_peft_model": "puna.peft_model",
}

__all__ = [
    "AsyncLLM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LLM",
    "LoRARequest",
    "LoraConfig",
    "PeftModel",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "TrainConfig",
    "Trainer",
    "__version__",
    "get_peft_model",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
