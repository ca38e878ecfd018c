"""The network: one set of modules for Llama 2, 3 and 4.

It knows tensors and `LlamaConfig`; it does not know files, tokens as text, or requests.
"""

from puna.model.attention import Attention, PackedAttention
from puna.model.config import LlamaConfig, RopeConfig
from puna.model.llama import Llama

__all__ = ["Attention", "Llama", "LlamaConfig", "PackedAttention", "RopeConfig"]
