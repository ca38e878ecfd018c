"""How much memory the key/value cache may take.

On a GPU a share of the whole device less what is in use; on the CPU a share of the memory that is free now,
as the kernel or the container's limit tells it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CPU_SHARE = 0.5
GPU_SHARE = 0.92


def cache_budget(device: torch.device, utilization: float | None) -> int:
    """Return the bytes that the cache may take; `utilization` is the share, in (0, 1]."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = GPU_SHARE if utilization is None else utilization
        budget = int(total * share) - (total - free)
        logger.info("cache: %.0f%% of %.1f GiB less what is in use", 100 * share, total / 2**30)
        return max(budget, 0)
    free = free_memory()
    share = CPU_SHARE if utilization is None else utilization
    logger.info("cache: at most %.0f%% of %.1f GiB of free memory", 100 * share, free / 2**30)
    return int(free * share)


def free_memory() -> int:
    """Return the bytes of RAM that can still be taken without swapping."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
