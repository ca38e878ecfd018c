"""How much memory the key/value cache may take.

On a GPU a share of the whole device less what is in use; on the CPU a share of the memory that is free now,
as the kernel or the container's limit (cgroup v2) tells it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CPU_SHARE = 0.5
GPU_SHARE = 0.92
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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
    free = _numbers(_MEMINFO).get("MemAvailable:", 0) * 1024
    if not free:  # not Linux: half of what there is may be in use
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        # What is used counts pages of files that were read, such as weights; they make room when asked.
        reclaimable = _numbers(_CGROUP / "memory.stat").get("inactive_file", 0)
        free = min(free, int(text) - int(used.read_text()) + reclaimable)
    return max(free, 0)


def _numbers(path: Path) -> dict[str, int]:
    """Read lines of a name and a number; nothing where there is no such file."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
