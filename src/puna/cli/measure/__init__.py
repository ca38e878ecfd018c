"""`puna bench`: measure the engine in this process, or a server.

Options, results and metrics have the names of `vllm bench` (0.33), so that both can be run from one script.
"""

from __future__ import annotations

import typer

from puna.cli.measure.engine_commands import latency, throughput
from puna.cli.measure.serve_command import serve

bench = typer.Typer(
    name="bench", help="Measure the engine, or a server.", no_args_is_help=True, rich_markup_mode=None
)
bench.command()(throughput)
bench.command()(latency)
bench.command()(serve)
