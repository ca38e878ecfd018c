"""Whole models: written as GGUF files and read again, quantised at load, with an importance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.gguf_header import GGMLType, read_metadata
from puna.model import Llama, LlamaConfig, PackedAttention
from puna.weights.gguf import GgufFile, open_gguf
from puna.weights.gguf_export import gguf_metadata
from puna.weights.gguf_writer import Value
from puna.weights.loader import Checkpoint, load_model, open_checkpoint
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import QuantEmbedding, QuantExperts, QuantLinear
from puna.weights.quantize_blocks import quantize
from puna.weights.quantize_file import Written, write_quantized
from puna.weights.quantize_mix import file_type

from tiny import hf_llama, hf_llama4, puna_twin


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def write(source: Path, out: Path, kind: str, **options: Any) -> Written:
    """Write a folder or file as GGUF, without a vocabulary but in name."""
    checkpoint = open_checkpoint(source)
    metadata: dict[str, Value] = dict(gguf_metadata(checkpoint.config, "tiny"))
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(checkpoint.config.vocab_size)]
    return write_quantized(checkpoint, out, metadata, file_type(kind), **options)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {n: v.dequantize() if isinstance(v, QuantTensor) else v for n, v in open_gguf(path).tensors()}


def logits(model: Llama) -> Tensor:
    ids = torch.arange(20) % model.config.vocab_size
    out: Tensor = model(ids, torch.arange(20), PackedAttention([0, 20]))
    return out


LLAMAS: Mapping[str, dict[str, Any]] = {
    "plain": {"rope_theta": 5e5},
    "tied_with_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 24},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_a_float_file_holds_the_same_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = save(hf_llama(**changes), tmp_path / "hf")
    write(folder, tmp_path / "m.gguf", "f32")
    model, again = load_model(folder), load_model(tmp_path / "m.gguf")
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_rows_of_q_and_k_lie_as_llama_cpp_has_them(tmp_path: Path) -> None:
    theirs = hf_llama()
    write(save(theirs, tmp_path / "hf"), tmp_path / "m.gguf", "f32")
    q = theirs.model.layers[1].self_attn.q_proj.weight
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = q.detach().view(8, 2, 4, 64).transpose(1, 2).reshape(64, 64)
    assert np.array_equal(written["blk.1.attn_q.weight"].data, expected.numpy())
    assert written["blk.0.attn_k.weight"].shape.tolist() == [64, 16]


def test_llama4_comes_back_and_its_experts_are_quantised(tmp_path: Path) -> None:
    changes = {"attention_chunk_size": 8192, "floor_scale": 8192, "hidden_size": 64, "intermediate_size": 96}
    folder = save(hf_llama4(**changes), tmp_path / "hf")
    write(folder, tmp_path / "f32.gguf", "f32")
    model, again = load_model(folder), load_model(tmp_path / "f32.gguf")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    write(folder, tmp_path / "q8.gguf", "q8_0")
    expected = model.state_dict()
    for name, value in tensors_of(tmp_path / "q8.gguf").items():
        if name.endswith("experts.gate_proj"):
            gate = expected[name.replace("gate_proj", "gate_up_proj")][..., :96].transpose(1, 2)
            torch.testing.assert_close(value, quantize(gate, GGMLType.Q8_0).dequantize(), rtol=0, atol=0)
    at_load = load_model(folder, quantize="q8_0")
    assert isinstance(at_load.get_submodule("model.layers.0.feed_forward.experts"), QuantExperts)
    torch.testing.assert_close(
        logits(at_load), logits(load_model(tmp_path / "q8.gguf")), rtol=1e-5, atol=1e-5
    )


def test_what_gguf_cannot_say_is_refused() -> None:
    dynamic = LlamaConfig.from_hf(
        hf_llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}).config.to_dict()
    )
    with pytest.raises(UnsupportedError, match="'dynamic'"):
        gguf_metadata(dynamic, "x")
    with pytest.raises(UnsupportedError, match="attention_chunk_size"):
        gguf_metadata(puna_twin(hf_llama4()).config, "x")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "f16"])
def test_a_file_and_a_model_quantised_at_load_are_the_same(tmp_path: Path, stories: Path, kind: str) -> None:
    written = write(stories / "hf", tmp_path / "m.gguf", kind)
    values = tensors_of(tmp_path / "m.gguf")
    floats = load_file(stories / "hf/model.safetensors")
    assert set(values) == set(floats)
    assert read_metadata(tmp_path / "m.gguf")["general.file_type"] == file_type(kind).number
    assert sum(written.types.values()) == len(floats)
    if kind == "f16":
        assert all(torch.equal(v, floats[n].half().float()) for n, v in values.items() if v.ndim > 1)
        return
    model = load_model(stories / "hf", quantize=kind)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}
    assert len(modules) == 31  # down_proj's rows of 172 are no whole blocks
    for name, module in modules.items():
        assert torch.equal(module.quantized.dequantize(), values[f"{name}.weight"]), name
        lost = values[f"{name}.weight"] - floats[f"{name}.weight"]
        assert 0 < float(lost.norm() / floats[f"{name}.weight"].norm()) < 0.1


def test_k_quants_reach_the_file_where_rows_are_long_enough(tmp_path: Path) -> None:
    folder = save(hf_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2), tmp_path / "hf")
    written = write(folder, tmp_path / "m.gguf", "q4_k_m")
    info = GgufFile(tmp_path / "m.gguf").tensors
    assert info["blk.0.attn_q.weight"].type is GGMLType.Q4_K
    assert info["output.weight"].type is GGMLType.Q6_K
    assert info["blk.1.ffn_down.weight"].type is GGMLType.Q6_K
    assert written.types == {GGMLType.Q4_K: 13, GGMLType.Q6_K: 3, GGMLType.F32: 5}
    q = dict(open_gguf(tmp_path / "m.gguf").tensors())["model.layers.0.self_attn.q_proj.weight"]
    original = load_model(folder).get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(q, QuantTensor)
    assert torch.equal(q.data, quantize(original, GGMLType.Q4_K).data)  # rows put back by our reader


def test_what_is_quantised_is_not_quantised_again_unasked(tmp_path: Path, stories: Path) -> None:
    write(stories / "hf", tmp_path / "q8.gguf", "q8_0")
    with pytest.raises(ParameterError, match="quantised already.*--allow-requantize"):
        write(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0")
    assert not (tmp_path / "q4.gguf").exists()
    write(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0", allow_requantize=True)
    before, after = tensors_of(tmp_path / "q8.gguf"), tensors_of(tmp_path / "q4.gguf")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(after[name], quantize(before[name], GGMLType.Q4_0).dequantize())
    with pytest.raises(ParameterError, match="quantised already"):
        load_model(tmp_path / "q8.gguf", quantize="q4_0")


def test_what_loses_nothing_more_is_written_unasked(tmp_path: Path, stories: Path) -> None:
    write(stories / "hf", tmp_path / "q8.gguf", "q8_0")
    write(tmp_path / "q8.gguf", tmp_path / "again.gguf", "q8_0")
    write(tmp_path / "q8.gguf", tmp_path / "f32.gguf", "f32")
    before = tensors_of(tmp_path / "q8.gguf")
    for name in ("again", "f32"):
        after = tensors_of(tmp_path / f"{name}.gguf")
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_names_that_quantise_nothing_are_refused_at_load(stories: Path) -> None:
    with pytest.raises(ParameterError, match="'bf16' is a dtype"):
        load_model(stories / "hf", quantize="bf16")
    with pytest.raises(ParameterError, match="'awq' is not known"):
        load_model(stories / "hf", quantize="awq")


class Damaged:
    """A checkpoint one of whose tensors is not there, or has another shape."""

    def __init__(self, checkpoint: Checkpoint, *, missing: str = "", misshapen: str = "") -> None:
        self.inner, self.missing, self.misshapen = checkpoint, missing, misshapen
        self.path, self.config, self.total_bytes = checkpoint.path, checkpoint.config, checkpoint.total_bytes

    def tensors(self) -> Any:
        for name, value in self.inner.tensors():
            assert isinstance(value, Tensor)
            if name != self.missing:
                yield name, value[..., :32] if name == self.misshapen else value


def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, stories: Path) -> None:
    down = "model.layers.4.mlp.down_proj.weight"
    for damage, message in (
        ({"missing": down}, "tensors are missing: blk.4.ffn_down.weight"),
        (
            {"misshapen": down},
            r"blk.4.ffn_down.weight has the shape \[64, 32\], the config asks for \[64, 172\]",
        ),
    ):
        damaged: Any = Damaged(open_checkpoint(stories / "hf"), **damage)
        with pytest.raises(CheckpointError, match=message):
            write_quantized(damaged, tmp_path / "m.gguf", {}, file_type("q8_0"))
        assert not list(tmp_path.iterdir())


def test_an_importance_matrix_is_used(tmp_path: Path, stories: Path) -> None:
    name, ours = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    squares = torch.linspace(0.1, 30, 64)
    write(stories / "hf", tmp_path / "m.gguf", "q4_0", importance={name: squares})
    up = load_file(stories / "hf/model.safetensors")[ours]
    values = tensors_of(tmp_path / "m.gguf")
    assert torch.equal(values[ours], quantize(up, GGMLType.Q4_0, squares).dequantize())
    assert not torch.equal(values[ours], quantize(up, GGMLType.Q4_0).dequantize())


def test_each_expert_has_an_importance_of_its_own(tmp_path: Path) -> None:
    changes = {"attention_chunk_size": 8192, "floor_scale": 8192, "hidden_size": 64, "intermediate_size": 96}
    folder = save(hf_llama4(**changes), tmp_path / "hf")
    stack = load_model(folder).get_parameter("model.layers.0.feed_forward.experts.down_proj").transpose(1, 2)
    rows = torch.arange(1.0, stack.shape[0] * 96 + 1).view(-1, 96)
    expected = [quantize(rows_of, GGMLType.Q4_0, rows[i]).dequantize() for i, rows_of in enumerate(stack)]
    for form in (rows, rows.flatten()):  # as the two kinds of files have it
        importance = {"blk.0.ffn_down_exps.weight": form}
        write(folder, tmp_path / f"{form.ndim}.gguf", "q4_0", importance=importance)
        found = tensors_of(tmp_path / f"{form.ndim}.gguf")["model.layers.0.feed_forward.experts.down_proj"]
        assert torch.equal(found, torch.stack(expected))


def test_an_importance_that_does_not_fit_is_refused(
    tmp_path: Path, stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ParameterError, match=r"has \[7\] for blk.0.ffn_up.weight, whose rows have 64"):
        write(stories / "hf", tmp_path / "m.gguf", "q4_0", importance={"blk.0.ffn_up.weight": torch.ones(7)})
    assert "nothing for 29 of 30 weights: blk.0.attn_k.weight" in caplog.text
    with pytest.raises(ParameterError, match="nothing for any weight of this model"):
        write(stories / "hf", tmp_path / "m.gguf", "q4_0", importance={"blk.9.ffn_up.weight": torch.ones(64)})


def test_weights_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    model = hf_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    folder = save(model, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight cannot be quantised: .*not finite"):
        write(folder, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight cannot be quantised"):
        load_model(folder, quantize="q8_0")
    with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight cannot be quantised: .*half precision"):
        write(folder, tmp_path / "m.gguf", "f16")
