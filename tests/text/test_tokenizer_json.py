"""Folders with a tokenizer.json: ids and text as Transformers gives them, roles from the files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hard_text import HARD_TEXTS, LONG_WORDS, any_text, word_text
from puna.errors import TokenizerError
from puna.text.byte_level import LLAMA3_SPLIT, LLAMA4_SPLIT
from puna.text.sentencepiece_model import parse_model
from puna.text.tokenizer import Tokenizer, load_tokenizer

_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _byte_level(split: str | None, *, ignore_merges: bool = True) -> Pipeline:
    """Train a tiny tokenizer of Llama 3's build on the hard texts."""
    pipeline = Pipeline(models.BPE(ignore_merges=ignore_merges))
    if split is None:
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pipeline.train_from_iterator(HARD_TEXTS, trainer)
    pipeline.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIALS])
    pipeline.add_tokens([AddedToken("wow", normalized=False), AddedToken(" two words", normalized=False)])
    _add_bos(pipeline, _SPECIALS[0])
    return pipeline


def _add_bos(pipeline: Pipeline, bos: str) -> None:
    pipeline.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, pipeline.token_to_id(bos))],
            ),
        ]
    )


def _llama2(stories: Path, scheme: str) -> Pipeline:
    """Write the stories' vocabulary as Transformers 4 ("legacy") and 5 write a Llama 2 tokenizer.json."""
    path = stories / "hf/tokenizer.model"
    vocab = {piece.token: i for i, piece in enumerate(parse_model(path, path.read_bytes()).pieces)}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pipeline = Pipeline(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        pipeline.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pipeline.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    pipeline.add_tokens([AddedToken("wow", normalized=False)])
    _add_bos(pipeline, "<s>")
    return pipeline


_BUILDS = ["llama3", "llama4", "gpt2", "merges", "legacy", "first", "always", "never"]


def _build(name: str, stories: Path) -> Pipeline:
    splits = {"llama3": LLAMA3_SPLIT, "llama4": LLAMA4_SPLIT, "gpt2": None}
    if name in splits:
        return _byte_level(splits[name])
    if name == "merges":
        return _byte_level(LLAMA3_SPLIT, ignore_merges=False)
    return _llama2(stories, name)


@pytest.fixture(scope="module")
def folders(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a Hugging Face folder of each build."""
    made = {}
    for name in _BUILDS:
        folder = made[name] = tmp_path_factory.mktemp(name)
        pipeline = _build(name, stories)
        pipeline.save(str(folder / "tokenizer.json"))
        bos, eos = ("<s>", "</s>") if pipeline.token_to_id("<s>") else (_SPECIALS[0], "<|eot_id|>")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    return {
        name: (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder))
        for name, folder in folders.items()
    }


_SPECIAL_TEXTS = [
    "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|><|eot_id|> <|begin_of_text|>",
    "<s>[INST] Hello [/INST] ok </s><s> a</s>b <unk> c",
    "wow, wow two words wowwow",
    " <s> <|eot_id|> ",
]


@pytest.mark.parametrize("name", _BUILDS)
def test_hard_texts_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = pairs[name]
    for text in (*HARD_TEXTS, *_SPECIAL_TEXTS):
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
        ids = ours.encode(text, parse_special=True, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", _BUILDS)
def test_found_texts_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = pairs[name]
    special = st.sampled_from([*ours.special_tokens, "wow"])

    @settings(max_examples=40, deadline=None)
    @given(st.one_of(any_text, word_text, st.lists(st.one_of(special, any_text)).map("".join)))
    def check(text: str) -> None:
        ids = ours.encode(text, parse_special=True)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)

    check()


@pytest.mark.parametrize("name", ["llama3", "llama4", "gpt2"])
def test_any_ids_decode_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = pairs[name]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, len(ours) - 1)))
    def check(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids)

    check()


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_long_texts_take_the_same_ids_in_the_fast_way(
    pairs: dict[str, tuple[Tokenizer, Any]], kind: str
) -> None:
    ours, theirs = pairs["llama3"]
    text = LONG_WORDS[kind][:40_000]
    assert ours.encode(text) == theirs.encode(text)


def test_roles_and_sizes(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    for ours, theirs in pairs.values():
        assert ours.vocab_size == len(ours) == len(theirs)
        assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert ours.add_bos
        assert ours.pad_token_id is None
        assert ours.eos_token_ids == {theirs.eos_token_id}
        assert set(ours.special_tokens.values()) == set(theirs.all_special_ids) | {
            i for i, token in theirs.added_tokens_decoder.items() if token.special
        }
        for token_id in range(len(ours)):
            assert ours.id_to_token(token_id) == theirs.convert_ids_to_tokens(token_id)
            assert ours.token_to_id(ours.id_to_token(token_id)) == token_id


def test_a_bare_tokenizer_json_is_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
    for ours in (load_tokenizer(file), load_tokenizer(tmp_path)):
        assert ours.encode("Hello <|eot_id|>") == theirs.encode("Hello <|eot_id|>", split_special_tokens=True)
        assert ours.bos_token_id == ours.token_to_id("<|begin_of_text|>")
        assert (ours.eos_token_id, ours.eos_token_ids) == (None, frozenset())


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(folders: dict[str, Path], tmp_path: Path) -> MakeFolder:
    """Return a function that writes the Llama 3 build with other files beside it: name_json={...}."""

    def make(**files: Any) -> Path:
        (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_eos_ids_are_the_union_of_all_files(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(
        make_folder(
            config={"eos_token_id": 1, "bos_token_id": 7, "text_config": {"eos_token_id": [5]}},
            generation_config={"eos_token_id": [2, 3], "pad_token_id": 4},
            tokenizer_config={"eos_token": "<|end_of_text|>", "pad_token": None},
        )
    )
    eos = tokenizer.token_to_id("<|end_of_text|>")
    assert tokenizer.eos_token_id == eos
    assert tokenizer.eos_token_ids == {1, 2, 3, 5, eos}
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (7, 4)


def test_a_chat_template_makes_end_of_turn_tokens_end(make_folder: MakeFolder) -> None:
    config = {"eos_token": "<|end_of_text|>", "chat_template": "{{ messages }}"}
    tokenizer = load_tokenizer(make_folder(tokenizer_config=config))
    named = {tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")}
    assert tokenizer.eos_token_ids == named
    assert tokenizer.chat_template == "{{ messages }}"


def test_templates_in_files_win_over_those_in_json(make_folder: MakeFolder) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    folder = make_folder(tokenizer_config={"chat_template": templates})
    assert load_tokenizer(folder).chat_templates == {"default": "a", "rag": "b"}
    (folder / "chat_template.jinja").write_text("from a file\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("\u00e9", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "from a file\n"
    assert tokenizer.chat_templates == {"default": "from a file\n", "rag": "b", "tool_use": "\u00e9"}


def test_special_tokens_come_from_every_place(make_folder: MakeFolder) -> None:
    """As Transformers: a named token is special even if the vocabulary lacks it or lists it as plain."""
    folder = make_folder(
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "wow"},
        special_tokens_map={"pad_token": "<pad>", "additional_special_tokens": ["the", "<|eot_id|>"]},
    )
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert len(ours) == len(theirs)
    for text in ("wow the <pad> other", "<|eot_id|>wow"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert set(ours.encode(text)[1:]).isdisjoint(ours.special_tokens.values())
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_special_tokens_may_swallow_white_space(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.from_file(str(folders["llama3"] / "tokenizer.json"))
    pipeline.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<end>", rstrip=True)])
    pipeline.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast(tokenizer_object=pipeline)
    for text in ("a  <mask> b", "a <end>  \n b", " <end> <mask> ", "<end><mask>"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text)


def test_a_special_token_that_merges_could_reach_stays_out_of_reach(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """With ignore_merges a whole word that is in the vocabulary is taken; a special one must not be."""
    data = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    word = "He" if "He" in data["model"]["vocab"] else max(data["model"]["vocab"], key=len)
    entry = {"id": data["model"]["vocab"][word], "content": word, "special": True, "single_word": False}
    data["added_tokens"].append({**entry, "lstrip": False, "rstrip": False, "normalized": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert entry["id"] not in tokenizer.encode(word)
    assert tokenizer.encode(word, parse_special=True, add_special_tokens=False) == [entry["id"]]


def test_missing_bytes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(models.BPE({"a": 0, "b": 1}, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abc") == [0, 1]
    assert "no token for 254 of the 256 bytes" in caplog.text


def _change(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        data = data[int(key)] if isinstance(data, list) else data[key]
    data[int(last) if isinstance(data, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.type", "Unigram", "model is of type 'Unigram'"),
        ("model", None, "model is of type None"),
        ("model.vocab", {}, "model.vocab is no object, or empty"),
        ("model.vocab", [], "model.vocab is no object, or empty"),
        ("model.vocab.a", "7", "'a' has the id '7'"),
        ("model.vocab.a", True, "'a' has the id True"),
        ("model.vocab.a", -1, "'a' has the id -1"),
        ("model.vocab.a", 0, "id 0 belongs to two tokens"),
        ("model.vocab.a", 10**12, "no token has id"),
        ("model.vocab.", 5000, "model.vocab: a token has 1 to 65536"),
        ("model.vocab." + "x" * 70_000, 5000, "this one 70000"),
        ("model.vocab.\ud800", 507, "the token '\\\\ud800' holds a lone surrogate"),
        ("model.dropout", 0.1, "model.dropout is 0.1"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix is '##'"),
        ("model.unk_token", "?x", "model.unk_token '\\?x' is not in the vocabulary"),
        ("model.merges", None, "model.merges is no list"),
        ("model.merges", ["a b c"], r"model.merges\[0\] is 'a b c'"),
        ("model.merges", [["a"]], r"model.merges\[0\]"),
        ("model.merges", [["a", 5]], r"model.merges\[0\]"),
        ("model.merges", ["zz zzz"], "tokenizer.json: .*zz"),
        ("added_tokens", {}, "added_tokens is no list"),
        ("added_tokens.0", 5, r"added_tokens\[0\]: an object with id and content"),
        ("added_tokens.0.content", "", r"added_tokens\[0\]: a token has 1 to"),
        ("added_tokens.0.content", "<|eot_id|>", "has a second id"),
        ("added_tokens.0.id", 3, "id 3 belongs to two tokens"),
        ("added_tokens.0.id", 10**9, "no token has id"),
        ("added_tokens.0.id", -2, r"added_tokens\[0\]: an object with id and content"),
        ("added_tokens.0.single_word", True, "a special token with single_word"),
        ("normalizer", {"type": "Lowercase"}, "normalizer has a step of type 'Lowercase'"),
        ("normalizer", 5, "normalizer has a step of type None"),
        ("pre_tokenizer.pretokenizers.0.pattern.Regex", "(a+)+$", r"has the pattern .*\(a\+\)\+\$"),
        ("pre_tokenizer", {"type": "Split", "pattern": None}, "has the pattern 'None'"),
        ("pre_tokenizer.pretokenizers.0.type", "Whitespace", "step of type 'Whitespace'"),
        ("pre_tokenizer", {"type": "Metaspace", "prepend_scheme": "sometimes"}, "tokenizer.json: "),
        ("decoder", None, "decoder None is none that a Llama has"),
        ("decoder", {"type": "WordPiece"}, "decoder has a step of type 'WordPiece'"),
        ("decoder", {"type": "Sequence"}, "decoder"),
        ("post_processor", {"type": "BertProcessing"}, "step of type 'BertProcessing'"),
        ("post_processor.processors.1.single", [{"A": 1}], "is no template item"),
        ("post_processor.processors.1.special_tokens", {}, "special_tokens has no ids for"),
        ("post_processor.processors.1.special_tokens.<|begin_of_text|>.ids", [9999], "9999"),
    ],
)
def test_bad_files_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    data = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    _change(data, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "not JSON: .*line 1 column 2"),
        ("tokenizer.json", "[]", "a JSON object is expected, not list"),
        ("tokenizer.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", "\xff", "not JSON: .*position 0"),
        ("tokenizer_config.json", '{"add_bos_token": 1}', "add_bos_token is 1; true or false"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token: 5 is no token"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: a string"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template: a string"),
        ("tokenizer_config.json", '{"additional_special_tokens": "x"}', "a list of tokens is expected"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is no object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": "x"}}', "'-1' is no token id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "wow"}}}', "calls it 9"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"999": {"content": "<>"}}}',
            "no token has id",
        ),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'; token ids are expected"),
        ("config.json", '{"eos_token_id": [-5]}', "eos_token_id"),
        ("config.json", '{"eos_token_id": 99999}', "eos_token_id is 99999; the vocabulary has ids 0 to"),
        ("config.json", '{"bos_token_id": 99999}', "bos_token_id is 99999; the vocabulary has ids 0 to"),
        ("added_tokens.json", '{"x": "y"}', "'x': 'y' is no token id"),
    ],
)
def test_bad_files_beside_it_are_refused_by_name(
    make_folder: MakeFolder, name: str, text: str, message: str
) -> None:
    folder = make_folder()
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


def test_an_added_id_beyond_the_vocabulary_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    data = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    _change(data, "post_processor.processors.1.special_tokens.<|begin_of_text|>.ids", [9999])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    with pytest.raises(TokenizerError, match="added_token_id is 9999; the vocabulary has ids 0 to"):
        load_tokenizer(tmp_path)


def test_a_pad_id_beyond_the_vocabulary_is_left_out(
    make_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """Fine-tunes of the first Llama carry pad ids that only their embedding has."""
    folder = make_folder(config={"pad_token_id": 99_999}, generation_config={"eos_token_id": -1})
    assert load_tokenizer(folder).pad_token_id is None
    assert "no token for the pad_token_id of the model's config, 99999" in caplog.text
