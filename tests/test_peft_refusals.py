"""What adapters refuse, and what they say: configs, targets, files that do not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.auto_model import CausalLM
from puna.errors import CheckpointError, ConfigError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.peft_model import PeftModel, get_peft_model

from tiny import hf_llama, puna_twin


@pytest.fixture
def ours() -> PeftModel:
    return get_peft_model(CausalLM(puna_twin(hf_llama())), LoraConfig(r=4))


def test_unknown_keys_are_named_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = LoraConfig.from_dict(
            {"peft_type": "LORA", "target_modules": ["q_proj"], "zebra": 1, "ant": None}
        )
    assert config.r == 8 and "ant, zebra" in caplog.text


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
        ({"layer_replication": [[0, 1]]}, UnsupportedError, "layer_replication"),
        ({"init_lora_weights": "loftq"}, UnsupportedError, "loftq"),
        ({"r": 0}, ConfigError, "positive"),
        ({"target_modules": "a|b", "layers_to_transform": 1}, ConfigError, "layers_to_transform"),
        ({"layers_pattern": "h"}, ConfigError, "layers_to_transform"),
        ({"bias": "some"}, ConfigError, "some"),
        ({"lora_alpha": "x"}, ConfigError, "alpha must be a number"),
        ({"alpha_pattern": {"q": "x"}}, ConfigError, "alpha must be a number"),
        ({"rank_pattern": [1]}, ConfigError, "rank_pattern must map"),
        ({"target_modules": "(q"}, ConfigError, "regular expression"),
    ],
)
def test_bad_configs(values: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LoraConfig.from_dict(values)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"target_modules": ["zebra"]}, ParameterError, "zebra"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["zebra"]}, ParameterError, "zebra"),
        ({"target_modules": ["q_proj", "mlp"]}, UnsupportedError, "mlp"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [-1]}, ParameterError, "-1"),
        ({"init_lora_weights": "orthogonal", "r": 3}, ParameterError, "even rank"),
        ({"init_lora_weights": "eva"}, UnsupportedError, "eva"),
        ({"init_lora_weights": "mica"}, UnsupportedError, "mica"),
    ],
)
def test_a_refused_adapter_leaves_nothing_behind(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    network = puna_twin(hf_llama(tie_word_embeddings=True))
    before = list(network.state_dict())
    with pytest.raises(error, match=text):
        get_peft_model(network, LoraConfig(**settings))
    assert list(network.state_dict()) == before and network.lm_head is None
    get_peft_model(network, LoraConfig())


def test_how_an_adapter_began_does_not_keep_it_from_being_read(saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "eva"}))
    read = PeftModel.from_pretrained(puna_twin(hf_llama()), saved)
    assert read.peft_config["default"].init_lora_weights == "eva"


@pytest.fixture
def saved(ours: PeftModel, tmp_path: Path) -> Path:
    ours.save_pretrained(tmp_path)
    return tmp_path


def test_files_that_do_not_fit(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wrong shape.*expected \[4, 48\]"):
        PeftModel.from_pretrained(puna_twin(hf_llama(hidden_size=48)), saved)
    model = puna_twin(hf_llama(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="unexpected"):
        PeftModel.from_pretrained(model, saved)
    assert not any("lora" in key for key in model.state_dict())
    with pytest.raises(ModelNotFoundError, match="adapter_config"):
        PeftModel.from_pretrained(model, saved / "nowhere")


def test_a_readme_that_is_there_is_kept(ours: PeftModel, saved: Path) -> None:
    assert "library_name: peft" in (saved / "README.md").read_text()
    (saved / "README.md").write_text("mine")
    ours.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"


def test_a_file_cannot_change_other_weights(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "adapter_model.safetensors"
    network = puna_twin(hf_llama())
    before = network.model.norm.weight.clone()
    save_file(load_file(path) | {"base_model.model.model.norm.weight": torch.zeros(64)}, path)
    with pytest.raises(CheckpointError, match="unexpected: model.norm.weight"):
        PeftModel.from_pretrained(network, saved)
    assert torch.equal(network.model.norm.weight, before)


def test_names_of_other_tools_are_read(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "adapter_model.safetensors")
    renamed = {
        key.replace("base_model.model.model.", "base_model.model.model.language_model.").replace(
            ".weight", ".default.weight"
        ): value
        for key, value in tensors.items()
    }
    save_file(renamed, saved / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(puna_twin(hf_llama()), saved)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(model.state_dict()[f"{key}.default.weight"], tensors[f"{key}.weight"])
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    old = PeftModel.from_pretrained(puna_twin(hf_llama()), saved)
    assert torch.equal(old.state_dict()[f"{key}.default.weight"], tensors[f"{key}.weight"])
