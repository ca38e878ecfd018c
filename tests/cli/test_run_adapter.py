"""`puna run --adapter`: the answers of the merged model, over any base, and what the chat says of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from puna import AutoModelForCausalLM, LoraConfig, get_peft_model
from puna.cli.app import app
from puna.cli.chat_commands import ChatCommands
from puna.cli.chat_state import ChatState, ModelOptions
from puna.cli.terminal import Terminal
from puna.errors import CheckpointError, ModelNotFoundError

GREEDY = ("--temperature", "0", "--max-tokens", "24")
KINDS: dict[str, dict[str, Any]] = {
    "by rows": {"target_modules": "all-linear"},
    "put into the model": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


def save(stories: Path, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories / "hf"), config)
    if config.modules_to_save:
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input="", prog_name="puna")


@pytest.mark.parametrize("base", ["hf", "gguf/stories260k-f32.gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_as_the_merged_model(stories: Path, tmp_path: Path, kind: str, base: str) -> None:
    adapter = save(stories, tmp_path / "adapter", **KINDS[kind])
    merged = invoke("merge", stories / "hf", adapter, tmp_path / "merged", "--no-check")
    assert merged.stdout == f"wrote {tmp_path / 'merged'}: {stories / 'hf'} with {adapter} in its weights\n"
    expected = invoke("run", tmp_path / "merged", "Once upon", *GREEDY).stdout
    assert expected != invoke("run", stories / "hf", "Once upon", *GREEDY).stdout
    found = invoke("run", stories / base, "Once upon", *GREEDY, "--adapter", adapter)
    assert (found.stdout, found.stderr) == (expected, "")


def test_what_is_wrong_is_found_before_the_weights_are_read(stories: Path, tmp_path: Path) -> None:
    missing = invoke("run", stories / "hf", "a", "--adapter", tmp_path / "no")
    assert isinstance(missing.exception, ModelNotFoundError) and "loading adapter 'no'" in str(
        missing.exception
    )
    adapter = save(stories, tmp_path / "adapter", target_modules=["q_proj"])
    other = invoke("run", "cria", "a", "--adapter", adapter)
    assert isinstance(other.exception, CheckpointError) and "do not fit the model" in str(other.exception)


def test_the_chat_shows_the_adapter_and_leaves_it_with_its_model(stories: Path, tmp_path: Path) -> None:
    adapter = save(stories, tmp_path / "adapter", target_modules=["q_proj"])
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out=out, err=err, columns=lambda: None)
    state = ChatState(terminal, ModelOptions(adapter=str(adapter)))
    state.load(stories / "hf")
    commands = ChatCommands(state, lambda on: None)
    commands.obey("/show info")
    shown = out.getvalue()
    assert "  Adapter\n" in shown and "    rank          4\n" in shown
    commands.obey("/show modelfile")
    assert f"FROM {stories / 'hf'}\nADAPTER {adapter}\n" in out.getvalue()
    commands.obey(f"/load {stories / 'hf'}")
    assert state.options.adapter == str(adapter)
    commands.obey(f"/load {stories / 'gguf' / 'stories260k-f32.gguf'}")
    assert state.options.adapter is None
    assert f"[the adapter {adapter} stays behind with its model]" in err.getvalue()
