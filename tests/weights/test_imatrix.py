"""Importance matrices: the files, and what is found while a model reads, against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import CheckpointError, ParameterError
from puna.model import Llama, PackedAttention
from puna.weights.gguf_writer import write_gguf
from puna.weights.imatrix import Activations, read_imatrix, write_imatrix
from puna.weights.imatrix_collect import ActivationSums, cut_rows
from puna.weights.loader import load_model

from tiny import hf_llama, hf_llama4, puna_twin

# ---------------------------------------------------------------------------------------------------- files


def test_a_matrix_comes_back(tmp_path: Path) -> None:
    squares = torch.linspace(0.1, 30, 64)[None]
    seen = {"blk.0.ffn_up.weight": Activations(sums=squares * 50, counts=torch.tensor([50.0]))}
    write_imatrix(tmp_path / "i.gguf", seen, datasets=["text"], chunk_size=512, chunks=3)
    found = read_imatrix(tmp_path / "i.gguf")
    torch.testing.assert_close(found.means["blk.0.ffn_up.weight"], squares[0])
    assert (found.datasets, found.chunks) == (("text",), 3)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert reader.fields["imatrix.datasets"].contents() == ["text"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {"blk.0.ffn_up.weight.in_sum2": [64, 1], "blk.0.ffn_up.weight.counts": [1, 1]}


def test_experts_that_saw_nothing_count_evenly(tmp_path: Path) -> None:
    seen = Activations(sums=torch.tensor([[2.0, 4.0], [0.0, 0.0]]), counts=torch.tensor([2.0, 0.0]))
    write_imatrix(tmp_path / "i.gguf", {"a": seen}, datasets=[], chunk_size=1, chunks=1)
    assert read_imatrix(tmp_path / "i.gguf").means["a"].tolist() == [[1.0, 2.0], [1.0, 1.0]]


def dat(*, calls: int = 4, values: tuple[float, ...] = (8.0, 2.0)) -> bytes:
    name = b"blk.0.ffn_up.weight"
    head = np.array([1, len(name)], "<i4").tobytes() + name
    return head + np.array([calls, len(values)], "<i4").tobytes() + np.array(values, "<f4").tobytes()


def test_the_older_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat())  # the oldest files end here
    assert read_imatrix(path).means["blk.0.ffn_up.weight"].tolist() == [2.0, 0.5]
    path.write_bytes(dat(calls=0) + np.array([7, 4], "<i4").tobytes() + b"text")
    found = read_imatrix(path)
    assert found.means["blk.0.ffn_up.weight"].tolist() == [8.0, 2.0]
    assert (found.datasets, found.chunks) == (("text",), 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dat()[:-1], "damaged: values at byte"),
        (dat() + b"\7\0\0", "damaged: the number of chunks at byte"),
        (b"{\n  'json'}", "no importance matrix"),
        (b"\0\0\0\0", "has 0 entries"),
        (dat(values=(1.0, float("nan"))), "blk.0.ffn_up.weight are negative or not finite"),
        (dat(values=(1.0, -2.0)), "blk.0.ffn_up.weight are negative or not finite"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_where(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "i.dat")


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.type": "model"}, {})
    with pytest.raises(CheckpointError, match="no importance matrix"):
        read_imatrix(tmp_path / "x.gguf")
    write_gguf(tmp_path / "y.gguf", {"general.type": "imatrix"}, {"a.in_sum2": torch.ones(1, 4)})
    with pytest.raises(CheckpointError, match=r"a\.counts' is missing"):
        read_imatrix(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match="no such file"):
        read_imatrix(tmp_path / "none.dat")


# --------------------------------------------------------------------------------------------- what is found

ROWS = ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5])


def found_in(model: Llama) -> dict[str, Activations]:
    with ActivationSums(model) as sums:
        for row in ROWS:
            sums.read(row)
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert not hooked
    return sums.found()


def squares(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).double().square().sum(0, keepdim=True)


@torch.no_grad()
def layer_inputs(model: Llama, row: list[int]) -> tuple[Tensor, Tensor]:
    """Return what meets the first layer's q, k, v, and its MLP."""
    layer: Any = model.model.layers[0]
    ids, places = torch.tensor(row), torch.arange(len(row))
    x = model.model.embed_tokens(ids)
    normed = layer.input_layernorm(x)
    attention = PackedAttention([0, len(row)])
    x = x + layer.self_attn(normed, places, model.model.rope(places, None), attention)
    return normed, layer.post_attention_layernorm(x)


@torch.no_grad()
def test_sums_of_squares_are_those_of_what_meets_each_weight() -> None:
    model = puna_twin(hf_llama())
    found = found_in(model)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(found) == {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert all(seen.counts.tolist() == [11] for seen in found.values())
    normed, before_mlp = zip(*(layer_inputs(model, row) for row in ROWS), strict=True)
    mlp: Any = model.model.layers[0].mlp
    inner = [functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in before_mlp]
    for part, inputs in (("attn_k", normed), ("ffn_up", before_mlp), ("ffn_down", inner)):
        torch.testing.assert_close(
            found[f"blk.0.{part}.weight"].sums, squares(list(inputs)), rtol=1e-5, atol=0
        )


@torch.no_grad()
def test_experts_count_what_comes_to_them() -> None:
    model = puna_twin(hf_llama4())
    layer = model.config.moe_layers[0]
    assert layer == 0
    found = found_in(model)
    mixture: Any = model.model.layers[0].feed_forward
    x = torch.cat([layer_inputs(model, row)[1] for row in ROWS])
    best, chosen = mixture.router(x).max(1)
    scaled = x * torch.sigmoid(best)[:, None]
    gate, up, down = (found[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    for expert in range(model.config.num_local_experts):
        mine = scaled[chosen == expert]
        wide, upper = (mine @ mixture.experts.gate_up_proj[expert]).chunk(2, dim=1)
        assert gate.counts[expert] == up.counts[expert] == down.counts[expert] == len(mine)
        torch.testing.assert_close(gate.sums[expert], squares([mine])[0], rtol=1e-5, atol=1e-12)
        inner = squares([functional.silu(wide) * upper])[0]
        torch.testing.assert_close(down.sums[expert], inner, rtol=1e-5, atol=1e-12)
    assert torch.equal(gate.sums, up.sums)
    assert len(set(chosen.tolist())) > 1
    assert "blk.0.ffn_up_shexp.weight" in found and "blk.0.ffn_gate_inp.weight" not in found


def test_a_quantised_model_can_be_read_with(tmp_path: Path) -> None:
    changes = {"attention_chunk_size": 8192, "floor_scale": 8192, "hidden_size": 64, "intermediate_size": 96}
    hf_llama4(**changes).save_pretrained(tmp_path)
    whole = found_in(load_model(tmp_path))
    packed = found_in(load_model(tmp_path, quantize="q8_0"))
    assert set(packed) == set(whole)
    for name, seen in packed.items():
        assert float(seen.counts.sum()) == 11, name
        if name.startswith("blk.0.attn"):  # behind the first router a token may go to another expert
            lost = (seen.sums - whole[name].sums).norm() / whole[name].sums.norm()
            assert float(lost) < 0.1, name
    gate, up = (packed[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    assert torch.equal(gate.sums, up.sums) and bool(((gate.sums > 0).all(1) == (gate.counts > 0)).all())


def test_what_is_not_finite_is_refused() -> None:
    model = puna_twin(hf_llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("inf")
    with pytest.raises(ParameterError, match="not finite: compute in float32"):
        found_in(model)


def test_a_text_is_cut_into_rows() -> None:
    assert cut_rows([1, 2, 3, 4, 5], 3, 0) == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert cut_rows([1, 2, 3], 2, None) == [[1, 2], [3]]
    assert cut_rows([], 4, 0) == []
    with pytest.raises(ParameterError, match="at least 2 tokens, got 1"):
        cut_rows([1], 1, 0)
