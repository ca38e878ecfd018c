"""A tokenizer written into GGUF metadata and read again gives the same ids, texts and roles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings

from hard_text import HARD_TEXTS, any_text
from puna.cria import FOLDER
from puna.errors import UnsupportedError
from puna.text.gguf_vocab_export import gguf_vocabulary
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.weights.gguf_writer import write_gguf


def through_gguf(source: Path, folder: Path, *, vocab_size: int | None = None) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizer of a model and its twin, written into a GGUF file and read from there."""
    original = load_tokenizer(source)
    keys = gguf_vocabulary(source, vocab_size=vocab_size or original.vocab_size)
    path = folder / "vocab.gguf"
    write_gguf(path, {"general.architecture": "llama", **keys}, {})
    return original, load_tokenizer(path)


def assert_same(one: Tokenizer, other: Tokenizer, texts: list[str]) -> None:
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(one, f"{name}_token_id") == getattr(other, f"{name}_token_id"), name
    assert one.eos_token_ids == other.eos_token_ids
    assert one.special_tokens == other.special_tokens
    assert one.chat_templates == other.chat_templates
    assert one.add_bos == other.add_bos
    for text in texts:
        for special in (False, True):
            ids = one.encode(text, parse_special=special)
            assert other.encode(text, parse_special=special) == ids, text
            assert one.decode(ids) == other.decode(ids)


@pytest.fixture(scope="module")
def cria(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    return through_gguf(FOLDER, tmp_path_factory.mktemp("cria"))


def test_byte_level_bpe(cria: tuple[Tokenizer, Tokenizer]) -> None:
    assert_same(*cria, [*HARD_TEXTS, "<|eot_id|>hi<|begin_of_text|>"])
    assert cria[1].chat_template


@given(any_text)
@settings(deadline=None, max_examples=30)
def test_byte_level_bpe_of_any_text(cria: tuple[Tokenizer, Tokenizer], text: str) -> None:
    assert cria[0].encode(text) == cria[1].encode(text)


def test_sentencepiece(tmp_path: Path, stories: Path) -> None:
    original, again = through_gguf(stories / "hf", tmp_path)
    assert_same(original, again, [*HARD_TEXTS, "<s>hi</s>", " two  spaces "])


def test_llama_2_as_tokenizer_json(tmp_path: Path, stories: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(stories / "hf/tokenizer_config.json", folder)
    write_bpe_with_fallback(stories / "hf/tokenizer.model", folder / "tokenizer.json")
    original, again = through_gguf(folder, tmp_path)
    assert original.path.name == "tokenizer.json"
    assert_same(original, again, ["Once upon a time, there was", "a\u00e9\U0001f600 b", "  x", "<s>hi"])


def write_bpe_with_fallback(model: Path, out: Path) -> None:
    """Write the pieces as Transformers writes a Llama 2 tokenizer.json, merges by the pieces' scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    from puna.text.sentencepiece_model import parse_model

    pieces = parse_model(model, model.read_bytes()).pieces
    vocab = {piece.token: i for i, piece in enumerate(pieces)}
    scored = sorted(enumerate(pieces), key=lambda item: (-item[1].score, item[0]))
    merges = [
        (piece.token[:cut], piece.token[cut:])
        for _, piece in scored
        for cut in range(1, len(piece.token))
        if piece.token[:cut] in vocab and piece.token[cut:] in vocab
    ]
    pipeline = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pipeline.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pipeline.save(str(out))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "llama4"])
def test_meta_files_of_ranks(tmp_path: Path, test_data: Path, name: str) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    shutil.copy(test_data / f"tokenizers/{name}-tokenizer.model", folder / "tokenizer.model")
    original, again = through_gguf(folder, tmp_path)
    assert_same(original, again, [*HARD_TEXTS, "<|eot_id|>hi<|begin_of_text|>"])


def test_rows_without_a_token_are_filled(tmp_path: Path) -> None:
    original, again = through_gguf(FOLDER, tmp_path, vocab_size=4099)
    assert again.vocab_size == 4099 and again.id_to_token(4098) == "[PAD4098]"
    assert again.encode("[PAD4098]") == original.encode("[PAD4098]")


def test_a_gguf_keeps_its_keys(stories: Path) -> None:
    path = stories / "gguf/stories260k-f32.gguf"
    keys = gguf_vocabulary(path, vocab_size=512)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert all(key.startswith("tokenizer.") for key in keys)


def test_what_gguf_has_no_name_for_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="ignore_merges is not what GGUF's 'llama-bpe'"):
        gguf_vocabulary(tmp_path, vocab_size=4096)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="GGUF has no name for its way of splitting"):
        gguf_vocabulary(tmp_path, vocab_size=4096)
