"""Rows with adapters of their own: what `Served` computes, against each adapter alone in `PeftModel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams
from puna.errors import CheckpointError, ModelNotFoundError, ParameterError, UnsupportedError
from puna.gguf_header import GGMLType
from puna.model import Llama, PackedAttention
from puna.model.lora_config import LoraConfig
from puna.model.lora_serving import AdapterRows, LowRank, ServedAdapter, group_rows, install
from puna.peft_model import PeftModel, get_peft_model
from puna.served_adapters import read_served
from puna.weights.adapter_files import read_adapter_tensors, write_adapter
from puna.weights.nf4 import swap_in_4bit
from puna.weights.quant import swap_in
from puna.weights.quantize_blocks import quantize

from tiny import hf_llama, puna_twin

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 4, "lora_alpha": 6},
    "patterns": {"target_modules": ALL, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}},
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "lora bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5, 40]},
    "head tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [2], "embed_tokens": [7]},
    },
}
LENGTHS = [5, 1, 7, 4]
IDS = torch.tensor([1, 5, 9, 33, 2, 8, 11, 70, 3, 7, 40, 12, 90, 4, 61, 2, 5])


def llama(**changes: Any) -> Llama:
    return puna_twin(hf_llama(**changes))


def save(network: Llama, folder: Path, settings: Mapping[str, Any], seed: int = 1) -> PeftModel:
    """Write an adapter of random values for the model, and return the model with it."""
    torch.manual_seed(seed)
    model = get_peft_model(network, LoraConfig(**{"r": 4, "init_lora_weights": False, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def borders() -> list[int]:
    return [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]


@torch.no_grad()
def logits(network: Llama) -> Tensor:
    found: Tensor = network(IDS, positions(), PackedAttention(borders()))
    return found


@torch.no_grad()
def served_logits(network: Llama, adapters: list[ServedAdapter | None]) -> Tensor:
    rows, head_rows = AdapterRows(), AdapterRows()
    for adapter in adapters:
        if adapter is not None:
            install(network, adapter, rows, head_rows)
    with rows.of(adapters, LENGTHS, CPU), head_rows.of(adapters, LENGTHS, CPU):
        return logits(network)


def parts(values: Tensor) -> list[Tensor]:
    return list(values.split(LENGTHS))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_an_adapter_equal_the_adapter_alone_and_others_keep_the_bits_of_the_base(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": tied}
    expected = parts(logits(save(llama(**changes), tmp_path, KINDS[kind]).network))
    network = llama(**changes)
    base = parts(logits(network))
    adapter = read_served(network, tmp_path)
    found = parts(served_logits(network, [adapter, None, None, adapter]))
    for place, part in enumerate(found):
        wanted = expected if place in (0, 3) else base
        assert torch.equal(part, base[place]) is (place in (1, 2))
        torch.testing.assert_close(part, wanted[place], atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(network), torch.cat(base))  # with what serves adapters around its modules


def test_three_adapters_in_one_pass_each_have_their_own_rows(tmp_path: Path) -> None:
    kinds = ["plain", "rslora", "embedding"]
    alone = [
        parts(logits(save(llama(), tmp_path / kind, KINDS[kind], seed).network))
        for seed, kind in enumerate(kinds)
    ]
    network = llama()
    adapters = [read_served(network, tmp_path / kind, name=kind) for kind in kinds]
    found = parts(served_logits(network, [adapters[2], adapters[0], None, adapters[1]]))
    for place, which in ((0, 2), (1, 0), (3, 1)):
        torch.testing.assert_close(found[place], alone[which][place], atol=2e-5, rtol=1e-4)
    merged = PeftModel.from_pretrained(llama(), tmp_path / "rslora").merge_and_unload()
    torch.testing.assert_close(found[3], parts(logits(merged))[3], atol=2e-4, rtol=1e-3)


def pack_gguf(network: Llama) -> None:
    for name, tensor in list(network.named_parameters()):
        if name.endswith(("proj.weight", "embed_tokens.weight")):
            swap_in(network, name, quantize(tensor.data, GGMLType.Q8_0))


@pytest.mark.parametrize("packing", ["nf4", "q8_0"])
@pytest.mark.parametrize("kind", ["plain", "dora", "tokens"])
def test_over_packed_weights(kind: str, packing: str, tmp_path: Path) -> None:
    def packed() -> Llama:
        network = llama(intermediate_size=96, tie_word_embeddings=True)
        if packing == "nf4":
            swap_in_4bit(network)
        else:
            pack_gguf(network)
        return network

    expected = parts(logits(save(packed(), tmp_path, KINDS[kind]).network))
    network = packed()
    base = parts(logits(network))
    found = parts(served_logits(network, [read_served(network, tmp_path), None, None, None]))
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-3)
    assert torch.equal(torch.cat(found[1:]), torch.cat(base[1:]))


def test_a_half_precision_base_is_rounded_once(tmp_path: Path) -> None:
    """As PEFT does it: the sum is in float32, and then rounded to the dtype of the base."""
    expected = parts(logits(save(llama().bfloat16(), tmp_path, KINDS["rslora"]).network))
    network = llama().bfloat16()
    found = parts(served_logits(network, [read_served(network, tmp_path), None, None, None]))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected[0], atol=0.06, rtol=0.02)


def test_rows_that_lie_together_are_a_slice() -> None:
    one, two = (ServedAdapter(name=name, key=b"", changes={}) for name in ("one", "two"))
    assert group_rows([None, one, one, None], [2, 3, 1, 4], CPU) == ((one, slice(2, 6)),)
    groups = dict(group_rows([one, two, one, None], [2, 3, 1, 4], CPU))
    assert groups[two] == slice(2, 5)
    rows = groups[one]
    assert isinstance(rows, Tensor) and rows.tolist() == [0, 1, 5]
    assert group_rows([None, one], [2, 0], CPU) == ()


def test_an_adapter_is_known_by_its_content(tmp_path: Path) -> None:
    network = llama()
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        save(llama(), tmp_path / folder, KINDS["plain"], seed)
    a, b, c = (read_served(network, tmp_path / folder).key for folder in "abc")
    assert a == b != c


def test_what_cannot_be_served_says_so_and_what_to_do(tmp_path: Path) -> None:
    network = llama()
    save(llama(), tmp_path / "norm", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]})
    with pytest.raises(UnsupportedError, match=r"adapter 'mine': modules_to_save \['norm'\]: .*puna merge"):
        read_served(network, tmp_path / "norm", name="mine")
    save(llama(), tmp_path / "pissa", {"init_lora_weights": "pissa", "target_modules": ["q_proj"]})
    with pytest.raises(UnsupportedError, match="'pissa' changes the base weights"):
        read_served(network, tmp_path / "pissa")
    save(llama(), tmp_path / "rank", {"r": 24, "target_modules": ["q_proj"]})
    with pytest.raises(ParameterError, match="rank 24, above max_lora_rank 16: give max_lora_rank=24"):
        read_served(network, tmp_path / "rank", max_rank=16)
    assert read_served(network, tmp_path / "rank", max_rank=24).name == "rank"
    with pytest.raises(ModelNotFoundError, match="loading adapter 'x' failed: .*no adapter"):
        read_served(network, tmp_path, name="x")


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    save(llama(), tmp_path, KINDS["plain"])
    tensors = read_adapter_tensors(tmp_path)
    q = "model.layers.0.self_attn.q_proj"
    del tensors[f"{q}.lora_A.weight"]
    tensors[f"{q}.lora_B.weight"] = torch.zeros(64, 5)
    write_adapter(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tensors)
    with pytest.raises(CheckpointError) as caught:
        read_served(llama(), tmp_path)
    assert f"missing: {q}.lora_A.weight" in str(caught.value)
    assert f"of the wrong shape: {q}.lora_B.weight (expected [64, 4], got [64, 5])" in str(caught.value)


def test_a_saved_base_table_must_be_the_models_own(tmp_path: Path) -> None:
    model = save(llama(), tmp_path / "with", KINDS["embedding"])
    model.save_pretrained(tmp_path / "with")  # as PEFT does: the base's table too
    assert "model.embed_tokens.base_layer.weight" in read_adapter_tensors(tmp_path / "with")
    network = llama()
    assert "model.embed_tokens" in read_served(network, tmp_path / "with").changes
    network.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(UnsupportedError, match="base_layer.weight is not the model's own"):
        read_served(network, tmp_path / "with")


def test_reading_draws_no_random_numbers(tmp_path: Path) -> None:
    save(llama(), tmp_path, KINDS["embedding"])
    network = llama()
    before = torch.get_rng_state()
    read_served(network, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_engines_over_one_model_serve_their_own_requests() -> None:
    model = puna_twin(hf_llama())
    change = LowRank(torch.randn(2, 64), torch.randn(64, 2), 1.0)
    adapter = ServedAdapter(name="a", key=b"a", changes={"model.layers.0.self_attn.q_proj": (change,)})
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = []
    for _ in range(2):
        engine = LLMEngine(model, EngineConfig(num_blocks=16))
        for name, chosen in (("plain", None), ("adapted", adapter)):
            engine.add(name, [5, 7, 11], params, adapter=chosen)
        found: dict[str, list[int]] = {"plain": [], "adapted": []}
        while engine.has_unfinished:
            for output in engine.step():
                found[output.sequence.request_id] += output.new_token_ids
        answers.append(found)
    assert answers[0] == answers[1]
    assert answers[0]["plain"] != answers[0]["adapted"]
