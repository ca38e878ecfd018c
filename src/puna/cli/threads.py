"""The option --threads: how many threads torch may use, and the kernels, which follow it."""

from __future__ import annotations

from typing import Annotated

import typer

Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, metavar="N", help="Threads of the CPU; as many as torch takes.")
]


def use_threads(count: int | None) -> None:
    """Let torch use so many threads of the CPU from now on; None: as many as it takes by itself."""
    if count is not None:
        import torch  # takes its time

        torch.set_num_threads(count)
