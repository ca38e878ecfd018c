"""A model's generation_config.json: what is read from it, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.errors import CheckpointError
from puna.locate import default_sampling, listed_sampling, read_generation_config


def test_what_a_file_asks_for(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None and listed_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "top_p": 0.9, "eos_token_id": [2, 3], "min_p": null}')
    assert read_generation_config(tmp_path) == {
        "do_sample": True,
        "top_p": 0.9,
        "eos_token_id": [2, 3],
        "min_p": None,
    }
    assert listed_sampling(tmp_path) == {"top_p": 0.9}
    assert default_sampling(tmp_path) == {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    file.write_text('{"temperature": 0.6}')
    assert listed_sampling(tmp_path) == {"temperature": 0.6}
    assert default_sampling(tmp_path) == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (1 << 20) + b"{}", "is not JSON"),
        (b"[1]", "must hold a JSON object"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_generation_config(tmp_path)
    assert caught.value.path == tmp_path / "generation_config.json"
