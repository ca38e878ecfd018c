"""The operations that cost the time, each in a fast form and in a plain one that defines what is right.

Which form is used is decided once, on import, and logged: the compiled kernels where they were built and can
run here, else the reference. `PUNA_KERNELS=reference|cpu` forces one, `PUNA_CPU_ISA=portable|avx2|neon|...`
an instruction set. This room knows tensors and packed bytes, neither the model nor files.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

from puna.errors import ConfigError

logger = logging.getLogger(__name__)


def _load_cpu() -> ModuleType | None:
    """Return the module of the compiled kernels, or None if they were not built or are not wanted."""
    wanted = os.environ.get("PUNA_KERNELS", "")
    if wanted not in ("", "reference", "cpu"):
        raise ConfigError(f"PUNA_KERNELS is {wanted!r}; it may be reference or cpu")
    if wanted == "reference":
        logger.info("kernels: reference (PUNA_KERNELS)")
        return None
    try:
        from puna.kernels import cpu
    except ImportError as error:
        if wanted == "cpu":
            raise ConfigError(
                f"PUNA_KERNELS=cpu, but the compiled kernels cannot be loaded: {error}"
            ) from error
        logger.warning("the compiled kernels are not there (%s): using the slow reference kernels", error)
        return None
    isa = os.environ.get("PUNA_CPU_ISA", "")
    if isa:
        cpu.choose(isa)
    logger.info("kernels: cpu (%s, %d threads)", cpu.chosen(), cpu.num_threads())
    return cpu


_cpu = _load_cpu()


def compiled() -> ModuleType | None:
    """Return `puna.kernels.cpu` where the compiled kernels are in use, else None."""
    return _cpu
