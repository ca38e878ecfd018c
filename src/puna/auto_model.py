"""A model with Transformers' surface: batches with padding in, logits or ids out.

Inside there is no batch axis and no padding: `attention_mask` says which places hold tokens, those go
through the model as one row, and results are put back in their places. Left and right padding, and gaps, are
all the same to it. Names, defaults and shapes are those of Transformers 5.23; what is asked for beyond them
is refused by name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from puna.auto_arguments import WithoutEffect, refuse
from puna.auto_generation import GenerationConfig, Streamer, eos_ids, make_plan, resolve, run
from puna.auto_saving import save_model
from puna.errors import ParameterError, UnsupportedError
from puna.model import Llama, LlamaConfig, PackedAttention
from puna.weights.quant import num_packed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CausalLMOutput:
    """Hold what a forward pass gave: by attribute, by name, or by place (loss, if any, then logits)."""

    logits: Tensor  # (batch, tokens, vocab)
    loss: Tensor | None = None

    def __getitem__(self, key: str | int) -> Tensor:
        if isinstance(key, int):
            return self.to_tuple()[key]
        if key not in ("logits", "loss") or getattr(self, key) is None:
            raise KeyError(key)
        value: Tensor = getattr(self, key)
        return value

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Return what is there, the loss first."""
        return (self.logits,) if self.loss is None else (self.loss, self.logits)


class ConfigView:
    """Show a `LlamaConfig` under the names of a Hugging Face config, to be read only."""

    def __init__(self, config: LlamaConfig, *, dtype: torch.dtype, name_or_path: str) -> None:
        rope = dataclasses.asdict(config.rope)
        values: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        del values["rope"], values["eos_token_ids"], values["nope_layers"]
        if not config.is_llama4:
            values = {name: value for name, value in values.items() if name not in _LLAMA4_ONLY}
        else:
            values["no_rope_layers"] = [
                int(i not in config.nope_layers) for i in range(config.num_hidden_layers)
            ]
            values["moe_layers"] = list(config.moe_layers)
        eos = list(config.eos_token_ids)
        values |= {
            "architectures": ["Llama4ForCausalLM" if config.is_llama4 else "LlamaForCausalLM"],
            "hidden_act": "silu",
            "rope_parameters": {name: value for name, value in rope.items() if value is not None},
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "dtype": dtype,
            "torch_dtype": dtype,
            "name_or_path": name_or_path,
            "is_encoder_decoder": False,
        }
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name != "_values" and name in self._values:
            return self._values[name]
        raise AttributeError(f"the config has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return all values; the dtype as its name."""
        name = str(self._values["dtype"]).removeprefix("torch.")
        return {k: v for k, v in self._values.items() if k != "torch_dtype"} | {"dtype": name}

    def get_text_config(self) -> Self:
        """Return the part about text, which is all there is."""
        return self

    def __repr__(self) -> str:
        return f"ConfigView({self.to_dict()})"


_FORWARD_WITHOUT_EFFECT: WithoutEffect = {
    "cache_position": (),
    "inputs_embeds": (),
    "logits_to_keep": (0,),
    "num_items_in_batch": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "past_key_values": (),
    "return_dict": (True,),
    "token_type_ids": (),
    "use_cache": (False,),
}
_LLAMA4_ONLY = frozenset(
    """
    intermediate_size_mlp num_local_experts num_experts_per_tok moe_layers attention_chunk_size use_qk_norm
    attn_temperature_tuning floor_scale attn_scale
    """.split()  # noqa: SIM905
)


class CausalLM:
    """A `Llama` behind the methods that code written for Transformers calls.

    The network is `.llama`; `.model` and `.lm_head` are its parts. Parameters come without gradients from
    `from_pretrained`; `requires_grad_()` turns them on.
    """

    def __init__(
        self, llama: Llama, generation_config: GenerationConfig | None = None, *, name_or_path: str = ""
    ) -> None:
        self.llama = llama
        self.name_or_path = name_or_path
        config = llama.config
        self.generation_config = generation_config or GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=list(config.eos_token_ids) or None,
            pad_token_id=config.pad_token_id,
        )

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """Write a Hugging Face folder, which must be new, or empty but for a tokenizer's files.

        Raises UnsupportedError for quantised weights, and for a model that came from another format.
        """
        save_model(self.llama, self.name_or_path, save_directory, options)

    # -- the network, as torch knows it

    @property
    def config(self) -> ConfigView:
        """Return the config under Hugging Face's names."""
        return ConfigView(self.llama.config, dtype=self.dtype, name_or_path=self.name_or_path)

    @property
    def model(self) -> nn.Module:
        """Return the decoder without its head."""
        return self.llama.model

    @property
    def lm_head(self) -> nn.Module | None:
        """Return the head, None where it is the embedding."""
        return self.llama.lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that it computes in."""
        return self.llama.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.llama.model.norm.weight.device

    @property
    def training(self) -> bool:
        """Say whether it is in training mode, which changes nothing: a Llama has no dropout."""
        return self.llama.training

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.llama.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, or the embedding where they are tied."""
        head = self.llama.lm_head
        return self.llama.model.embed_tokens if head is None else head

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters; quantised weights are none."""
        return self.llama.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names, as in Hugging Face checkpoints, and parameters."""
        return self.llama.named_parameters()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield names and modules of the network."""
        yield from self.llama.named_modules()

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of the network."""
        return self.llama.modules()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors by name; packed blocks where weights are quantised."""
        return dict(self.llama.state_dict())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count parameters, tied ones once; quantised weights count by their values."""
        if only_trainable:
            return sum(p.numel() for p in self.llama.parameters() if p.requires_grad)
        return self.llama.num_parameters() + sum(num_packed(module) for module in self.llama.modules())

    def get_memory_footprint(self) -> int:
        """Return the bytes of all weights."""
        tensors = [*self.llama.parameters(), *self.llama.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def eval(self) -> Self:
        """Put it into evaluation mode."""
        self.llama.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Put it into training mode; parameters need `requires_grad_()` too."""
        self.llama.train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let all parameters collect gradients, or none."""
        self.llama.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the weights to a device, or all but quantised ones to a dtype."""
        self.llama.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        return f"CausalLM(\n{self.llama!r}\n)"

    # -- forward and generate

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unsupported: Any,
    ) -> CausalLMOutput:
        """Compute logits for input_ids (batch, tokens), and the loss where labels are given.

        Positions count from the left edge, padding included, as in Transformers; give `position_ids` for
        others. Logits are zero where `attention_mask` is. The loss is the mean over labels that are not -100,
        each predicted by the token before it; a label behind padding is left out.
        """
        refuse("forward()", unsupported, _FORWARD_WITHOUT_EFFECT)
        ids, mask = _checked_inputs(input_ids, attention_mask)
        _require_in_vocabulary(ids[mask], self.llama.config.vocab_size)
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)
        positions = position_ids.to(ids.device).expand(ids.shape)[mask]
        borders = [0, *mask.sum(dim=1).cumsum(dim=0).tolist()]
        device = self.device
        rows = self.llama(ids[mask].to(device), positions.to(device), PackedAttention(borders))
        logits = rows.new_zeros(*ids.shape, rows.shape[-1])
        logits[mask.to(device)] = rows
        return CausalLMOutput(logits=logits, loss=None if labels is None else _loss(logits, labels, mask))

    forward = __call__

    def generate(
        self,
        inputs: Tensor | Mapping[str, Any] | None = None,
        generation_config: object | None = None,
        streamer: Streamer | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts, (batch, tokens): return them with the new ids behind, (batch, tokens + new).

        `inputs` is a tensor or what a tokenizer returned. Rows that end early are filled up with
        `pad_token_id`, or the first end-of-sequence id where there is none. `settings` are those of
        `GenerationConfig`. Sampling draws one seed a row from torch's global generator, so that
        `torch.manual_seed` makes it repeatable (the draws are Puna's, not those of Transformers); a sequence
        ends where the model's context does. Raises ParameterError and UnsupportedError, naming the setting.
        """
        if position_ids is not None:
            raise UnsupportedError("generate() does not support position_ids: padding is left out by itself")
        config = resolve(self.generation_config, generation_config, settings)
        ids, mask = _prompts(inputs, input_ids, attention_mask, config, self.device)
        _require_in_vocabulary(ids[mask], self.llama.config.vocab_size)
        plan = make_plan(config, ids.shape[1], self.llama.config)
        return run(self.llama, ids, mask, plan, tokenizer=tokenizer, streamer=streamer)


def _prompts(
    inputs: Tensor | Mapping[str, Any] | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return ids and a boolean mask, both (batch, tokens), from the ways in which prompts are given."""
    if isinstance(inputs, Mapping):
        others = {
            name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
        }
        refuse("generate()", others, dict.fromkeys(others, ()))
        if "input_ids" not in inputs:
            raise ParameterError("inputs has no input_ids")
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    if inputs is not None and input_ids is not None:
        raise ParameterError("give either inputs or input_ids, not both")
    ids = input_ids if inputs is None else inputs
    if ids is None:
        if config.bos_token_id is None:
            raise ParameterError("no prompt, and no bos_token_id to begin with: give input_ids")
        ids = torch.tensor([[config.bos_token_id]], device=device)
    if attention_mask is None and isinstance(ids, Tensor):
        attention_mask = _inferred_mask(ids, config)
    ids, mask = _checked_inputs(ids, attention_mask)
    if not bool(mask.any(dim=1).all()):
        raise ParameterError("a row has no tokens: its attention_mask is 0 everywhere")
    return ids, mask


def _inferred_mask(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """Take pad tokens in the prompts for padding, unless they also end sequences, as Transformers does."""
    pad, eos = config.pad_token_id, eos_ids(config)
    if pad is not None and pad not in eos:
        return ids != pad
    if len(ids) > 1 and eos:
        logger.warning(
            "a batch without attention_mask, and %s: padding would be read as text; pass attention_mask",
            "no pad_token_id" if pad is None else "pad_token_id also ends sequences",
        )
    return None


def _checked_inputs(ids: object, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ids, (batch, tokens), and the mask as booleans."""
    if not isinstance(ids, Tensor):
        raise ParameterError(f"input_ids must be a tensor (return_tensors='pt'), got {type(ids).__name__}")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ParameterError(
            f"input_ids must be integers (batch, tokens), got {ids.dtype} {tuple(ids.shape)}"
        )
    if attention_mask is None:
        return ids.long(), torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ParameterError(
            f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, got {shape}"
        )
    return ids.long(), attention_mask.to(ids.device) != 0


def _require_in_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raise ParameterError for an id that no row of the embedding belongs to."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ParameterError(
            f"token id {int(outside[0])} is outside the model's vocabulary, 0 to {vocab_size - 1}"
        )


def _loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Average the cross entropy of each label under the logits one place before it."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ParameterError(f"labels must be a tensor of integers, got {kind}")
    if labels.shape != mask.shape:
        raise ParameterError(f"labels must have the shape of input_ids {tuple(mask.shape)}")
    _require_in_vocabulary(labels[labels != -100], logits.shape[-1])
    seen = mask[:, :-1].to(logits.device)
    wanted = labels[:, 1:].to(logits.device).masked_fill(~seen, -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten())
