"""The compiled decoder against the modules that it stands for, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from puna import LoraConfig, get_peft_model
from puna.engine import compiled_decoder
from puna.engine.compiled_decoder import CompiledDecoder
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.paged_cache import PagedAttention, PagedKVCache
from puna.engine.sampling import SamplingParams
from puna.gguf_header import GGMLType
from puna.kernels import compiled
from puna.model import Llama
from puna.model.lora_serving import LowRank, ServedAdapter
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import QuantLinear, swap_in

from tiny import hf_llama, hf_llama4, puna_twin

pytestmark = pytest.mark.skipif(compiled() is None, reason="the compiled kernels are not in use")

TYPES = (GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q5_1)


def quantized(**changes: Any) -> Llama:
    """Make a model whose linears have several block types."""
    model = puna_twin(hf_llama(intermediate_size=96, **changes))
    for number, (name, module) in enumerate(list(model.model.layers.named_modules())):
        if isinstance(module, torch.nn.Linear):
            kind = TYPES[number % len(TYPES)]
            data = gguf.quants.quantize(module.weight.numpy(), gguf.GGMLQuantizationType(int(kind)))
            swap_in(model, f"model.layers.{name}.weight", QuantTensor(torch.from_numpy(data), kind))
    return model


def mlp_of(model: Llama, layer: int) -> Any:
    return model.get_submodule(f"model.layers.{layer}.mlp")


def both(model: Llama, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Run two sequences in three steps: a prompt, a chunk, one token; by the modules and by the decoder."""
    decoder = CompiledDecoder.of(model)
    assert decoder is not None
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for outs, use_decoder in zip(results, (False, True), strict=True):
        cache = PagedKVCache(model.config, num_blocks=9, block_size=16, dtype=dtype)
        tables = [[7, 2, 4, 0], [1, 8, 3, 5]]
        for starts, counts in (([0, 0], [21, 3]), ([21, 3], [1, 30]), ([22, 33], [1, 1])):
            positions = torch.cat([torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
            ids = (positions * 7 + 3) % 96
            attention = PagedAttention(cache, tables, starts, counts)
            select = torch.arange(len(ids))
            assert decoder.takes(attention, len(ids))
            compute = decoder.hidden_states if use_decoder else model.hidden_states
            outs.append(compute(ids, positions, attention, select))
    return results


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@torch.inference_mode()
def test_equals_the_modules_with_quantized_weights(cache: torch.dtype) -> None:
    expected, got = both(quantized(), cache)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def kernels_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels for 16-bit weights also where torch is faster."""
    monkeypatch.setattr(compiled_decoder, "prefers_kernel", lambda *_: True)


@pytest.mark.usefixtures("kernels_preferred")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_equals_the_modules_with_weights_of_16_bits(dtype: torch.dtype) -> None:
    expected, got = both(puna_twin(hf_llama()).to(dtype), dtype)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("kernels_preferred")
@torch.inference_mode()
def test_equals_the_modules_where_both_kinds_are_mixed_and_rope_is_scaled() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model = quantized(
        rope_scaling=rope, head_dim=16, max_position_embeddings=16, num_key_value_heads=8
    ).bfloat16()
    other = puna_twin(hf_llama(intermediate_size=96)).bfloat16()
    mlp_of(model, 1).down_proj = mlp_of(other, 0).down_proj
    expected, got = both(model, torch.bfloat16)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: puna_twin(hf_llama()),  # whole float32 weights
        lambda: puna_twin(hf_llama4()),
        lambda: puna_twin(hf_llama(attention_bias=True)).bfloat16(),
        lambda: puna_twin(hf_llama(mlp_bias=True)).bfloat16(),
        lambda: with_adapter(quantized()),
        lambda: quantized().to(torch.float64),
    ],
    ids=["float32", "llama4", "attention_bias", "mlp_bias", "lora", "float64"],
)
def test_leaves_to_the_modules_what_it_does_not_know(make: Callable[[], Llama]) -> None:
    assert CompiledDecoder.of(make()) is None


def with_adapter(model: Llama) -> Llama:
    get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    return model


def change_weight(model: Llama) -> None:
    mlp_of(model, 1).up_proj = QuantLinear(mlp_of(model, 0).up_proj.quantized)


def add_hook(model: Llama) -> None:
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(lambda *_: None)


def move(model: Llama) -> None:
    model.to(torch.float64)


def move_storage(model: Llama) -> None:
    model.state_dict()["model.layers.1.mlp.down_proj.matrix.packed"].share_memory_()


def listen_to_a_layer(model: Llama) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def listen_to_a_matrix(model: Llama) -> None:
    model.get_submodule("model.layers.1.mlp.down_proj.matrix").register_forward_hook(lambda *_: None)


def drop_a_layer(model: Llama) -> None:
    del model.model.layers[1]


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        add_hook,
        with_adapter,
        move,
        move_storage,
        listen_to_a_layer,
        listen_to_a_matrix,
        drop_a_layer,
    ],
)
def test_notices_that_the_model_has_changed(change: Callable[[Llama], object]) -> None:
    model = quantized()
    decoder = CompiledDecoder.of(model)
    cache = PagedKVCache(model.config, num_blocks=2, block_size=16, dtype=torch.float32)
    attention = PagedAttention(cache, [[0]], [0], [5])
    assert decoder is not None and decoder.takes(attention, 5)
    change(model)
    assert not decoder.takes(attention, 5)


@torch.inference_mode()
def test_looks_behind_what_serves_adapters_and_leaves_their_rows_to_it() -> None:
    model = quantized()
    engine = LLMEngine(model, EngineConfig(num_blocks=16, enable_prefix_caching=False))
    change = LowRank(torch.randn(2, 64), torch.randn(64, 2), 1.0)
    adapter = ServedAdapter(name="a", key=b"a", changes={"model.layers.0.self_attn.q_proj": (change,)})
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    def answer(chosen: ServedAdapter | None, *, compiled_too: bool) -> list[int]:
        decoder, found = engine.runner._decoder, []
        engine.runner._decoder = decoder if compiled_too else None
        engine.add("x", [5, 7, 11], params, adapter=chosen)
        while engine.has_unfinished:
            found += [token for output in engine.step() for token in output.new_token_ids]
        engine.runner._decoder = decoder
        return found

    plain = answer(None, compiled_too=True)
    adapted = answer(adapter, compiled_too=True)
    assert adapted != plain
    assert adapted == answer(adapter, compiled_too=False)
    assert plain == answer(None, compiled_too=True) == answer(None, compiled_too=False)
    attention = PagedAttention(engine.runner.cache, [[0]], [0], [5])
    assert engine.runner._decoder is not None and engine.runner._decoder.takes(attention, 5)


def test_not_under_autocast_nor_where_gradients_are_wanted() -> None:
    model = quantized()
    decoder = CompiledDecoder.of(model)
    cache = PagedKVCache(model.config, num_blocks=2, block_size=16, dtype=torch.float32)
    attention = PagedAttention(cache, [[0]], [0], [5])
    assert decoder is not None and decoder.takes(attention, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not decoder.takes(attention, 5)
    model.model.norm.weight.requires_grad_()
    assert not decoder.takes(attention, 5)
    with torch.no_grad():
        assert decoder.takes(attention, 5)


def test_a_cache_of_fp8_is_left_to_the_modules() -> None:
    model = quantized()
    decoder = CompiledDecoder.of(model)
    cache = PagedKVCache(model.config, num_blocks=2, block_size=16, dtype=torch.float8_e4m3fn)
    assert decoder is not None and not decoder.takes(PagedAttention(cache, [[0]], [0], [5]), 5)


def test_wrong_input_raises() -> None:
    model = quantized()
    decoder = CompiledDecoder.of(model)
    assert decoder is not None
    cache = PagedKVCache(model.config, num_blocks=2, block_size=16, dtype=torch.float32)
    attention = PagedAttention(cache, [[0]], [0], [5])
    x, cos = torch.zeros(5, 64), torch.zeros(5, 1, 4)
    run, batch = decoder._kernel.run, attention.compiled_batch
    for wrong in (
        lambda: run(x[:4], cos[:4], cos[:4], batch, attention.slots[:4], cache),
        lambda: run(x.double(), cos, cos, batch, attention.slots, cache),
        lambda: run(x, cos[:4], cos, batch, attention.slots, cache),
        lambda: run(x, cos, cos, batch, attention.slots + 100, cache),
        lambda: run(x, cos, cos, batch, attention.slots.int(), cache),
    ):
        with pytest.raises(ValueError):
            wrong()  # type: ignore[no-untyped-call]
