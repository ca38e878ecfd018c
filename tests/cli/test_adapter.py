"""`puna adapter` and `puna merge` on stories260k, read again by PEFT and Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from puna import AutoModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from puna.cli.app import app
from puna.errors import ModelNotFoundError, ParameterError
from puna.weights.write_hf import write_hf

IDS = torch.tensor([[1, 403, 407, 261]])


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)], prog_name="puna")


@pytest.fixture
def trained(stories: Path) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, alpha_pattern={"k_proj": 2},
        target_modules=["q_proj", "k_proj"], layers_to_transform=[0, 1, 3], modules_to_save=["norm"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(AutoModelForCausalLM.from_pretrained(stories / "hf"), config)


@pytest.fixture
def folder(trained: PeftModel, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: object) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits  # type: ignore[operator]
    return out.detach()


def test_inspect(folder: Path, stories: Path) -> None:
    lines = invoke("inspect", folder).stdout.splitlines()
    assert lines == [
        "  format        peft",
        f"  base model    {stories / 'hf'}",
        "  rank          4",
        "  alpha         6",
        "  scale         1, 3 (rsLoRA)",
        "  modules       k_proj (3), q_proj (3)",
        "  layers        0-1, 3",
        "  parameters    3,392 (2,688 LoRA, 704 whole weights)",
        "  stored as     float32, 13,568 bytes",
    ]
    facts = json.loads(invoke("inspect", folder, "--json").stdout)
    assert (facts["scales"], facts["layers"], facts["tool"]) == ([1.0, 3.0], [0, 1, 3], "peft")


def test_convert(stories: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "mlx", tmp_path / "peft"
    source.mkdir()
    a, b = torch.randn(64, 3), torch.randn(3, 64)
    name = "model.layers.2.self_attn.q_proj"
    save_file({f"{name}.lora_a": a, f"{name}.lora_b": b}, source / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 10.0, "dropout": 0.0}}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    result = invoke("convert", source, out, "--model", stories / "hf")
    assert result.stdout == f"wrote {out}: 2 tensors, rank 3, alpha 30\n"
    tensors = load_file(out / "adapter_model.safetensors")
    assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], a.T)
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], b.T)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 30, ["q_proj"])
    assert isinstance(config["lora_alpha"], int)
    assert (config["layers_to_transform"], config["base_model_name_or_path"]) == ([2], str(stories / "hf"))
    assert isinstance(invoke("convert", source, out).exception, ParameterError)


@pytest.mark.filterwarnings("ignore")  # of Transformers
def test_merge(trained: PeftModel, folder: Path, stories: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["merge", str(stories / "hf"), str(folder), str(out)], prog_name="puna")
    assert "checked: 4 answers of 128 tokens are the same" in done.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = logits(trained.eval())
    torch.testing.assert_close(logits(theirs), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=2e-4, rtol=1e-4
    )
    assert (out / "tokenizer.json").is_file() or (out / "tokenizer.model").is_file()
    assert not list(tmp_path.glob(".*"))


def test_shards_are_read_again(stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories / "hf")
    write_hf(model.llama, stories / "hf", tmp_path / "out", max_shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ParameterError, match="already"):
        write_hf(model.llama, stories / "hf", tmp_path / "out")


def test_no_adapter(stories: Path) -> None:
    assert isinstance(invoke("inspect", stories / "hf").exception, ModelNotFoundError)
