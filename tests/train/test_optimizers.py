"""What moves, at which rate, when: LoRA+, rates by width, other AdamWs, steps within the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.errors import MissingExtraError, ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.peft_model import create_loraplus_optimizer, get_peft_model
from puna.train import optimizers
from puna.train.methods import auto_learning_rate
from puna.train.optimizers import load_moments, make_optimizer, require_optimizer, set_rates
from puna.train.train_config import TrainConfig
from puna.train.trainer import StepMetrics, Trainer
from puna.train.training_plan import make_plan
from puna.weights.loader import load_model
from training_data import tiny_config

from tiny import hf_llama, puna_twin

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def config_with(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})


def run(folder: Path, name: str, **changes: Any) -> list[StepMetrics]:
    seen: list[StepMetrics] = []
    Trainer(tiny_config(folder, output=str(folder / name), **changes), on_step=seen.append).train()
    return seen


def test_lora_plus_groups_are_those_of_peft() -> None:
    targets = ["q_proj", "embed_tokens"]
    settings = LoraConfig(r=4, target_modules=targets, lora_bias=False, modules_to_save=["norm"])
    network = puna_twin(hf_llama())
    model = get_peft_model(network, settings)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours = make_optimizer(network, config_with(learning_rate=1e-3, loraplus_lr_ratio=16, weight_decay=0.1))

    def settings_of(optimizer: Any) -> dict[int, tuple[float, float]]:
        groups = optimizer.param_groups
        return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    found, expected = settings_of(ours), settings_of(theirs)
    assert found.keys() == expected.keys()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = expected[id(parameter)]
        # PEFT lets the weights of norms decay, where Transformers and Puna do not.
        assert found[id(parameter)] == pytest.approx((rate, 0.0 if parameter.ndim == 1 else decay)), name
    assert sorted({rate for rate, _ in found.values()}) == pytest.approx([1e-6, 1e-3, 16e-3])
    set_rates(ours, 0.5)
    assert sorted({rate for rate, _ in settings_of(ours).values()}) == pytest.approx([5e-7, 5e-4, 8e-3])


def test_lora_plus_moves_b_faster(tmp_path: Path) -> None:
    changes = {"lora": LORA, "learning_rate": 1e-3, "max_steps": 1, "warmup_steps": 0}
    run(tmp_path, "plain", **changes)
    run(tmp_path, "plus", loraplus_lr_ratio=8.0, **changes)
    from safetensors.torch import load_file

    plain, plus = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "plus"))
    for name, value in plain.items():
        factor = 8 if "lora_B" in name else 1  # AdamW's first step is the rate, whatever the gradient
        torch.testing.assert_close(plus[name], value * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden_size", "rate"), [(2048, 4.9e-4), (3072, 3.6e-4), (4096, 2.9e-4), (8192, 1.7e-4)]
)
def test_rates_by_width(hidden_size: int, rate: float) -> None:
    assert auto_learning_rate("lora", hidden_size) == pytest.approx(rate, rel=0.03)
    assert auto_learning_rate("full", hidden_size) == auto_learning_rate("qlora", hidden_size) / 10


def test_an_automatic_rate_is_a_number_in_the_plan(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{"learning_rate": "auto"})
    assert make_plan(config).config.rate == pytest.approx(5e-4 * (2000 / 64) ** 0.781)
    assert TrainConfig.from_dict({**config.to_dict(), "learning_rate": "auto"}).learning_rate == "auto"
    with pytest.raises(ParameterError, match="learning_rate must be a number"):
        config_with(learning_rate="fast")
    with pytest.raises(ParameterError, match="weight_decay must be a number"):
        config_with(weight_decay="auto")
    with pytest.raises(ParameterError, match="'auto' is for objective sft"):
        config_with(learning_rate="auto", objective="dpo")


def test_unfused_adamw_is_the_same(tmp_path: Path) -> None:
    changes = {"lora": LORA, "learning_rate": 1e-2}
    fused = run(tmp_path, "fused", **changes)
    plain = run(tmp_path, "plain", optim="adamw_torch", **changes)
    assert [m.loss for m in plain] == pytest.approx([m.loss for m in fused], rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_steps_within_the_backward_pass_end_in_the_same_bits(tmp_path: Path, tied: bool) -> None:
    changes: dict[str, Any] = {"method": "full", "learning_rate": 1e-2, "weight_decay": 0.1}
    changes |= {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "max_steps": 5}
    if tied:
        hf_llama(tie_word_embeddings=True, vocab_size=512).save_pretrained(tmp_path / "tied")
        for path in (Path(tiny_config(tmp_path).model)).iterdir():
            if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
                (tmp_path / "tied" / path.name).write_bytes(path.read_bytes())
        changes["model"] = str(tmp_path / "tied")
    after = run(tmp_path, "after", **changes)
    within = run(tmp_path, "within", optimizer_in_backward=True, **changes)
    assert [m.loss for m in within] == [m.loss for m in after]
    assert [m.grad_norm for m in within] == pytest.approx([m.grad_norm for m in after], rel=1e-5)
    ours, theirs = load_model(tmp_path / "within"), load_model(tmp_path / "after")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def test_gradients_are_gone_within_the_backward_pass() -> None:
    network = puna_twin(hf_llama()).requires_grad_()
    config = config_with(
        method="full", optimizer_in_backward=True, gradient_accumulation_steps=1, max_grad_norm=0
    )
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    make_optimizer(network, config)
    ids = torch.arange(6)
    from puna.model.attention import PackedAttention

    network(ids, ids, PackedAttention([0, 6])).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters() if p.ndim > 1)


def test_going_on_by_force_takes_the_new_settings() -> None:
    network = puna_twin(hf_llama())
    get_peft_model(network, LORA)
    before = make_optimizer(network, config_with(weight_decay=0.1, learning_rate=1e-3))
    for group in before.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    assert isinstance(before, torch.optim.Optimizer)
    before.step()
    after = make_optimizer(network, config_with(weight_decay=0.3, learning_rate=1e-2, adam_beta2=0.9))
    load_moments(after, before.state_dict())
    (group,) = after.param_groups
    assert (group["rate"], group["weight_decay"], group["betas"]) == (1e-2, 0.3, (0.9, 0.9))
    assert isinstance(after, torch.optim.Optimizer)
    moments = after.state[group["params"][0]]
    assert moments["step"] == 1 and torch.equal(moments["exp_avg"], torch.full_like(moments["exp_avg"], 0.1))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_are_refused_where_they_cannot_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnsupportedError, match=f"optim '{name}' is bitsandbytes', .* on cpu: use adamw_torch"
    ):
        make_plan(tiny_config(tmp_path, optim=name))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtraError, match="pip install bitsandbytes"):
        require_optimizer(config_with(optim=name), torch.device("cuda"))


def test_optimizers_of_bitsandbytes_are_made_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Any]] = []

    class Fake:
        def __getattr__(self, name: str) -> Any:
            def make(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
                made.append((name, settings))
                return torch.optim.SGD(groups, lr=settings["lr"])

            return make

    monkeypatch.setattr(optimizers, "_bitsandbytes", lambda name: Fake())
    network = puna_twin(hf_llama())
    get_peft_model(network, LORA)
    for name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        make_optimizer(network, config_with(optim=name, adam_beta2=0.95))
    assert [name for name, _ in made] == ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"]
    assert all(s == {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8} for _, s in made)


def test_refusals() -> None:
    with pytest.raises(ParameterError, match="optim is 'sgd'; known are adamw_torch_fused"):
        config_with(optim="sgd")
    with pytest.raises(ParameterError, match="loraplus_lr_ratio is for adapters"):
        config_with(method="full", loraplus_lr_ratio=4.0)
    within = {"optimizer_in_backward": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0}
    with pytest.raises(ParameterError, match="is for method full"):
        config_with(**within)
    with pytest.raises(ParameterError, match="needs gradient_accumulation_steps 1"):
        config_with(**{**within, "gradient_accumulation_steps": 2}, method="full")
    with pytest.raises(ParameterError, match="needs max_grad_norm 0"):
        config_with(**{**within, "max_grad_norm": 1.0}, method="full")
