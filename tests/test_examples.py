"""The examples run, are short, and the web guides' Transformers code runs with its import line changed."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

from puna.locate import find_model
from tiny_chat import save_chat_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# As published, but for the first line and the model's name.
GUIDE = """
from puna import AutoTokenizer, AutoModelForCausalLM
import torch
model_id = MODEL
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    torch_dtype=torch.bfloat16,
    device_map="auto"
)
messages = [
    {"role": "user", "content": "Explain quantum computing"}
]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt")
outputs = model.generate(inputs, max_new_tokens=512)
print(tokenizer.decode(outputs[0]))
"""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat_model"))


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "guide", "exec"), {})
    return out.getvalue()


def test_the_guides_example_prints_what_transformers_prints(chat_model: Path) -> None:
    ours = printed(GUIDE.replace("MODEL", repr(str(chat_model))).replace("bfloat16", "float32"))
    theirs = GUIDE.replace("from puna", "from transformers").replace("(inputs,", "(**inputs,")
    expected = printed(
        theirs.replace("MODEL", repr(str(chat_model))).replace("torch.bfloat16", "torch.float32")
    )
    assert ours == expected and "Explain quantum computing<|eot_id|>" in ours


@pytest.mark.parametrize("name", ["tiny", "cria"])
def test_the_guides_example_runs_as_it_is(chat_model: Path, name: str) -> None:
    text = printed(GUIDE.replace("MODEL", repr(_model(name, chat_model))))
    assert "Explain quantum computing" in text


@pytest.mark.parametrize("name", ["tiny", "cria"])
def test_transformers_style(
    chat_model: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / "transformers_style.py"
    monkeypatch.setattr(sys, "argv", [str(path), _model(name, chat_model)])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert "What do llamas eat?" in out and "Llamas are" in out and "The puna is a high" in out


def _model(name: str, chat_model: Path) -> str:
    if name == "tiny":
        return str(chat_model)
    try:
        shipped = (find_model(name) / "model.safetensors").is_file()
    except ImportError:
        shipped = False
    if not shipped:
        pytest.skip("the embedded model is not in this source tree")
    return name


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
