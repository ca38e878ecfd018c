"""`puna quantize` and `puna run --quantize`: the golden story survives, what cannot be is refused."""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path

import gguf
import pytest
import torch
from typer.testing import CliRunner, Result

from puna import LLM, AutoModelForCausalLM, SamplingParams, kernels
from puna.cli.app import app
from puna.errors import ParameterError, UnsupportedError
from puna.model import PackedAttention
from puna.text.tokenizer import load_tokenizer
from puna.weights.loader import load_model
from puna.weights.quant import QuantLinear

pytestmark = pytest.mark.slow  # together they take long

GREEDY = ("--temperature", "0", "--max-tokens", "256")
BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="puna")


@pytest.mark.parametrize("source", ["hf", "meta", "gguf/stories260k-f32.gguf"])
def test_the_golden_story_from_a_float_file(stories: Path, tmp_path: Path, source: str) -> None:
    written = invoke("quantize", stories / source, tmp_path / "m.gguf", "--type", "f32")
    assert written.exit_code == 0 and "1.0 MB, 32.00 bits per weight" in written.stdout
    story = invoke("run", tmp_path / "m.gguf", "", *GREEDY).stdout
    assert story == (stories / "golden.txt").read_text(encoding="utf-8")


def test_q8_0_of_a_folder_and_of_a_gguf_are_the_same_model(stories: Path, tmp_path: Path) -> None:
    for source, out in (("hf", "a.gguf"), ("gguf/stories260k-f32.gguf", "b.gguf")):
        result = invoke("quantize", stories / source, tmp_path / out, "--type", "Q8_0")
        assert result.stdout.splitlines()[1] == "tensors: 31 Q8_0, 11 F32, 5 F16"
    one, two = (gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    assert all((a.data == b.data).all() for a, b in zip(one.tensors, two.tensors, strict=True))
    assert two.fields["general.file_type"].contents() == 7
    assert two.fields["tokenizer.ggml.model"].contents() == "llama"
    assert invoke("run", tmp_path / "a.gguf", "", *GREEDY).stdout.startswith(BEGINNING)


@torch.inference_mode()
def test_the_story_from_q8_0(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, rounded to 8 bits, part from the golden text late, where two words are as likely.

    Along the story that the dequantised weights write, the compiled kernels may choose another word only
    where the best two are nearly even.
    """
    path = tmp_path / "m.gguf"
    invoke("quantize", stories / "gguf/stories260k-f32.gguf", path, "--type", "q8_0")
    compiled = invoke("run", path, "", *GREEDY).stdout
    model = load_model(path)
    monkeypatch.setattr(kernels, "_cpu", None)
    exact = invoke("run", path, "", *GREEDY).stdout
    golden = (stories / "golden.txt").read_text(encoding="utf-8")
    assert commonprefix([golden, exact, compiled]).startswith(BEGINNING)
    assert len(commonprefix([golden, exact])) > len(golden) // 3
    ids = torch.tensor(load_tokenizer(path).encode(exact))
    places, attention = torch.arange(len(ids)), PackedAttention([0, len(ids)])
    wanted = load_model(path)(ids, places, attention)
    monkeypatch.undo()
    found = model(ids, places, attention)
    best, second = wanted.topk(2).values.unbind(1)
    others = found.argmax(1) != wanted.argmax(1)
    assert not bool((others & (best - second > 0.15)).any())
    assert int(others.sum()) <= 5
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_cria_answers_from_its_quantised_file(tmp_path: Path) -> None:
    assert invoke("quantize", "cria", tmp_path / "cria.gguf").exit_code == 0
    answer = invoke("run", tmp_path / "cria.gguf", "Who are you?", "--temperature", "0", "--max-tokens", "6")
    assert answer.stdout.startswith("I am cria")
    facts = invoke("show", tmp_path / "cria.gguf").stdout
    assert "Q4_K" in facts


def test_an_importance_matrix_is_found_and_used(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A llama is an animal of the Andes. <|eot_id|>\n" * 20, encoding="utf-8")
    out = tmp_path / "i.gguf"
    found = invoke("imatrix", "cria", "--data", text, "-o", out, "--context", "64", "--chunks", "3")
    assert found.stdout == f"wrote {out}: 42 weights, 192 tokens in 3 pieces\n"
    whole = invoke("imatrix", "cria", "--data", text, "-o", tmp_path / "j.gguf", "--parse-special")
    assert "in 1 pieces" in whole.stdout
    reader = gguf.GGUFReader(out)
    assert reader.fields["imatrix.datasets"].contents() == [str(text)]
    assert {int(t.data.item()) for t in reader.tensors if t.name.endswith("counts")} == {192}
    for name, options in (("a", ("--imatrix", out)), ("b", ())):
        arguments = ("quantize", "cria", tmp_path / f"{name}.gguf", "--type", "q4_0", *options)
        assert invoke(*arguments).exit_code == 0
    weighted, plain = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "ab")
    assert weighted.fields["quantize.imatrix.entries_count"].contents() == 42
    assert weighted.fields["quantize.imatrix.chunks_count"].contents() == 3
    assert weighted.fields["quantize.imatrix.dataset"].contents() == str(text)
    up = [{t.name: t for t in r.tensors}["blk.1.ffn_up.weight"].data for r in (weighted, plain)]
    assert up[0].shape == up[1].shape and (up[0] != up[1]).any()


def test_what_gives_no_importance_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (
        ("empty.txt", "there is no text in it"),
        ("latin.txt", "is no UTF-8 text: byte 3"),
        ("none.txt", "cannot be read: No such file"),
    ):
        error = invoke("imatrix", "cria", "--data", tmp_path / name, "-o", tmp_path / "i.gguf").exception
        assert isinstance(error, ParameterError) and message in str(error)
    error = invoke("imatrix", "cria", "--data", "x", "-o", tmp_path / "empty.txt").exception
    assert isinstance(error, ParameterError) and "is there already" in str(error)
    f16 = invoke("quantize", "cria", tmp_path / "m.gguf", "--type", "f16", "--imatrix", "x").exception
    assert isinstance(f16, ParameterError) and "f16 is not quantised" in str(f16)


def test_quantising_at_load_through_every_door(stories: Path) -> None:
    story = invoke("run", stories / "hf", "", *GREEDY, "--quantize", "q8_0").stdout
    assert story.startswith(BEGINNING)
    llm = LLM(stories / "hf", quantization="q8_0", kv_cache_memory_bytes=1 << 22)
    params = SamplingParams(temperature=0, max_tokens=30)
    assert BEGINNING.startswith(llm.generate("", params, use_tqdm=False)[0].outputs[0].text.strip())
    model = AutoModelForCausalLM.from_pretrained(stories / "hf", quantization="q4_0")
    assert isinstance(model.llama.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)


def test_what_cannot_be_done_is_refused(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "old.gguf").touch()
    for arguments, message in (
        (("quantize", stories / "hf", tmp_path / "old.gguf"), "is there already"),
        (("quantize", stories / "hf", tmp_path / "m.gguf", "--type", "q9"), "'q9' is not known"),
        (("run", stories / "hf", "x", "--quantize", "f16"), "'f16' is a dtype"),
    ):
        error = invoke(*arguments).exception
        assert isinstance(error, ParameterError) and message in str(error)
    with pytest.raises(UnsupportedError, match="quantization='awq' is not supported"):
        LLM(stories / "hf", quantization="awq")
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]
