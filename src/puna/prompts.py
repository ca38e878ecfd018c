"""Prompts in the forms that vLLM takes: text, ids, or a dict of either; one or a list of these.

Also `tokenization_kwargs`: how text becomes ids where the default is not wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict

from puna.errors import ParameterError, UnsupportedError
from puna.text_engine import TextEngine


class TextPrompt(TypedDict, total=False):
    """A prompt of text. `cache_salt` keeps its cached blocks apart from those of other salts."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt of ids, with the text to show for it."""

    prompt_token_ids: Sequence[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | Mapping[str, Any]
PromptType = str | Sequence[int] | TextPrompt | TokensPrompt


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ParameterError(f"prompts must be text, token ids, a dict, or a list of these, got {prompts!r}")
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int | Integral) else listed


def read_prompt(
    engine: TextEngine, prompt: Prompt, options: Mapping[str, Any] | None = None
) -> tuple[str | None, list[int]]:
    """Return the text to show for a prompt, and its ids.

    The names of special tokens in text become those tokens, as in vLLM; `options` (tokenization_kwargs) may
    hold `add_special_tokens`, `split_special_tokens` (True: all text is plain), and `truncate_prompt_tokens`,
    of which the last are kept (-1: as many as the context holds with one more to generate).
    """
    text, ids = _content(prompt)
    chosen = {"add_special_tokens": True, "split_special_tokens": False, "truncate_prompt_tokens": None}
    unknown = set(options or ()) - set(chosen)
    if unknown:
        raise UnsupportedError(f"tokenization_kwargs has no key {sorted(unknown)[0]!r}")
    chosen.update(options or {})
    for name in ("add_special_tokens", "split_special_tokens"):
        if not isinstance(chosen[name], bool):
            raise ParameterError(f"{name} must be True or False, got {chosen[name]!r}")
    if ids is None:
        ids = engine.encode(
            text or "",
            parse_special=not chosen["split_special_tokens"],
            add_special_tokens=bool(chosen["add_special_tokens"]),
        )
    return text, _truncated(list(ids), chosen["truncate_prompt_tokens"], engine.engine.max_model_len - 1)


def cache_salt(prompt: Prompt) -> bytes:
    """Return what keeps a prompt's cached blocks apart."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and not isinstance(salt, str):
        raise ParameterError(f"cache_salt must be text, got {salt!r}")
    return (salt or "").encode()


def _truncated(ids: list[int], limit: int | None, longest: int) -> list[int]:
    if limit is None:
        return ids
    if isinstance(limit, bool) or not isinstance(limit, int) or not (limit == -1 or 1 <= limit <= longest):
        raise ParameterError(f"truncate_prompt_tokens must be -1 or 1 to {longest}, got {limit!r}")
    return ids[-(longest if limit == -1 else limit) :]


def _content(prompt: Prompt) -> tuple[str | None, Iterable[int] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        if not isinstance(prompt, Iterable):
            raise ParameterError(f"a prompt must be text, token ids or a dict of these, got {prompt!r}")
        return None, prompt
    unknown = {key for key in prompt if prompt[key] is not None}
    unknown -= {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown:
        raise UnsupportedError(f"a prompt has no key {sorted(unknown)[0]!r}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise ParameterError("a prompt needs 'prompt' or 'prompt_token_ids'")
    if text is not None and not isinstance(text, str):
        raise ParameterError(f"'prompt' must be text, got {text!r}")
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Iterable)):
        raise ParameterError(f"'prompt_token_ids' must be a list of ids, got {ids!r}")
    if isinstance(ids, Sequence) and any(isinstance(one, bool) for one in ids):
        raise ParameterError("'prompt_token_ids' must be a list of ids, not of booleans")
    return text, ids
