"""Checkpoint folders that are there whole or not at all: written aside, flushed to the disk, then renamed.

`OUTPUT/checkpoint-120` is the state after 120 steps. Whatever moment a process is killed at, the latest
checkpoint can be gone on from; leftovers have names that begin with a dot and are removed at the next start.
Knows no models.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.+checkpoint-\d+\.(?:part|old)(?:\.part)?")


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all checkpoints, ascending."""
    if not output.is_dir():
        return []
    found = [(match, path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def checkpoint_folder(output: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return output / f"checkpoint-{step}"


def save_checkpoint(
    output: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    limit: int | None = None,
    best: int | None = None,
) -> Path:
    """Make the checkpoint of a step, let `write` fill it, and keep the newest `limit` of all, and the best.

    `write` is given a folder that is not there yet.
    """
    output.mkdir(parents=True, exist_ok=True)
    part, final = output / f".checkpoint-{step}.part", checkpoint_folder(output, step)
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    for path in sorted(part.rglob("*")):
        _flush(path)
    _flush(part)
    if final.exists():
        _remove(final)
    part.rename(final)
    _flush(output)
    if limit is not None:
        for number, old in list_checkpoints(output)[:-limit]:
            if number != best:
                _remove(old)
    return final


def remove_leftovers(output: Path) -> None:
    """Remove what a killed process has left behind."""
    for path in output.iterdir() if output.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
