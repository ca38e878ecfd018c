"""`puna merge` and `puna export`: what is written answers as the adapter does, and says so itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from puna import AutoModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from puna.cli.app import app
from puna.cli.model_card import merged_card
from puna.cria import FOLDER as CRIA
from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.export_check import Agreement
from puna.gguf_header import read_metadata
from puna.text.formats import BUILT_IN
from puna.text.tokenizer import load_tokenizer
from puna.weights.adapter_open import open_adapter
from puna.weights.loader import load_model, open_checkpoint

pytestmark = pytest.mark.slow  # together they take long

SAME = "are the same"
LLAMA_CPP = os.environ.get("PUNA_LLAMA_CPP", "")  # a folder with llama.cpp's programs


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="puna")


def save(base: Path, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "init_lora_weights": False, **settings})
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(stories: Path, tmp_path: Path) -> Path:
    return save(stories / "hf", tmp_path / "adapter", target_modules="all-linear", use_rslora=True)


def test_merge(stories: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = invoke("merge", stories / "hf", adapter, out)
    first, second = done.stdout.splitlines()
    assert first == f"wrote {out}: {stories / 'hf'} with {adapter} in its weights"
    assert second.startswith("checked: 4 answers of 128 tokens are the same")
    whole = PeftModel.from_pretrained(load_model(stories / "hf"), adapter).merge_and_unload().state_dict()
    for name, tensor in load_model(out).state_dict().items():
        torch.testing.assert_close(tensor, whole[name], atol=2e-6, rtol=1e-5)
    assert (out / "tokenizer.json").is_file() or (out / "tokenizer.model").is_file()
    card = (out / "README.md").read_text()
    assert "\nbase_model: 'hf'\nbase_model_relation: finetune\n" in card and "rank 4, alpha 4" in card
    assert isinstance(invoke("merge", stories / "hf", adapter, out).exception, ParameterError)


def test_a_trained_template_goes_along(tmp_path: Path) -> None:
    adapter = save(CRIA, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "chat_template.jinja").write_text(BUILT_IN["llama3.1"])
    done = invoke("merge", "cria", adapter, tmp_path / "merged")
    assert SAME in done.stdout
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == BUILT_IN["llama3.1"]
    file, modelfile = tmp_path / "x.gguf", tmp_path / "Modelfile"
    done = invoke("export", "cria", "--adapter", adapter, "--gguf", file, "--modelfile", modelfile)
    assert SAME in done.stdout
    assert read_metadata(file)["tokenizer.chat_template"] == BUILT_IN["llama3.1"]
    text = modelfile.read_text()
    assert text.startswith(f'FROM {file}\nTEMPLATE """<|start_header_id|>system<|end_header_id|>\n\nCutting')
    assert text.endswith(
        '"""\nPARAMETER stop <|end_of_text|>\nPARAMETER stop <|eom_id|>\nPARAMETER stop <|eot_id|>\n'
    )


@pytest.mark.parametrize("kind", [None, "f16", "q8_0"])
def test_export_gguf(stories: Path, adapter: Path, tmp_path: Path, kind: str | None) -> None:
    out = tmp_path / "x.gguf"
    chosen = () if kind is None else ("--type", kind)
    done = invoke("export", stories / "hf", "--adapter", adapter, "--gguf", out, *chosen)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("checked: 4 answers of 128 tokens")
    if kind is None:
        assert SAME in last
    facts = json.loads(invoke("show", out, "--json").stdout)
    assert facts["quantization"] == {None: "F32", "f16": "F16", "q8_0": "Q8_0"}[kind]
    metadata = read_metadata(out)
    assert metadata["general.name"] == "x" and metadata["general.base_model.0.name"] == "hf"
    whole = PeftModel.from_pretrained(load_model(stories / "hf"), adapter).merge_and_unload().state_dict()
    if kind is None:
        for name, tensor in load_model(out).state_dict().items():
            torch.testing.assert_close(tensor, whole[name], atol=2e-6, rtol=1e-5)


def test_export_without_an_adapter(tmp_path: Path) -> None:
    done = invoke("export", "cria", "--gguf", tmp_path / "x.gguf", "--modelfile", tmp_path / "Modelfile")
    assert SAME in done.stdout
    assert read_metadata(tmp_path / "x.gguf")["tokenizer.chat_template"] == load_tokenizer(CRIA).chat_template
    assert "TEMPLATE" in (tmp_path / "Modelfile").read_text()


def test_export_an_adapter_alone(stories: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = invoke("export", stories / "hf", "--adapter", adapter, "--gguf-adapter", out)
    assert done.stdout.splitlines()[0].startswith(f"wrote {out}: an adapter of 35 modules, 0.")
    assert SAME in done.stdout
    base = stories / "gguf" / "stories260k-f32.gguf"
    options = ("Once upon", "--temperature", "0", "--max-tokens", "16", "--adapter")
    assert (
        invoke("run", base, *options, out).stdout == invoke("run", stories / "hf", *options, adapter).stdout
    )


def test_a_quantised_base_is_not_quantised_again_unasked(
    stories: Path, adapter: Path, tmp_path: Path
) -> None:
    packed, out = tmp_path / "q8.gguf", tmp_path / "x.gguf"
    assert invoke("quantize", stories / "hf", packed, "--type", "q8_0").exit_code == 0
    only_q = save(stories / "hf", tmp_path / "q", target_modules=["q_proj"])
    assert "say with --type" in str(invoke("export", packed, "--gguf", out).exception)
    refused = invoke("export", packed, "--adapter", only_q, "--gguf", out, "--type", "q4_0")
    assert isinstance(refused.exception, ParameterError) and "is quantised already" in str(refused.exception)
    assert not out.exists()
    # what keeps its type is copied, and what was merged is whole
    done = invoke("export", packed, "--adapter", only_q, "--gguf", out, "--type", "q8_0")
    assert done.exit_code == 0 and "checked: 4 answers" in done.stdout
    one, other = (dict(open_checkpoint(file).tensors()) for file in (packed, out))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one[name].data, other[name].data)


def test_wrong_use(stories: Path, adapter: Path, tmp_path: Path) -> None:
    for arguments in ((), ("--gguf", "a.gguf", "--gguf-adapter", "b.gguf")):
        assert "give --gguf FILE or" in str(invoke("export", stories / "hf", *arguments).exception)
    taken = tmp_path / "taken.gguf"
    taken.touch()
    assert "is there already" in str(invoke("export", stories / "hf", "--gguf", taken).exception)
    alone = invoke("export", stories / "hf", "--gguf-adapter", tmp_path / "x.gguf")
    assert "needs --adapter" in str(alone.exception)
    base = stories / "gguf" / "stories260k-f32.gguf"
    refused = invoke("merge", base, adapter, tmp_path / "out")
    assert isinstance(refused.exception, UnsupportedError) and "puna export --gguf" in str(refused.exception)


def test_the_card_names_the_duties_of_the_licence(stories: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "Llama-3.1-8B"
    base.mkdir()
    (base / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date")
    opened = open_adapter(adapter, open_checkpoint(stories / "hf").config)
    card = merged_card(base, opened)
    assert "\nlicense: llama3.1\n" in card and '- Start the name of the model with "Llama".' in card


@pytest.mark.skipif(not LLAMA_CPP, reason="PUNA_LLAMA_CPP names no folder with llama.cpp's programs")
def test_llama_cpp_sees_the_same_perplexity(stories: Path, adapter: Path, tmp_path: Path) -> None:
    base = stories / "gguf" / "stories260k-f32.gguf"
    merged, alone = tmp_path / "merged.gguf", tmp_path / "alone.gguf"
    assert invoke("export", stories / "hf", "--adapter", adapter, "--gguf", merged).exit_code == 0
    assert invoke("export", stories / "hf", "--adapter", adapter, "--gguf-adapter", alone).exit_code == 0
    text = tmp_path / "text.txt"
    text.write_text((stories / "golden.txt").read_text() * 8)

    def perplexity(*arguments: str | Path) -> float:
        options = ["-f", text, "-c", "128", "-b", "128", "--chunks", "4", "-t", "1"]
        command = [f"{LLAMA_CPP}/llama-perplexity", *options, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=60)
        found = re.findall(r"\[(\d+)\]([\d.]+)", done.stdout)  # its last lines may get lost when it ends
        return float(dict(found)["3"])

    plain, beside, inside = (
        perplexity("-m", base),
        perplexity("-m", base, "--lora", alone),
        perplexity("-m", merged),
    )
    assert beside == pytest.approx(inside, rel=2e-3) and abs(plain - inside) > 0.1 * plain


def test_a_written_model_that_is_another_is_an_error() -> None:
    near = Agreement(num_prompts=4, num_tokens=100, num_same=97, divergence=0.001)
    near.require(Path("out"))
    for divergence in (0.9, float("nan")):
        far = Agreement(num_prompts=4, num_tokens=100, num_same=3, divergence=divergence)
        with pytest.raises(CheckpointError, match="out.*does not answer"):
            far.require(Path("out"))
