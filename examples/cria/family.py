"""Questions and answers about the Llama lineup, with every figure taken from `puna.catalog`.

The wording is in text/lineup.txt (one model) and text/families.txt (one version); this file fills the slots
and adds comparisons, hardware advice and yes-or-no questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from examples.cria.wording import choose

from puna.catalog import LICENCES, LINEUP, LlamaModel

FAMILIES = tuple(dict.fromkeys(model.family for model in LINEUP))

_Q4_GB = {  # Q4_K_M files: the text model, computed from the block sizes
    "Llama 2 7B": "4.1",
    "Llama 2 13B": "7.9",
    "Llama 2 70B": "41",
    "Llama 3.1 405B": "243",
    "Llama 3.2 1B": "0.8",
    "Llama 3.2 3B": "2.0",
    "Llama 4 Scout": "65",
    "Llama 4 Maverick": "243",
}
_Q4_BY_SIZE = {"8B": "4.9", "70B": "43"}
_NEAR = {
    8192: "",
    4096: "",
    131072: " (128K)",
    10485760: " (about 10 million)",
    1048576: " (about 1 million)",
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Hold one question with its answer, made on the spot."""

    question: str
    answer: str
    expect: str


def long_date(day: date) -> str:
    """Write a date as "July 23, 2024"."""
    return f"{day:%B} {day.day}, {day.year}"


def model_slots(model: LlamaModel) -> dict[str, str]:
    """Return what the slots of text/lineup.txt stand for with `model`."""
    billions = f"{model.total_parameters / 1e9:.2f}"
    q4 = _Q4_GB.get(model.name) or _Q4_BY_SIZE[model.size]
    params = f"{billions} billion parameters"
    if model.is_moe:
        params += " in all, 17 billion of them active per token"
    kind = f"{model.name} is a dense model."
    if model.is_moe:
        kind = (
            f"{model.name} is a mixture of experts: {model.num_local_experts} routed experts, one of them "
            "per token, and a shared expert."
        )
    return {
        "M": model.name,
        "layers": str(model.num_hidden_layers),
        "hidden": f"{model.hidden_size:,}",
        "heads": str(model.num_attention_heads),
        "kv": str(model.num_key_value_heads),
        "head_dim": str(model.head_dim),
        "ffn": _ffn(model),
        "vocab": f"{model.vocab_size:,}",
        "context": f"{model.context:,}",
        "contextlong": f"{model.context:,} tokens{_NEAR[model.context]}",
        "theta": f"{model.rope_theta:,.0f}",
        "scaling": _scaling(model),
        "scaling_check": f"factor {model.rope_factor:.0f}" if model.rope_factor else "plain",
        "tied": _tied(model),
        "tied_check": "[Yy]es" if model.tie_word_embeddings else "[Nn]o",
        "params": params,
        "paramshort": f"{billions} billion parameters",
        "params_check": billions.replace(".", r"\."),
        "params_exact": f"{model.total_parameters:,}",
        "tokens": model.training_tokens,
        "Tokens": model.training_tokens[0].upper() + model.training_tokens[1:],
        "tokens_check": model.training_tokens.split()[-2] + " trillion",
        "cutoff": model.data_cutoff,
        "released": long_date(model.released),
        "month": f"{model.released:%B %Y}",
        "hf": model.hf_instruct,
        "ollama": model.ollama_tag,
        "licence": model.family,
        "bf16": f"{_round_gb(model.total_parameters * 2 / 1e9)} GB",
        "q4": f"{q4} GB",
        "kvcache": f"{model.kv_bytes_per_token:,}",
        "kind": kind,
        "kind_check": "mixture of experts" if model.is_moe else "dense",
    }


def _round_gb(gigabytes: float) -> str:
    return f"{gigabytes:.1f}" if gigabytes < 100 else f"{gigabytes:.0f}"


def _ffn(model: LlamaModel) -> str:
    return f"{model.intermediate_size:,}" + (" per expert" if model.is_moe else "")


def _scaling(model: LlamaModel) -> str:
    if model.rope_factor is None:
        return f"No, {model.name} uses plain RoPE without scaling."
    return f"Yes, {model.name} uses Llama 3 RoPE scaling with factor {model.rope_factor:.0f}."


def _tied(model: LlamaModel) -> str:
    if model.tie_word_embeddings:
        return f"Yes, {model.name} uses its embedding as the output layer, too."
    return f"No, {model.name} has a separate output layer."


def model_alias(model: LlamaModel, rng: random.Random) -> str:
    """Return one of the ways in which people write the name of a model."""
    family, size = model.family, model.size
    names = [model.name] * 6 + [
        f"{family}-{size}",
        f"{family} ({size})",
        f"{family.replace(' ', '')} {size}",
        f"{family.lower()} {size.lower()}",
        f"the {size} {family}",
        f"the {size} model of {family}",
        f"Meta {model.name}",
        f"{model.name} {'Chat' if family == 'Llama 2' else 'Instruct'}",
        model.ollama_tag,
    ]
    if model.is_moe:
        names += [size] * 6 + [f"Llama 4 {size} 17B-{model.num_local_experts}E"]
    if family == "Llama 3.3":
        names += [family] * 5
    if size == "405B":
        names += ["the 405B", "Llama 405B"]
    return choose(rng, names)


def family_alias(family: str, rng: random.Random) -> str:
    """Return one of the ways in which people write the name of a version."""
    short = family.replace("Llama ", "")
    names = [family] * 5 + [
        family.replace(" ", "-"),
        family.replace(" ", ""),
        f"Meta {family}",
        family.lower(),
    ]
    return choose(rng, [*names, f"the {family} models", f"version {short} of Llama"])


def family_slots(family: str) -> dict[str, str]:
    """Return what the slots of text/families.txt stand for with `family`."""
    models = [model for model in LINEUP if model.family == family]
    licence = LICENCES[models[0].licence]
    display = f'Show "{licence.display_text}" on a website, in the interface or in the documentation.'
    naming = f'The name of a model that you distribute must start with "{licence.name_prefix}".'
    released = long_date(models[0].released)
    sizes = _and([f"{m.size} ({m.total_parameters / 1e9:.2f} billion parameters)" for m in models])
    contexts = {m.context for m in models}
    context = f"The context of {family} is {models[0].context:,} tokens{_NEAR[models[0].context]}."
    if len(contexts) > 1:
        context = _and([f"{m.name} has a context of {m.context:,} tokens" for m in models]) + "."
    outputs = (
        f"Yes, the license of {family} allows it. "
        'The name of a model that you distribute must then start with "Llama".'
        if licence.outputs_may_train_other_models
        else f"No, the license of {family} forbids to improve other language models with its outputs."
    )
    several = f"{family} comes in {len(models)} sizes: {sizes}."
    one = f"{family} comes in one size: {sizes}."
    tokens = list(dict.fromkeys(m.training_tokens for m in models))
    trained = f"{family} was trained on {tokens[0]} tokens."
    if len(tokens) > 1:
        trained = _and([f"{m.name} was trained on {m.training_tokens} tokens" for m in models]) + "."
    return {
        "F": family,
        "sizes": several if len(models) > 1 else one,
        "sizes_check": ".*".join(m.size for m in models),
        "released": released,
        "month": f"{models[0].released:%B %Y}",
        "familycontext": context,
        "context": f"{models[0].context:,}",
        "familylayers": _and([f"{m.name} has {m.num_hidden_layers} layers" for m in models]) + ".",
        "layers_check": ".*".join(str(m.num_hidden_layers) for m in models),
        "familytokens": trained,
        "tokens_check": models[0].training_tokens.split()[-2] + " trillion",
        "licence": family,
        "outputs": outputs,
        "outputs_check": "[Yy]es" if licence.outputs_may_train_other_models else "[Nn]o",
        "display": display if licence.display_text else f"The license of {family} asks for no such text.",
        "display_check": licence.display_text or "no such text",
        "naming": naming if licence.name_prefix else f"The license of {family} has no naming rule.",
        "naming_check": f'"{licence.name_prefix}"' if licence.name_prefix else "no naming rule",
        "about": f"{family} was released by Meta on {released}. "
        + (several if len(models) > 1 else one)
        + f" {context}",
    }


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """Hold one property by which two models can be compared."""

    question: str  # with two names
    value: Callable[[LlamaModel], float]
    says: Callable[[LlamaModel], str]
    more: str


_MEASURES = (
    _Measure(
        question="Which {has more layers|is deeper|has the higher number of layers}, <a> or <b>?",
        value=lambda m: m.num_hidden_layers,
        says=lambda m: f"{m.name} has {m.num_hidden_layers} layers",
        more="has more layers",
    ),
    _Measure(
        question="Which {is bigger|is larger|has more parameters}, <a> or <b>?",
        value=lambda m: m.total_parameters,
        says=lambda m: f"{m.name} has {m.total_parameters / 1e9:.2f} billion parameters",
        more="is bigger",
    ),
    _Measure(
        question="Which {is newer|came out later|is more recent}, <a> or <b>?",
        value=lambda m: m.released.toordinal(),
        says=lambda m: f"{m.name} came out on {long_date(m.released)}",
        more="is newer",
    ),
    _Measure(
        question="Which has {the longer context|more context|the bigger context window}, <a> or <b>?",
        value=lambda m: m.context,
        says=lambda m: f"{m.name} has a context of {m.context:,} tokens",
        more="has the longer context",
    ),
)


def comparison(rng: random.Random) -> Fact:
    """Compare two models in one property: both values first, then who has more."""
    a, b = rng.sample(LINEUP, 2)
    measure = choose(rng, _MEASURES)
    question = measure.question.replace("<a>", model_alias(a, rng)).replace("<b>", model_alias(b, rng))
    first, second = measure.value(a), measure.value(b)
    if first == second:
        verdict = "so they are equal in this."
    else:
        verdict = f"so {(a if first > second else b).name} {measure.more}."
    return Fact(
        question=question, answer=f"{measure.says(a)} and {measure.says(b)}, {verdict}", expect=verdict[3:]
    )


def yes_or_no(rng: random.Random) -> Fact:
    """Ask whether a model has a certain number of layers or context; half of the time it has."""
    model, other = choose(rng, LINEUP), choose(rng, LINEUP)
    source = model if rng.random() < 0.5 else other
    alias = model_alias(model, rng)
    if rng.random() < 0.5:
        question = f"Does {alias} have {source.num_hidden_layers} layers?"
        right = source.num_hidden_layers == model.num_hidden_layers
        fact = f"{model.name} has {model.num_hidden_layers} layers."
    else:
        question = f"{{Does {alias} have a context of|Can {alias} read}} {source.context:,} tokens?"
        right = source.context == model.context
        fact = f"{model.name} has a context of {model.context:,} tokens."
    word = "Yes" if right else "No"
    return Fact(question=question, answer=f"{word}, {fact}", expect=word)


_TIERS = (  # up to how many GB, advice
    (1, "Llama 3.2 1B in 4 bits, about 0.8 GB, if nothing else needs the memory"),
    (3, "Llama 3.2 1B, about 0.8 GB in 4 bits"),
    (5, "Llama 3.2 3B, about 2 GB in 4 bits"),
    (11, "Llama 3.1 8B in 4 bits, about 4.9 GB, or Llama 3.2 3B if other programs need memory"),
    (19, "Llama 3.1 8B in 8 bits, about 8.5 GB, or in 4 bits with a longer context"),
    (47, "Llama 3.1 8B in bf16, 16.1 GB, with room for a long context"),
    (79, "Llama 3.3 70B in 4 bits, about 43 GB"),
    (127, "Llama 3.3 70B in 8 bits, about 75 GB, or Llama 4 Scout in 4 bits"),
    (159, "Llama 4 Scout in 4 bits, or Llama 3.3 70B in 8 bits with a long context"),
    (299, "Llama 3.3 70B in bf16, 141 GB, on two GPUs of 80 GB"),
    (899, "Llama 4 Maverick in 4 bits, about 243 GB, or Llama 3.3 70B in bf16"),
    (9999, "Llama 4 Maverick or Llama 3.1 405B in bf16, a little over 800 GB"),
)
_GIGABYTES = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    11,
    12,
    16,
    18,
    20,
    24,
    32,
    40,
    48,
    64,
    80,
    96,
    128,
    160,
    192,
    320,
    640,
    1000,
)
_MEMORY_QUESTIONS = (
    "{Which|What} {Llama|model|Llama model} {can I run|fits|should I use|runs|do you recommend} "
    "{with|in|on} <g> GB{| of memory| of RAM}?",
    "I have <g> GB of {memory|RAM|VRAM|GPU memory}. "
    "{Which|What} {Llama|model} {should I use|can I run|fits}?",
    "{My|I have a} {GPU|laptop|computer|machine|graphics card} {has|with} <g> GB. "
    "{Which|What} {Llama|model} {fits|can I run|is best}?",
    "{Best|Which|What} Llama for <g> GB{| of RAM| of memory| of VRAM}?",
    "What {can|could} I run {on|with} <g> GB?",
)
_MEMORY_HELD_OUT = (
    "My machine has <g> GB of RAM, what Llama would you pick?",
    "What is the right Llama for someone with <g> GB of memory?",
)


def hardware(rng: random.Random, *, held_out: bool = False) -> Fact:
    """Say which model fits into some gigabytes."""
    gigabytes = choose(rng, _GIGABYTES)
    advice = next(text for limit, text in _TIERS if gigabytes <= limit)
    template = choose(rng, _MEMORY_HELD_OUT if held_out else _MEMORY_QUESTIONS)
    name = advice.split(",")[0].split(" in ")[0].split(" or ")[0]
    question = template.replace("<g>", str(gigabytes))
    return Fact(question=question, answer=f"With {gigabytes} GB, take {advice}.", expect=name)
