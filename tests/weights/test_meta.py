"""Meta folders: shards made from a Transformers model by the inverse rules load back to its weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from puna.weights.loader import load_model
from puna.weights.meta import MetaCheckpoint

from tiny import hf_llama, hf_llama4

State = dict[str, Tensor]

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 16,
    "ffn_dim_multiplier": 0.47,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
PARAMS4 = {
    **PARAMS,
    "n_layers": 4,
    "head_dim": 8,
    "multiple_of": 8,
    "ffn_dim_multiplier": 0.4,
    "moe_args": {"num_experts": 4, "interleave_moe_layer_step": 2},
    "use_qk_norm": True,
}
HEAD_DIM = 8
DENSE = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def slices(tensor: Tensor, count: int, axis: int) -> list[Tensor]:
    return [part.clone() for part in tensor.chunk(count, dim=axis)]


def pairs_adjacent(weight: Tensor) -> Tensor:
    """Move each head's row t * d/2 + j to 2j + t: Hugging Face's order of RoPE pairs to Meta's."""
    order = [
        head * HEAD_DIM + t * HEAD_DIM // 2 + j
        for head in range(weight.shape[0] // HEAD_DIM)
        for j in range(HEAD_DIM // 2)
        for t in range(2)
    ]
    return weight[torch.tensor(order)]


def kv_slices(weight: Tensor, count: int) -> list[Tensor]:
    """Give each shard its heads; with more shards than heads, neighbours get the same one."""
    heads = weight.view(-1, HEAD_DIM, weight.shape[1])
    repeats = max(1, count // heads.shape[0])
    return slices(heads.repeat_interleave(repeats, dim=0).flatten(0, 1), count, 0)


def meta_shards(state: State, count: int, *, embedding_axis: int = 0) -> list[State]:
    """Write a `LlamaForCausalLM` as `count` shards of Meta's."""
    shards: list[State] = [{} for _ in range(count)]

    def put(name: str, parts: list[Tensor]) -> None:
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part

    put("tok_embeddings.weight", slices(state["model.embed_tokens.weight"], count, embedding_axis))
    put("output.weight", slices(state["lm_head.weight"], count, 0))
    put("norm.weight", [state["model.norm.weight"]] * count)
    put("rope.freqs", [torch.ones(4)] * count)
    for layer in range(2):
        hf, meta = f"model.layers.{layer}", f"layers.{layer}"
        q, k, v, o = (state[f"{hf}.self_attn.{key}_proj.weight"] for key in "qkvo")
        put(f"{meta}.attention.wq.weight", slices(pairs_adjacent(q), count, 0))
        put(f"{meta}.attention.wk.weight", kv_slices(pairs_adjacent(k), count))
        put(f"{meta}.attention.wv.weight", kv_slices(v, count))
        put(f"{meta}.attention.wo.weight", slices(o, count, 1))
        for proj, short in DENSE.items():
            weight = state[f"{hf}.mlp.{proj}.weight"]
            put(f"{meta}.feed_forward.{short}.weight", slices(weight, count, int(short == "w2")))
        put(f"{meta}.attention_norm.weight", [state[f"{hf}.input_layernorm.weight"]] * count)
        put(f"{meta}.ffn_norm.weight", [state[f"{hf}.post_attention_layernorm.weight"]] * count)
    return shards


def meta4_shards(state: State, count: int) -> list[State]:
    """Write a `Llama4ForCausalLM` as `count` shards of Meta's."""
    shards: list[State] = [{} for _ in range(count)]

    def put(name: str, parts: list[Tensor]) -> None:
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.contiguous()

    put("tok_embeddings.weight", slices(state["model.embed_tokens.weight"], count, 0))
    put("output.weight", slices(state["lm_head.weight"], count, 0))
    put("norm.weight", [state["model.norm.weight"]] * count)
    for layer in range(4):
        hf, meta = f"model.layers.{layer}", f"layers.{layer}"
        qkv = [slices(state[f"{hf}.self_attn.{key}_proj.weight"], count, 0) for key in "qkv"]
        put(f"{meta}.attention.wqkv.weight", [torch.cat(parts) for parts in zip(*qkv, strict=True)])
        put(f"{meta}.attention.wo.weight", slices(state[f"{hf}.self_attn.o_proj.weight"], count, 1))
        put(f"{meta}.attention.wqkv.layer_norm_weight", [state[f"{hf}.input_layernorm.weight"]] * count)
        norm, ff, hf_ff = (
            state[f"{hf}.post_attention_layernorm.weight"],
            f"{meta}.feed_forward",
            f"{hf}.feed_forward",
        )
        if layer % 2 == 0:
            put(f"{ff}.mlp.layer_norm_weight", [norm] * count)
            gate, up = (slices(state[f"{hf_ff}.{p}_proj.weight"], count, 0) for p in ("gate", "up"))
            put(f"{ff}.mlp.fc1_weight", [torch.cat(parts) for parts in zip(gate, up, strict=True)])
            put(f"{ff}.mlp.fc2_weight", slices(state[f"{hf_ff}.down_proj.weight"], count, 1))
            continue
        put(f"{ff}.norm.weight", [norm] * count)
        put(f"{ff}.router_DE", [state[f"{hf_ff}.router.weight"].t()] * count)
        gate_up, down = state[f"{hf_ff}.experts.gate_up_proj"], state[f"{hf_ff}.experts.down_proj"]
        for name, half in zip(("moe_w_in_eD_F", "moe_w_swiglu_eD_F"), gate_up.chunk(2, dim=2), strict=True):
            put(f"{ff}.experts.{name}", [part.flatten(0, 1) for part in slices(half, count, 2)])
        put(f"{ff}.experts.moe_w_out_eF_D", [part.flatten(0, 1) for part in slices(down, count, 1)])
        shared = f"{hf_ff}.shared_expert"
        put(f"{ff}.w_in_shared_FD.weight", slices(state[f"{shared}.gate_proj.weight"], count, 0))
        put(f"{ff}.w_swiglu_FD.weight", slices(state[f"{shared}.up_proj.weight"], count, 0))
        put(f"{ff}.w_out_shared_DF.weight", slices(state[f"{shared}.down_proj.weight"], count, 1))
        put(f"{ff}.running_gate_stats_3E", [torch.ones(3, 4)] * count)
    return shards


def write(folder: Path, shards: list[Any], params: dict[str, Any] = PARAMS) -> None:
    (folder / "params.json").write_text(json.dumps(params))
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")


def require_equal(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def state() -> State:
    weights: State = hf_llama().state_dict()
    return weights


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_are_joined_to_the_weights_they_were_cut_from(
    tmp_path: Path, state: State, count: int, embedding_axis: int
) -> None:
    write(tmp_path, meta_shards(state, count, embedding_axis=embedding_axis))
    checkpoint = MetaCheckpoint(tmp_path)
    require_equal(dict(checkpoint.tensors()), state)
    require_equal(load_model(tmp_path).state_dict(), state)
    assert (checkpoint.format, checkpoint.dtype, checkpoint.skipped) == (
        "meta",
        torch.float32,
        ["rope.freqs"],
    )


@pytest.mark.parametrize("count", [1, 2])
def test_llama4_shards_are_joined_to_the_weights_they_were_cut_from(tmp_path: Path, count: int) -> None:
    model = hf_llama4(intermediate_size=40, intermediate_size_mlp=72, interleave_moe_layer_step=2)
    weights = model.state_dict()
    shards: list[Any] = meta4_shards(weights, count)
    for shard in shards:
        shard["layers.0.attention.wqkv._extra_state"] = io.BytesIO(b"x")
        shard["vision_embeddings.weight"] = torch.ones(3)
    write(tmp_path, shards, PARAMS4)
    require_equal(load_model(tmp_path).state_dict(), weights)
    checkpoint = MetaCheckpoint(tmp_path)
    require_equal(dict(checkpoint.tensors()), weights)
    stats = [f"layers.{i}.feed_forward.running_gate_stats_3E" for i in (1, 3)]
    skipped = ["layers.0.attention.wqkv._extra_state", *stats, "vision_embeddings.weight"]
    assert sorted(checkpoint.skipped) == sorted(skipped)


def test_stories_equals_its_hugging_face_twin(stories: Path) -> None:
    require_equal(
        dict(MetaCheckpoint(stories / "meta").tensors()), load_file(stories / "hf" / "model.safetensors")
    )


@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_the_vocabulary_comes_from_the_embedding_where_params_say_minus_one(
    tmp_path: Path, state: State, embedding_axis: int
) -> None:
    write(
        tmp_path,
        meta_shards(state, 2, embedding_axis=embedding_axis),
        {"model": {**PARAMS, "vocab_size": -1}, "tokenizer": {}},
    )
    assert MetaCheckpoint(tmp_path).config.vocab_size == 96
    require_equal(dict(MetaCheckpoint(tmp_path).tensors()), state)


@pytest.mark.parametrize("present", [True, False])
def test_a_head_that_is_the_embedding_again_or_absent_is_tied(
    tmp_path: Path, state: State, present: bool
) -> None:
    tied = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    shards = meta_shards(tied, 2, embedding_axis=1)
    if not present:
        for shard in shards:
            del shard["output.weight"]
    write(tmp_path, shards)
    checkpoint = MetaCheckpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings
    del tied["lm_head.weight"]
    require_equal(dict(checkpoint.tensors()), tied)
    read = [shard[name] for shard in shards for name in shard.keys() - {"rope.freqs", "output.weight"}]
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in read)


def test_a_head_that_differs_only_late_is_not_tied(tmp_path: Path, state: State) -> None:
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    write(tmp_path, meta_shards({**state, "lm_head.weight": head}, 1))
    checkpoint = MetaCheckpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    assert torch.equal(dict(checkpoint.tensors())["lm_head.weight"], head)


def test_one_unnumbered_file_will_do(tmp_path: Path, state: State) -> None:
    write(tmp_path, meta_shards(state, 1))
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.pth")
    require_equal(dict(MetaCheckpoint(tmp_path).tensors()), state)


# ------------------------------------------------------------------------------------------ what is wrong


def test_a_gap_between_shards_is_named(tmp_path: Path, state: State) -> None:
    write(tmp_path, meta_shards(state, 4))
    (tmp_path / "consolidated.01.pth").unlink()
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match="missing consolidated.01.pth, consolidated.02.pth$"):
        MetaCheckpoint(tmp_path)


def test_missing_last_shards_are_noticed(tmp_path: Path, state: State) -> None:
    write(tmp_path, meta_shards(state, 4)[:3])
    with pytest.raises(CheckpointError, match="3 shards of .*wo.weight have 48 columns, .* 64: is a shard"):
        MetaCheckpoint(tmp_path)


def test_missing_files_are_named(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match="params.json: is missing"):
        MetaCheckpoint(tmp_path)
    write(tmp_path, [])
    with pytest.raises(ModelNotFoundError, match="no consolidated.00.pth"):
        MetaCheckpoint(tmp_path)


def drop_norm(shards: list[State]) -> None:
    del shards[1]["layers.1.ffn_norm.weight"]


def widen(shards: list[State]) -> None:
    shards[1]["layers.0.attention.wq.weight"] = torch.ones(1, 64)


def drop_embedding(shards: list[State]) -> None:
    for shard in shards:
        del shard["tok_embeddings.weight"]


def flatten_embedding(shards: list[State]) -> None:
    for shard in shards:
        shard["tok_embeddings.weight"] = shard["tok_embeddings.weight"].flatten()


def narrow_embedding(shards: list[State]) -> None:
    for shard in shards:
        shard["tok_embeddings.weight"] = shard["tok_embeddings.weight"][:, :60].clone()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_norm, "layers.1.ffn_norm.weight is not in consolidated.01.pth"),
        (widen, "layers.0.attention.wq.weight differs in shape or type between shards"),
        (drop_embedding, "no tok_embeddings.weight in any shard"),
        (flatten_embedding, r"tok_embeddings.weight has shape \[3072\], not two dimensions"),
        (narrow_embedding, "2 shards of tok_embeddings.weight with 60 columns do not give dim 64"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    tmp_path: Path, state: State, damage: Callable[[list[State]], None], reason: str
) -> None:
    shards = meta_shards(state, 2)
    damage(shards)
    write(tmp_path, shards)
    with pytest.raises(CheckpointError, match=reason):
        MetaCheckpoint(tmp_path)


def test_more_heads_that_do_not_repeat_are_refused(tmp_path: Path, state: State) -> None:
    shards = meta_shards(state, 4)
    shards[3]["layers.1.attention.wv.weight"] += 1
    write(tmp_path, shards)
    with pytest.raises(CheckpointError, match="layers.1.attention.wv.weight has 4 heads, not 2"):
        list(MetaCheckpoint(tmp_path).tensors())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.wqkv.weight", (50, 64)),
        ("layers.0.feed_forward.mlp.fc1_weight", (71, 64)),
        ("layers.1.feed_forward.experts.moe_w_in_eD_F", (255, 40)),
        ("layers.1.feed_forward.experts.moe_w_swiglu_eD_F", (256, 39)),
        ("layers.1.feed_forward.experts.moe_w_out_eF_D", (161, 64)),
        ("layers.1.feed_forward.experts.moe_w_in_eD_F", ()),
    ],
)
def test_llama4_tensors_of_a_wrong_shape_are_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    model = hf_llama4(intermediate_size=40, intermediate_size_mlp=72, interleave_moe_layer_step=2)
    shards = meta4_shards(model.state_dict(), 1)
    shards[0][name] = torch.ones(shape)
    write(tmp_path, shards, PARAMS4)
    with pytest.raises(CheckpointError, match=f"{name} has "):
        list(MetaCheckpoint(tmp_path).tensors())


@pytest.mark.parametrize("half", ["moe_w_in_eD_F", "moe_w_swiglu_eD_F"])
def test_half_an_expert_is_named_as_missing(tmp_path: Path, half: str) -> None:
    model = hf_llama4(intermediate_size=40, intermediate_size_mlp=72, interleave_moe_layer_step=2)
    shards = meta4_shards(model.state_dict(), 1)
    del shards[0][f"layers.1.feed_forward.experts.{half}"]
    write(tmp_path, shards, PARAMS4)
    with pytest.raises(CheckpointError, match=f"no layers.1.feed_forward.experts.{half} in any shard"):
        list(MetaCheckpoint(tmp_path).tensors())


def test_unknown_tensors_come_under_their_own_name_and_are_reported(tmp_path: Path, state: State) -> None:
    shards = meta_shards(state, 2)
    for shard in shards:
        shard["layers.0.attention.wz.weight"] = torch.ones(2, 2)
        shard["extra"] = torch.ones(3)
    write(tmp_path, shards)
    assert dict(MetaCheckpoint(tmp_path).tensors()).keys() - state.keys() == {
        "layers.0.attention.wz.weight",
        "extra",
    }
    with pytest.raises(CheckpointError, match="unexpected: layers.0.attention.wz.weight, extra$"):
        load_model(tmp_path)


def test_configs_that_cannot_be_are_refused_by_name(tmp_path: Path, state: State) -> None:
    write(tmp_path, meta_shards(state, 1))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"n_heads": "8"}, ConfigError, "params.json: n_heads"),
        ({"vocab_size": "96"}, ConfigError, "params.json: vocab_size"),
        ({"dim": 0}, ConfigError, "params.json: dim"),
        ({"lora_args": {"rank": 16}}, UnsupportedError, "params.json: .*lora_args"),
        ({"quantization_args": {"scheme": "x"}}, UnsupportedError, "params.json: .*quantization_args"),
        ({"vision_num_cross_attention_layers": 8}, UnsupportedError, "Llama 3.2 Vision"),
    ]
    for changes, kind, named in cases:
        (tmp_path / "params.json").write_text(json.dumps({**PARAMS, **changes}))
        with pytest.raises(kind, match=named):
            MetaCheckpoint(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path, state: State) -> None:
    shards = meta_shards(state, 1)
    write(tmp_path, shards)
    torch.save({}, tmp_path / "fp8_scales_0.pt")
    with pytest.raises(UnsupportedError, match="fp8_scales_0.pt are not supported"):
        MetaCheckpoint(tmp_path)
    (tmp_path / "fp8_scales_0.pt").unlink()
    name = "layers.0.feed_forward.w1.weight"
    shards[0][name] = shards[0][name].to(torch.float8_e4m3fn)
    write(tmp_path, shards)
    with pytest.raises(UnsupportedError, match=f"{name}: stored as float8_e4m3fn"):
        MetaCheckpoint(tmp_path)
