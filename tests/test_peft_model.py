"""Adapters against the real PEFT on a tiny Llama: first values, logits, gradients, training, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.auto_model import CausalLM
from puna.errors import UnsupportedError
from puna.gguf_header import GGMLType
from puna.model import Llama
from puna.model.lora_config import LoraConfig
from puna.peft_model import PeftModel, create_loraplus_optimizer, get_peft_model
from puna.weights.nf4 import FourBitLinear, swap_in_4bit
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import QuantLinear, swap_in

from tiny import hf_llama, hf_llama4, puna_twin

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

IDS = torch.tensor([[1, 5, 9, 33, 2, 8, 11, 70], [3, 7, 40, 12, 90, 4, 61, 2]])

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {"k_proj": 32, "self_attn.q_proj": 2},
    },
    "regex": {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    "layers pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norms": {"modules_to_save": ["norm", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [2, 5, 40]},
    "head tokens": {"trainable_token_indices": {"lm_head": [2, 5], "embed_tokens": [7, 9]}},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "dora": {"use_dora": True, "target_modules": ALL},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa", "r": 4},
    "pissa niter": {"init_lora_weights": "pissa_niter_4", "r": 4},
    "olora": {"init_lora_weights": "olora", "r": 4},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "init False": {"init_lora_weights": False},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "default targets": {"target_modules": None},
}


def pair(theirs: Any, settings: dict[str, Any], seed: int = 7) -> tuple[Any, PeftModel]:
    """Put the same adapter into Transformers' model with PEFT and into our twin of it."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings}
    ours = puna_twin(theirs)
    torch.manual_seed(seed)
    expected = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    return expected, get_peft_model(CausalLM(ours), LoraConfig(**settings))


def stir(*models: torch.nn.Module) -> None:
    """Move trained parameters away from where they begin, all models alike."""
    for model in models:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "original_module" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return out


def loss(model: Any) -> Tensor:
    return functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def backward(model: Any) -> None:
    loss(model).backward()  # type: ignore[no-untyped-call]


def base_model(settings: dict[str, Any]) -> Any:
    biased = "bias" in settings or "lora_bias" in settings
    return hf_llama(attention_bias=biased, mlp_bias=biased)


@pytest.mark.parametrize("name", SWITCHES)
def test_equals_peft(name: str, tmp_path: Path) -> None:
    """First values bit for bit, then logits, gradients, both files, merging, disabling."""
    settings = SWITCHES[name]
    model = base_model(settings)
    base = logits(model)
    theirs, ours = pair(model, settings)
    expected = trained(theirs)
    assert list(trained(ours)) == list(expected) or set(trained(ours)) == set(expected)
    for key, value in trained(ours).items():
        assert torch.equal(value, expected[key]), key
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    stir(theirs, ours)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    backward(theirs)
    backward(ours)
    for key, value in trained(ours).items():
        torch.testing.assert_close(value.grad, expected[key].grad, atol=1e-6, rtol=1e-4, msg=key)
    same_files(theirs, ours, tmp_path)
    if "bias" not in settings and "pissa" not in name and name != "olora":
        with ours.disable_adapter():
            torch.testing.assert_close(logits(ours), base, atol=1e-5, rtol=1e-5)
    adapted = logits(ours).detach()
    merged = ours.merge_and_unload(safe_merge=True)
    assert isinstance(merged, CausalLM)
    torch.testing.assert_close(logits(merged), adapted, atol=2e-5, rtol=1e-4)
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())


def same_files(theirs: Any, ours: PeftModel, folder: Path) -> None:
    """Both write the same bytes, and each reads what the other wrote."""
    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours")
    weights = [(folder / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[0] == weights[1]
    first, second = (json.loads((folder / w / "adapter_config.json").read_text()) for w in ("theirs", "ours"))
    for config in (first, second):
        for key in ("target_modules", "exclude_modules"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    if (
        first["target_modules"] != second["target_modules"]
    ):  # PEFT writes whole names in models as small as this
        suffixes = tuple(second.pop("target_modules"))
        assert all(name.endswith(suffixes) for name in first.pop("target_modules"))
    assert first == second


@pytest.mark.parametrize(
    "name", ["plain", "rslora", "dora", "saved head", "tokens", "embedding", "pissa", "bias all"]
)
def test_files_are_read_both_ways(name: str, tmp_path: Path) -> None:
    settings = SWITCHES[name]
    theirs, ours = pair(base_model(settings), settings)
    stir(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = logits(theirs)
    read = PeftModel.from_pretrained(CausalLM(puna_twin(base_model(settings))), tmp_path / "theirs")
    torch.testing.assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)
    assert not trained(read)
    back = peft.PeftModel.from_pretrained(base_model(settings), tmp_path / "ours")
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        pytest.param("dora", marks=pytest.mark.slow),
        pytest.param("all-linear", marks=pytest.mark.slow),
    ],
)
def test_a_hundred_steps_lose_what_peft_loses(name: str) -> None:
    theirs, ours = pair(hf_llama(), SWITCHES[name])
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([*trained(model).values()], lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        curve = []
        for _ in range(100):
            value = loss(model)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([*trained(model).values()], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curve.append(value.detach())
        losses.append(torch.stack(curve))
    assert losses[0][-1] < losses[0][0] - 0.5
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)


def test_half_precision_base_rounds_and_widens_like_peft() -> None:
    theirs, ours = pair(hf_llama().bfloat16(), {"r": 4})
    for key, value in trained(ours).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, trained(theirs)[key])


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": ["embed_tokens", "lm_head"]}],
)
def test_merging_rounds_like_peft(settings: dict[str, Any], safe: bool) -> None:
    theirs, ours = pair(base_model(settings).bfloat16(), settings)
    stir(theirs, ours)
    expected = theirs.merge_and_unload(safe_merge=safe).state_dict()
    got = ours.merge_and_unload(safe_merge=safe).state_dict()
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_dropout_draws_like_peft() -> None:
    theirs, ours = pair(hf_llama(), {"lora_dropout": 0.5, "target_modules": ALL})
    stir(theirs, ours)
    row = IDS[:1]
    torch.manual_seed(1)
    expected = theirs.train()(input_ids=row).logits
    torch.manual_seed(1)
    got = ours.train()(input_ids=row).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": [3, 7, 9]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_tied_embeddings(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(hf_llama(tie_word_embeddings=True), settings)
    stir(theirs, ours)
    adapted = logits(ours)
    torch.testing.assert_close(adapted, logits(theirs), atol=1e-5, rtol=1e-5)
    same_files(theirs, ours, tmp_path)
    base = CausalLM(puna_twin(hf_llama(tie_word_embeddings=True)))
    read = PeftModel.from_pretrained(base, tmp_path / "theirs")
    torch.testing.assert_close(logits(read), adapted, atol=1e-5, rtol=1e-5)
    assert read.unload().llama.lm_head is None
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, atol=2e-5, rtol=1e-4)
    assert merged.llama.config.tie_word_embeddings == (merged.llama.lm_head is None)


EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_experts(targets: list[str], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": targets, "r": 3}
    theirs, ours = pair(hf_llama4(), settings)
    for key, value in trained(ours).items():
        assert torch.equal(value, trained(theirs)[key]), key
    stir(theirs, ours)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-4)
    backward(theirs)
    backward(ours)
    for key, value in trained(ours).items():
        grad = trained(theirs)[key].grad
        torch.testing.assert_close(value.grad, grad, atol=1e-6, rtol=1e-3, msg=key)
    same_files(theirs, ours, tmp_path)
    adapted = logits(ours)
    torch.testing.assert_close(logits(ours.merge_and_unload()), adapted, atol=2e-5, rtol=1e-4)


@pytest.fixture
def ours() -> PeftModel:
    return get_peft_model(CausalLM(puna_twin(hf_llama())), LoraConfig(r=4))


def test_merge_and_unmerge_in_place(ours: PeftModel) -> None:
    stir(ours)
    adapted = logits(ours)
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours), adapted, atol=1e-5, rtol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(logits(ours), adapted, atol=1e-5, rtol=1e-5)


def test_unload_gives_the_base_back(ours: PeftModel) -> None:
    stir(ours)
    base = ours.unload()
    expected = puna_twin(hf_llama()).state_dict()
    assert base.state_dict().keys() == expected.keys()
    assert all(torch.equal(base.state_dict()[key], expected[key]) for key in expected)


def test_several_adapters(ours: PeftModel, tmp_path: Path) -> None:
    stir(ours)
    first = logits(ours)
    ours.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj", "q_proj"]))
    assert torch.equal(logits(ours), first)
    assert all(".default." in name for name in trained(ours))
    ours.set_adapter("second")
    assert trained(ours) and all(".second." in name for name in trained(ours))
    stir(ours)
    second = logits(ours)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    other = PeftModel.from_pretrained(CausalLM(puna_twin(hf_llama())), tmp_path)
    other.load_adapter(tmp_path / "second", "x")
    torch.testing.assert_close(logits(other), first, atol=1e-5, rtol=1e-5)
    other.set_adapter("x")
    assert torch.equal(logits(other), second)
    theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path)
    theirs.load_adapter(tmp_path / "second", "x")
    theirs.base_model.set_adapter(["default", "x"])
    other.set_adapter(["default", "x"])
    torch.testing.assert_close(logits(other), logits(theirs), atol=1e-5, rtol=1e-5)
    ours.delete_adapter("second")
    assert ours.active_adapters == ["default"]
    assert torch.equal(logits(ours), first)


def test_loaded_adapters_train_only_when_told(ours: PeftModel, tmp_path: Path) -> None:
    """As in PEFT: frozen and in evaluation mode after loading, trained once they are set active."""
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_llama(), tmp_path, is_trainable=True)
    read = PeftModel.from_pretrained(CausalLM(puna_twin(hf_llama())), tmp_path, is_trainable=True)
    for model in (read, theirs):
        assert len(trained(model)) == 8
        model.train()
        model.load_adapter(tmp_path, "x")
        assert not model.training and not any(".x." in name for name in trained(model))
        model.set_adapter("x", inference_mode=True)
        assert not trained(model)
        model.set_adapter("x")
        assert len(trained(model)) == 8 and all(".x." in name for name in trained(model))


def test_disabled_adapters_keep_what_was_trainable(ours: PeftModel) -> None:
    before = set(trained(ours))
    with ours.disable_adapter():
        assert not trained(ours)
    assert set(trained(ours)) == before


def test_line_is_pefts(ours: PeftModel, capsys: pytest.CaptureFixture[str]) -> None:
    ours.print_trainable_parameters()
    peft.get_peft_model(hf_llama(), peft.LoraConfig(r=4)).print_trainable_parameters()
    out = capsys.readouterr().out.splitlines(keepends=True)
    assert out[0] == out[1]
    assert out[0].startswith("trainable params: 1,664 || all params: ")


def quantised(model: Llama) -> Llama:
    """Pack all linears of the layers as Q8_0."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = torch.from_numpy(quantize(tensor.numpy(), GGMLQuantizationType.Q8_0))
            swap_in(model, name, QuantTensor(packed, GGMLType.Q8_0))
    return model


def packed_4bit(model: Llama) -> Llama:
    assert len(swap_in_4bit(model)) == 14
    return model


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("pack", [quantised, packed_4bit])
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"])
def test_a_quantised_base(targets: Any, dora: bool, pack: Callable[[Llama], Llama]) -> None:
    network = pack(puna_twin(hf_llama()))
    whole = puna_twin(hf_llama())
    for name, module in network.named_modules():
        if isinstance(module, QuantLinear | FourBitLinear):
            whole.get_submodule(name).weight.data = module.quantized.dequantize()
    config = LoraConfig(r=4, use_dora=dora, target_modules=targets)
    models = []
    for model in (network, whole):
        torch.manual_seed(5)
        models.append(get_peft_model(CausalLM(model), config))
    stir(*models)
    packed, plain = models
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-5, rtol=1e-5)
    backward(packed)
    backward(plain)
    for key, value in trained(packed).items():
        torch.testing.assert_close(value.grad, trained(plain)[key].grad, atol=1e-6, rtol=1e-4)
    assert packed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        packed.merge_adapter()
    adapted = logits(packed)
    torch.testing.assert_close(logits(packed.merge_and_unload()), adapted, atol=2e-5, rtol=1e-4)


def test_loraplus_groups_are_pefts() -> None:
    from peft.optimizers import create_loraplus_optimizer as theirs_create

    theirs, ours = pair(
        hf_llama(attention_bias=True), {"target_modules": ["embed_tokens", "q_proj"], "bias": "all"}
    )
    expected = theirs_create(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    got = create_loraplus_optimizer(
        ours, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    for ours_group, their_group in zip(got.param_groups, expected.param_groups, strict=True):
        assert [p.shape for p in ours_group["params"]] == [p.shape for p in their_group["params"]]
        assert (ours_group["lr"], ours_group["weight_decay"]) == (
            their_group["lr"],
            their_group["weight_decay"],
        )


def test_the_guides_example(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from puna import AutoModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(str(stories / "hf"))
    lora_config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none"
    )
    peft_model = get_peft_model(model, lora_config)
    peft_model.print_trainable_parameters()
    assert "|| trainable%: " in capsys.readouterr().out
    ids = torch.tensor([[1, 403, 407, 261]])
    optimizer = torch.optim.AdamW([*trained(peft_model).values()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        peft_model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    peft_model.save_pretrained(str(tmp_path / "lora-adapter"))
    expected = peft_model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    fresh = AutoModelForCausalLM.from_pretrained(str(stories / "hf"))
    read = PeftModel.from_pretrained(fresh, tmp_path / "lora-adapter")
    assert torch.equal(read.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert read.peft_config["default"].base_model_name_or_path == str(stories / "hf")
