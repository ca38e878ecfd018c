"""Sums of adapters against the real PEFT: factors by value, and what the sum computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.auto_model import CausalLM
from puna.errors import ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.peft_model import PeftModel, get_peft_model

from tiny import hf_llama, puna_twin

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

IDS = torch.tensor([[1, 5, 9, 33, 2, 8, 11, 70]])
FIRST: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | {
    "target_modules": ["q_proj", "v_proj"]
}
SECOND: dict[str, Any] = FIRST | {"lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}


def models(first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, PeftModel]:
    """Put the same two adapters into Transformers' model with PEFT and into our twin of it."""
    base = hf_llama()
    twin = CausalLM(puna_twin(base))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **first), "one")
    theirs.add_adapter("two", peft.LoraConfig(task_type="CAUSAL_LM", **second))
    torch.manual_seed(1)
    ours = get_peft_model(twin, LoraConfig(task_type="CAUSAL_LM", **first), "one")
    ours.add_adapter("two", LoraConfig(task_type="CAUSAL_LM", **second))
    return theirs, ours


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def sums(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if ".sum." in name}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 3, "svd_clamp": 0.9, "svd_full_matrices": False}),
    ],
)
def test_equals_peft(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = models(FIRST, SECOND)
    for model in (theirs, ours):
        model.add_weighted_adapter(["one", "two"], [0.7, -1.5], "sum", combination_type=kind, **options)
    expected = sums(theirs)
    assert sums(ours).keys() == expected.keys() and len(expected) == 12
    for name, value in sums(ours).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    assert not any(p.requires_grad for p in sums(ours).values())
    for model in (theirs, ours):
        model.set_adapter("sum")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    config, wanted = ours.peft_config["sum"], theirs.peft_config["sum"]
    assert (config.r, config.lora_alpha) == (wanted.r, wanted.lora_alpha)
    assert set(config.target_modules or ()) == wanted.target_modules


def test_an_embedding_and_one_adapter_alone() -> None:
    first = FIRST | {"target_modules": ["embed_tokens", "q_proj"]}
    theirs, ours = models(first, FIRST | {"target_modules": ["embed_tokens"]})
    for model in (theirs, ours):
        model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "sum", combination_type="cat")
        model.add_weighted_adapter(["one"], [-2.0], "twice")
    for name in ("sum", "twice"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "r": 3}])
def test_cat_is_the_exact_sum(settings: dict[str, Any]) -> None:
    """Also with rsLoRA, where PEFT's sum is too large by the root of its rank."""
    _, ours = models(FIRST | settings, SECOND | settings)
    ours.set_adapter(["one", "two"])
    expected = logits(ours)
    ours.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    ours.set_adapter("sum")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("second", "arguments", "error", "text"),
    [
        ({}, (["one", "two"], [1.0], "sum", "cat"), ParameterError, "one weight"),
        ({}, (["one", "x"], [1.0, 1.0], "sum", "cat"), ParameterError, "x"),
        ({}, (["one", "two"], [1.0, 1.0], "one", "cat"), ParameterError, "already"),
        ({}, (["one", "two"], [1.0, 1.0], "half", "cat"), ParameterError, "attribute"),
        ({}, (["one", "two"], [1.0, 1.0], "sum", "ties"), UnsupportedError, "ties"),
        ({"r": 2}, (["one", "two"], [1.0, 1.0], "sum", "linear"), ParameterError, "one rank"),
        ({"use_dora": True}, (["one", "two"], [1.0, 1.0], "sum", "svd"), UnsupportedError, "use_dora"),
        ({"bias": "all"}, (["one", "two"], [1.0, 1.0], "sum", "svd"), UnsupportedError, "bias"),
        (
            {"layers_to_transform": 1},
            (["one", "two"], [1.0, 1.0], "sum", "cat"),
            ParameterError,
            "layers_to_transform",
        ),
        ({"target_modules": ".*q_proj"}, (["one", "two"], [1.0, 1.0], "sum", "cat"), ParameterError, "lists"),
    ],
)
def test_refusals(
    second: dict[str, Any], arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    model = get_peft_model(puna_twin(hf_llama()), LoraConfig(**FIRST), "one")
    model.add_adapter("two", LoraConfig(**(SECOND | second)))
    with pytest.raises(error, match=text):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"one", "two"}
