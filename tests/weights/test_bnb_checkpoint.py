"""Folders that Transformers saved with weights packed by bitsandbytes, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.auto_model import CausalLM
from puna.errors import CheckpointError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.peft_model import get_peft_model
from puna.weights.hf import HfCheckpoint
from puna.weights.int8 import Int8Linear
from puna.weights.loader import load_model
from puna.weights.nf4 import FourBitLinear
from puna.weights.write_hf import write_hf

from tiny import hf_llama

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes and Transformers

IDS = torch.tensor([[1, 5, 9, 33, 2, 8, 11, 70]])
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    """Let Transformers pack a tiny model; return its model and the folder that it saved."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    hf_llama().save_pretrained(folder / "whole")
    config = BitsAndBytesConfig(**SETTINGS[name])
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(folder / "packed")
    return theirs, folder / "packed"


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs, folder = saved(name, tmp_path)
    network = load_model(folder)
    kind = Int8Linear if name == "int8" else FourBitLinear
    assert sum(isinstance(module, kind) for module in network.modules()) == 14
    for path, module in theirs.named_modules():
        if name == "int8" and type(module).__name__ == "Linear8bitLt":
            ours = network.get_submodule(path)
            assert isinstance(ours, Int8Linear) and torch.equal(ours.packed, module.weight.data)
    model = CausalLM(network)
    expected = theirs(input_ids=IDS).logits
    error = (model(input_ids=IDS).logits - expected).norm() / expected.norm()
    assert error < (0.03 if name == "int8" else 1e-5)  # LLM.int8() rounds activations too; we do not
    kinds = {"nf4 double": "NF4", "fp4": "FP4", "int8": "INT8"}
    assert HfCheckpoint(folder).packed.kind == kinds[name]
    assert model.num_parameters() == hf_llama().num_parameters()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    assert sum(".lora_A." in key for key in adapted.state_dict()) == 14
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    whole = adapted.merge_and_unload()
    write_hf(whole.llama, folder, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = CausalLM(load_model(tmp_path / "merged"))
    assert torch.equal(again(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_packed_weights_are_not_written(tmp_path: Path) -> None:
    _, folder = saved("fp4", tmp_path)
    with pytest.raises(UnsupportedError, match="quantised weights"):
        write_hf(load_model(folder), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged(tmp_path: Path) -> None:
    _, folder = saved("nf4 double", tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weight = "model.layers.0.mlp.up_proj.weight"

    def check(changes: dict[str, torch.Tensor], without: str, text: str) -> None:
        changed = {key: value for key, value in (tensors | changes).items() if key != without}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=text):
            load_model(folder)

    check({f"{weight}.absmax": torch.zeros(3, dtype=torch.uint8)}, "", r"up_proj.*absmax has 3 bytes")
    check({weight: tensors[weight][:-1]}, "", r"up_proj.*bytes, and needs")
    check({}, weight, "up_proj.weight is missing")
    state = f"{weight}.quant_state.bitsandbytes__nf4"
    values = json.loads(bytes(tensors[state].tolist()))
    for change, text in (
        ({"dtype": "load"}, "dtype 'load'"),
        ({"dtype": []}, "dtype"),
        ({"shape": [64, 80]}, "wrong shape.*up_proj"),
        ({"shape": "x"}, "shape 'x'"),
    ):
        raw = torch.tensor(list(json.dumps(values | change).encode()), dtype=torch.uint8)
        check({state: raw}, "", text)
