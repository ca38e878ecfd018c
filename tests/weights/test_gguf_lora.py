"""LoRA adapters as GGUF files: written and read again, and held to llama.cpp's rules with its own package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import CheckpointError, UnsupportedError
from puna.model import Llama, LlamaConfig
from puna.model.lora_config import LoraConfig
from puna.peft_model import get_peft_model
from puna.weights.adapter_facts import read_adapter_facts
from puna.weights.adapter_import import read_any_adapter
from puna.weights.adapter_open import open_adapter
from puna.weights.gguf_lora import write_gguf_adapter
from puna.weights.gguf_writer import write_gguf

from tiny import hf_llama, puna_twin

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 6},
    "rslora": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 6},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {"k_proj": 32},
    },
    "table and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def network(**changes: Any) -> Llama:
    return puna_twin(hf_llama(**changes))


def save(folder: Path, settings: dict[str, Any], **changes: Any) -> LlamaConfig:
    torch.manual_seed(1)
    base = network(**changes)
    config = base.config
    model = get_peft_model(base, LoraConfig(**{"r": 4, "init_lora_weights": False, **settings}))
    model.save_pretrained(folder, save_embedding_layers=False)
    return config


def write(folder: Path, out: Path, base: LlamaConfig) -> int:
    opened = open_adapter(folder, base)
    return write_gguf_adapter(out, opened.config, opened.tensors, base, name="mine")


def deltas(source: Path, base: LlamaConfig) -> dict[str, Tensor]:
    """Return scale * B @ A of each module."""
    opened = open_adapter(source, base)
    found = {}
    from puna.model.lora import adapter_modules

    for name, module in adapter_modules(opened.skeleton):
        scale: float = module.scaling["opened"]  # type: ignore[assignment,index]
        tensors = opened.tensors
        embedded = f"{name}.lora_embedding_A" in tensors
        a = tensors[f"{name}.lora_embedding_A" if embedded else f"{name}.lora_A.weight"]
        b = tensors[f"{name}.lora_embedding_B" if embedded else f"{name}.lora_B.weight"]
        found[name] = scale * b @ a
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    base = save(tmp_path / "peft", KINDS[kind])
    expected = deltas(tmp_path / "peft", base)
    assert write(tmp_path / "peft", tmp_path / "x.gguf", base) == len(expected)
    found = deltas(tmp_path / "x.gguf", base)
    assert set(found) == set(expected)
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], atol=1e-6, rtol=1e-5)


def test_the_file_is_what_llama_cpp_applies(tmp_path: Path) -> None:
    """y = W x + alpha / rank * B (A x), for W and B with the rows of q and k as rotary pairs."""
    base = save(tmp_path / "peft", KINDS["patterns"])
    expected = deltas(tmp_path / "peft", base)
    write(tmp_path / "peft", tmp_path / "x.gguf", base)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "mine"
    alpha = fields["adapter.lora.alpha"]
    tensors = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * 14
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_up": "mlp.up_proj"}
    for theirs, ours in names.items():
        a, b = (tensors[f"blk.1.{theirs}.weight.lora_{factor}"] for factor in "ab")
        rank = b.shape[1]
        assert a.shape[0] == rank == {"attn_q": 3, "attn_k": 4, "ffn_up": 5}[theirs]
        delta = alpha / rank * b @ a
        if theirs != "ffn_up":  # back from pairs to halves
            delta = delta.view(-1, 4, 2, 64).transpose(1, 2).reshape(-1, 64)
        torch.testing.assert_close(delta, expected[f"model.layers.1.{ours}"], atol=1e-6, rtol=1e-5)


def test_one_scale_leaves_the_factors_as_they_are(tmp_path: Path) -> None:
    base = save(tmp_path / "peft", KINDS["rslora"])
    write(tmp_path / "peft", tmp_path / "x.gguf", base)
    config, tensors = read_any_adapter(tmp_path / "x.gguf", base)
    _, theirs = read_any_adapter(tmp_path / "peft", base)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 12, False)  # 6 / sqrt(4) * 4
    assert set(tensors) == set(theirs)
    assert all(torch.equal(tensors[name], theirs[name]) for name in tensors)


def test_a_file_without_alpha_is_applied_as_it_is(tmp_path: Path) -> None:
    base = network().config
    metadata = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    a, b = torch.randn(3, 64), torch.randn(64, 3)
    c, d = torch.randn(2, 64), torch.randn(80, 2)
    tensors = {
        "blk.0.attn_output.weight.lora_a": a,
        "blk.0.attn_output.weight.lora_b": b.half(),
        "blk.1.ffn_up.weight.lora_a": c,
        "blk.1.ffn_up.weight.lora_b": d,
        "blk.0.attn_norm.weight": torch.ones(64),
    }
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    found = deltas(tmp_path / "x.gguf", base)
    torch.testing.assert_close(found["model.layers.0.self_attn.o_proj"], b.half().float() @ a)
    torch.testing.assert_close(found["model.layers.1.mlp.up_proj"], d @ c)
    facts = read_adapter_facts(tmp_path / "x.gguf", base)
    assert (facts.tool, facts.scales) == ("gguf", [1.0])


def test_llama4_keeps_the_order_of_rows(tmp_path: Path) -> None:
    from tiny import hf_llama4

    torch.manual_seed(1)
    base = puna_twin(hf_llama4())
    config = base.config
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "peft")
    opened = open_adapter(tmp_path / "peft", config)
    write_gguf_adapter(tmp_path / "x.gguf", opened.config, opened.tensors, config, name="x")
    _, tensors = read_any_adapter(tmp_path / "x.gguf", config)
    assert set(tensors) == set(opened.tensors)
    assert all(torch.equal(tensors[name], opened.tensors[name]) for name in tensors)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    raw = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    q = opened.tensors["model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(raw["blk.0.attn_q.weight.lora_b"], q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector has no place"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm.weight has no place"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
            "trainable_tokens_delta has no place",
        ),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"target_modules": ["lm_head"]}, "tied to the head"),
    ],
)
def test_what_llama_cpp_has_no_place_for(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = save(tmp_path / "peft", settings, tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match=f"{message}.*: merge it and export the model"):
        write(tmp_path / "peft", tmp_path / "x.gguf", base)
    assert not (tmp_path / "x.gguf").exists()


def test_wrong_files_are_named(tmp_path: Path) -> None:
    base = network().config
    kind = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    path = tmp_path / "x.gguf"
    cases: list[tuple[dict[str, Any], str, type[Exception]]] = [
        ({**kind, "general.architecture": "qwen2"}, "for qwen2, not llama", CheckpointError),
        ({**kind, "general.type": "model"}, "is no LoRA adapter", UnsupportedError),
        (kind, "blk.0.attn_q.weight is no factor", UnsupportedError),
    ]
    for metadata, message, error in cases:
        write_gguf(path, metadata, {"blk.0.attn_q.weight": torch.ones(64, 64)})
        with pytest.raises(error, match=message):
            read_any_adapter(path, base)
    write_gguf(path, kind, {"blk.0.attn_q.weight.lora_a": torch.ones(4, 64)})
    with pytest.raises(CheckpointError, match="missing: model.layers.0.self_attn.q_proj.lora_B.weight"):
        open_adapter(path, base)
