"""Draw the loss of cria's runs, one after the other.

python -m examples.cria.plot OUT.png METRICS.jsonl [METRICS.jsonl ...]      # needs matplotlib
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def read_losses(paths: list[Path], num_processes: int = 2) -> tuple[list[float], list[float], list[float]]:
    """Return millions of tokens so far, losses averaged over 5 entries, and where each later run starts."""
    tokens: list[float] = []
    losses: list[float] = []
    starts: list[float] = []
    for path in paths:
        before = tokens[-1] if tokens else 0.0
        starts.append(before)
        recent: list[float] = []
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            recent = [*recent[-4:], entry["loss"]]
            tokens.append(before + entry["tokens"] * num_processes / 1e6)
            losses.append(sum(recent) / len(recent))
    return tokens, losses, starts[1:]


def main() -> None:
    """Draw and save."""
    tokens, losses, starts = read_losses([Path(name) for name in sys.argv[2:]])
    figure, axes = plt.subplots(figsize=(6, 3), dpi=80)
    axes.plot(tokens, losses, linewidth=1)
    for start in starts:
        axes.axvline(start, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="million tokens", ylabel="loss", yscale="log", title="cria: training loss")
    figure.tight_layout()
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
