"""`puna train` and `puna data preview` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from puna.cli.app import app
from puna.errors import ConfigError, ModelNotFoundError, ParameterError, UnsupportedError
from tiny_chat import EOT
from training_data import tiny_config, write_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    return Path(tiny_config(place).model)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="puna")


def table(text: str) -> dict[str, str]:
    lines = [line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ")]
    return {name: value.strip() for name, value in lines}


def test_a_dry_run_prints_the_plan(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    out = tmp_path / "out"
    result = invoke(
        "train", "--model", model, "--data", data, "--output", out, "--dry-run", "--device", "cpu",
        "--max-length", "96", "--gradient-accumulation-steps", "2", "--lora-r", "4", "--lora-target-modules",
        "q_proj,v_proj", "--warmup-steps", "0.1", "--num-train-epochs", "10",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = table(result.stdout)
    assert rows["model"] == f"{model}, float32 on cpu"
    # 4 * (64 + 64) of q_proj and 4 * (64 + 16) of v_proj, in two layers
    assert rows["method"].startswith("lora, rank 4, alpha 32: 1,664 of ")
    assert rows["data"].startswith("12 rows, ") and "trained (" in rows["data"]
    assert rows["learning rate"].startswith("0.0002, linear, ")
    assert {"weights", "adapter", "gradients", "optimiser", "activations", "loss"} <= rows.keys()
    assert not out.exists()


def test_a_training_from_a_file_and_flags(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    data, out = write_data(tmp_path), tmp_path / "out"
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {model}\ndata: [{data}]\noutput: {tmp_path / 'other'}\ndevice: cpu\nmax_seq_length: 96\n"
        "learning_rate: 5e-3\nlora:\n  r: 2\n  target_modules: [q_proj]\nmax_steps: 2\n"
    )
    result = invoke("train", file, "--output", out, "--lora-alpha", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith(f"wrote {out}: an adapter")
    assert "\nstep 2/2  epoch " in result.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3, ["q_proj"])
    assert config["base_model_name_or_path"] == str(model)
    assert not (tmp_path / "other").exists()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates == pytest.approx([5e-3, 2.5e-3])
    again = invoke("train", file, "--output", out, "--lora-alpha", "3")
    assert isinstance(again.exception, ParameterError) and "holds a training" in str(again.exception)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_type": "hinge"}, UnsupportedError, "loss_type is not supported"),
        ({"optim": "adamw_8bit", "device": "cpu"}, UnsupportedError, "optim 'adamw_8bit' is bitsandbytes'"),
        ({"learning_rat": 5}, ParameterError, "no setting 'learning_rat': did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, ParameterError, "learning_rate must be"),
        ({"max_steps": True}, ParameterError, "is True, where"),
        ({"packing": 1}, ParameterError, "is 1, where true or false is meant"),
        ({"method": "dpo"}, ParameterError, "method is 'dpo'; known are full, lora, qlora"),
        ({"lora": {"rank": 4}}, ParameterError, "lora: no setting 'rank'"),
        ({"max_seq_length": 3, "max_length": 3}, ParameterError, "max_length is there twice"),
        ({"dtype": "float16"}, ParameterError, "dtype is 'float16'"),
        ({"max_length": 5000}, ParameterError, "max_length 5000 is above the model's context of 1024"),
        ({"warmup_steps": 1.5}, ParameterError, "warmup_steps is a share below 1 or a whole number"),
        ({"method": "full", "merge": True}, ParameterError, "merge is for adapters"),
        ({"date": "31.7.2026"}, ParameterError, "it is written like 2026-07-31"),
    ],
)
def test_wrong_settings_are_named(
    model: Path, tmp_path: Path, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    file = tmp_path / "config.json"
    base = {"model": str(model), "data": str(write_data(tmp_path)), "output": str(tmp_path / "out")}
    file.write_text(json.dumps({**base, **settings}))
    result = invoke("train", file, "--dry-run")
    assert isinstance(result.exception, error) and message in str(result.exception)


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    assert isinstance(invoke("train", tmp_path / "no.yaml").exception, ModelNotFoundError)
    (tmp_path / "list.json").write_text("[1]")
    assert isinstance(invoke("train", tmp_path / "list.json").exception, ConfigError)
    missing = invoke("train", "--model", "cria").exception
    assert isinstance(missing, ParameterError) and str(missing) == "data, output: missing"


def test_preview_marks_what_is_trained(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    ask, answer = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "a llama"}
    rows = [{"messages": [ask, answer]}, {"text": "hello"}, {"text": "to the user"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    result = invoke("data", "preview", file, "--model", model, "--rows", "2")
    first, second = result.stdout.split(f"{file}:")[1:]
    assert first.startswith("1: ") and f">>>a llama{EOT}<<<" in first and "user" in first
    assert f">>>hello{EOT}<<<" in second and "2 of 3 rows: " in second and "lengths: " in second
    colored = invoke("data", "preview", file, "--model", model, "--rows", "1", "--color").stdout
    assert f"\x1b[32ma llama{EOT}\x1b[0m" in colored
    assert isinstance(
        invoke("data", "preview", file, "--model", model, "--rows", "-1").exception, ParameterError
    )


def test_preview_begins_anywhere_and_shows_where_rows_are_cut(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("hello", "to the user", "why?")))
    shown = invoke("data", "preview", file, "--model", model, "--start", "2", "--max-length", "3").stdout
    assert "hello" not in shown and f"{file}:2: " in shown and f"{file}:3: " in shown
    tokens = int(shown.split(":2: ")[1].split()[0])
    assert f"<<<[cut: {tokens - 3} more tokens]" in shown
    assert "2 of 3 rows: " in shown and "2 longer than 3 tokens" in shown
    beyond = invoke("data", "preview", file, "--model", model, "--start", "4").exception
    assert isinstance(beyond, ParameterError) and "start is 4, and " in str(beyond)


def test_preview_names_the_answers_of_a_pair(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "why", "chosen": " llama", "rejected": " hello"}))
    shown = invoke("data", "preview", file, "--model", model).stdout
    assert f"{file}:1, chosen: " in shown and f"{file}:1, rejected: " in shown
    assert f">>> llama{EOT}<<<" in shown and f">>> hello{EOT}<<<" in shown and "1 of 1 rows" in shown


def test_a_dry_run_estimates_the_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.time_estimate.estimate_seconds", lambda plan: 123.4)
    arguments = ("train", "--model", model, "--data", write_data(tmp_path), "--output", tmp_path / "out")
    result = invoke(*arguments, "--dry-run", "--device", "cpu")
    assert table(result.stdout)["time"] == "about 2:03, an estimate from one layer, measured now"
    monkeypatch.setattr("puna.train.time_estimate.estimate_seconds", lambda plan: None)
    shown = invoke(*arguments, "--dry-run", "--device", "cpu").stdout
    assert table(shown)["time"] == "not estimated; the first steps tell"


def test_samples_and_measurements_are_printed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(
        "train", "--model", model, "--data", write_data(tmp_path), "--output", out, "--device", "cpu",
        "--max-steps", "2", "--eval-split", "0.3", "--eval-steps", "1", "--eval-on-start", "--sample-prompts",
        "hello", "--sample-max-tokens", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    measured = [line.split()[1] for line in lines if line.startswith("step ") and "  measured  " in line]
    assert measured == ["0/2", "1/2", "2/2"]
    assert len([line for line in lines if "  sample  hello  ->  " in line]) == 3
    assert lines[-2].startswith(f"report: {out / 'report.html'}") and lines[-1].startswith("wrote ")
