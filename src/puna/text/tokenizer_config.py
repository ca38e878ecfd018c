"""Read the small files beside a Hugging Face tokenizer: which tokens have which role, and the chat templates.

tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json, generation_config.json,
chat_template.jinja and additional_chat_templates/*.jinja; each may be missing. Where they disagree the rules
are those of Transformers 5: special_tokens_map.json and added_tokens.json count only when
tokenizer_config.json lists no added tokens, and .jinja files win over templates inside JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.text.vocabulary import END_TOKENS, TokenizerParts

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 1 << 28

ROLES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """Name a token that is matched in text as a whole, by a control string if `special`."""

    content: str
    special: bool


@dataclass(frozen=True, kw_only=True)
class HfTokenizerConfig:
    """Hold what the files beside a vocabulary say; roles are "bos", "eos", "unk" and "pad"."""

    role_tokens: Mapping[str, str] = field(default_factory=dict)
    role_ids: Mapping[str, int] = field(default_factory=dict)  # from config.json, generation_config.json
    eos_ids: frozenset[int] = frozenset()
    special_tokens: tuple[str, ...] = ()
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool = True
    legacy: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def apply_config(parts: TokenizerParts, config: HfTokenizerConfig, path: Path) -> TokenizerParts:
    """Return the parts with the roles, the ids that end a turn, and the templates of the config.

    A role goes by the token's name, then by the id in the model's config. eos ids are the union of both; a
    tokenizer with a chat template also ends at the tokens that Llama 3 and 4 are known to end a turn with:
    the first Llama 3 release listed only <|end_of_text|> and never stopped.
    """
    size = len(parts.tokens)
    roles = {
        role: token_id
        for role, token_id in config.role_ids.items()
        if token_id < size or role in ("bos", "eos")
    }
    for role in config.role_ids.keys() - roles.keys():
        logger.warning(
            "%s: no token for the %s_token_id of the model's config, %d", path, role, config.role_ids[role]
        )
    for role, token in config.role_tokens.items():
        if token not in parts.special_tokens:
            raise TokenizerError(
                f"{path}: the files beside it call {token!r} the {role}_token; there is none such"
            )
        roles[role] = parts.special_tokens[token]
    eos = roles.get("eos", parts.eos_token_id)
    ends = set(config.eos_ids) | ({eos} if eos is not None else set())
    if config.chat_templates:
        ends.update(parts.special_tokens[name] for name in END_TOKENS if name in parts.special_tokens)
    return replace(
        parts,
        bos_token_id=roles.get("bos", parts.bos_token_id),
        eos_token_id=eos,
        pad_token_id=roles.get("pad", parts.pad_token_id),
        unk_token_id=roles.get("unk", parts.unk_token_id),
        eos_token_ids=frozenset(ends),
        chat_templates=config.chat_templates,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise `TokenizerError` naming file and place where it is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError, both with the place
        raise TokenizerError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path}: a JSON object is expected, not {type(data).__name__}")
    return data


def read_tokenizer_config(folder: Path) -> HfTokenizerConfig:
    """Read every file beside the vocabulary in `folder`; raise `TokenizerError` naming file and key."""
    path = folder / "tokenizer_config.json"
    config = _read_optional(path)
    added = _added_tokens(path, config.get("added_tokens_decoder"))
    if "added_tokens_decoder" not in config:
        config |= _read_optional(folder / "special_tokens_map.json")
        added = _legacy_added_tokens(folder / "added_tokens.json")
    role_ids, eos_ids = _model_ids(folder)
    tokens = {key.removesuffix("_token"): text for key, text in _named_tokens(path, config)}
    return HfTokenizerConfig(
        role_tokens={role: token for role, token in tokens.items() if role in ROLES},
        role_ids=role_ids,
        eos_ids=eos_ids,
        special_tokens=(*tokens.values(), *_extra_tokens(path, config)),
        added_tokens=added,
        add_bos=_flag(path, config, "add_bos_token"),
        add_eos=_flag(path, config, "add_eos_token"),
        add_prefix_space=_flag(path, config, "add_prefix_space") is not False,
        legacy=bool(_flag(path, config, "legacy")),
        chat_templates=_json_templates(path, config.get("chat_template")) | _file_templates(folder),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _flag(path: Path, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{path}: {key} is {value!r}; true or false is expected")
    return value


def token_text(value: object, where: str) -> str:
    """Return the string of a token written as a string or as an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise TokenizerError(
            f"{where}: {value!r} is no token: a string, or an object with content, is expected"
        )
    return value


def _named_tokens(path: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every "..._token" key that names a token; Transformers takes all of them as special."""
    return [
        (key, token_text(value, f"{path}: {key}"))
        for key, value in config.items()
        if key.endswith("_token") and key not in ("add_bos_token", "add_eos_token") and value is not None
    ]


def _extra_tokens(path: Path, config: Mapping[str, Any]) -> list[str]:
    extra: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        if not isinstance(value, list | dict):
            raise TokenizerError(f"{path}: {key} is {value!r}; a list of tokens is expected")
        items = value.values() if isinstance(value, dict) else value
        extra += [token_text(item, f"{path}: {key}") for item in items]
    return extra


def _added_tokens(path: Path, entries: object) -> dict[int, AddedToken]:
    if not isinstance(entries, dict | None):
        raise TokenizerError(f"{path}: added_tokens_decoder is no object")
    added = {}
    for key, value in (entries or {}).items():
        if not key.isascii() or not key.isdigit():
            raise TokenizerError(f"{path}: added_tokens_decoder: {key[:40]!r} is no token id")
        special = isinstance(value, dict) and value.get("special") is True
        text = token_text(value, f"{path}: added_tokens_decoder: {key[:40]}")
        added[int(key)] = AddedToken(content=text, special=special)
    return added


def _legacy_added_tokens(path: Path) -> dict[int, AddedToken]:
    added = {}
    for token, token_id in _read_optional(path).items():
        if not is_id(token_id) or not token:
            raise TokenizerError(f"{path}: {token!r}: {token_id!r} is no token id")
        added[token_id] = AddedToken(content=token, special=False)
    return added


def is_id(value: object) -> bool:
    """Say whether a value out of a JSON file can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _model_ids(folder: Path) -> tuple[dict[str, int], frozenset[int]]:
    """Return the role ids of the model's own configs, and the union of the eos ids in them."""
    roles: dict[str, int] = {}
    eos_ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        config = _read_optional(folder / name)
        nested = config.get("text_config")
        for section in (nested if isinstance(nested, dict) else {}, config):
            for role in ROLES:
                ids = _ids(folder / name, section, f"{role}_token_id")
                if role == "eos":
                    eos_ids.update(ids)
                roles.update((role, token_id) for token_id in ids[:1])
    return roles, frozenset(eos_ids)


def _ids(path: Path, config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    if value is None or value == -1:  # -1: "none" in the first Llama's configs
        return []
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if not is_id(token_id):
            raise TokenizerError(f"{path}: {key} is {value!r}; token ids are expected")
    return ids


def _json_templates(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    templates = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                templates[name] = template
            case _:
                raise TokenizerError(
                    f"{path}: chat_template: a string, or a list of name and template, is expected"
                )
    return templates


def _file_templates(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    return {name: _read_text(path) for name, path in files.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}") from None
