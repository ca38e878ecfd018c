"""What `--verbose` prints after an answer: counts, durations and rates, in the words and order of Ollama."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.session import Usage


def usage_lines(usage: Usage, load_seconds: float) -> list[str]:
    """Return the lines; a rate that cannot be measured is left out.

    The prompt's rate is over the tokens that were computed; those found in the cache have their own line.
    The first token comes out of the prompt's computation, so the answer's rate is over the others.
    """
    computed = usage.prompt_tokens - usage.cached_tokens
    rows = [
        ("total duration", duration(load_seconds + usage.prompt_seconds + usage.output_seconds)),
        ("load duration", duration(load_seconds)),
        ("prompt eval count", f"{usage.prompt_tokens} token(s)"),
        ("prompt cached count", f"{usage.cached_tokens} token(s)" if usage.cached_tokens else None),
        ("prompt eval duration", duration(usage.prompt_seconds)),
        ("prompt eval rate", _rate(computed, usage.prompt_seconds)),
        ("eval count", f"{usage.output_tokens} token(s)"),
        ("eval duration", duration(usage.output_seconds)),
        ("eval rate", _rate(usage.output_tokens - 1, usage.output_seconds)),
    ]
    return [f"{name + ':':<22}{value}" for name, value in rows if value is not None]


def duration(seconds: float) -> str:
    """Return a duration as Go writes it, to six digits: 1m2.5s, 4.709213s, 130.079ms, 12us."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds, 3), 60)
        hours, minutes = divmod(int(minutes), 60)
        return (f"{hours}h" if hours else "") + f"{minutes}m{rest:.6g}s"
    if seconds >= 1:
        return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3f}".rstrip("0").rstrip(".") + "ms"
    return f"{seconds * 1e6:.0f}us" if seconds else "0s"


def _rate(tokens: int, seconds: float) -> str | None:
    return f"{tokens / seconds:.2f} tokens/s" if tokens > 0 and seconds > 0 else None
