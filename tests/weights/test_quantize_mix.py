"""The mixes: which type each tensor gets, against the counts that llama.cpp's files are known to have."""

from __future__ import annotations

from collections import Counter

import pytest

from puna.errors import ParameterError
from puna.gguf_header import GGMLType
from puna.weights.quantize_mix import FILE_TYPES, ModelShape, file_type, mix, sorted_names

LLAMA_8B = ModelShape(num_layers=32, num_heads=32, num_kv_heads=8, tied=False)
LLAMA_70B = ModelShape(num_layers=80, num_heads=64, num_kv_heads=8, tied=False)


def shapes_of(model: ModelShape, hidden: int = 4096) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (128256, hidden),
        "output_norm.weight": (hidden,),
    }
    if not model.tied:
        shapes["output.weight"] = (128256, hidden)
    for layer in range(model.num_layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{layer}.{part}.weight"] = (hidden, hidden)
        shapes[f"blk.{layer}.attn_norm.weight"] = (hidden,)
    return shapes


def layers_of(
    name: str, part: str, kind: GGMLType, model: ModelShape, *, weighted: bool = False
) -> list[int]:
    kinds = mix(file_type(name), shapes_of(model), model, weighted=weighted)
    return [i for i in range(model.num_layers) if kinds[f"blk.{i}.{part}.weight"] is kind]


def test_q4_k_m_of_llama_3_1_8b_is_the_well_known_one() -> None:
    kinds = mix(file_type("Q4_K_M"), shapes_of(LLAMA_8B), LLAMA_8B)
    assert Counter(kind.name for kind in kinds.values()) == {"Q4_K": 193, "Q6_K": 33, "F32": 33}
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_of("q4_k_m", "attn_v", GGMLType.Q6_K, LLAMA_8B) == more
    assert layers_of("q4_k_m", "ffn_down", GGMLType.Q6_K, LLAMA_8B) == more
    assert kinds["output.weight"] is GGMLType.Q6_K and kinds["token_embd.weight"] is GGMLType.Q4_K


def test_the_other_mixes() -> None:
    assert layers_of("q4_k_s", "attn_v", GGMLType.Q5_K, LLAMA_8B) == [0, 1, 2, 3]
    assert layers_of("q4_k_s", "ffn_down", GGMLType.Q5_K, LLAMA_8B) == [0, 1, 2, 3]
    assert layers_of("q3_k_m", "attn_v", GGMLType.Q5_K, LLAMA_8B) == [0, 1]
    assert layers_of("q3_k_m", "ffn_down", GGMLType.Q5_K, LLAMA_8B) == [0, 1]
    assert layers_of("q3_k_m", "attn_output", GGMLType.Q4_K, LLAMA_8B) == list(range(32))
    assert layers_of("q2_k", "attn_v", GGMLType.Q4_K, LLAMA_8B) == list(range(32))
    assert layers_of("q2_k", "ffn_down", GGMLType.Q3_K, LLAMA_8B) == list(range(32))
    assert layers_of("q4_0", "ffn_down", GGMLType.Q4_1, LLAMA_8B) == []
    assert layers_of("q4_0", "ffn_down", GGMLType.Q4_1, LLAMA_8B, weighted=True) == [0, 1, 2, 3]
    assert layers_of("iq4_xs", "ffn_down", GGMLType.Q5_K, LLAMA_8B) == [0, 1, 2, 3]
    assert layers_of("iq4_xs", "ffn_down", GGMLType.Q5_K, LLAMA_8B, weighted=True) == []
    assert layers_of("q4_k_m", "attn_v", GGMLType.Q5_K, LLAMA_70B) == [
        i for i in range(80) if not (i < 10 or i >= 70 or (i - 10) % 3 == 2)
    ]
    for name, kind in (("q8_0", GGMLType.Q8_0), ("q6_k", GGMLType.Q6_K)):
        kinds = mix(file_type(name), shapes_of(LLAMA_8B), LLAMA_8B)
        assert set(kinds.values()) == {kind, GGMLType.F32}
    assert mix(file_type("bf16"), shapes_of(LLAMA_8B), LLAMA_8B)["output.weight"] is GGMLType.BF16


def test_a_tied_embedding_is_the_head() -> None:
    tied = ModelShape(num_layers=2, num_heads=8, num_kv_heads=8, tied=True)
    assert mix(file_type("q4_0"), shapes_of(tied), tied)["token_embd.weight"] is GGMLType.Q6_K


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [
        ("q4_k_s", 96, "Q5_0"),
        ("q5_k_s", 96, "Q5_1"),
        ("q6_k", 96, "Q8_0"),
        ("q3_k_s", 96, "Q4_0"),
        ("q2_k", 96, "Q4_0"),
        ("iq4_xs", 96, "IQ4_NL"),
        ("q4_k_s", 80, "F16"),
        ("q8_0", 80, "F16"),
    ],
)
def test_rows_that_are_no_whole_blocks_fall_back(name: str, hidden: int, expected: str) -> None:
    model = ModelShape(num_layers=8, num_heads=8, num_kv_heads=8, tied=False)
    kinds = mix(file_type(name), shapes_of(model, hidden), model)
    assert kinds["blk.5.ffn_up.weight"].name == expected
    assert kinds["output.weight"].name == ("Q8_0" if hidden == 96 else "F16")


def test_routers_norms_and_biases_stay_float() -> None:
    model = ModelShape(num_layers=1, num_heads=8, num_kv_heads=8, tied=False)
    shapes = {"blk.0.ffn_gate_inp.weight": (16, 256), "blk.0.attn_q.bias": (256,), "rope_freqs.weight": (64,)}
    assert set(mix(file_type("q4_0"), shapes, model).values()) == {GGMLType.F32}


def test_names_and_their_order() -> None:
    assert file_type("Q4_K").name == "q4_k_m" and file_type("q5-k-s").number == 16
    with pytest.raises(ParameterError, match="'q9_9' is not known: f32, f16"):
        file_type("q9_9")
    assert {file_type(name).name for name in FILE_TYPES} == set(FILE_TYPES)
    names = ["output.weight", "blk.10.a.weight", "blk.9.b.weight", "blk.9.a.weight"]
    assert sorted_names(names) == ["output.weight", "blk.9.a.weight", "blk.9.b.weight", "blk.10.a.weight"]
