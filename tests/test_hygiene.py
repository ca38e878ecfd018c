"""Imports go down only, text knows no tensors, and the public names are frozen."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import puna

SOURCE = Path(puna.__file__).parent

# A room may import from those listed; everyone may import errors and gguf_header.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "gguf_header": set(),
    "catalog": set(),
    "cria": set(),
    "text": {"gguf_header"},
    "kernels": set(),
    "model": {"kernels"},
    "weights": {"model", "kernels", "gguf_header"},
    "engine": {"weights", "model", "kernels"},
    "peft_model": {"weights", "model", "kernels"},
    "locate": {"cria", "gguf_header"},
    "outputs": {"engine", "text"},
    "prompts": {"text_engine"},
    "served_adapters": {"peft_model", "engine", "weights", "model"},
    "export_check": {"text_engine", "engine", "peft_model", "weights", "model", "text"},
    "text_engine": {"served_adapters", "outputs", "engine", "model", "text"},
    "session": {"served_adapters", "text_engine", "engine", "weights", "model", "text", "locate"},
}
DOORS = {
    "async_llm",
    "auto",
    "auto_arguments",
    "auto_encoding",
    "auto_generation",
    "auto_model",
    "auto_saving",
    "auto_tokenizer",
    "cli",
    "llm",
    "llm_arguments",
    "server",
    "train",
    "__init__",
    "__main__",
}
TORCH_FREE = ("errors", "gguf_header", "catalog", "cria", "text")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imports_of(path) if name.startswith("puna."))
    return {parts[1] for parts in names}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    upward = rooms_imported(path) - ALLOWED[room] - {room, "errors"}
    assert not upward, f"{room} may not import {sorted(upward)}"


@pytest.mark.parametrize("room", TORCH_FREE)
def test_rooms_without_tensors_do_not_import_torch(room: str) -> None:
    for path in [*SOURCE.glob(f"{room}.py"), *SOURCE.glob(f"{room}/**/*.py")]:
        assert not {name for name in imports_of(path) if name.split(".")[0] == "torch"}, path


def test_file_names_are_unique_and_say_something() -> None:
    names = [path.name for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))
    assert not {"utils.py", "base.py", "common.py", "helpers.py", "core.py", "manager.py"} & set(names)


def test_importing_puna_and_its_command_line_imports_no_torch() -> None:
    code = "import puna, puna.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names() -> None:
    assert puna.__all__ == [
        "AsyncLLM",
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "BeamSearchParams",
        "CompletionOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "LLM",
        "LoRARequest",
        "LoraConfig",
        "PeftModel",
        "PoolingOutput",
        "PoolingParams",
        "PoolingRequestOutput",
        "RequestOutput",
        "RequestOutputKind",
        "SamplingParams",
        "ScoringOutput",
        "ScoringRequestOutput",
        "StructuredOutputsParams",
        "TextPrompt",
        "TokensPrompt",
        "TrainConfig",
        "Trainer",
        "__version__",
        "get_peft_model",
    ]
