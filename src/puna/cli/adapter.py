"""`puna adapter`: what an adapter is, and another tool's written as PEFT's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from puna.model.config import LlamaConfig
    from puna.weights.adapter_facts import AdapterFacts

adapter = typer.Typer(
    name="adapter", help="Inspect and convert adapters.", no_args_is_help=True, rich_markup_mode=None
)

_Folder = Annotated[
    str,
    typer.Argument(metavar="ADAPTER", help="A folder of PEFT, mlx-lm, torchtune or LitGPT, or a .gguf file."),
]
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")]
_Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model that the adapter belongs to.", show_default=False),
]
_Alpha = Annotated[
    float | None,
    typer.Option(
        metavar="ALPHA", help="lora_alpha of a torchtune adapter without a config.", show_default=False
    ),
]


@adapter.command()
def inspect(
    folder: _Folder,
    model: _Model = None,
    alpha: _Alpha = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what an adapter is: rank, scale, targets, sizes.

    MODEL, whose config alone is read, is needed for adapters of torchtune, LitGPT and llama.cpp.
    """
    from puna.weights.adapter_facts import read_adapter_facts

    facts = read_adapter_facts(folder, _config_of(model), alpha=alpha)
    if as_json:
        typer.echo(json.dumps(asdict(facts), indent=2, default=str))
    else:
        typer.echo("\n".join(adapter_lines(facts)))


@adapter.command()
def convert(folder: _Folder, out: _Out, model: _Model = None, alpha: _Alpha = None) -> None:
    """Write another tool's adapter as PEFT does.

    An adapter of mlx-lm, torchtune, LitGPT or llama.cpp becomes a folder that every tool reads which reads
    PEFT's.
    MODEL, whose config alone is read, is needed for adapters of torchtune, LitGPT and llama.cpp.
    """
    import dataclasses

    from puna.weights.adapter_files import write_adapter
    from puna.weights.adapter_import import read_any_adapter
    from puna.weights.write_hf import require_new

    require_new(out)
    config, tensors = read_any_adapter(folder, _config_of(model), alpha=alpha)
    if model is not None:
        config = dataclasses.replace(config, base_model_name_or_path=model)
    write_adapter(out, config, tensors)
    typer.echo(f"wrote {out}: {len(tensors)} tensors, rank {config.r}, alpha {config.lora_alpha:g}")


def adapter_lines(facts: AdapterFacts) -> list[str]:
    """Return the facts of an adapter as lines."""
    extras = [name for name, on in (("rsLoRA", facts.use_rslora), ("DoRA", facts.use_dora)) if on]
    targets = ", ".join(f"{name} ({count})" for name, count in facts.modules.items())
    parts = ", ".join(f"{count:,} {kind}" for kind, count in facts.parts.items())
    rows = {
        "format": facts.tool,
        "base model": facts.base_model or "not named",
        "rank": str(facts.rank),
        "alpha": f"{facts.alpha:g}",
        "scale": ", ".join(f"{scale:g}" for scale in facts.scales)
        + (f" ({', '.join(extras)})" if extras else ""),
        "modules": targets or "none",
        "layers": _ranges(facts.layers) or "none",
        "parameters": f"{facts.parameters:,}" + (f" ({parts})" if len(facts.parts) > 1 else ""),
        "stored as": f"{', '.join(facts.dtypes)}, {facts.num_bytes:,} bytes",
    }
    width = max(len(name) for name in rows)
    return [f"  {name.ljust(width)}    {text}" for name, text in rows.items()]


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _config_of(model: str | None) -> LlamaConfig | None:
    if model is None:
        return None
    from puna.locate import find_model
    from puna.weights.loader import open_checkpoint

    return open_checkpoint(find_model(model)).config
