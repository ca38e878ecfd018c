"""Hugging Face folders: every tensor equals what Transformers saved; indices that lie are refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from puna.weights.hf import HfCheckpoint
from puna.weights.loader import load_model

from tiny import hf_llama, hf_llama4

State = dict[str, Tensor]


def save_model(model: Any, folder: Path, max_shard_size: str = "1GB") -> State:
    """Save a Transformers model and return its weights."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    state: State = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def require_equal(got: Mapping[str, object], expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        found = got[name]
        assert isinstance(found, Tensor) and torch.equal(found, tensor), name
        assert found.dtype == tensor.dtype, name


def as_bin(folder: Path) -> None:
    """Turn the safetensors files of a folder into what `save_pretrained` wrote before they existed."""
    for path in folder.glob("model*.safetensors"):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("convert", [lambda folder: None, as_bin])
@pytest.mark.parametrize(
    "make",
    [
        hf_llama,
        lambda: hf_llama(attention_bias=True, mlp_bias=True),
        lambda: hf_llama4(interleave_moe_layer_step=2),
    ],
)
def test_every_tensor_equals_transformers(
    tmp_path: Path, make: Callable[[], Any], convert: Callable[[Path], None], max_shard_size: str
) -> None:
    state = save_model(make(), tmp_path, max_shard_size)
    convert(tmp_path)
    checkpoint = HfCheckpoint(tmp_path)
    require_equal(dict(checkpoint.tensors()), state)
    require_equal(load_model(tmp_path).state_dict(), state)
    assert checkpoint.total_bytes == sum(tensor.numel() * 4 for tensor in state.values())
    assert (checkpoint.format, checkpoint.dtype, checkpoint.skipped) == ("hf", torch.float32, [])


def test_the_dtype_is_what_the_config_declares_else_what_the_file_holds(tmp_path: Path) -> None:
    save_model(hf_llama().bfloat16(), tmp_path)
    assert HfCheckpoint(tmp_path).dtype == torch.bfloat16
    change_config(tmp_path, dtype="float16")
    assert HfCheckpoint(tmp_path).dtype == torch.float16
    change_config(tmp_path, dtype=None)
    assert HfCheckpoint(tmp_path).dtype == torch.bfloat16


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    state = save_model(hf_llama(tie_word_embeddings=True), tmp_path)
    del state["lm_head.weight"]
    require_equal(dict(HfCheckpoint(tmp_path).tensors()), state)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_is_skipped_and_mentioned_if_it_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    state = save_model(hf_llama(tie_word_embeddings=True), tmp_path)
    head = state.pop("lm_head.weight").clone()
    if not same:
        head[-1, -1] += 1
    save_file({**state, "lm_head.weight": head}, tmp_path / "model.safetensors")
    checkpoint = HfCheckpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        require_equal(dict(checkpoint.tensors()), state)
    assert checkpoint.total_bytes == sum(tensor.numel() * 4 for tensor in state.values())
    assert checkpoint.skipped == ["lm_head.weight"]
    assert ("lm_head.weight differs from model.embed_tokens.weight" in caplog.text) is not same


def test_saved_rope_frequencies_are_skipped(tmp_path: Path) -> None:
    state = save_model(hf_llama(), tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**state, name: torch.ones(4)}, tmp_path / "model.safetensors")
    checkpoint = HfCheckpoint(tmp_path)
    require_equal(dict(checkpoint.tensors()), state)
    assert checkpoint.skipped == [name]


def test_of_a_multimodal_llama4_only_the_text_is_used(tmp_path: Path) -> None:
    state = save_model(hf_llama4(), tmp_path)
    vision = {
        "vision_model.class_embedding": torch.ones(3),
        "multi_modal_projector.linear_1.weight": torch.ones(4, 3),
    }
    prefixed = {f"language_model.{name}": tensor for name, tensor in state.items()}
    save_file({**prefixed, **vision}, tmp_path / "model.safetensors")
    text_config = json.loads((tmp_path / "config.json").read_text())
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text_config}))
    checkpoint = HfCheckpoint(tmp_path)
    require_equal(dict(checkpoint.tensors()), state)
    assert sorted(checkpoint.skipped) == sorted(vision)


def split_experts(state: State) -> State:
    """Write each expert's matrices alone and as (out, in), the way quantising exporters do."""
    split: State = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        for expert, weight in enumerate(tensor):
            if leaf == "gate_up_proj":
                half = weight.shape[1] // 2
                split[f"{prefix}.{expert}.gate_proj.weight"] = weight[:, :half].t().contiguous()
                split[f"{prefix}.{expert}.up_proj.weight"] = weight[:, half:].t().contiguous()
            elif prefix.endswith("experts"):
                split[f"{prefix}.{expert}.{leaf}.weight"] = weight.t().contiguous()
        if not prefix.endswith("experts"):
            split[name] = tensor
    return split


def test_experts_stored_one_by_one_are_stacked(tmp_path: Path) -> None:
    state = save_model(hf_llama4(), tmp_path)
    split = split_experts(state)
    assert len(split) == len(state) + 4 * (3 * 4 - 2)
    save_file(split, tmp_path / "model.safetensors")
    require_equal(dict(HfCheckpoint(tmp_path).tensors()), state)


def test_missing_and_misshapen_experts_are_named(tmp_path: Path) -> None:
    split = split_experts(save_model(hf_llama4(), tmp_path))
    one = "model.layers.0.feed_forward.experts.3.up_proj.weight"
    weight = split.pop(one)
    save_file(split | {one.replace("3", "9"): weight}, tmp_path / "model.safetensors")
    reason = f"missing: {one}; unexpected: {one.replace('3', '9')}"
    with pytest.raises(CheckpointError, match=reason):
        list(HfCheckpoint(tmp_path).tensors())
    save_file(split | {one: weight[1:].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"3.up_proj.weight has shape \[79, 64\], .* \[80, 64\]"):
        list(HfCheckpoint(tmp_path).tensors())


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    state = save_model(hf_llama4(), tmp_path)
    save_file(state | {"language_model.model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight name the same tensor"):
        HfCheckpoint(tmp_path)


def test_stories_loads(stories: Path) -> None:
    require_equal(
        dict(HfCheckpoint(stories / "hf").tensors()), load_file(stories / "hf" / "model.safetensors")
    )


# ----------------------------------------------------------------------------------------- what is not there


def test_missing_files_are_named(tmp_path: Path) -> None:
    save_model(hf_llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ModelNotFoundError, match="looked for model.safetensors, model.safetensors.index.json"
    ):
        HfCheckpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: is missing"):
        HfCheckpoint(tmp_path)


def test_a_config_error_names_file_and_key(tmp_path: Path) -> None:
    save_model(hf_llama(), tmp_path)
    for key, value in [("vocab_size", -1), ("vocab_size", 10**12), ("num_attention_heads", "8")]:
        shutil.copy(tmp_path / "config.json", tmp_path / "kept")
        change_config(tmp_path, **{key: value})
        with pytest.raises(ConfigError, match=f"config.json: {key} must be"):
            HfCheckpoint(tmp_path)
        shutil.move(tmp_path / "kept", tmp_path / "config.json")


@pytest.mark.parametrize("model_type", ["mllama", "qwen2", None])
def test_other_models_are_refused_by_name(tmp_path: Path, model_type: str | None) -> None:
    save_model(hf_llama(), tmp_path)
    change_config(tmp_path, model_type=model_type)
    with pytest.raises(UnsupportedError, match=f"config.json: model_type {model_type!r}"):
        HfCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, r"\(float-quantized\)"),
        ({"load_in_4bit": True}, "unnamed"),
        ("odd", "unnamed"),
    ],
)
def test_quantised_checkpoints_are_refused_by_method(tmp_path: Path, settings: Any, named: str) -> None:
    save_model(hf_llama(), tmp_path)
    change_config(tmp_path, quantization_config=settings)
    with pytest.raises(UnsupportedError, match=f"quantised by .*{named}.* GGUF"):
        HfCheckpoint(tmp_path)


def test_weights_that_are_no_floats_are_refused_by_type(tmp_path: Path) -> None:
    state = save_model(hf_llama(), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"stored as F8_E4M3 are not supported \({name}\)"):
        HfCheckpoint(tmp_path)


# ---------------------------------------------------------------------------------------- indices that lie


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a folder with a model in several shards."""
    save_model(hf_llama(), tmp_path, "50KB")
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "/etc/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "nul\0.safetensors",
        "line\n.safetensors",
        "surrogate\ud800.safetensors",
        "x" * 300 + ".safetensors",
        ".safetensors",
        "config.json",
        "",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_shard_names_with_tricks_are_refused_unopened(sharded: Path, shard: Any) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, sharded.parent / "model.safetensors")
    change_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(CheckpointError, match="must be .safetensors files beside the index, not"):
        HfCheckpoint(sharded)


def test_all_that_an_index_has_wrong_is_in_one_error(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    first, last = load_file(shards[0]), load_file(shards[-1])
    twice, unlisted, absent = sorted(first)[0], "odd.weight", sorted(last)[0]
    last.pop(absent)
    save_file(last | {twice: first[twice], unlisted: torch.ones(1)}, shards[-1])
    shards[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        HfCheckpoint(sharded)
    assert caught.value.path.name == "model.safetensors.index.json"
    for part in (
        f"missing files: {shards[1].name}",
        f"tensors not in their shard: {absent}",
        f"tensors in two shards: {twice}",
        f"tensors not listed: {unlisted}",
    ):
        assert part in caught.value.reason


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    for content in ['{"weight_map": {}}', '{"weight_map": []}', "{}", "nothing"]:
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index.json: (weight_map must|not valid JSON)"):
            HfCheckpoint(sharded)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: "):
        HfCheckpoint(sharded)


def test_shards_may_be_links_as_in_a_hub_cache(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    for number, shard in enumerate(sharded.glob("*.safetensors")):
        shutil.move(shard, blobs / str(number))
        shard.symlink_to(blobs / str(number))
    assert len(dict(HfCheckpoint(sharded).tensors())) == 21
