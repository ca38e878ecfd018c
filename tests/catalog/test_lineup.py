"""The lineup's figures against those that Meta publishes."""

from __future__ import annotations

import pytest

from puna.catalog import LICENCES, LINEUP, find_model
from puna.catalog.lineup import LlamaModel

TOTALS = {
    "Llama 2 7B": 6_738_415_616,
    "Llama 2 13B": 13_015_864_320,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3 8B": 8_030_261_248,
    "Llama 3 70B": 70_553_706_496,
    "Llama 3.1 8B": 8_030_261_248,
    "Llama 3.1 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
    "Llama 3.2 1B": 1_235_814_400,
    "Llama 3.2 3B": 3_212_749_824,
    "Llama 3.3 70B": 70_553_706_496,
    "Llama 4 Scout": 107_769_861_120,
    "Llama 4 Maverick": 400_711_848_960,
}


def named(name: str) -> LlamaModel:
    model = find_model(name)
    assert model is not None
    return model


@pytest.mark.parametrize("name", TOTALS)
def test_total_parameters_are_the_published_ones(name: str) -> None:
    assert named(name).total_parameters == TOTALS[name]


def test_lineup_holds_exactly_the_models_counted_above() -> None:
    assert [model.name for model in LINEUP] == list(TOTALS)


def test_active_parameters_of_llama_4_are_17_billion() -> None:
    assert named("Llama 4 Scout").active_parameters == 17_172_894_720
    assert named("Llama 4 Maverick").active_parameters == 17_184_691_200
    assert named("Llama 3.1 8B").active_parameters == 8_030_261_248


def test_kv_cache_bytes_per_token() -> None:
    assert named("Llama 2 7B").kv_bytes_per_token == 524_288
    assert named("Llama 3.1 8B").kv_bytes_per_token == 131_072
    assert named("Llama 3.2 3B").kv_bytes_per_token == 114_688
    assert named("Llama 4 Scout").kv_bytes_per_token == 196_608


def test_hf_config_of_3_2_1b() -> None:
    config = named("llama3.2:1b").hf_config()
    assert config["head_dim"] == 64
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 131072
    assert config["eos_token_id"] == [128001, 128008, 128009]
    assert config["rope_scaling"] == {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def test_hf_config_of_maverick_and_scout() -> None:
    maverick, scout = named("llama4:maverick").hf_config(), named("llama4:scout").hf_config()
    assert maverick["model_type"] == "llama4_text"
    assert maverick["rope_scaling"] is None
    assert (maverick["num_local_experts"], maverick["num_experts_per_tok"]) == (128, 1)
    assert (maverick["interleave_moe_layer_step"], scout["interleave_moe_layer_step"]) == (2, 1)
    assert (maverick["use_qk_norm"], scout["use_qk_norm"]) == (False, True)
    assert scout["rope_scaling"]["high_freq_factor"] == 1.0
    assert scout["no_rope_layers"][:5] == [1, 1, 1, 0, 1]
    assert scout["max_position_embeddings"] == 10485760
    assert named("llama4:scout").hf_config(instruct=False)["max_position_embeddings"] == 262144


def test_names_lead_to_models() -> None:
    assert named("meta-llama/Meta-Llama-3-8B-Instruct").name == "Llama 3 8B"
    assert named(" META-LLAMA/LLAMA-2-7B-HF ").name == "Llama 2 7B"
    assert named("Llama 3.3 70B").hf_base is None
    assert find_model("Llama 5 1T") is None
    assert find_model("") is None


def test_every_model_has_a_licence_of_its_family() -> None:
    for model in LINEUP:
        assert LICENCES[model.licence].family == model.family
