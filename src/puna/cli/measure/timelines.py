"""The metrics of a benchmark, computed from what each request did and when.

Names and definitions are those of `vllm bench` (0.33): TTFT is the time to the first chunk, ITL the gaps
between chunks, E2EL the time to the last chunk, TPOT what each token after the first took. This module knows
neither engines nor servers: it turns timelines into numbers, and numbers into a table or a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import PunaError

METRICS = ("ttft", "tpot", "itl", "e2el")
_TITLES = {
    "ttft": "Time to first token (ms)",
    "tpot": "Time per output token, the first left out (ms)",
    "itl": "Inter-token latency (ms)",
    "e2el": "End-to-end latency (ms)",
}


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What one request did: counts of tokens, and seconds on a clock that all requests share.

    A chunk holds one token or several. A request failed if it has an `error`; then its counts do not count.
    """

    prompt_len: int
    output_len: int
    sent: float
    chunk_times: tuple[float, ...] = ()
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Return the seconds from sending to the first chunk; 0 without any."""
        return self.chunk_times[0] - self.sent if self.chunk_times else 0.0

    @property
    def latency(self) -> float:
        """Return the seconds from sending to the last chunk; 0 without any."""
        return self.chunk_times[-1] - self.sent if self.chunk_times else 0.0

    @property
    def itls(self) -> list[float]:
        """Return the seconds between chunks."""
        return [after - before for before, after in zip(self.chunk_times, self.chunk_times[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """Return the seconds per token after the first; 0 where there is none."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


def summarise(
    timelines: Sequence[Timeline],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return vLLM's metrics of requests that took `duration` seconds together; times in milliseconds.

    `goodput` maps ttft, tpot or e2el to the most milliseconds that a good request may take.
    """
    done = [timeline for timeline in timelines if timeline.error is None]
    prompt_tokens = sum(timeline.prompt_len for timeline in done)
    output_tokens = sum(timeline.output_len for timeline in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(timelines) - len(done),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "request_goodput": _num_good(done, goodput) / duration if goodput else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
        "max_output_tokens_per_s": _busiest_second(done),
        "max_concurrent_requests": _most_at_once(done),
    }
    for name in metrics:
        result |= _statistics(name, _values(name, done), percentiles)
    return result


def details(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Return what each request did, in vLLM's lists; times in seconds."""
    return {
        "input_lens": [timeline.prompt_len for timeline in timelines],
        "output_lens": [timeline.output_len for timeline in timelines],
        "ttfts": [timeline.ttft for timeline in timelines],
        "itls": [timeline.itls for timeline in timelines],
        "latencies": [timeline.latency for timeline in timelines],
        "start_times": [timeline.sent for timeline in timelines],
        "generated_texts": [timeline.text for timeline in timelines],
        "errors": [timeline.error or "" for timeline in timelines],
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Return what `summarise` found as lines for people."""
    rows = [
        ("Requests that succeeded", f"{result['completed']}"),
        ("Requests that failed", f"{result['failed']}"),
        ("Duration (s)", f"{result['duration']:.2f}"),
        ("Input tokens", f"{result['total_input_tokens']}"),
        ("Output tokens", f"{result['total_output_tokens']}"),
        ("Requests/s", f"{result['request_throughput']:.2f}"),
        ("Output tokens/s", f"{result['output_throughput']:.2f}"),
        ("Total tokens/s", f"{result['total_token_throughput']:.2f}"),
        ("Output tokens in the busiest second", f"{result['max_output_tokens_per_s']:.0f}"),
        ("Most requests at once", f"{result['max_concurrent_requests']}"),
    ]
    if result.get("request_goodput") is not None:
        rows.insert(6, ("Good requests/s", f"{result['request_goodput']:.2f}"))
    lines = [f"{name:<38}{value:>12}" for name, value in rows]
    for name in METRICS:
        ending = f"_{name}_ms"
        found = [(key.removesuffix(ending), value) for key, value in result.items() if key.endswith(ending)]
        if found:
            lines += ["", _TITLES[name], *(f"  {label:<36}{value:>12.2f}" for label, value in found)]
    return lines


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write results to the file that was named, if any. Raises PunaError when that cannot be done."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise PunaError(f"{path}: cannot be written: {error.strerror}") from None


def _values(name: str, done: Sequence[Timeline]) -> list[float]:
    """Return one metric's seconds; a request of one token has no time per further token."""
    match name:
        case "ttft":
            return [timeline.ttft for timeline in done]
        case "tpot":
            return [timeline.tpot for timeline in done if timeline.output_len > 1]
        case "itl":
            return [gap for timeline in done for gap in timeline.itls]
    return [timeline.latency for timeline in done]


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = np.asarray(seconds or [0.0]) * 1000
    found = {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(np.std(values)),
    }
    return found | {f"p{share:g}_{name}_ms": float(np.percentile(values, share)) for share in percentiles}


def _num_good(done: Sequence[Timeline], goodput: Mapping[str, float]) -> int:
    def is_good(timeline: Timeline) -> bool:
        seconds = {"ttft": timeline.ttft, "tpot": timeline.tpot, "e2el": timeline.latency}
        return all(seconds[name] * 1000 <= limit for name, limit in goodput.items())

    return sum(map(is_good, done))


def _busiest_second(done: Sequence[Timeline]) -> float:
    """Return the most tokens that came in one whole second since the start; chunks weigh the same."""
    began = min((timeline.sent for timeline in done), default=0.0)
    tokens: dict[int, float] = {}
    for timeline in done:
        for moment in timeline.chunk_times:
            second = int(moment - began)
            tokens[second] = tokens.get(second, 0.0) + timeline.output_len / len(timeline.chunk_times)
    return max(tokens.values(), default=0.0)


def _most_at_once(done: Sequence[Timeline]) -> int:
    """Return how many requests ran at the same time, at most; one that ends makes room first."""
    ends = [(timeline.sent + timeline.latency, -1) for timeline in done]
    most = running = 0
    for _, change in sorted([*ends, *((timeline.sent, 1) for timeline in done)]):
        running += change
        most = max(most, running)
    return most
