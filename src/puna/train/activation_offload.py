"""Keep what the backward pass needs in the host's memory instead of the accelerator's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from puna.errors import UnsupportedError

_SMALL = 1024  # values below which moving costs more than it saves


def require_offload(device: torch.device) -> None:
    """Raise UnsupportedError for a device that computes in the host's memory anyway."""
    if device.type == "cpu":
        raise UnsupportedError(
            "activation_offloading moves what an accelerator keeps to the host: on the CPU it is there "
            "already"
        )


def activation_offload(*, enabled: bool) -> AbstractContextManager[object]:
    """Within the block, move what a forward pass keeps to pinned host memory, and back when it is needed.

    With gradient checkpointing that is the input of each layer, and no weight of them.
    """
    return saved_tensors_hooks(_to_host, _to_device) if enabled else nullcontext()


def _to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if tensor.device.type == "cpu" or tensor.numel() < _SMALL:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=False)
    return tensor.device, host


def _to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
