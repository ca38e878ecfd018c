"""Adapters of other tools, written as those tools do: each must do to the model what it does there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.errors import CheckpointError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.model import Llama
from puna.model.lora import adapter_modules
from puna.model.lora_layers import LoraLinear
from puna.peft_model import PeftModel
from puna.weights.adapter_import import adapter_kind, read_any_adapter

from tiny import hf_llama, puna_twin

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, RANK = 64, 80, 8, 2, 8, 3


@pytest.fixture
def network() -> Llama:
    return puna_twin(hf_llama())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


def write_mlx(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    save_file(dict(tensors), folder / "adapters.safetensors")
    values = {
        "fine_tune_type": "lora",
        "model": "somewhere/llama",
        "num_layers": 1,
        "lora_parameters": {"rank": RANK, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))


def write_torchtune(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    torch.save(dict(tensors), folder / "adapter_0.pt")
    if settings:
        (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_litgpt(folder: Path, tensors: Mapping[str, Tensor], settings: str) -> None:
    torch.save({"model": dict(tensors)}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(f"checkpoint_dir: x\nprecision: bf16-true\n{settings}")


def deltas(network: Llama, folder: Path) -> dict[str, Tensor]:
    """Load an adapter and return what it adds to each weight."""
    PeftModel.from_pretrained(network, folder)
    return {
        name: module.delta_weight("default").detach()
        for name, module in adapter_modules(network)
        if isinstance(module, LoraLinear)
    }


def test_mlx(network: Llama, tmp_path: Path) -> None:
    a, b = draw(HIDDEN, RANK), draw(RANK, HIDDEN)
    write_mlx(
        tmp_path,
        {
            "model.layers.1.self_attn.q_proj.lora_a": a,
            "model.layers.1.self_attn.q_proj.lora_b": b,
        },
    )
    config, _ = read_any_adapter(tmp_path, network.config)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (RANK, 60.0, 0.1)
    assert (config.target_modules, config.layers_to_transform) == (["q_proj"], [1])
    assert config.base_model_name_or_path == "somewhere/llama"
    got = deltas(network, tmp_path)
    assert list(got) == ["model.layers.1.self_attn.q_proj"]
    x = draw(5, HIDDEN)
    expected = 20.0 * (x @ a) @ b  # what LoRALinear adds there
    torch.testing.assert_close(x @ got["model.layers.1.self_attn.q_proj"].T, expected, rtol=1e-4, atol=1e-4)


def test_mlx_dora(network: Llama, tmp_path: Path) -> None:
    a, b, m = draw(WIDTH, RANK), draw(RANK, HIDDEN), draw(HIDDEN).abs()
    name = "model.layers.0.mlp.down_proj"
    tensors = {f"{name}.lora_a": a, f"{name}.lora_b": b, f"{name}.m": m}
    write_mlx(tmp_path, tensors, fine_tune_type="dora")
    weight = network.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    adapted = weight + 20.0 * (b.T @ a.T)
    x = draw(5, WIDTH)
    expected = (m / adapted.norm(dim=1)) * (x @ adapted.T)
    PeftModel.from_pretrained(network, tmp_path)
    torch.testing.assert_close(network.get_submodule(name)(x), expected, rtol=1e-4, atol=1e-4)


def test_torchtune(network: Llama, tmp_path: Path) -> None:
    """Row 2i + j of a head in torchtune is row j * 4 + i in ours (heads of 8), for q and k only."""
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": draw(RANK, HIDDEN),
        "layers.0.attn.q_proj.lora_b.weight": draw(HEADS * HEAD_DIM, RANK),
        "layers.0.attn.k_proj.lora_a.weight": draw(RANK, HIDDEN),
        "layers.0.attn.k_proj.lora_b.weight": draw(KV_HEADS * HEAD_DIM, RANK),
        "layers.0.attn.output_proj.lora_a.weight": draw(RANK, HIDDEN),
        "layers.0.attn.output_proj.lora_b.weight": draw(HIDDEN, RANK),
        "layers.1.mlp.w2.lora_a.weight": draw(RANK, WIDTH),
        "layers.1.mlp.w2.lora_b.weight": draw(HIDDEN, RANK),
        "output.lora_a.weight": draw(RANK, HIDDEN),
        "output.lora_b.weight": draw(96, RANK),
    }
    write_torchtune(tmp_path, tensors, r=RANK, lora_alpha=6)
    got = deltas(network, tmp_path)
    names = {
        "layers.0.attn.q_proj": "model.layers.0.self_attn.q_proj",
        "layers.0.attn.k_proj": "model.layers.0.self_attn.k_proj",
        "layers.0.attn.output_proj": "model.layers.0.self_attn.o_proj",
        "layers.1.mlp.w2": "model.layers.1.mlp.down_proj",
        "output": "lm_head",
    }
    assert got.keys() == set(names.values())
    for theirs, ours in names.items():
        expected = 2.0 * tensors[f"{theirs}.lora_b.weight"] @ tensors[f"{theirs}.lora_a.weight"]
        if "q_proj" in ours or "k_proj" in ours:
            moved = torch.empty_like(expected)
            for row in range(expected.shape[0]):
                head, (i, j) = row // HEAD_DIM, divmod(row % HEAD_DIM, 2)
                moved[head * HEAD_DIM + j * HEAD_DIM // 2 + i] = expected[row]
            expected = moved
        torch.testing.assert_close(got[ours], expected, rtol=1e-4, atol=1e-5)


def test_torchtune_needs_alpha(network: Llama, tmp_path: Path) -> None:
    a, b = draw(RANK, HIDDEN), draw(HIDDEN, RANK)
    write_torchtune(
        tmp_path,
        {f"layers.{i}.attn.v_proj.lora_{x}.weight": t for i in (0, 1) for x, t in (("a", a), ("b", b))},
    )
    with pytest.raises(ParameterError, match="alpha has to be given"):
        read_any_adapter(tmp_path, network.config)
    with pytest.raises(ParameterError, match="config of its base"):
        read_any_adapter(tmp_path)
    config, tensors = read_any_adapter(tmp_path, network.config, alpha=12)
    assert (config.lora_alpha, config.target_modules, config.layers_to_transform) == (12, ["v_proj"], None)
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.lora_B.weight"], b)


@pytest.mark.parametrize("parts", ["qv", "qkv", "k"])
def test_litgpt(parts: str, network: Llama, tmp_path: Path) -> None:
    """Chunk n of A belongs to rows n of B; q has all heads, k and v those of the groups."""
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    a, b = draw(RANK * len(parts), HIDDEN), draw(sum(sizes[part] for part in parts), RANK)
    fc_a, fc_b = draw(RANK, HIDDEN), draw(WIDTH, RANK)
    tensors = {
        "transformer.h.1.attn.qkv.lora_A": a,
        "transformer.h.1.attn.qkv.lora_B": b,
        "transformer.h.1.mlp.fc_1.lora_A": fc_a,
        "transformer.h.1.mlp.fc_1.lora_B": fc_b,
    }
    flags = "".join(
        f"lora_{name}: {str(name[0] in parts).lower()}\n" for name in ("query", "key", "value", "mlp")
    )
    write_litgpt(tmp_path, tensors, f"lora_r: {RANK}\nlora_alpha: 6\nlora_dropout: 0.05\n{flags}")
    got = deltas(network, tmp_path)
    start = 0
    for n, part in enumerate(parts):
        expected = 2.0 * b[start : start + sizes[part]] @ a[n * RANK : (n + 1) * RANK]
        start += sizes[part]
        name = f"model.layers.1.self_attn.{part}_proj"
        torch.testing.assert_close(got.pop(name), expected, rtol=1e-4, atol=1e-5)
    assert list(got) == ["model.layers.1.mlp.gate_proj"]
    torch.testing.assert_close(got.popitem()[1], 2.0 * fc_b @ fc_a, rtol=1e-4, atol=1e-5)


def test_refusals(network: Llama, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"adapters\.safetensors"):
        adapter_kind(tmp_path)
    write_mlx(tmp_path, {"model.embed_tokens.lora_a": draw(96, RANK)})
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        read_any_adapter(tmp_path)
    write_mlx(tmp_path, {"model.norm.weight": draw(HIDDEN)}, fine_tune_type="full")
    with pytest.raises(UnsupportedError, match="full"):
        read_any_adapter(tmp_path)
    write_mlx(tmp_path, {}, lora_parameters={"rank": 8})
    with pytest.raises(CheckpointError, match="scale"):
        read_any_adapter(tmp_path)
    with pytest.raises(ParameterError, match="alpha"):
        read_any_adapter(tmp_path, alpha=3)
    (tmp_path / "adapters.safetensors").unlink()
    write_litgpt(tmp_path, {"transformer.h.0.attn.qkv.lora_A": draw(4, HIDDEN)}, "lora_r: 2\n")
    with pytest.raises(CheckpointError, match="lora_alpha"):
        read_any_adapter(tmp_path, network.config)
    settings = "lora_r: 2\nlora_alpha: 2\nlora_query: true\nlora_key: true\nlora_value: true\n"
    write_litgpt(tmp_path, {"transformer.h.0.attn.qkv.lora_A": draw(4, HIDDEN)}, settings)
    with pytest.raises(CheckpointError, match="4 rows"):
        read_any_adapter(tmp_path, network.config)
