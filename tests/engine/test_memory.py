"""What may be taken: the kernel's word, the container's limit, and pages of files that make room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from puna.engine import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for /proc and the cgroup: 100 KiB are free, and there is no limit."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  100 kB\nHugePages_Total: 0\n")
    return tmp_path


def test_a_share_of_what_is_free(system: Path) -> None:
    assert memory.free_memory() == 100 * 1024
    assert memory.cache_budget(torch.device("cpu"), None) == 50 * 1024
    assert memory.cache_budget(torch.device("cpu"), 0.25) == 25 * 1024


def test_the_limit_of_the_container_counts_and_pages_of_files_do_not(system: Path) -> None:
    (system / "memory.current").write_text("70000\n")
    (system / "memory.max").write_text("max\n")
    assert memory.free_memory() == 100 * 1024
    (system / "memory.max").write_text("90000\n")
    assert memory.free_memory() == 20_000
    (system / "memory.stat").write_text("anon 10000\ninactive_file 60000\n")
    assert memory.free_memory() == 80_000
    (system / "memory.max").write_text("5000\n")
    assert memory.free_memory() == 0


def test_where_the_kernel_does_not_tell_half_of_the_memory_counts(system: Path) -> None:
    (system / "meminfo").unlink()
    assert memory.free_memory() > 2**28
