"""Read a checkpoint as Meta publishes it: `params.json` and `consolidated.NN.pth`, a file per model shard.

A tensor is put together from all shards on the axis that its role asks for, and gets Hugging Face's name and
row order: q and k of Llama 2 and 3 are permuted, Llama 4's fused and stacked tensors taken apart. Roles and
axes: llama-models 0.3 and the conversion scripts of Transformers 5.23. It does not know tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedError
from puna.model.config import LlamaConfig
from puna.weights.files import StoredTensor, TensorFile, list_names, open_torch_file, read_json_object

_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_LAYER = re.compile(r"layers\.(?P<layer>\d{1,4})\.(?P<rest>.+)")
_DROPPED = re.compile(
    r"rope\.freqs|freqs_cis|freq_cis|vision_.+|.*\._extra_state|"
    r".*\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)

# After "layers.N.": Hugging Face's name and the axis to join shards on; None: every shard has the whole.
_LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
}
_LLAMA_NAMES: dict[str, tuple[str, int | None]] = {
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
}
_LLAMA4_NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wqkv.layer_norm_weight": ("input_layernorm.weight", None),
    "feed_forward.norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.mlp.layer_norm_weight": ("post_attention_layernorm.weight", None),
    "feed_forward.w_in_shared_FD.weight": ("feed_forward.shared_expert.gate_proj.weight", 0),
    "feed_forward.w_swiglu_FD.weight": ("feed_forward.shared_expert.up_proj.weight", 0),
    "feed_forward.w_out_shared_DF.weight": ("feed_forward.shared_expert.down_proj.weight", 1),
    "feed_forward.mlp.fc2_weight": ("feed_forward.down_proj.weight", 1),
}

_Named = Iterator[tuple[str, Tensor]]


def list_shards(folder: Path) -> list[Path]:
    """Return `consolidated.pth` or `consolidated.NN.pth` in order, [] if there is none.

    Raises CheckpointError where a number is left out.
    """
    if (folder / "consolidated.pth").is_file():
        return [folder / "consolidated.pth"]
    numbered: dict[int, Path] = {}
    for path in sorted(folder.glob("consolidated.*.pth")):
        if match := re.fullmatch(r"consolidated\.(\d{1,4})\.pth", path.name):
            numbered[int(match[1])] = path
    absent = sorted(set(range(max(numbered, default=-1) + 1)) - numbered.keys())
    if absent:
        raise CheckpointError(folder, f"missing {list_names(f'consolidated.{i:02d}.pth' for i in absent)}")
    return [numbered[i] for i in sorted(numbered)]


class MetaCheckpoint:
    """A folder in Meta's layout; `tensors` yields fresh tensors under the names of our modules."""

    format: Literal["meta"] = "meta"

    def __init__(self, folder: Path | str) -> None:
        """Read params.json and find every tensor in every shard.

        Raises ConfigError, CheckpointError, ModelNotFoundError, UnsupportedError (quantised; not a Llama).
        """
        self.path = Path(folder)
        self.skipped: list[str] = []
        params = _read_params(self.path)
        shards = list_shards(self.path)
        if not shards:
            raise ModelNotFoundError(f"{self.path}: no consolidated.00.pth beside params.json")
        self._shards = [open_torch_file(path) for path in shards]
        self._names = _common_names(self.path, self._shards)
        self.config = self._read_config(params)
        self._require_all_shards()
        used = [name for name in self._names if not self._is_skipped(name)]
        self.total_bytes = sum(shard.tensors[name].num_bytes for shard in self._shards for name in used)
        self.dtype = self._stored(_EMBEDDING).dtype or torch.float32

    def tensors(self) -> _Named:
        """Yield (name, tensor), one at a time; the tensors are the caller's.

        A tensor whose name is not known comes under its own name, from the first shard. Fills `skipped`.
        Raises CheckpointError where a file ends early or shards do not fit together.
        """
        self.skipped = [name for shard in self._shards[:1] for name in shard.others]
        for name in self._names:
            if self._is_skipped(name):
                self.skipped.append(name)
            else:
                yield from self._convert(name)

    def _is_skipped(self, name: str) -> bool:
        return bool(_DROPPED.fullmatch(name)) or (name == _HEAD and self.config.tie_word_embeddings)

    # -------------------------------------------------------------------------------------------- the config

    def _read_config(self, params: dict[str, Any]) -> LlamaConfig:
        dim, vocab_size = params.get("dim"), None
        if params.get("vocab_size") in (None, -1) and isinstance(dim, int):
            vocab_size = self._embedding_rows(dim)
        try:
            config = LlamaConfig.from_meta(params, vocab_size=vocab_size)
            if self._is_tied(config):
                config = LlamaConfig.from_meta(params, vocab_size=vocab_size, tie_word_embeddings=True)
        except ConfigError as error:
            raise ConfigError(f"{self.path / 'params.json'}: {error}") from error
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.path / 'params.json'}: {error}") from error
        return config

    def _embedding_rows(self, dim: int) -> int:
        rows = self._matrix_shape(_EMBEDDING)[0]
        return rows if self._embedding_axis(dim) == 1 else rows * len(self._shards)

    def _embedding_axis(self, dim: int) -> int:
        """Return the axis that gives (vocab, dim): 1 for Llama 2, 0 for later models."""
        columns = self._matrix_shape(_EMBEDDING)[1]
        if columns == dim:
            return 0
        if columns * len(self._shards) == dim:
            return 1
        reason = f"{len(self._shards)} shards of {_EMBEDDING} with {columns} columns do not give dim {dim}"
        raise CheckpointError(self.path, reason)

    def _is_tied(self, config: LlamaConfig) -> bool:
        """Say whether the output head is the embedding again, or left out, as in Llama 3.2 1B and 3B."""
        if _HEAD not in self._names:
            return True
        axis = self._embedding_axis(config.hidden_size)
        if self._matrix_shape(_HEAD)[1] != config.hidden_size:
            return False  # of a wrong shape: the loader says so
        parts = [shard.read_rows(_EMBEDDING, 0, 1) for shard in self._shards[: axis * len(self._shards) or 1]]
        if not torch.equal(torch.cat(parts, dim=1), self._shards[0].read_rows(_HEAD, 0, 1)):
            return False  # the usual case, found without reading either
        return torch.equal(self._join(_EMBEDDING, axis), self._join(_HEAD, 0))

    def _require_all_shards(self) -> None:
        """Raise if the shards' rows do not add up, as when the last ones were not downloaded."""
        name, heads = "layers.0.attention.wo.weight", self.config.num_attention_heads
        if name not in self._names:
            return  # the loader will list it
        columns = self._matrix_shape(name)[1] * len(self._shards)
        wanted = heads * self.config.head_dim
        if columns != wanted:
            reason = (
                f"{len(self._shards)} shards of {name} have {columns} columns, params.json asks for {wanted}"
            )
            raise CheckpointError(self.path, f"{reason}: is a shard missing?")

    # ------------------------------------------------------------------------------------------- the tensors

    def _convert(self, name: str) -> _Named:
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            yield from self._convert_layer(name, f"model.layers.{int(layer['layer'])}", layer["rest"])
        elif name == _EMBEDDING:
            yield "model.embed_tokens.weight", self._join(name, self._embedding_axis(self.config.hidden_size))
        elif name == _HEAD:
            yield "lm_head.weight", self._join(name, 0)
        elif name == "norm.weight":
            yield "model.norm.weight", self._shards[0].read(name)
        else:
            yield name, self._shards[0].read(name)

    def _convert_layer(self, name: str, layer: str, rest: str) -> _Named:
        names = _LAYER_NAMES | (_LLAMA4_NAMES if self.config.is_llama4 else _LLAMA_NAMES)
        special = _LLAMA4_SPECIAL.get(rest) if self.config.is_llama4 else None
        if special is not None:
            yield from special(self, name, layer)
        elif rest in names:
            hf_name, axis = names[rest]
            tensor = self._shards[0].read(name) if axis is None else self._join(name, axis)
            yield f"{layer}.{hf_name}", self._arrange_rows(name, rest, tensor)
        else:
            yield name, self._shards[0].read(name)

    def _arrange_rows(self, name: str, rest: str, tensor: Tensor) -> Tensor:
        """Drop repeated key and value heads, and put q and k into Hugging Face's order of RoPE pairs."""
        if rest in ("attention.wk.weight", "attention.wv.weight"):
            tensor = self._drop_repeated_heads(name, tensor)
        if self.config.is_llama4 or rest not in ("attention.wq.weight", "attention.wk.weight"):
            return tensor
        head_dim = self.config.head_dim
        if tensor.shape[0] % head_dim or tensor.dim() != 2:
            return tensor  # of a wrong shape: the loader says so
        return tensor.view(-1, head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)

    def _drop_repeated_heads(self, name: str, tensor: Tensor) -> Tensor:
        """Keep one of each run of equal heads: with more shards than heads, each shard got a copy."""
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        heads, rest = divmod(tensor.shape[0], head_dim)
        if rest or heads == kv_heads or heads % kv_heads:
            return tensor
        runs = tensor.view(kv_heads, heads // kv_heads, head_dim, -1)
        if not torch.equal(runs, runs[:, :1].expand_as(runs)):
            reason = f"{name} has {heads} heads, not {kv_heads}, and they do not repeat"
            raise CheckpointError(self.path, reason)
        return runs[:, 0].reshape(kv_heads * head_dim, -1)

    def _join(self, name: str, axis: int) -> Tensor:
        """Concatenate a tensor's shards on an axis, with one shard beside the result in memory."""
        if len(self._shards) == 1:
            return self._shards[0].read(name)
        return self._place(name, axis, self._matrix_shape(name), lambda part: part)

    def _place(
        self, name: str, axis: int, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Join on `axis` what `view` makes of each shard; `shape` is that of one view."""
        whole = [*shape]
        whole[axis] *= len(self._shards)
        out = torch.empty(whole, dtype=self._stored(name).dtype)
        for part, shard in zip(out.chunk(len(self._shards), dim=axis), self._shards, strict=True):
            part.copy_(view(shard.read(name)))
        return out

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        shape = self._stored(name).shape
        if len(shape) != 2:
            raise CheckpointError(self.path, f"{name} has shape {list(shape)}, not two dimensions")
        return shape[0], shape[1]

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._names:
            raise CheckpointError(self.path, f"no {name} in any shard")
        return self._shards[0].tensors[name]

    # ----------------------------------------------------------------------------------------------- Llama 4

    def _split_qkv(self, name: str, layer: str) -> _Named:
        """Take q, k and v out of each shard's stack of them; no permutation: both sides pair neighbours."""
        config, count = self.config, len(self._shards)
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        heads["v"] = heads["k"]
        rows = {key: value * config.head_dim // count for key, value in heads.items()}
        parts = [shard.read(name) for shard in self._shards]
        if any(part.shape[0] != sum(rows.values()) for part in parts):
            reason = f"{name} has {parts[0].shape[0]} rows a shard, not {sum(rows.values())}"
            raise CheckpointError(self.path, reason)
        split = [torch.split(part, list(rows.values())) for part in parts]
        for i, key in enumerate(rows):
            yield f"{layer}.self_attn.{key}_proj.weight", torch.cat([part[i] for part in split])

    def _split_fc1(self, name: str, layer: str) -> _Named:
        """Take gate and up out of each shard's stack of them, in a dense layer."""
        rows, columns = self._matrix_shape(name)
        half = rows // 2
        self._require_shape(name, (2 * half, columns))
        for key, start in (("gate", 0), ("up", half)):
            take = partial(torch.narrow, dim=0, start=start, length=half)
            yield f"{layer}.feed_forward.{key}_proj.weight", self._place(name, 0, (half, columns), take)

    def _stack_gate_up(self, name: str, layer: str) -> _Named:
        """Put the experts' gate and up side by side: (experts * dim, width) each, split by width."""
        up_name = name.replace("moe_w_in_eD_F", "moe_w_swiglu_eD_F")
        self._stored(up_name)
        experts, hidden = self.config.num_local_experts, self.config.hidden_size
        width = self._matrix_shape(name)[1]
        self._require_shape(name, (experts * hidden, width))
        self._require_shape(up_name, (experts * hidden, width))
        out = torch.empty(experts, hidden, 2, len(self._shards), width, dtype=self._stored(name).dtype)
        for i, part_name in enumerate((name, up_name)):
            for j, shard in enumerate(self._shards):
                out[:, :, i, j] = shard.read(part_name).view(experts, hidden, width)
        yield f"{layer}.feed_forward.experts.gate_up_proj", out.flatten(2)

    def _check_gate(self, name: str, layer: str) -> _Named:
        """Yield nothing: `_stack_gate_up` reads this tensor, if the other half is there."""
        self._stored(name.replace("moe_w_swiglu_eD_F", "moe_w_in_eD_F"))
        yield from ()

    def _stack_down(self, name: str, layer: str) -> _Named:
        """Stack the experts' down projections: (experts * width, dim) in each shard."""
        experts, hidden = self.config.num_local_experts, self.config.hidden_size
        width = self._matrix_shape(name)[0] // max(experts, 1)
        self._require_shape(name, (experts * width, hidden))
        shape = (experts, width, hidden)
        yield (
            f"{layer}.feed_forward.experts.down_proj",
            self._place(name, 1, shape, lambda part: part.view(shape)),
        )

    def _transpose_router(self, name: str, layer: str) -> _Named:
        yield f"{layer}.feed_forward.router.weight", self._shards[0].read(name).t().contiguous()

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        got = self._stored(name).shape
        if got != shape:
            raise CheckpointError(self.path, f"{name} has shape {list(got)} in a shard, not {list(shape)}")


_LLAMA4_SPECIAL: dict[str, Callable[[MetaCheckpoint, str, str], _Named]] = {
    "attention.wqkv.weight": MetaCheckpoint._split_qkv,
    "feed_forward.mlp.fc1_weight": MetaCheckpoint._split_fc1,
    "feed_forward.experts.moe_w_in_eD_F": MetaCheckpoint._stack_gate_up,
    "feed_forward.experts.moe_w_swiglu_eD_F": MetaCheckpoint._check_gate,
    "feed_forward.experts.moe_w_out_eF_D": MetaCheckpoint._stack_down,
    "feed_forward.router_DE": MetaCheckpoint._transpose_router,
}


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    params = read_json_object(path)
    nested = params.get("model")
    params = nested if isinstance(nested, dict) else params
    scales = sorted(p.name for kind in ("fp8", "int4") for p in folder.glob(f"{kind}_scales_*.pt"))
    if scales:
        raise UnsupportedError(
            f"{folder}: weights quantised with {list_names(scales, limit=2)} are not supported: "
            "use the bfloat16 checkpoint"
        )
    vision = sorted(key for key in params if key.startswith("vision_") and key != "vision_args")
    if vision:
        raise UnsupportedError(f"{path}: Llama 3.2 Vision ({list_names(vision)}) is not supported")
    return params


def _common_names(folder: Path, shards: list[TensorFile]) -> dict[str, None]:
    """Return the tensors in the first shard's order; raise if shards differ in names, shapes or types."""
    names = {name: None for shard in shards for name in shard.tensors}
    problems: list[str] = []
    for name in names:
        found = [shard.tensors.get(name) for shard in shards]
        absent = [shard.path.name for shard, stored in zip(shards, found, strict=True) if stored is None]
        if absent:
            problems.append(f"{name} is not in {list_names(absent)}")
        elif len({(stored.shape, stored.dtype_name) for stored in found if stored is not None}) > 1:
            problems.append(f"{name} differs in shape or type between shards")
    if problems:
        raise CheckpointError(folder, f"the shards do not fit together: {list_names(problems)}")
    odd = {n: shards[0].tensors[n].dtype_name for n in names if shards[0].tensors[n].dtype is None}
    odd = {name: kind for name, kind in odd.items() if not _DROPPED.fullmatch(name)}
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        raise UnsupportedError(
            f"{folder}: {list_names(odd, limit=4)}: stored as {kinds}, not as plain floats"
        )
    return names
