"""`puna show`: facts read from headers, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from puna.catalog.lineup import LINEUP
from puna.cli.app import app
from puna.cli.model_facts import count_parameters, size_text
from puna.errors import PunaError
from puna.model import LlamaConfig


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["show", *arguments], prog_name="puna")


def test_sections(stories: Path) -> None:
    result = invoke(str(stories / "gguf" / "stories260k-f32.gguf"))
    assert result.stdout.splitlines() == [
        "  Model",
        "    architecture        llama",
        "    parameters          260K (260,032)",
        "    context length      512",
        "    embedding length    64",
        "    quantization        F32",
        "    size on disk        1 MB",
        "    format              GGUF",
        "",
        "  Tokenizer",
        "    kind                SentencePiece",
        "    vocabulary          512",
        "    begins with         <s>",
        "    stops at            </s> (2)",
        "    chat template       none: the model continues text",
        "",
        "  Parameters",
        "    temperature         0.8",
        "    top_k               40",
        "    top_p               0.9",
    ]


@pytest.mark.parametrize("path", ["hf", "meta", "gguf"])
def test_json(stories: Path, path: str) -> None:
    facts = json.loads(invoke(str(stories / path), "--json").stdout)
    assert facts["format"] == path
    assert facts["parameters"] == facts["active_parameters"] == 260032
    assert (facts["context_length"], facts["vocab_size"]) == (512, 512)
    assert facts["stop_tokens"] == {"</s>": 2}


def test_the_stored_type_is_shown_and_what_the_config_makes_of_it(stories: Path, tmp_path: Path) -> None:
    shutil.copytree(stories / "hf", tmp_path, dirs_exist_ok=True)
    tmp_path.chmod(0o755)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("torch_dtype", None)
    for declared, shown in (
        ("float32", "F32"),
        ("bfloat16", "F32 (loaded as BF16, as the config says)"),
        (None, "F32"),
    ):
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": declared}))
        lines = invoke(str(tmp_path)).stdout.splitlines()
        assert f"    quantization        {shown}" in lines


def test_a_licence_file_is_shown(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories / "hf", folder)
    folder.chmod(0o755)
    (folder / "LICENSE.txt").write_text("\nMIT License\n\nCopyright someone\n\nPermission is granted\n")
    assert invoke(str(folder)).stdout.splitlines()[-4:] == [
        "  License",
        "    MIT License",
        "    Copyright someone",
        "    ...",
    ]
    assert invoke(str(folder), "--license").stdout.endswith("Permission is granted\n")


def test_what_is_not_there_is_an_error(stories: Path) -> None:
    for flag, what in (("--license", "licence text"), ("--template", "chat template")):
        result = invoke(str(stories / "hf"), flag)
        assert isinstance(result.exception, PunaError)
        assert str(result.exception) == f"{stories / 'hf'}: no {what} is kept with this model"
    assert "no model '/no/such'" in str(invoke("/no/such").exception)
    assert invoke(str(stories / "hf"), "--json", "--license").exit_code == 2


@pytest.mark.parametrize("model", LINEUP, ids=lambda model: str(model.name))
def test_parameter_counts_are_those_of_the_lineup(model: object) -> None:
    from puna.catalog.lineup import LlamaModel

    assert isinstance(model, LlamaModel)
    counts = count_parameters(LlamaConfig.from_hf(model.hf_config()))
    assert counts == (model.total_parameters, model.active_parameters)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (4_683_073_184, "4.7 GB"), (42 * 10**9, "42 GB")],
)
def test_sizes_are_written_as_ollama_does(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
