"""GGUF checkpoints as llama.cpp's converter writes them come back as the model had them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, UnsupportedError
from puna.gguf_header import GGMLType
from puna.model import Llama, LlamaConfig, PackedAttention
from puna.weights.gguf import GgufFile, open_gguf, read_metadata
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import swap_in

from tiny import hf_llama, hf_llama4, puna_twin

Array = npt.NDArray[Any]
Tensors = dict[str, Tensor]

F16, BF16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q8_0", "Q4_0"))

TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k as llama.cpp's converter does: rotary pairs become neighbours."""
    per_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return per_head.swapaxes(1, 2).reshape(rows.shape)


def as_converted(state: Mapping[str, Tensor], config: LlamaConfig) -> Tensors:
    """Rename and reorder a model's tensors to what a GGUF file of it holds."""
    out: Tensors = {}
    for name, value in state.items():
        if name == "lm_head.weight":
            out["output.weight"] = value
        elif name in TOP:
            out[TOP[name]] = value
        else:
            _, _, layer, *rest = name.split(".")
            part, leaf = ".".join(rest[:-1]), rest[-1]
            if leaf == "gate_up_proj":
                gate, up = value.transpose(1, 2).chunk(2, dim=1)
                out[f"blk.{layer}.ffn_gate_exps.weight"] = gate
                out[f"blk.{layer}.ffn_up_exps.weight"] = up
            elif part.endswith("experts"):
                out[f"blk.{layer}.ffn_down_exps.weight"] = value.transpose(1, 2)
            else:
                if not config.is_llama4 and part.endswith("q_proj"):
                    value = permuted(value, config.num_attention_heads)
                if not config.is_llama4 and part.endswith("k_proj"):
                    value = permuted(value, config.num_key_value_heads)
                out[f"blk.{layer}.{PARTS[part]}.{leaf}"] = value
    return out


def packed(value: Tensor, kind: Any) -> Array:
    """Quantise with the gguf package."""
    array: Array = gguf.quants.quantize(value.contiguous().numpy(), kind)
    return array


def writer(path: Path, config: LlamaConfig, **options: Any) -> Any:
    """Start a file with the keys that llama.cpp's converter writes."""
    arch = "llama4" if config.is_llama4 else "llama"
    out = gguf.GGUFWriter(path, arch, **options)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size_mlp or config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope.rope_theta)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    if config.is_llama4:
        out.add_expert_count(config.num_local_experts)
        out.add_expert_used_count(config.num_experts_per_tok)
        out.add_expert_feed_forward_length(config.intermediate_size)
        out.add_interleave_moe_layer_step(config.moe_layers[0] + 1)
    return out


def finish(out: Any) -> None:
    """Write all and close."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def write(path: Path, config: LlamaConfig, tensors: Tensors, kind: Any = None, **keys: Any) -> Path:
    """Write a file; matrices take `kind`, the rest are float32 as the converter has them."""
    out = writer(path, config)
    for key, value in keys.items():
        out.add_uint32(key.replace("__", "."), value)
    for name, value in tensors.items():
        kept = value.ndim == 1 or "ffn_gate_inp" in name or kind is None
        array = value.contiguous().numpy() if kept else packed(value, kind)
        out.add_tensor(name, array, raw_dtype=None if kept or array.dtype == np.float16 else kind)
    finish(out)
    return path


def make_llama(**changes: Any) -> Llama:
    """Make a random Llama whose rows are whole blocks of 32."""
    return puna_twin(hf_llama(intermediate_size=96, **changes))


def loaded(path: Path) -> Tensors:
    """Read all tensors of a file, dequantised."""
    values = dict(open_gguf(path).tensors())
    return {n: v.dequantize() if isinstance(v, QuantTensor) else v for n, v in values.items()}


def assert_same(got: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Compare every tensor exactly."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name].float(), value.float()), name


def fill(path: Path) -> Llama:
    """Build the model of a file and give it the tensors as they are, quantised or not."""
    checkpoint = open_gguf(path)
    with torch.device("meta"):
        model = Llama(checkpoint.config)
    for name, value in checkpoint.tensors():
        if isinstance(value, QuantTensor):
            swap_in(model, name, value)
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value.float(), requires_grad=False))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval()


def logits(model: Llama) -> Tensor:
    """Run 20 tokens."""
    ids = torch.arange(20) % model.config.vocab_size
    out: Tensor = model(ids, torch.arange(20), PackedAttention([0, 20]))
    return out


def test_stories_equal_the_safetensors_file(stories: Path) -> None:
    checkpoint = open_gguf(stories / "gguf" / "stories260k-f32.gguf")
    assert_same(dict_of_floats(checkpoint.tensors()), load_file(stories / "hf" / "model.safetensors"))
    assert checkpoint.format == "gguf"
    assert checkpoint.dtype == torch.float32
    assert checkpoint.total_bytes == sum(4 * v.numel() for v in dict_of_floats(checkpoint.tensors()).values())
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.num_key_value_heads == 4
    assert checkpoint.skipped == []


def dict_of_floats(pairs: Any) -> Tensors:
    """Collect a stream that has no quantised tensors."""
    out = dict(pairs)
    assert all(isinstance(value, Tensor) for value in out.values())
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_llama_comes_back_with_its_rows_in_order(tmp_path: Path, tied: bool) -> None:
    model = make_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    path = write(tmp_path / "m.gguf", model.config, as_converted(model.state_dict(), model.config))
    assert_same(loaded(path), model.state_dict())
    config = open_gguf(path).config
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (tied, True, True)
    assert torch.equal(logits(fill(path)), logits(model))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(None, torch.float32), (F16, torch.float16), (BF16, torch.bfloat16), (Q8_0, torch.float32)],
)
def test_dtype_is_that_of_most_weights(tmp_path: Path, kind: Any, dtype: torch.dtype) -> None:
    model = make_llama()
    path = write(tmp_path / "m.gguf", model.config, as_converted(model.state_dict(), model.config), kind)
    checkpoint = open_gguf(path)
    assert checkpoint.dtype == dtype
    if kind is not Q8_0:
        values = dict_of_floats(checkpoint.tensors())
        assert values["model.layers.0.self_attn.q_proj.weight"].dtype == dtype
        rounded = {n: v.to(dtype) if v.ndim > 1 else v for n, v in model.state_dict().items()}
        assert_same(values, rounded)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0])
def test_quantised_rows_are_put_back_byte_by_byte(tmp_path: Path, kind: Any) -> None:
    model = make_llama()
    path = write(tmp_path / "m.gguf", model.config, as_converted(model.state_dict(), model.config), kind)
    values = dict(open_gguf(path).tensors())
    for name, weight in model.state_dict().items():
        value = values[name]
        if weight.ndim == 1:
            assert isinstance(value, Tensor) and torch.equal(value, weight)
        else:
            assert isinstance(value, QuantTensor) and value.shape == weight.shape
            assert np.array_equal(value.data.numpy(), packed(weight, kind)), name


@pytest.mark.usefixtures("reference_kernels")
def test_a_quantised_model_computes_what_its_dequantised_twin_does(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    path = write(tmp_path / "m.gguf", model.config, as_converted(model.state_dict(), model.config), Q8_0)
    twin = make_llama(tie_word_embeddings=True)
    twin.load_state_dict(loaded(path))
    torch.testing.assert_close(logits(fill(path)), logits(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [None, Q8_0])
def test_fused_qkv_is_split(tmp_path: Path, kind: Any) -> None:
    model = make_llama(attention_bias=True)
    tensors = as_converted(model.state_dict(), model.config)
    path = write(tmp_path / "split.gguf", model.config, tensors, kind)
    fused = dict(tensors)
    for layer in range(2):
        for leaf in ("weight", "bias"):
            fused[f"blk.{layer}.attn_qkv.{leaf}"] = torch.cat(
                [fused.pop(f"blk.{layer}.attn_{part}.{leaf}") for part in "qkv"]
            )
    assert_same(loaded(write(tmp_path / "fused.gguf", model.config, fused, kind)), loaded(path))


def test_biases_that_some_projections_lack_are_zero(tmp_path: Path) -> None:
    model = make_llama(attention_bias=True)
    tensors = as_converted(model.state_dict(), model.config)
    tensors = {n: v for n, v in tensors.items() if not n.endswith("attn_output.bias")}
    expected = dict(model.state_dict())
    for layer in range(2):
        expected[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(64)
    assert_same(loaded(write(tmp_path / "m.gguf", model.config, tensors)), expected)


def test_rope_freqs_reach_the_config(tmp_path: Path) -> None:
    model = make_llama()
    tensors = as_converted(model.state_dict(), model.config)
    tensors["rope_freqs.weight"] = torch.tensor([1.0, 1.5, 4.0, 8.0])
    checkpoint = open_gguf(write(tmp_path / "m.gguf", model.config, tensors))
    assert checkpoint.config.rope.freq_factors == (1.0, 1.5, 4.0, 8.0)
    assert_same(dict_of_floats(checkpoint.tensors()), model.state_dict())
    assert checkpoint.skipped == []


def make_llama4(**changes: Any) -> Llama:
    """Make a random Llama 4 with dense and expert layers, of whole blocks of 32."""
    sizes = {"intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
    return puna_twin(hf_llama4(**sizes, **changes))


def test_llama4_comes_back(tmp_path: Path) -> None:
    model = make_llama4()
    path = write(tmp_path / "m.gguf", model.config, as_converted(model.state_dict(), model.config))
    assert_same(loaded(path), model.state_dict())
    config = open_gguf(path).config
    assert config.model_type == "llama4_text"
    assert (config.moe_layers, config.nope_layers) == ((1, 3), (3,))


@pytest.mark.usefixtures("reference_kernels")
def test_quantised_experts_stay_packed(tmp_path: Path) -> None:
    model = make_llama4()
    tensors = as_converted(model.state_dict(), model.config)
    path = write(tmp_path / "m.gguf", model.config, tensors, Q8_0)
    values = dict(open_gguf(path).tensors())
    for part in ("gate", "up", "down"):
        value = values[f"model.layers.1.feed_forward.experts.{part}_proj"]
        assert isinstance(value, QuantTensor)
        assert np.array_equal(value.data.numpy(), packed(tensors[f"blk.1.ffn_{part}_exps.weight"], Q8_0))
    float_path = write(tmp_path / "f.gguf", model.config, dequantised(tensors))
    torch.testing.assert_close(logits(fill(path)), logits(fill(float_path)), rtol=1e-4, atol=1e-4)


def dequantised(tensors: Tensors) -> Tensors:
    """Round matrices to what Q8_0 makes of them."""
    out = {}
    for name, value in tensors.items():
        kept = value.ndim == 1 or "ffn_gate_inp" in name
        out[name] = value if kept else torch.from_numpy(gguf.quants.dequantize(packed(value, Q8_0), Q8_0))
    return out


def test_experts_of_mixed_types_are_all_packed(tmp_path: Path) -> None:
    model = make_llama4()
    tensors = as_converted(model.state_dict(), model.config)
    out = writer(tmp_path / "m.gguf", model.config)
    for name, value in tensors.items():
        quantise = "ffn_gate_exps" in name or "ffn_up_exps" in name
        array = packed(value, Q8_0) if quantise else value.contiguous().numpy()
        out.add_tensor(name, array, raw_dtype=Q8_0 if quantise else None)
    finish(out)
    values = dict(open_gguf(tmp_path / "m.gguf").tensors())
    down = values["model.layers.1.feed_forward.experts.down_proj"]
    assert isinstance(down, QuantTensor) and down.type == GGMLType.F32
    assert torch.equal(down.dequantize(), tensors["blk.1.ffn_down_exps.weight"])
    assert logits(fill(tmp_path / "m.gguf")).isfinite().all()


@pytest.mark.parametrize("kind", [None, Q8_0])
def test_experts_stored_one_by_one_are_stacked(tmp_path: Path, kind: Any) -> None:
    model = make_llama4()
    tensors = as_converted(model.state_dict(), model.config)
    path = write(tmp_path / "stacked.gguf", model.config, tensors, kind)
    single: Tensors = {}
    for name, value in tensors.items():
        if "_exps" in name:
            single |= {name.replace("_exps", f".{expert}"): value[expert] for expert in (2, 0, 1, 3)}
        else:
            single[name] = value
    assert_same(loaded(write(tmp_path / "single.gguf", model.config, single, kind)), loaded(path))
    del single["blk.1.ffn_up.2.weight"]
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up_exps\.weight' have holes"):
        open_gguf(write(tmp_path / "hole.gguf", model.config, single))


def test_vision_tensors_are_named_as_skipped(tmp_path: Path) -> None:
    model = make_llama4()
    tensors = as_converted(model.state_dict(), model.config)
    vision = {"v.blk.0.attn_q.weight": torch.ones(4, 4), "mm.linear_1.weight": torch.ones(4, 4)}
    checkpoint = open_gguf(write(tmp_path / "m.gguf", model.config, {**tensors, **vision}))
    assert checkpoint.total_bytes == sum(4 * v.numel() for v in tensors.values())
    for _ in range(2):
        assert_same(dict_of_floats(checkpoint.tensors()), model.state_dict())
        assert checkpoint.skipped == list(vision)


def test_unknown_tensors_keep_their_names(tmp_path: Path) -> None:
    model = make_llama()
    tensors = as_converted(model.state_dict(), model.config)
    odd = {"blk.0.attn_sub_norm.weight": torch.ones(64), "blk.00.attn_v.weight": torch.ones(2, 2)}
    values = loaded(write(tmp_path / "m.gguf", model.config, {**tensors, **odd}))
    assert_same(values, {**model.state_dict(), **odd})


def test_heads_that_do_not_fit_are_left_to_the_loader(tmp_path: Path) -> None:
    model = make_llama()
    tensors = as_converted(model.state_dict(), model.config)
    tensors["blk.0.attn_q.weight"] = torch.ones(63, 64)
    values = loaded(write(tmp_path / "m.gguf", model.config, tensors))
    assert values["model.layers.0.self_attn.q_proj.weight"].shape == (63, 64)
    tensors["blk.0.attn_qkv.weight"] = torch.ones(95, 64)
    with pytest.raises(
        CheckpointError, match=r"'blk\.0\.attn_qkv\.weight' is \[95, 64\]; the rows .* are 96"
    ):
        loaded(write(tmp_path / "m.gguf", model.config, tensors))


def test_writing_to_a_tensor_does_not_change_the_file(stories: Path) -> None:
    path = stories / "gguf" / "stories260k-f32.gguf"
    file = GgufFile(path)
    before = path.read_bytes()
    norm = file.read("output_norm.weight")
    assert isinstance(norm, Tensor)
    norm.zero_()
    assert path.read_bytes() == before
    again = GgufFile(path).read("output_norm.weight")
    assert isinstance(again, Tensor) and bool(again.any())


def test_metadata_of_a_vocabulary_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_token_list([b"<s>", "\u2581a".encode(), b"\xff"])
    out.add_token_scores([0.0, -1.5, -2.0])
    out.add_token_types([3, 1, 6])
    out.add_add_bos_token(True)
    finish(out)
    metadata = read_metadata(path)
    assert metadata["tokenizer.ggml.tokens"] == ["<s>", "\u2581a", "\udcff"]
    assert metadata["tokenizer.ggml.scores"] == [0.0, -1.5, -2.0]
    assert metadata["tokenizer.ggml.token_type"] == [3, 1, 6]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    with pytest.raises(CheckpointError, match="token_embd.weight"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("qwen2", {}, "architecture 'qwen2'"),
        ("mllama", {}, "architecture 'mllama'"),
        ("clip", {}, "architecture 'clip'"),
        ("llama", {"llama.expert_count": 8}, "Mixtral"),
        ("llama", {"general.type": "adapter"}, "LoRA adapter"),
        ("llama", {"general.type": "imatrix"}, "importance matrix"),
    ],
)
def test_what_is_no_llama_is_refused_by_name(
    tmp_path: Path, arch: str, keys: dict[str, Any], message: str
) -> None:
    path = tmp_path / "m.gguf"
    out = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        out.add_string(key, value) if isinstance(value, str) else out.add_uint32(key, value)
    finish(out)
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_types_that_are_not_supported_are_refused_before_loading(tmp_path: Path) -> None:
    model = make_llama(hidden_size=256, num_attention_heads=8)
    out = writer(tmp_path / "m.gguf", model.config)
    for name, value in as_converted(model.state_dict(), model.config).items():
        if name == "blk.1.attn_v.weight":
            out.add_tensor(name, np.zeros((64, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
        else:
            out.add_tensor(name, value.numpy())
    finish(out)
    with pytest.raises(UnsupportedError, match=r"'blk\.1\.attn_v\.weight' has the type IQ2_XXS"):
        open_gguf(tmp_path / "m.gguf")


def test_metadata_that_make_no_model_name_the_file(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    out.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(out)
    with pytest.raises(ConfigError, match=r"m\.gguf: llama\."):
        open_gguf(tmp_path / "m.gguf")


def write_parts(folder: Path, model: Llama, per_part: int = 9) -> list[Path]:
    """Write a split model as the gguf package does."""
    out = writer(folder / "m.gguf", model.config, split_max_tensors=per_part)
    for name, value in as_converted(model.state_dict(), model.config).items():
        out.add_tensor(name, value.contiguous().numpy())
    finish(out)
    return sorted(folder.glob("m-*.gguf"))


def test_split_files_are_read_from_the_first(tmp_path: Path) -> None:
    model = make_llama()
    paths = write_parts(tmp_path, model)
    assert len(paths) == 3
    checkpoint = open_gguf(paths[0])
    assert_same(dict_of_floats(checkpoint.tensors()), model.state_dict())
    assert checkpoint.total_bytes == sum(4 * v.numel() for v in model.state_dict().values())


def test_a_later_part_says_which_is_the_first(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, make_llama())
    with pytest.raises(CheckpointError, match=r"part 2 of 3; give the first: .*m-00001-of-00003\.gguf"):
        open_gguf(paths[1])


def test_missing_swapped_and_renamed_parts_are_errors(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path, make_llama())
    aside = tmp_path / "aside"
    third.rename(aside)
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing beside it: m-00003-of-00003\.gguf"):
        open_gguf(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: split\.no, split\.count are \(1, 3\)"):
        open_gguf(first)
    aside.rename(third)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="part 1 of 3 and must be named"):
        open_gguf(renamed)


def renumbered(part: Path, number: int) -> bytes:
    """Return the bytes of a part with another split.no."""
    content = bytearray(part.read_bytes())
    at = content.index(b"split.no") + len("split.no") + 4
    content[at : at + 2] = number.to_bytes(2, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("per_part", "message"),
    [(9, "its parts hold 27 tensors, split.tensors.count is 21"), (7, "is also in another part")],
)
def test_a_part_twice_is_found_out(tmp_path: Path, per_part: int, message: str) -> None:
    _, second, third = write_parts(tmp_path, make_llama(), per_part)
    third.write_bytes(renumbered(second, 2))
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")
