"""Adapters merged tensor by tensor, against `merge_and_unload` of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.errors import CheckpointError, ParameterError, UnsupportedError
from puna.gguf_header import GGMLType
from puna.model import Llama, PackedAttention
from puna.model.lora_config import LoraConfig
from puna.peft_model import PeftModel, get_peft_model
from puna.weights.adapter_files import read_adapter_config, read_adapter_tensors, write_adapter
from puna.weights.adapter_open import open_adapter
from puna.weights.gguf_export import gguf_metadata, gguf_shapes, gguf_tensors
from puna.weights.gguf_writer import GgufWriter, PlannedTensor
from puna.weights.loader import empty_model, load_model, open_checkpoint
from puna.weights.merged_checkpoint import MergedCheckpoint
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quantize_blocks import quantize
from puna.weights.write_hf import write_hf_stream

from tiny import hf_llama, hf_llama4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Transformers, about token ids

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ALL, "use_rslora": True, "lora_alpha": 6},
    "patterns": {"target_modules": ALL, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "lora bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "saved table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [2, 5, 40]},
    "head tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
}  # fmt: skip


def save_base(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(load_model(base), LoraConfig(**{"r": 4, "init_lora_weights": False, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path) -> Llama:
    checkpoint = open_checkpoint(base)
    return load_model(MergedCheckpoint(checkpoint, open_adapter(adapter, checkpoint.config)))


def require_equal(found: Llama, expected: Llama, *, atol: float = 2e-6, rtol: float = 1e-5) -> None:
    assert found.config == expected.config
    theirs = expected.state_dict()
    assert set(found.state_dict()) == set(theirs)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], msg=name, atol=atol, rtol=rtol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_merging_the_whole_model(kind: str, tied: bool, tmp_path: Path) -> None:
    biased = "bias" in kind
    model = hf_llama(attention_bias=biased, mlp_bias=biased, tie_word_embeddings=tied)
    base = save_base(tmp_path / "base", model)
    adapter = save_adapter(base, tmp_path / "adapter", KINDS[kind])
    found = merged(base, adapter)
    beside = PeftModel.from_pretrained(load_model(base), adapter)
    ids = torch.tensor([1, 5, 2, 40, 7])
    row = ids, torch.arange(5), PackedAttention([0, 5])
    torch.testing.assert_close(found(*row), beside(*row), atol=1e-4, rtol=1e-3)
    require_equal(found, beside.merge_and_unload())


def test_stacked_experts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama4())
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    settings = {"target_modules": ["q_proj"], "target_parameters": names}
    adapter = save_adapter(base, tmp_path / "adapter", settings)
    require_equal(
        merged(base, adapter), PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    )


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama().bfloat16())
    adapter = save_adapter(base, tmp_path / "adapter", KINDS["rslora"])
    wide = load_model(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(wide, adapter).merge_and_unload().bfloat16()
    found = merged(base, adapter)
    assert found.model.norm.weight.dtype == torch.bfloat16
    require_equal(found, expected, atol=0.0, rtol=0.0)


def write_packed(folder: Path, file: Path) -> None:
    """Write a GGUF whose projections are in Q8_0."""
    source = open_checkpoint(folder)
    values: dict[str, Tensor | QuantTensor] = {}
    for ours, tensor in source.tensors():
        assert isinstance(tensor, Tensor)
        value = quantize(tensor, GGMLType.Q8_0) if ours.endswith("proj.weight") else tensor
        values.update(gguf_tensors(ours, value, source.config))
    plan = [
        PlannedTensor(
            name=name,
            shape=tuple(value.shape),
            type=value.type if isinstance(value, QuantTensor) else GGMLType.F32,
        )
        for name, value in values.items()
    ]
    with GgufWriter(file, gguf_metadata(source.config, "x"), plan) as out:
        for name, value in values.items():
            out.write(name, value)


def test_of_packed_weights_only_the_changed_ones_become_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama(intermediate_size=96))
    write_packed(base, tmp_path / "x.gguf")
    adapter = save_adapter(base, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    opened = open_adapter(adapter, checkpoint.config)
    kinds = {name: type(value) for name, value in MergedCheckpoint(checkpoint, opened).tensors()}
    packed = {name for name, kind in kinds.items() if kind is QuantTensor}
    assert len(packed) == 12 and not any("q_proj" in name for name in packed)
    whole = PeftModel.from_pretrained(load_model(tmp_path / "x.gguf"), adapter).merge_and_unload()
    name = "model.layers.1.self_attn.q_proj.weight"
    found = load_model(MergedCheckpoint(checkpoint, opened)).state_dict()
    torch.testing.assert_close(found[name], whole.state_dict()[name], atol=2e-6, rtol=1e-5)
    floats = dict(MergedCheckpoint(checkpoint, opened, dequantize=True).tensors())
    assert all(isinstance(value, Tensor) for value in floats.values())


def test_shards_are_written_as_they_fill_up(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama())
    adapter = save_adapter(base, tmp_path / "adapter", KINDS["rslora"])
    checkpoint = open_checkpoint(base)
    stream = MergedCheckpoint(checkpoint, open_adapter(adapter, checkpoint.config))
    write_hf_stream(stream, tmp_path / "out", max_shard_bytes=100_000, files={"README.md": "card"})
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    require_equal(load_model(tmp_path / "out"), load_model(stream))
    with pytest.raises(ParameterError, match="already"):
        write_hf_stream(stream, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama())
    adapter = save_adapter(base, tmp_path / "adapter", KINDS["lora bias"])
    with pytest.raises(UnsupportedError, match=r"o_proj.bias: cannot be merged, the model has none"):
        merged(base, adapter)
    broken = save_adapter(base, tmp_path / "broken", {"target_modules": ["q_proj"]})
    tensors = read_adapter_tensors(broken)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    write_adapter(broken, read_adapter_config(broken), tensors)
    with pytest.raises(ParameterError, match=r"layers.1.self_attn.q_proj.weight is not finite once merged"):
        merged(base, broken)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        open_adapter(broken, open_checkpoint(save_base(tmp_path / "other", hf_llama(hidden_size=32))).config)


def test_the_plan_of_a_gguf_has_the_head_that_merging_gives(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf_llama(tie_word_embeddings=True))
    adapter = save_adapter(base, tmp_path / "adapter", KINDS["head"])
    checkpoint = open_checkpoint(base)
    config = MergedCheckpoint(checkpoint, open_adapter(adapter, checkpoint.config)).config
    names = {
        name
        for ours, tensor in empty_model(config).state_dict().items()
        for name, _ in gguf_shapes(ours, tuple(tensor.shape))
    }
    assert "output.weight" in names and not config.tie_word_embeddings
