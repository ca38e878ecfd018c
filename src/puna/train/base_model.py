"""Load the model that a training begins with: in its dtype, on its device, in four bits for method "qlora".

Four-bit weights are packed while they are read, one by one, so that the whole model is never there unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from puna.errors import ParameterError, UnsupportedError
from puna.kernels.native_dtypes import is_native
from puna.model.llama import DecoderLayer, Llama
from puna.train.train_config import TrainConfig
from puna.weights.hf import HfCheckpoint
from puna.weights.loader import Checkpoint, Packed, empty_model, load_model
from puna.weights.nf4 import quantize_4bit

_KEPT_WHOLE = ("lm_head", "router")  # as in bitsandbytes and in `nf4.swap_in_4bit`


def is_packed(checkpoint: Checkpoint) -> bool:
    """Say whether a checkpoint's weights are stored in blocks; a GGUF file is taken to be."""
    if isinstance(checkpoint, HfCheckpoint):
        return checkpoint.packed.kind is not None
    return checkpoint.format == "gguf"


def choose_dtype(config: TrainConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the weights.

    By default float32 where they are trained themselves, since steps of a usual learning rate vanish in
    bfloat16's rounding; else the checkpoint's, with bfloat16 for float16, which would need its loss scaled.
    """
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    if config.method == "full":
        return torch.float32
    return torch.bfloat16 if checkpoint.dtype == torch.float16 else checkpoint.dtype


def choose_compute_dtype(
    config: TrainConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Return the dtype of activations: that of the weights, but float32 where the processor lacks it.

    Frozen weights become float32 a few rows at a time there, which costs little; torch's own products for the
    backward pass are up to 300 times slower. Weights of experts and weights that are trained have no such
    products, and stay as they are.
    """
    if config.method == "full" or checkpoint.config.is_llama4 or device.type != "cpu" or is_native(dtype):
        return dtype
    return torch.float32


@contextmanager
def computing_in(network: Llama, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, let embeddings, and so all activations, have a dtype."""

    def cast(module: nn.Module, inputs: object, embedded: Tensor) -> Tensor:
        return embedded.to(dtype)

    handle = network.model.embed_tokens.register_forward_hook(cast)
    try:
        yield
    finally:
        handle.remove()


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device: as named, else the first accelerator there is, else the CPU."""
    if config.device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.device(config.device)
    except RuntimeError as error:
        raise ParameterError(f"device is {config.device!r}: {error}") from error


def load_base(
    config: TrainConfig, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> Llama:
    """Load the model. Raises what `load_model` does."""
    if config.method == "qlora":
        checkpoint = _PackedOnTheWay(checkpoint, dtype)
    return load_model(checkpoint, dtype=dtype, device=device)


def four_bit_names(network: nn.Module) -> list[str]:
    """Return the names of the weights that method "qlora" packs."""
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in _KEPT_WHOLE
    ]


class _PackedOnTheWay:
    """A checkpoint whose linears come out in NF4 with double quantisation."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.path, self.config = checkpoint.path, checkpoint.config
        self.dtype, self.total_bytes = dtype, checkpoint.total_bytes
        self.skipped = checkpoint.skipped
        self._checkpoint = checkpoint
        self._names = frozenset(four_bit_names(empty_model(checkpoint.config)))

    @property
    def format(self) -> Literal["hf", "meta", "gguf"]:
        """See `Checkpoint`."""
        return self._checkpoint.format

    def tensors(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """See `Checkpoint`."""
        for name, value in self._checkpoint.tensors():
            if name in self._names and isinstance(value, Tensor):
                value = quantize_4bit(value.to(self.dtype))
            elif name in self._names:
                raise UnsupportedError(f"{self.path}: {name} is quantised already: use method 'lora'")
            yield name, value
        self.skipped = self._checkpoint.skipped


@contextmanager
def gradient_checkpointing(network: Llama, *, enabled: bool = True) -> Iterator[None]:
    """Within the block, keep only the input of each layer; the backward pass computes the layer again."""
    layers = [module for module in network.model.layers if isinstance(module, DecoderLayer)]
    if not enabled:
        yield
        return
    for layer in layers:
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's is seen again
