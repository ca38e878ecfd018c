"""Shared fixtures: where the test data is, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from puna import kernels


def _find_test_data() -> Path | None:
    named = os.environ.get("PUNA_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Draw the same numbers in every run: a bound that holds here holds on the next machine."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder with stories260k and Meta's tokenizers, or skip."""
    folder = _find_test_data()
    if folder is None:
        pytest.skip("no test data: set PUNA_TEST_DATA or put it at ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """Return the folder of stories260k: hf/, meta/, gguf/, golden.txt, golden_ids.json."""
    return test_data / "stories260k"


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as where nothing is compiled: exactly with the dequantised weights."""
    monkeypatch.setattr(kernels, "_cpu", None)
