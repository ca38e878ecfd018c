"""The loader: it tells formats apart, accounts for every tensor, and holds one tensor beside the model."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from puna.errors import CheckpointError, ModelNotFoundError, ParameterError
from puna.gguf_header import GGMLType
from puna.model import Llama, LlamaConfig, PackedAttention
from puna.weights.loader import load_model, open_checkpoint
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import QuantEmbedding, QuantExperts, QuantLinear

from tiny import hf_llama, hf_llama4, puna_twin

State = dict[str, Tensor]


@dataclass(kw_only=True)
class Stream:
    """A checkpoint in memory: the tensors that `make` yields."""

    config: LlamaConfig
    make: Callable[[], Iterator[tuple[str, Tensor | QuantTensor]]]
    format: Literal["hf", "meta", "gguf"] = "hf"
    path: Path = Path("somewhere")
    dtype: torch.dtype = torch.float32
    total_bytes: int = 0
    skipped: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, Tensor | QuantTensor]]:
        return self.make()


def stream(config: LlamaConfig, tensors: list[tuple[str, Any]]) -> Stream:
    return Stream(config=config, make=lambda: iter(tensors))


@pytest.fixture(scope="module")
def twin() -> Llama:
    return puna_twin(hf_llama())


@pytest.fixture(scope="module")
def moe_twin() -> Llama:
    return puna_twin(hf_llama4(interleave_moe_layer_step=2))


def packed(values: Tensor) -> QuantTensor:
    """Quantise to Q8_0 in the plainest way: 32 values as a float16 scale and int8s."""
    blocks = values.reshape(-1, 32).float()
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scales.float()).round().to(torch.int8)
    data = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return QuantTensor(data.view(*values.shape[:-1], -1), GGMLType.Q8_0)


def logits(model: Llama) -> Tensor:
    ids = torch.arange(12) * 7 % 96
    out: Tensor = model(ids, torch.arange(12), PackedAttention([0, 12]))
    return out


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("where", ["hf", "meta", "gguf", "gguf/stories260k-f32.gguf"])
def test_stories_is_the_same_model_in_all_formats(stories: Path, where: str) -> None:
    expected = load_file(stories / "hf" / "model.safetensors")
    state = load_model(stories / where).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_loaded_model_is_ready_to_run(tmp_path: Path, twin: Llama) -> None:
    hf_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted_to_the_dtype_asked_for(twin: Llama, dtype: torch.dtype) -> None:
    state = twin.state_dict()
    got = load_model(stream(twin.config, list(state.items())), dtype=dtype).state_dict()
    assert all(torch.equal(got[name], tensor.to(dtype)) for name, tensor in state.items())
    assert {tensor.dtype for tensor in got.values()} == {dtype}


@pytest.mark.parametrize("dtype", ["float32", torch.int8, None])
def test_other_dtypes_are_refused(twin: Llama, dtype: Any) -> None:
    with pytest.raises(ParameterError, match="dtype must be 'auto' or a floating point type"):
        load_model(stream(twin.config, []), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- memory


def test_a_tensor_that_fits_becomes_the_parameter(twin: Llama) -> None:
    state = twin.state_dict()
    model = load_model(stream(twin.config, list(state.items())))
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr()


def test_a_transposed_tensor_is_laid_out_anew(twin: Llama) -> None:
    state = {name: t.t().clone().t() if t.dim() == 2 else t for name, t in twin.state_dict().items()}
    model = load_model(stream(twin.config, list(state.items())))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("damage", [False, True])
def test_no_tensor_outlives_its_turn(twin: Llama, damage: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in twin.state_dict().items():
            fresh = torch.cat([tensor, tensor]) if damage else tensor.clone()
            alive.append(weakref.ref(fresh))
            yield name, fresh
            del fresh
            assert [ref() for ref in alive] == [None] * len(alive)

    checkpoint = Stream(config=twin.config, make=tensors)
    if damage:
        with pytest.raises(CheckpointError, match="of the wrong shape"):
            load_model(checkpoint)
    else:
        load_model(checkpoint, dtype=torch.bfloat16)
    assert len(alive) == len(twin.state_dict())


# ------------------------------------------------------------------------------------------------- accounting


def test_all_that_does_not_fit_is_in_one_error(twin: Llama) -> None:
    state = dict(twin.state_dict())
    norm = state.pop("model.norm.weight")
    gate = "model.layers.0.mlp.gate_proj.weight"
    state[gate] = state[gate][1:]
    tensors = [*state.items(), ("model.nrom.weight", norm), ("lm_head.weight", state["lm_head.weight"])]
    with pytest.raises(CheckpointError) as caught:
        load_model(stream(twin.config, tensors))
    assert str(caught.value) == (
        "somewhere: its tensors do not fit its config; missing: model.norm.weight; "
        "unexpected: model.nrom.weight; there twice: lm_head.weight; "
        f"of the wrong shape: {gate} (expected [80, 64], got [79, 64])"
    )


def test_long_listings_are_cut(twin: Llama) -> None:
    extra = [(f"odd.{i}", torch.ones(1)) for i in range(1000)]
    with pytest.raises(CheckpointError, match=r"odd.19 and 980 more$") as caught:
        load_model(stream(twin.config, [*twin.state_dict().items(), *extra]))
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match=r"missing: model.embed_tokens.weight, .* and 1 more$"):
        load_model(stream(twin.config, []))


def test_a_model_of_another_depth_is_refused(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, kind in [(1, "unexpected"), (3, "missing")]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(CheckpointError, match=rf"{kind}: model.layers.{min(layers, 2)}\.\S+, "):
            load_model(tmp_path)


def test_skipped_tensors_are_logged(twin: Llama, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = stream(twin.config, list(twin.state_dict().items()))
    checkpoint.skipped = ["vision_model.a"]
    with caplog.at_level(logging.INFO):
        load_model(checkpoint)
    assert "somewhere: images are not read; not used: vision_model.a" in caplog.text


def test_loading_is_silent_where_nobody_watches(twin: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(stream(twin.config, list(twin.state_dict().items())))
    assert capsys.readouterr() == ("", "")


def test_progress_ends_at_the_size_of_the_checkpoint(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("puna.weights.loader.tqdm", Recorded)
    for where in ("hf", "gguf"):
        load_model(stories / where)
        assert bars[-1].n == bars[-1].total > 1_000_000


# -------------------------------------------------------------------------------------------- packed weights


@pytest.mark.usefixtures("reference_kernels")
def test_packed_weights_replace_modules_and_compute_what_they_hold(twin: Llama) -> None:
    state = twin.state_dict()
    wide = {name for name, t in state.items() if t.dim() == 2 and t.shape[1] % 32 == 0}
    rounded = {n: packed(t).dequantize() if n in wide else t for n, t in state.items()}
    tensors = [(name, packed(t) if name in wide else t) for name, t in state.items()]
    model = load_model(stream(twin.config, tensors))
    expected = load_model(stream(twin.config, list(rounded.items())))
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)


def test_a_packed_embedding_gives_the_dtype_asked_for(twin: Llama) -> None:
    config = replace(twin.config, tie_word_embeddings=True)
    state = {name: tensor for name, tensor in twin.state_dict().items() if name != "lm_head.weight"}
    name = "model.embed_tokens.weight"
    tensors = [*(state | {name: packed(state[name])}).items()]
    model = load_model(stream(config, tensors), dtype=torch.bfloat16)
    assert model.model.embed_tokens(torch.tensor([3])).dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def packed_experts(state: State, leave_out: str = "") -> list[tuple[str, Any]]:
    """Replace each stack of experts by three packed ones, (experts, out, in); the widths must be 32n."""
    tensors: list[tuple[str, Any]] = []
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
            tensors += [(f"{prefix}.gate_proj", packed(gate)), (f"{prefix}.up_proj", packed(up))]
        elif prefix.endswith(".experts"):
            tensors.append((name, packed(tensor.transpose(1, 2))))
        else:
            tensors.append((name, tensor))
    return [(name, value) for name, value in tensors if name != leave_out]


@pytest.mark.usefixtures("reference_kernels")
def test_packed_experts_are_accounted_for_one_by_one() -> None:
    twin = puna_twin(hf_llama4(intermediate_size=96))
    model = load_model(stream(twin.config, packed_experts(twin.state_dict())))
    assert sum(isinstance(module, QuantExperts) for module in model.modules()) == 4
    assert torch.nn.functional.cosine_similarity(logits(model), logits(twin)).min() > 0.999
    for half in ("gate", "up", "down"):
        absent = f"model.layers.1.feed_forward.experts.{half}_proj"
        with pytest.raises(CheckpointError, match=f"config; missing: {absent}$"):
            load_model(stream(twin.config, packed_experts(twin.state_dict(), leave_out=absent)))


def test_packed_experts_of_a_wrong_shape_are_named() -> None:
    twin = puna_twin(hf_llama4(intermediate_size=96))
    name = "model.layers.1.feed_forward.experts.up_proj"
    tensors = [
        (n, packed(torch.ones(4, 64, 64)) if n == name else t) for n, t in packed_experts(twin.state_dict())
    ]
    reason = rf"of the wrong shape: {name} \(expected the shape \[4, 96, 64\], got \[4, 64, 64\] \(Q8_0\)\)$"
    with pytest.raises(CheckpointError, match=reason):
        load_model(stream(twin.config, tensors))


def test_packed_weights_of_a_wrong_shape_or_place_are_named(twin: Llama) -> None:
    state = dict(twin.state_dict())
    q = "model.layers.0.self_attn.q_proj.weight"
    tensors = [*(state | {q: packed(state[q][:60])}).items(), ("odd.weight", packed(torch.ones(2, 32)))]
    with pytest.raises(CheckpointError) as caught:
        load_model(stream(twin.config, tensors))
    assert "unexpected: odd.weight; of the wrong shape: " + q in str(caught.value)
    assert "[64, 64]" in str(caught.value) and "[60, 64]" in str(caught.value)


def test_a_norm_cannot_be_packed(moe_twin: Llama) -> None:
    tensors = [*moe_twin.state_dict().items()]
    tensors = [(n, packed(t) if n == "model.norm.weight" else t) for n, t in tensors]
    reason = r"config; unexpected: model.norm.weight \(RMSNorm.weight cannot hold Q8_0 blocks\)$"
    with pytest.raises(CheckpointError, match=reason):
        load_model(stream(moe_twin.config, tensors))


# --------------------------------------------------------------------------------------------- what is where


def test_a_path_that_is_no_model_says_what_was_looked_for(tmp_path: Path) -> None:
    wanted = "looked for config.json with model.safetensors, params.json with consolidated.00.pth, or a .gguf"
    with pytest.raises(ModelNotFoundError, match=wanted):
        open_checkpoint(tmp_path)
    for odd in (tmp_path / "gone", "nul\0", "x" * 5000, "~no-such-user/model"):
        with pytest.raises(ModelNotFoundError):
            open_checkpoint(odd)


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["config.json"], "config.json is there without weights"),
        (["model.safetensors"], "model.safetensors is there without config.json"),
        (["params.json"], "params.json is there without consolidated.00.pth"),
        (["consolidated.00.pth"], "consolidated files are there without params.json"),
    ],
)
def test_half_a_model_is_described(tmp_path: Path, files: list[str], hint: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelNotFoundError, match=hint):
        open_checkpoint(tmp_path)


def test_several_models_in_one_folder_are_listed(tmp_path: Path, stories: Path) -> None:
    for part in ("hf", "meta", "gguf"):
        for path in (stories / part).iterdir():
            shutil.copy(path, tmp_path / path.name)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.reason == (
        "holds several models: config.json with model.safetensors, params.json with consolidated.00.pth, "
        "second.gguf, stories260k-f32.gguf; give a .gguf file, or a folder of one"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "pytorch_model.bin"])
def test_one_file_of_a_folder_is_answered_with_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"give its folder, {tmp_path}"):
        open_checkpoint(tmp_path / name)
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give a folder or a .gguf file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_folder_with_gguf_and_its_helpers_is_a_gguf(tmp_path: Path, stories: Path) -> None:
    shutil.copy(stories / "gguf" / "stories260k-f32.gguf", tmp_path / "model.gguf")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path.name == "model.gguf"


def test_a_split_gguf_in_a_folder_is_one_model(tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=names[0]):
        open_checkpoint(tmp_path)
    os.remove(tmp_path / names[0])
    with pytest.raises(CheckpointError, match=names[1]):
        open_checkpoint(tmp_path)


def test_a_hub_folder_with_metas_files_below_is_hugging_face(tmp_path: Path, stories: Path) -> None:
    shutil.copytree(stories / "hf", tmp_path, dirs_exist_ok=True)
    shutil.copytree(stories / "meta", tmp_path / "original")
    assert open_checkpoint(tmp_path).format == "hf"
    assert open_checkpoint(tmp_path / "original").format == "meta"


def test_errors_of_a_file_pass_through(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: .*; unexpected: a$"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors: has 0 bytes"):
        load_model(tmp_path)


def test_a_device_that_is_not_there_is_named(stories: Path) -> None:
    for device in ("meta", "cuda:99"):
        with pytest.raises(ParameterError, match=device):
            load_model(stories / "hf", device=device)
