"""What can go wrong and is not Puna's fault, as one tree.

    PunaError
      ModelNotFoundError    no model under that name or path
      CheckpointError       a model file is missing, damaged, or does not fit its config; names the file
      ConfigError           a config key is missing, out of range, or unknown in value; names the key
      TokenizerError        a tokenizer file cannot be read, or asks for what no Llama uses
      TemplateError         a chat template failed, ran too long, or refused the messages
      ParameterError        an argument is out of range; also a ValueError
      UnsupportedError      known, and not supported; says what instead
      MissingExtraError     an optional dependency is not installed; also an ImportError

A message says what, which value, and what to do. Anything else that escapes is a bug.
"""

from __future__ import annotations

from pathlib import Path


class PunaError(Exception):
    """Be the root of every error that a user can cause."""


class ModelNotFoundError(PunaError):
    """Say that no model was found under the name or path given."""


class CheckpointError(PunaError):
    """Name a model file and what is wrong with it, with the place where that helps."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


class ConfigError(PunaError):
    """Name a config key whose value is missing, out of range, or unknown."""


class TokenizerError(PunaError):
    """Name a tokenizer file, or the part of one, that cannot be used."""


class TemplateError(PunaError):
    """Carry what a chat template said, or why it was stopped."""


class ParameterError(PunaError, ValueError):
    """Name an argument and the range it must be in."""


class UnsupportedError(PunaError):
    """Name a thing that exists and that Puna does not do."""


class MissingExtraError(PunaError, ImportError):
    """Name the extra to install: `pip install 'puna[name]'`."""
