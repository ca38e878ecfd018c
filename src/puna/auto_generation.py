"""What `generate` may be asked for, by Transformers' names, and how it becomes a plan for the engine.

`GenerationConfig` holds the values as a checkpoint or a user gave them; `resolve` lays them over each other:
keyword arguments, then the config given to `generate`, then the model's own, then defaults. Names, defaults
and precedence are those of Transformers 5.23 (`generation/configuration_utils.py`); a name that it knows and
Puna does not do is refused unless its value asks for nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from puna.auto_arguments import asks, refuse
from puna.auto_encoding import to_list
from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.request import Sequence
from puna.engine.sampling import SamplingParams
from puna.errors import ParameterError, UnsupportedError
from puna.locate import read_generation_config
from puna.model import Llama, LlamaConfig

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20

# Known to Transformers, not done here: with None or one of these values they change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "cache_config": (),
    "cache_implementation": ("dynamic",),
    "compile_config": (),
    "constraints": (),
    "continuous_batching_config": (),
    "custom_generate": (),
    "decoder_start_token_id": (),
    "disable_compile": (True, False),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "length_penalty": (1.0,),
    "logits_processor": ([],),
    "low_memory": (False,),
    "max_cache_len": (),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "penalty_alpha": (0.0,),
    "prefill_chunk_size": (),
    "prefix_allowed_tokens_fn": (),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "return_dict_in_generate": (False,),
    "sequence_bias": ({},),
    "speculation_type": (),
    "stopping_criteria": ([],),
    "suppress_tokens": ([],),
    "synced_gpus": (False,),
    "token_healing": (False,),
    "top_h": (),
    "trust_remote_code": (False,),
    "typical_p": (1.0,),
    "use_cache": (True,),
    "use_mtp": (False,),
    "use_model_defaults": (True,),
    "watermarking_config": (),
}
# Only read together with something above that is refused, or about the file itself: any value will do.
_IRRELEVANT = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        "transformers_version",
    }
)


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """Hold settings for `generate`; None means not set. Attributes may be changed, unknown ones may not."""

    max_length: int | None = None  # prompt (with its padding) and output
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    stop_strings: str | list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    refused: dict[str, Any] = field(default_factory=dict)  # set in a file, and not done: told on use

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Read the dict of a `generation_config.json`; what Puna does not do is kept as `refused`."""
        known = {name: values[name] for name in SETTINGS if name in values}
        return cls(**known, refused={name: value for name, value in values.items() if _asks(name, value)})

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationConfig | None:
        """Read the `generation_config.json` of a folder, if there is one. Raises CheckpointError."""
        values = read_generation_config(folder)
        return None if values is None else cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not None} | self.refused

    def over(self, other: GenerationConfig) -> GenerationConfig:
        """Return this config with what it leaves open taken from another."""
        return GenerationConfig(
            **{**other._settings(), **self._settings()}, refused=other.refused | self.refused
        )

    def _settings(self) -> dict[str, Any]:
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


SETTINGS = tuple(f.name for f in fields(GenerationConfig) if f.name != "refused")


def _asks(name: str, value: object) -> bool:
    """Say whether a setting that is not ours asks for anything."""
    if name in SETTINGS or name in _IRRELEVANT:
        return False
    return asks(value, _WITHOUT_EFFECT.get(name, ()))


def resolve(own: GenerationConfig, given: object, arguments: Mapping[str, Any]) -> GenerationConfig:
    """Lay keyword arguments over a given config over the model's own one; None as an argument unsets.

    `given` may be a `GenerationConfig` of Puna's or of Transformers', or None. Raises ParameterError for a
    name that Transformers does not know either, UnsupportedError for one that Puna does not do.
    """
    config = _as_config(given).over(own)
    mine = {name: value for name, value in arguments.items() if name in SETTINGS}
    others = {k: v for k, v in arguments.items() if k not in SETTINGS and k not in _IRRELEVANT}
    inherited = {name: value for name, value in config.refused.items() if name not in others}
    table = dict.fromkeys(inherited, ()) | _WITHOUT_EFFECT
    refuse("generate()", inherited | others, table, own=SETTINGS)
    _warn_of_unused(config, mine)
    resolved = replace(config, **mine, refused={})
    _require_kinds(resolved)
    return resolved


_INTEGERS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_return_sequences")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def _require_kinds(config: GenerationConfig) -> None:
    """Raise ParameterError for a value of a wrong type, wherever it was set."""
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(_INTEGERS, ("an integer", _is_integer)),
        **dict.fromkeys(_NUMBERS, ("a number", _is_number)),
        "do_sample": ("True or False", lambda value: isinstance(value, bool)),
        "stop_strings": ("a string or a list of strings", _is_text_or_texts),
        "bos_token_id": ("a token id", _is_integer),
        "pad_token_id": ("a token id", _is_integer),
        "eos_token_id": ("a token id or a list of them", _is_id_or_ids),
    }
    for name, (kind, fits) in kinds.items():
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise ParameterError(f"{name} must be {kind}, got {value!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_id_or_ids(value: object) -> bool:
    value = to_list(value)
    return all(map(_is_integer, value)) if isinstance(value, list) else _is_integer(value)


def _is_text_or_texts(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
    )


def _as_config(given: object) -> GenerationConfig:
    if given is None:
        return GenerationConfig()
    if isinstance(given, GenerationConfig):
        return given
    to_dict = getattr(given, "to_dict", None)
    if to_dict is None:
        raise ParameterError(f"generation_config must be a GenerationConfig, got {type(given).__name__}")
    return GenerationConfig.from_dict(to_dict())


def _warn_of_unused(config: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    if arguments.get("do_sample", config.do_sample):
        return
    unused = [name for name in ("temperature", "top_k", "top_p", "min_p") if arguments.get(name) is not None]
    if unused:
        logger.warning("without do_sample=True the likeliest token is taken; not used: %s", ", ".join(unused))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what the engine shall do for every row, and what pads the rows that end early."""

    params: SamplingParams
    do_sample: bool
    num_return_sequences: int
    stop_strings: tuple[str, ...]
    pad_token_id: int | None


def make_plan(config: GenerationConfig, width: int, model: LlamaConfig) -> Plan:
    """Turn settings into a plan for prompts of `width` tokens, padding included.

    Raises ParameterError where a value is out of range or the prompt is longer than `max_length` allows.
    """
    do_sample = bool(config.do_sample)
    new = _max_new_tokens(config, width, model.context_length)
    top_k = 50 if config.top_k is None else config.top_k
    number = 1 if config.num_return_sequences is None else config.num_return_sequences
    if number < 1 or (number > 1 and not do_sample):
        raise ParameterError(
            f"num_return_sequences is {number}: more than 1 needs do_sample=True, and 1 is least"
        )
    if do_sample and config.temperature is not None and config.temperature <= 0:
        raise ParameterError(
            f"temperature must be above 0, got {config.temperature}; for greedy: do_sample=False"
        )
    eos = eos_ids(config)
    stop = config.stop_strings
    if stop is not None and not all((stop,) if isinstance(stop, str) else stop):
        raise ParameterError(f"stop_strings cannot contain an empty string, got {stop!r}")
    return Plan(
        params=SamplingParams(
            temperature=_or(config.temperature, 1.0) if do_sample else 0.0,
            top_k=top_k if do_sample else 0,
            top_p=_or(config.top_p, 1.0) if do_sample else 1.0,
            min_p=_or(config.min_p, 0.0) if do_sample else 0.0,
            repetition_penalty=_or(config.repetition_penalty, 1.0),
            stop_token_ids=tuple(i for i in eos if 0 <= i < model.vocab_size),
            max_tokens=new,
            min_tokens=_min_new_tokens(config, width, new),
        ),
        do_sample=do_sample,
        num_return_sequences=number,
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        pad_token_id=eos[0] if config.pad_token_id is None and eos else config.pad_token_id,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def eos_ids(config: GenerationConfig) -> list[int]:
    """Return the ids that end a sequence."""
    eos = to_list(config.eos_token_id)
    if eos is None:
        return []
    return [int(token_id) for token_id in (eos if isinstance(eos, list) else [eos])]


def _max_new_tokens(config: GenerationConfig, width: int, context: int) -> int:
    if config.max_new_tokens is not None:
        if config.max_new_tokens < 1:
            raise ParameterError(f"max_new_tokens must be at least 1, got {config.max_new_tokens}")
        if config.max_length is not None:
            logger.warning("max_new_tokens %d goes before max_length", config.max_new_tokens)
        return config.max_new_tokens
    if config.max_length is None:
        warnings.warn(
            f"{DEFAULT_NEW_TOKENS} new tokens at most, since neither max_new_tokens nor max_length is given",
            UserWarning,
            stacklevel=4,
        )
        return max(min(DEFAULT_NEW_TOKENS, context - width), 1)
    if width >= config.max_length:
        raise ParameterError(
            f"the prompt has {width} tokens and max_length is {config.max_length}: set max_new_tokens, "
            "or a larger max_length"
        )
    return config.max_length - width


def _min_new_tokens(config: GenerationConfig, width: int, new: int) -> int:
    least = config.min_new_tokens
    if least is None:
        least = max((config.min_length or 0) - width, 0)
    if least < 0:
        raise ParameterError(f"min_new_tokens must be at least 0, got {least}")
    if least > new:
        warnings.warn(f"at least {least} new tokens are asked for, at most {new}", UserWarning, stacklevel=4)
    return min(least, new)


class Streamer(Protocol):
    """Take tokens as they come: first the prompt, (1, tokens), then each new one, (1,)."""

    def put(self, value: Tensor) -> None:
        """Take ids, on the CPU."""

    def end(self) -> None:
        """Be told that nothing more comes."""


def run(
    llama: Llama,
    ids: Tensor,
    mask: Tensor,
    plan: Plan,
    *,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """Continue the prompts, (batch, tokens), where the mask is true; return them with the new ids behind."""
    if plan.num_return_sequences > 1:
        ids, mask = (t.repeat_interleave(plan.num_return_sequences, dim=0) for t in (ids, mask))
    _check_batch(len(ids), plan, tokenizer, streamer)
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    stops = [StopText(plan.stop_strings, tokenizer, prompt) for prompt in prompts if plan.stop_strings]
    if streamer is not None:
        streamer.put(ids.cpu())
    sequences: list[Sequence | None] = [None] * len(prompts)
    engine = _engine(llama, prompts, plan)
    while engine.has_unfinished:
        for output in engine.step():
            row = int(output.sequence.request_id)
            sequences[row] = output.sequence
            if streamer is not None:
                streamer.put(torch.tensor(output.new_token_ids))
            if stops and stops[row].push(output.new_token_ids[0]) and not output.sequence.finish_reason:
                engine.finish(output.sequence, "stop")
    if streamer is not None:
        streamer.end()
    return torch.cat([ids, _padded([s for s in sequences if s is not None], plan).to(ids.device)], dim=1)


def _check_batch(rows: int, plan: Plan, tokenizer: Any, streamer: Streamer | None) -> None:
    if plan.stop_strings and not hasattr(tokenizer, "stream"):
        raise ParameterError("stop_strings need Puna's tokenizer: generate(..., tokenizer=tokenizer)")
    if plan.stop_strings and rows > 1 and plan.pad_token_id is None:
        raise ParameterError("stop_strings in a batch need pad_token_id: rows end at different lengths")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ParameterError(f"a streamer has the methods put and end; {streamer!r} has not")
    if streamer is not None and rows > 1:
        raise UnsupportedError(f"a streamer takes one sequence, not {rows}")


def _engine(llama: Llama, prompts: list[list[int]], plan: Plan) -> LLMEngine:
    """Return an engine with the prompts added, and a cache that just holds them all."""
    context, wanted = llama.config.context_length, plan.params.max_tokens or 0
    lengths = [min(len(prompt) + wanted, context) for prompt in prompts]
    block_size = EngineConfig.block_size
    num_blocks = sum(-(-length // block_size) for length in lengths)
    config = EngineConfig(num_blocks=num_blocks, max_num_seqs=len(prompts), max_model_len=max(lengths))
    engine = LLMEngine(llama, config)
    for row, prompt in enumerate(prompts):
        params = plan.params
        if plan.do_sample:
            params = replace(params, seed=int(torch.randint(0, 2**62, ())))
        engine.add(str(row), prompt, params)
    return engine


def _padded(sequences: list[Sequence], plan: Plan) -> Tensor:
    """Return the new ids, (batch, longest), the shorter rows filled up."""
    outputs = [s.output_ids for s in sequences]
    wanted, longest = plan.params.max_tokens, max(map(len, outputs))
    for sequence in sequences:
        if sequence.finish_reason == "length" and wanted is not None and len(sequence.output_ids) < wanted:
            context = len(sequence.token_ids)
            logger.warning("ended where the context of %d tokens does, before %d new tokens", context, wanted)
    pad = 0 if plan.pad_token_id is None else plan.pad_token_id
    return torch.tensor([ids + [pad] * (longest - len(ids)) for ids in outputs])


class StopText:
    """Watch the text of one sequence for stop strings, which may begin in the prompt."""

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, prompt_ids: list[int]) -> None:
        self._strings = strings
        self._keep = max(map(len, strings)) - 1
        self._decoder = tokenizer.stream(skip_special_tokens=False)
        self._tail = ""
        for token_id in prompt_ids:
            self._take(token_id)

    def push(self, token_id: int) -> bool:
        """Take the next id; say whether a stop string ends in its text."""
        known = len(self._tail)
        text = self._take(token_id)
        return any(text.find(s, max(known - len(s) + 1, 0)) >= 0 for s in self._strings)

    def _take(self, token_id: int) -> str:
        text = self._tail + self._decoder.push(token_id)
        self._tail = text[max(len(text) - self._keep, 0) :]
        return str(text)
