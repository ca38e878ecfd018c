"""The plan's numbers are those of the training: parameters of real adapters, and what torch really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import ParameterError, UnsupportedError
from puna.model.llama import Llama
from puna.model.lora_config import LoraConfig
from puna.peft_model import get_peft_model
from puna.train.base_model import gradient_checkpointing, load_base
from puna.train.encoding import Example
from puna.train.losses import batch_loss
from puna.train.packing import Batch
from puna.train.train_config import DEFAULT_LORA, TrainConfig
from puna.train.training_memory import activation_bytes, count_trained
from puna.train.training_plan import make_plan
from puna.weights.loader import empty_model, open_checkpoint
from training_data import tiny_config

from tiny import hf_llama, hf_llama4, puna_twin


def config_with(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": None},
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"], "bias": "all", "lora_bias": True, "layers_to_transform": 1},
        {"target_modules": r".*(k|down)_proj", "modules_to_save": ["norm"]},
        {"trainable_token_indices": [1, 5], "bias": "lora_only"},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_trained_parameters(lora: dict[str, Any], tied: bool) -> None:
    settings = replace(DEFAULT_LORA, **lora)
    network = puna_twin(hf_llama(tie_word_embeddings=tied, attention_bias=True))
    expected = count_trained(empty_model(network.config), config_with(lora=settings))
    assert get_peft_model(network, settings).get_nb_trainable_parameters()[0] == expected


def test_trained_parameters_of_experts_and_of_a_whole_model() -> None:
    network = puna_twin(hf_llama4())
    settings = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    expected = count_trained(empty_model(network.config), config_with(lora=settings))
    assert get_peft_model(network, settings).get_nb_trainable_parameters()[0] == expected
    plain = puna_twin(hf_llama(tie_word_embeddings=True))
    assert count_trained(empty_model(plain.config), config_with(method="full")) == plain.num_parameters()


def kept_bytes(network: Llama, tokens: int, *, checkpointing: bool) -> int:
    """Count what autograd keeps between the two passes, parameters aside; storages once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    ids = torch.randint(90, (tokens,)).tolist()
    batch = Batch.of([Example(place="", ids=ids, trained=[i == tokens - 1 for i in range(tokens)])])
    with (
        gradient_checkpointing(network, enabled=checkpointing),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        batch_loss(network, batch)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SIZES = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 4, "num_attention_heads": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_are_what_torch_keeps(dtype: torch.dtype, method: str) -> None:
    network = puna_twin(hf_llama(**SIZES)).to(dtype).requires_grad_()
    if method == "lora":
        get_peft_model(network, DEFAULT_LORA)
    config = config_with(method=method, gradient_checkpointing=False)
    expected = activation_bytes(network, config, dtype, 128)
    kept = kept_bytes(network, 128, checkpointing=False)
    assert 0.9 < expected / kept < 1.25, (expected, kept, expected / kept)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    network = puna_twin(hf_llama(**SIZES)).requires_grad_()
    config = config_with(method="full")
    inputs = kept_bytes(network, 128, checkpointing=True)
    layer = kept_bytes(puna_twin(hf_llama(**{**SIZES, "num_hidden_layers": 1})).requires_grad_(), 128,
                       checkpointing=False)  # fmt: skip
    assert 0.9 < activation_bytes(network, config, torch.float32, 128) / (inputs + layer) < 1.25


def test_a_plan_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    monkeypatch.setattr("puna.train.training_plan.free_on", lambda device: 1_000_000)
    monkeypatch.setattr("puna.train.trainer.load_base", lambda *args, **kwargs: pytest.fail("loaded"))
    from puna.train.trainer import Trainer

    with pytest.raises(ParameterError, match=r"needs about 0.0 GB of memory, most of it for \w+, and 0.0 GB"):
        Trainer(config).train()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_weights_of_a_plan(tmp_path: Path, method: str) -> None:
    config = tiny_config(tmp_path, method=method)
    plan = make_plan(config)
    network = load_base(config, plan.checkpoint, dtype=plan.dtype, device=plan.device)
    tensors = [*network.parameters(), *network.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if method == "qlora":
        held += 4 * max(parameter.numel() for parameter in network.parameters())
    assert plan.memory["weights"] == pytest.approx(held, rel=0.05)
    assert plan.trained_parameters * 4 * 2 == plan.memory["optimiser"]


def test_models_that_a_method_cannot_take(stories: Path, tmp_path: Path) -> None:
    gguf = next((stories / "gguf").glob("*.gguf"))
    config = tiny_config(tmp_path, model=str(gguf), method="full")
    with pytest.raises(UnsupportedError, match="'full' writes a Hugging Face folder"):
        make_plan(config)
    with pytest.raises(UnsupportedError, match="merge writes a Hugging Face folder"):
        make_plan(replace(config, method="lora", merge=True))
    with pytest.raises(UnsupportedError, match="is quantised already: use method 'lora'"):
        make_plan(replace(config, method="qlora"))
    assert open_checkpoint(gguf).format == "gguf"


def test_dtypes_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.cria import FOLDER
    from puna.train.base_model import choose_compute_dtype, choose_dtype

    checkpoint, cpu, gpu = open_checkpoint(FOLDER), torch.device("cpu"), torch.device("cuda")
    assert checkpoint.dtype == torch.bfloat16
    whole = config_with(method="full", dtype="bfloat16")
    assert choose_dtype(config_with(), checkpoint) == choose_dtype(whole, checkpoint) == torch.bfloat16
    assert choose_dtype(config_with(method="full"), checkpoint) == torch.float32
    assert choose_dtype(config_with(dtype="float32"), checkpoint) == torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("puna.train.base_model.is_native", lambda dtype, native=native: native)
        assert choose_compute_dtype(config_with(), checkpoint, torch.bfloat16, cpu) == expected
        assert choose_compute_dtype(config_with(), checkpoint, torch.bfloat16, gpu) == torch.bfloat16
        assert choose_compute_dtype(whole, checkpoint, torch.bfloat16, cpu) == torch.bfloat16
