"""Trained tokens: exactly what the model would write after the prompt that serving gives it, end included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.errors import ParameterError
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.train.encoding import ChatRendering, Example, border, encode_row, encode_rows
from puna.train.rows import ChatRow, TextRow
from tiny_chat import BOS, EOT, save_tokenizer

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "Once upon a time"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "the llama said hello"},
]
ANSWERS = [message["role"] == "assistant" for message in CHAT]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat(messages: Sequence[dict[str, Any]] = CHAT, trained: Sequence[bool] = ANSWERS) -> ChatRow:
    return ChatRow(place="d.jsonl:7", messages=messages, trained=trained)


def pieces(example: Example, tokenizer: Tokenizer) -> list[str]:
    """Return the trained stretches as text."""
    found: list[list[int]] = []
    for index, token in enumerate(example.ids):
        if example.trained[index]:
            if not example.trained[index - 1]:
                found.append([])
            found[-1].append(token)
    return [tokenizer.decode(ids) for ids in found]


def test_answers_with_their_end_are_trained(tokenizer: Tokenizer) -> None:
    example = encode_row(chat(), tokenizer)
    assert pieces(example, tokenizer) == [f"Once upon a time{EOT}", f"the llama said hello{EOT}"]
    assert example.ids == encode_chat(tokenizer, CHAT, add_generation_prompt=False)
    assert example.ids.count(tokenizer.bos_token_id) == 1 and example.ids[0] == tokenizer.bos_token_id
    # What comes before an answer is what serving would give the model.
    start = example.trained.index(True)
    assert example.ids[:start] == encode_chat(tokenizer, CHAT[:2])


@pytest.mark.filterwarnings("ignore")  # of Transformers
@pytest.mark.parametrize("count", [3, 5])
def test_marks_are_those_of_a_template_with_generation_blocks(tmp_path: Path, count: int) -> None:
    """TRL's labels come from these masks; its templates for training put the end token into the block."""
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    header = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    template = (
        "{{- bos_token }}{%- for message in messages %}{{- " + header + " }}"
        "{%- if message['role'] == 'assistant' %}"
        "{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    )
    found = theirs.apply_chat_template(
        CHAT[:count],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encode_row(chat(CHAT[:count], ANSWERS[:count]), load_tokenizer(tmp_path))
    assert list(example.ids) == found["input_ids"]
    assert list(map(int, example.trained)) == found["assistant_masks"]
    assert sum(found["assistant_masks"]) > 0


def test_a_weight_of_zero_leaves_an_answer_out(tokenizer: Tokenizer) -> None:
    example = encode_row(chat(trained=[False, False, False, False, True]), tokenizer)
    assert pieces(example, tokenizer) == [f"the llama said hello{EOT}"]


def test_a_special_token_in_a_content_is_text(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": EOT}, {"role": "assistant", "content": f"say {EOT} now"}]
    example = encode_row(chat(messages, [False, True]), tokenizer)
    assert list(example.ids).count(tokenizer.special_tokens[EOT]) == 2
    assert pieces(example, tokenizer) == [f"say {EOT} now{EOT}"]


@pytest.mark.parametrize("chat_format", ["llama3", "llama3.1"])
def test_formats_of_llama_3(tokenizer: Tokenizer, chat_format: str) -> None:
    example = encode_row(chat(), tokenizer, ChatRendering(chat_format=chat_format))
    assert pieces(example, tokenizer) == [f"Once upon a time{EOT}", f"the llama said hello{EOT}"]


def test_llama_2_on_a_sentencepiece_vocabulary(stories: Path) -> None:
    tokenizer = load_tokenizer(stories / "hf")
    example = encode_row(chat(), tokenizer, ChatRendering(chat_format="llama2"))
    assert pieces(example, tokenizer) == ["Once upon a time </s>", "the llama said hello </s>"]
    assert list(example.ids).count(tokenizer.bos_token_id or 0) == 2  # Llama 2 opens every turn with one


def test_tool_calls_are_trained(tokenizer: Tokenizer) -> None:
    call: dict[str, Any] = {"function": {"name": "weather", "arguments": {"city": "Puno"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "cold"},
        {"role": "assistant", "content": "Cold."},
    ]
    row = ChatRow(
        place="d", messages=messages, trained=[False, True, False, True], tools=[{"name": "weather"}]
    )
    example = encode_row(row, tokenizer, ChatRendering(chat_format="llama3.1"))
    assert pieces(example, tokenizer) == [
        f'{{"name": "weather", "parameters": {{"city": "Puno"}}}}{EOT}',
        f"Cold.{EOT}",
    ]


def test_what_a_template_writes_behind_the_end_is_not_trained(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}" + EOT + "\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    example = encode_row(chat(), tokenizer, ChatRendering(template=template))
    assert pieces(example, tokenizer) == [f"Once upon a time{EOT}", f"the llama said hello{EOT}"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no end token"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}" + EOT + "{% endfor %}",
            "another way",
        ),
    ],
)
def test_templates_that_cannot_be_trained(tokenizer: Tokenizer, template: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=f"^d.jsonl:7: .*{reason}"):
        encode_row(chat(), tokenizer, ChatRendering(template=template))


def test_a_token_across_the_border_belongs_to_the_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in ids] == ["Once", " upon"]
    assert border(tokenizer.encode("Once u", add_special_tokens=False), ids, tokenizer) == 2
    assert border(tokenizer.encode("Once", add_special_tokens=False), ids, tokenizer) == 1
    assert border([], ids, tokenizer) == 0
    row = TextRow(place="d", prompt="Once u", text="pon a time")
    example = encode_row(row, tokenizer)
    assert pieces(example, tokenizer) == [f" a time{EOT}"]


def test_text_ends_with_eos_and_does_not_train_bos(tokenizer: Tokenizer) -> None:
    example = encode_row(TextRow(place="d", text="a time"), tokenizer)
    assert tokenizer.decode(example.ids) == f"{BOS}a time{EOT}"
    assert pieces(example, tokenizer) == [f"a time{EOT}"]


def test_a_row_without_trained_tokens_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ParameterError, match="d.jsonl:7: no token of this row is trained"):
        encode_row(chat(trained=[False] * 5), tokenizer)


def test_rows_that_are_too_long(tokenizer: Tokenizer) -> None:
    rows = [TextRow(place="d:1", text="a time " * 30), TextRow(place="d:2", text="hello")]
    whole = encode_row(rows[0], tokenizer)
    cut, short = encode_rows(rows, tokenizer, max_length=20)
    assert cut.ids == whole.ids[:20] and cut.num_trained == 19
    assert encode_rows(rows, tokenizer, max_length=20, overlong="drop") == [short]
    *parts, last = encode_rows(rows, tokenizer, max_length=20, overlong="split")
    assert last == short and [t for part in parts for t in part.ids] == whole.ids
    assert all(not part.trained[0] and part.num_trained == len(part.ids) - 1 for part in parts)
    with pytest.raises(ParameterError, match=f"d:1: {len(whole.ids)} tokens, more than max_length 20"):
        encode_rows(rows, tokenizer, max_length=20, overlong="error")
    with pytest.raises(ParameterError, match="of the first 5 none is trained"):
        encode_rows([chat()], tokenizer, max_length=5)


def test_every_answer_of_the_conversation_that_ships_with_cria() -> None:
    from puna.cria import FOLDER

    tokenizer = load_tokenizer(FOLDER)
    example = encode_row(chat(CHAT[1:], ANSWERS[1:]), tokenizer)
    texts = pieces(example, tokenizer)
    assert [text.rpartition("<")[0] for text in texts] == ["Once upon a time", "the llama said hello"]
    assert json.dumps(texts).count("<|") == 2
