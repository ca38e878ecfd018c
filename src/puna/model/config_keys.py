"""Read typed, bounded values out of an untrusted dict, and name the key when one does not fit.

`Keys` remembers what was asked for, so that a key nobody read can be named in a warning: a setting of a
checkpoint is either used, known to be harmless, or mentioned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from puna.errors import ConfigError

logger = logging.getLogger(__name__)

_LARGEST = 2**31 - 1


class Keys:
    """Wrap a mapping of config values; every getter raises ConfigError naming the key and its value."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "", where: str = "") -> None:
        self._values = dict(values)
        self._prefix = prefix
        self._where = f"{where}." if where else prefix
        self._used: set[str] = set()

    def has(self, key: str) -> bool:
        """Say whether the key is there, whatever its value."""
        return self._prefix + key in self._values

    def default(self, key: str, value: Any) -> None:
        """Set a key that is absent; an explicit null stays null."""
        self._values.setdefault(self._prefix + key, value)

    def integer(self, key: str, default: int | None, *, low: int = 1, high: int = _LARGEST) -> int:
        """Return an integer in [low, high]; without a default the key is required."""
        value: int = self._required(key, self.optional_integer(key, default, low=low, high=high))
        return value

    def optional_integer(
        self, key: str, default: int | None, *, low: int = 1, high: int = _LARGEST
    ) -> int | None:
        """Return an integer in [low, high], or None where the file says null."""
        value = self._get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            if not (isinstance(value, float) and value.is_integer()):
                raise self._wrong(key, value, "an integer")
            value = int(value)
        if not low <= value <= high:
            raise self._wrong(key, value, f"in [{low}, {high}]")
        return value

    def number(
        self, key: str, default: float | None, *, low: float = -math.inf, exclusive: bool = False
    ) -> float:
        """Return a finite number, at least (or, with `exclusive`, above) `low`."""
        value = self._required(key, self._get(key, default))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        if value < low or (exclusive and value == low):
            raise self._wrong(key, value, f"{'above' if exclusive else 'at least'} {low:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a finite number, or None where it is absent or null."""
        return None if self._get(key, None) is None else self.number(key, None)

    def boolean(self, key: str, default: bool) -> bool:
        """Return a truth value; integers count (hub files write `attn_temperature_tuning: 4`)."""
        value = self._get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool | int):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def optional_string(self, key: str) -> str | None:
        """Return a string, or None where it is absent or null."""
        value = self._get(key, None)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def optional_mapping(self, key: str) -> Mapping[str, Any] | None:
        """Return an object, or None where it is absent or null."""
        value = self._get(key, None)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return value

    def optional_integers(self, key: str) -> tuple[int, ...] | None:
        """Return a list of integers, or None where it is absent or null."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, int) and abs(item) <= _LARGEST for item in value
        ):
            raise self._wrong(key, value, "a list of integers")
        return tuple(int(item) for item in value)

    def optional_strings(self, key: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None where it is absent or null."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return one integer or a list of them as a tuple, empty where absent or null."""
        value = self._get(key, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        return self.optional_integers(key) or ()

    def warn_of_unused(self, harmless: frozenset[str]) -> None:
        """Log the keys that nobody asked for and that are not known to be harmless."""
        unknown = sorted(set(self._values) - self._used - harmless)
        if unknown:
            logger.warning("config keys not known and not used: %s", ", ".join(unknown))

    def _get(self, key: str, default: Any) -> Any:
        self._used.add(self._prefix + key)
        return self._values.get(self._prefix + key, default)

    def _required(self, key: str, value: Any) -> Any:
        if value is None:
            raise ConfigError(f"{self._where}{key} is missing")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ConfigError(f"{self._where}{key} must be {expected}, got {shown}")
