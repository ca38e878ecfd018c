"""`puna merge` and `puna export`: a model, with an adapter in it or not, in the files of other tools.

What is written is read again and compared with what it was made from (`puna.export_check`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.errors import ParameterError

if TYPE_CHECKING:
    from puna.export_check import Answers
    from puna.gguf_header import Value
    from puna.text.tokenizer import Tokenizer
    from puna.weights.adapter_open import OpenedAdapter
    from puna.weights.loader import Checkpoint

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or cria.")]
_Adapter = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="An adapter of PEFT's, or another tool's.", show_default=False),
]
_NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not read what was written to compare its answers.")
]


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or cria.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A folder of PEFT or another tool, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")],
    no_check: _NoCheck = False,
) -> None:
    """Write a model with an adapter in its weights.

    MODEL is a Hugging Face folder, and OUT becomes one, in the same dtype, with its tokenizer, the chat
    template that was trained, and a model card. Weights pass one at a time; those that bitsandbytes packed
    become whole. The result is read again and compared with the adapter beside the model.
    """
    from puna.weights.merged_checkpoint import MergedCheckpoint
    from puna.weights.write_hf import hf_config, require_new, write_hf_stream

    require_new(out)
    job = _Job(model, adapter)
    merged = MergedCheckpoint(job.checkpoint, job.adapter, dequantize=True)
    hf_config(merged.path, merged.config, merged.dtype)  # raises for another format, before it takes long
    expected = None if no_check else job.answers()
    files = {"README.md": job.card()}
    if job.template is not None and job.trained_template is not None:
        files["chat_template.jinja"] = job.template
    write_hf_stream(merged, out, files=files)
    typer.echo(f"wrote {out}: {job.path} with {adapter} in its weights")
    job.report(expected, out, is_exact=True)


def export(
    model: _Model,
    adapter: _Adapter = None,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The .gguf file to write.", show_default=False)
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="q4_k_m, q8_0, f16, ...; else the floats stay as stored.",
            show_default=False,
        ),
    ] = None,
    gguf_adapter: Annotated[
        Path | None,
        typer.Option(
            "--gguf-adapter",
            metavar="FILE",
            help="The .gguf file to write the adapter alone into.",
            show_default=False,
        ),
    ] = None,
    modelfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The Modelfile to write, for Ollama.", show_default=False),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise what is quantised already.")
    ] = False,
    no_check: _NoCheck = False,
) -> None:
    """Write a model, or an adapter, for llama.cpp and Ollama.

    --gguf writes the model with its tokenizer and chat template, the adapter merged into it. --gguf-adapter
    writes the adapter as a file of its own, for use beside a GGUF of the model. --modelfile goes with either
    and has the template and the stop tokens that were trained.
    """
    if (gguf is None) == (gguf_adapter is None):
        raise ParameterError("give --gguf FILE or --gguf-adapter FILE")
    out = gguf or gguf_adapter
    assert out is not None
    for file in filter(None, (out, modelfile)):
        if file.exists():
            raise ParameterError(f"{file}: is there already: give a new file")
    job = _Job(model, adapter)
    if gguf is not None:
        _export_model(job, gguf, type, allow_requantize=allow_requantize, check=not no_check)
    else:
        _export_adapter(job, out, check=not no_check)
    if modelfile is not None:
        job.write_modelfile(modelfile, out, is_adapter=gguf is None)


def _export_model(job: _Job, out: Path, kind: str | None, *, allow_requantize: bool, check: bool) -> None:
    from puna.cli.quantize import gguf_keys, summary
    from puna.weights.merged_checkpoint import MergedCheckpoint
    from puna.weights.quantize_file import write_quantized
    from puna.weights.quantize_mix import FLOAT_TYPES, file_type

    wanted = file_type(kind or job.stored_type())
    merged = MergedCheckpoint(job.checkpoint, job.adapter)
    metadata = gguf_keys(job.path, merged) | job.gguf_keys(out)
    expected = job.answers() if check else None
    written = write_quantized(merged, out, metadata, wanted, allow_requantize=allow_requantize)
    typer.echo(summary(out, written))
    job.report(expected, out, is_exact=wanted.base in FLOAT_TYPES)


def _export_adapter(job: _Job, out: Path, *, check: bool) -> None:
    from puna.weights.gguf_lora import write_gguf_adapter

    if job.adapter is None:
        raise ParameterError("--gguf-adapter needs --adapter FOLDER")
    opened = job.adapter
    count = write_gguf_adapter(out, opened.config, opened.tensors, job.checkpoint.config, name=opened.name)
    typer.echo(f"wrote {out}: an adapter of {count} modules, {out.stat().st_size / 1e6:,.1f} MB")
    if check:
        job.report_adapter(out)


class _Job:
    """A model and perhaps an adapter that are to be written, and how the result is checked."""

    def __init__(self, model: str, adapter: str | None) -> None:
        """Read all but the weights of the model."""
        from puna.locate import find_model
        from puna.text.tokenizer import load_tokenizer
        from puna.weights.adapter_open import open_adapter
        from puna.weights.loader import open_checkpoint

        self.path = find_model(model)
        self.checkpoint: Checkpoint = open_checkpoint(self.path)
        self.tokenizer: Tokenizer = load_tokenizer(self.path)
        self.adapter: OpenedAdapter | None = None
        self.trained_template: str | None = None
        if adapter is not None:
            self.adapter = open_adapter(adapter, self.checkpoint.config)
            beside = Path(adapter).expanduser() / "chat_template.jinja"
            if beside.is_file():
                self.trained_template = beside.read_text(encoding="utf-8")

    @property
    def template(self) -> str | None:
        """Return the chat template: what lies beside the adapter, else the model's."""
        return self.trained_template or self.tokenizer.chat_template

    def stored_type(self) -> str:
        """Return the float type that keeps the weights as they are; raise for a quantised GGUF file."""
        import torch

        from puna.weights.gguf import GgufCheckpoint
        from puna.weights.quantize_mix import FLOAT_TYPES

        files = self.checkpoint.files if isinstance(self.checkpoint, GgufCheckpoint) else []
        if any(info.type not in FLOAT_TYPES for file in files for info in file.tensors.values()):
            raise ParameterError(f"{self.path}: is quantised: say with --type what it shall become")
        names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        return names[self.checkpoint.dtype]

    def answers(self) -> Answers:
        """Let the model answer, with the adapter beside it."""
        from puna.export_check import answer

        return answer(self.checkpoint, self.tokenizer, self.template, self.adapter)

    def report(self, expected: Answers | None, out: Path, *, is_exact: bool) -> None:
        """Print how the written model agrees with the source; raise where it is another, but for rounding."""
        from puna.export_check import compare

        if expected is not None:
            agreement = compare(expected, out, template=self.template)
            typer.echo(str(agreement))
            if is_exact:
                agreement.require(out)

    def report_adapter(self, out: Path) -> None:
        """Print how the model agrees with itself, once with the adapter and once with the written one."""
        from puna.export_check import compare_adapter
        from puna.weights.adapter_open import open_adapter

        written = open_adapter(out, self.checkpoint.config)
        agreement = compare_adapter(self.answers(), self.checkpoint, written)
        typer.echo(str(agreement))
        agreement.require(out)

    def gguf_keys(self, out: Path) -> dict[str, Value]:
        """Return what a file says of where it comes from, and the template that was trained."""
        keys: dict[str, Value] = {}
        if self.adapter is not None:
            keys |= {
                "general.name": out.stem,
                "general.base_model.count": 1,
                "general.base_model.0.name": self.path.resolve().name,
            }
        if self.trained_template is not None:
            keys["tokenizer.chat_template"] = self.trained_template
        return keys

    def card(self) -> str:
        """Return the model card of a merged model."""
        from puna.cli.model_card import merged_card

        assert self.adapter is not None
        return merged_card(self.path, self.adapter)

    def write_modelfile(self, file: Path, out: Path, *, is_adapter: bool) -> None:
        """Write the Modelfile for what was written."""
        from puna.cli.modelfile import export_modelfile
        from puna.weights.adapter_files import write_text

        source = self.path.resolve() if is_adapter else out.resolve()
        text = export_modelfile(
            source, self.tokenizer, self.template, adapter=out.resolve() if is_adapter else None
        )
        write_text(file, text)
        typer.echo(f"wrote {file}: ollama create NAME -f {file}")
