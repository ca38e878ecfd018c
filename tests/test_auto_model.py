"""The model's Transformers surface against Transformers: logits, loss, and ids for every way to generate."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.auto_generation import GenerationConfig
from puna.auto_model import CausalLM
from puna.errors import ParameterError, UnsupportedError
from puna.gguf_header import GGMLType
from puna.weights.packed_matrix import QuantTensor
from puna.weights.quant import swap_in

from tiny import hf_llama, hf_llama4, puna_twin

PAD = 90
ROWS = [[1, 5, 9, 33, 2, 8, 11], [1, 7, 40], [1, 17, 3, 60, 61]]
ONE = torch.tensor([ROWS[0]])


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Any]:
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, fill, strict=True)]
    input_ids = torch.tensor(ids)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


@pytest.fixture(scope="module")
def theirs() -> Any:
    model = hf_llama()
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture
def ours(theirs: Any) -> CausalLM:
    return CausalLM(puna_twin(theirs), GenerationConfig(bos_token_id=1, pad_token_id=PAD))


@pytest.fixture(scope="module")
def free(theirs: Any) -> list[list[int]]:
    """Return what the rows continue with, 16 ids each, when nothing ends them."""
    out = theirs.generate(**padded(ROWS), max_new_tokens=16, do_sample=False)
    return [row[7:].tolist() for row in out]


def both(theirs: Any, ours: CausalLM, inputs: dict[str, Any], **settings: Any) -> tuple[list[Any], list[Any]]:
    expected = theirs.generate(**inputs, **settings)
    return ours.generate(**inputs, **settings).tolist(), expected.tolist()


# -- forward


@pytest.mark.parametrize("make", [hf_llama, hf_llama4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(make: Any, side: str) -> None:
    reference = make()
    batch = padded(ROWS, side)
    with torch.no_grad():
        expected = reference(**batch).logits
    logits = CausalLM(puna_twin(reference))(**batch).logits
    kept = batch["attention_mask"] == 1
    torch.testing.assert_close(logits[kept], expected[kept], atol=2e-5, rtol=1e-4)
    assert not logits[~kept].any()


def test_position_ids_are_honoured(theirs: Any, ours: CausalLM) -> None:
    positions = torch.tensor([[0, 1, 2, 50, 51, 52, 53]])
    with torch.no_grad():
        expected = theirs(ONE, position_ids=positions).logits
    torch.testing.assert_close(ours(ONE, position_ids=positions).logits, expected, atol=2e-5, rtol=1e-4)


def test_loss_equals_transformers(theirs: Any, ours: CausalLM) -> None:
    batch = padded(ROWS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = theirs(**batch, labels=labels).loss
    output = ours(**batch, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    assert output[0] is output["loss"] is output.loss and output[1] is output.logits
    assert output.to_tuple() == (output.loss, output.logits)


def test_labels_behind_left_padding_are_left_out(ours: CausalLM) -> None:
    batch = padded([ROWS[0], ROWS[1]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    alone = [torch.tensor([row]) for row in ROWS[:2]]
    means = torch.stack([ours(ids, labels=ids)["loss"] for ids in alone])
    torch.testing.assert_close(ours(**batch, labels=labels).loss, (means * torch.tensor([6, 2])).sum() / 8)


def test_gradients_flow_once_they_are_asked_for(theirs: Any, ours: CausalLM) -> None:
    assert not any(p.requires_grad for p in ours.parameters())
    ours.train().requires_grad_()
    loss = ours(ONE, labels=ONE).loss
    assert loss is not None and ours.training
    loss.backward()  # type: ignore[no-untyped-call]
    theirs.zero_grad()
    theirs(ONE, labels=ONE).loss.backward()
    name, parameter = next(iter(ours.named_parameters()))
    torch.testing.assert_close(
        parameter.grad, dict(theirs.named_parameters())[name].grad, atol=1e-5, rtol=1e-3
    )
    theirs.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"past_key_values": object()}, UnsupportedError, "past_key_values"),
        ({"use_cache": True}, UnsupportedError, "use_cache"),
        ({"output_hidden_states": True}, UnsupportedError, "output_hidden_states"),
        ({"attention_mask": torch.ones(1, 3)}, ParameterError, r"\(1, 7\), got \(1, 3\)"),
        ({"labels": torch.ones(1, 3).long()}, ParameterError, r"labels must have the shape .*\(1, 7\)"),
        (
            {"labels": torch.ones(1, 7)},
            ParameterError,
            "labels must be a tensor of integers, got torch.float32",
        ),
        ({"labels": [1]}, ParameterError, "labels must be a tensor of integers, got list"),
        ({"labels": ONE + 90}, ParameterError, "token id 99 is outside the model's vocabulary, 0 to 95"),
    ],
)
def test_forward_refuses_by_name(
    ours: CausalLM, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours(ONE, **arguments)


@pytest.mark.parametrize("ids", [[[1, 2]], torch.tensor([1, 2]), torch.tensor([[1.0]])])
def test_forward_wants_a_matrix_of_ids(ours: CausalLM, ids: Any) -> None:
    with pytest.raises(ParameterError, match="input_ids must be"):
        ours(ids)


@pytest.mark.parametrize("wrong", [96, -1])
def test_ids_outside_the_vocabulary_are_refused_where_they_are_read(ours: CausalLM, wrong: int) -> None:
    ids = torch.tensor([[1, wrong, 5]])
    for call in (ours, ours.generate):
        with pytest.raises(
            ParameterError, match=f"token id {wrong} is outside the model's vocabulary, 0 to 95"
        ):
            call(ids)
    masked = ours(ids, attention_mask=torch.tensor([[0, 0, 1]])).logits[0, 2]
    assert torch.equal(masked, ours(torch.tensor([[0, 0, 5]]), torch.tensor([[0, 0, 1]])).logits[0, 2])


# -- generate


def test_greedy_alone(theirs: Any, ours: CausalLM) -> None:
    got, expected = both(theirs, ours, {"inputs": ONE}, max_new_tokens=16)
    assert got == expected


@pytest.mark.parametrize("make", [hf_llama, hf_llama4])
def test_greedy_batch_with_left_padding(make: Any) -> None:
    reference = make()
    model = CausalLM(puna_twin(reference))
    settings = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": PAD}
    got, expected = both(reference, model, padded(ROWS), **settings)
    assert got == expected


def test_right_padding_gives_the_same_new_ids(ours: CausalLM, free: list[list[int]]) -> None:
    out = ours.generate(**padded(ROWS, "right"), max_new_tokens=16)
    assert out[:, 7:].tolist() == free
    assert out[:, :7].equal(padded(ROWS, "right")["input_ids"])


@pytest.mark.parametrize("eos_at", [(0, 2), (1, 5), (2, 9)])
def test_rows_that_end_are_filled_up(theirs: Any, ours: CausalLM, free: list[list[int]], eos_at: Any) -> None:
    row, place = eos_at
    for eos in (free[row][place], [free[row][place], free[1][3]], [r[6] for r in free]):
        got, expected = both(theirs, ours, padded(ROWS), max_new_tokens=16, eos_token_id=eos)
        assert got == expected


def test_without_pad_token_the_first_eos_fills_up(theirs: Any, ours: CausalLM, free: list[list[int]]) -> None:
    eos = [free[0][4], free[1][2]]
    settings = {"max_new_tokens": 16, "eos_token_id": eos, "pad_token_id": None}
    got, expected = both(theirs, ours, padded(ROWS), **settings)
    assert got == expected


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.7])
def test_repetition_penalty_counts_prompt_and_output_but_no_padding(
    theirs: Any, ours: CausalLM, free: list[list[int]], penalty: float
) -> None:
    for pad in (PAD, free[1][0], free[2][1]):  # pad tokens that would be chosen show whether padding counts
        batch = padded(ROWS)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
        settings = {"max_new_tokens": 16, "repetition_penalty": penalty, "pad_token_id": pad}
        got, expected = both(theirs, ours, batch, **settings)
        assert got == expected


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 6}, {"min_length": 13}, {"min_new_tokens": 0}])
def test_minimum_lengths(theirs: Any, ours: CausalLM, free: list[list[int]], minimum: dict[str, int]) -> None:
    settings = {"max_new_tokens": 16, "eos_token_id": [free[0][1], free[1][3], free[2][8]], **minimum}
    got, expected = both(theirs, ours, padded(ROWS), **settings)
    assert got == expected


def test_max_length_counts_prompt_and_padding(theirs: Any, ours: CausalLM) -> None:
    got, expected = both(theirs, ours, padded(ROWS), max_length=12)
    assert got == expected and len(got[0]) == 12
    with pytest.raises(ParameterError, match="the prompt has 7 tokens and max_length is 7"):
        ours.generate(ONE, max_length=7)


def test_twenty_new_tokens_by_default_with_a_warning(theirs: Any, ours: CausalLM) -> None:
    with pytest.warns(UserWarning, match="20 new tokens"):
        got = ours.generate(ONE)
    with pytest.warns(UserWarning, match="max_length"):
        expected = theirs.generate(ONE)
    assert got.tolist() == expected.tolist() and got.shape == (1, 27)


def test_it_ends_with_the_context_and_says_so(ours: CausalLM, caplog: pytest.LogCaptureFixture) -> None:
    out = ours.generate(torch.ones(1, 250, dtype=torch.long), max_new_tokens=100)
    assert out.shape == (1, 256)
    assert "context of 256 tokens" in caplog.text
    with pytest.raises(ParameterError, match="256 tokens.*max_model_len 256"):
        ours.generate(torch.ones(1, 256, dtype=torch.long), max_new_tokens=1)


def test_a_mapping_keywords_and_bos_alone(theirs: Any, ours: CausalLM, free: list[list[int]]) -> None:
    batch = padded(ROWS)
    assert ours.generate(batch, max_new_tokens=16)[:, 7:].tolist() == free
    assert ours.generate(input_ids=ONE, max_new_tokens=16)[0, 7:].tolist() == free[0]
    assert ours.generate(max_new_tokens=8).tolist() == theirs.generate(max_new_tokens=8).tolist()


def test_padding_is_seen_without_a_mask(theirs: Any, ours: CausalLM, free: list[list[int]]) -> None:
    ids = padded(ROWS)["input_ids"]
    assert ours.generate(ids, max_new_tokens=16)[:, 7:].tolist() == free
    got, expected = both(theirs, ours, {"inputs": ids}, max_new_tokens=16, eos_token_id=free[0][5])
    assert got == expected


@pytest.mark.parametrize("pad", [None, 5])
def test_a_batch_whose_padding_cannot_be_seen_warns(
    theirs: Any, ours: CausalLM, caplog: pytest.LogCaptureFixture, pad: int | None
) -> None:
    inputs = {"inputs": padded(ROWS)["input_ids"]}
    with caplog.at_level(logging.WARNING):
        got, expected = both(theirs, ours, inputs, max_new_tokens=8, pad_token_id=pad, eos_token_id=5)
    assert got == expected
    assert "without attention_mask" in caplog.text


def test_settings_come_from_arguments_then_the_given_config_then_the_models(ours: CausalLM) -> None:
    from transformers import GenerationConfig as TheirConfig

    ours.generation_config.max_new_tokens = 3
    assert ours.generate(ONE).shape == (1, 10)
    assert ours.generate(ONE, GenerationConfig(max_new_tokens=4)).shape == (1, 11)
    assert ours.generate(ONE, generation_config=TheirConfig(max_new_tokens=5)).shape == (1, 12)
    assert ours.generate(ONE, GenerationConfig(max_new_tokens=4), max_new_tokens=6).shape == (1, 13)


def test_sampling_is_repeatable_by_manual_seed(ours: CausalLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "temperature": 1.5}

    def draw(seed: int, **changes: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        rows: list[list[int]] = ours.generate(**padded(ROWS), **{**settings, **changes}).tolist()
        return rows

    assert draw(3) == draw(3) != draw(4)
    several = draw(3, num_return_sequences=3)
    assert len(several) == 9 and [row[:7] for row in several[:3]] == [several[0][:7]] * 3
    assert len({tuple(row) for row in several[:3]}) == 3


def test_sampling_keeps_to_the_truncation(ours: CausalLM, free: list[list[int]]) -> None:
    batch = padded(ROWS)
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        out = ours.generate(batch, max_new_tokens=16, do_sample=True, **one)
        assert out[:, 7:].tolist() == free, one


def test_top_k_is_50_by_default(ours: CausalLM) -> None:
    logits = ours(ONE).logits[0, -1]
    best = set(logits.topk(50).indices.tolist())
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0}
    out = ours.generate(ONE, num_return_sequences=100, **settings)
    assert set(out[:, -1].tolist()) <= best
    out = ours.generate(ONE, num_return_sequences=100, top_k=0, **settings)
    assert not set(out[:, -1].tolist()) <= best


class Bytes:
    """A tokenizer whose ids are the characters "0", "1", ... from U+0030 on."""

    def stream(self, *, skip_special_tokens: bool) -> Bytes:
        assert skip_special_tokens is False
        return self

    def push(self, token_id: int) -> str:
        return chr(0x30 + token_id)


def test_stop_strings_end_a_row_behind_their_token(ours: CausalLM, free: list[list[int]]) -> None:
    text = ["".join(chr(0x30 + i) for i in row) for row in free]
    stop = [text[0][3:6], text[1][7:9]]
    out = ours.generate(**padded(ROWS), max_new_tokens=16, stop_strings=stop, tokenizer=Bytes())
    ends = [min(e for s in stop if (e := t.find(s) + len(s)) >= len(s)) for t in text[:2]]
    assert out[0, 7 : 7 + ends[0]].tolist() == free[0][: ends[0]] and set(out[0, 7 + ends[0] :].tolist()) <= {
        PAD
    }
    assert out[1, 7 : 7 + ends[1]].tolist() == free[1][: ends[1]]


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there(
    ours: CausalLM, free: list[list[int]]
) -> None:
    last, first = chr(0x30 + ROWS[0][-1]), chr(0x30 + free[0][0])
    out = ours.generate(ONE, max_new_tokens=16, stop_strings=last + first, tokenizer=Bytes())
    assert out.shape == (1, 8)
    inside = "".join(chr(0x30 + i) for i in ROWS[0][1:4])
    assert ours.generate(ONE, max_new_tokens=16, stop_strings=[inside], tokenizer=Bytes()).shape == (1, 23)


class Recorder:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_what_transformers_gives_it(theirs: Any, ours: CausalLM) -> None:
    recorded, expected = Recorder(), Recorder()
    ours.generate(ONE, max_new_tokens=5, streamer=recorded)
    theirs.generate(ONE, max_new_tokens=5, streamer=expected)
    assert recorded.got == expected.got
    with pytest.raises(UnsupportedError, match="one sequence, not 3"):
        ours.generate(**padded(ROWS), max_new_tokens=5, streamer=recorded)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_beams": 4}, UnsupportedError, "num_beams=4"),
        ({"return_dict_in_generate": True}, UnsupportedError, "return_dict_in_generate=True"),
        ({"logits_processor": [1]}, UnsupportedError, "logits_processor"),
        ({"use_cache": False}, UnsupportedError, "use_cache=False"),
        ({"cache_implementation": "static"}, UnsupportedError, "cache_implementation='static'"),
        ({"no_repeat_ngram_size": 2}, UnsupportedError, "no_repeat_ngram_size=2"),
        ({"position_ids": ONE}, UnsupportedError, "position_ids"),
        ({"max_token": 4}, ParameterError, "'max_token': did you mean 'max_"),
        ({"pixel_values": ONE}, ParameterError, "'pixel_values'"),
        ({"max_new_tokens": 0}, ParameterError, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": -1}, ParameterError, "min_new_tokens must be at least 0"),
        ({"num_return_sequences": 2}, ParameterError, "num_return_sequences is 2"),
        ({"do_sample": True, "temperature": 0.0}, ParameterError, "temperature must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, ParameterError, "top_p"),
        ({"repetition_penalty": 0.0}, ParameterError, "repetition_penalty"),
        ({"stop_strings": "a"}, ParameterError, "stop_strings need"),
        ({"input_ids": ONE}, ParameterError, "not both"),
        ({"attention_mask": torch.zeros(1, 7)}, ParameterError, "a row has no tokens"),
        ({"generation_config": 3}, ParameterError, "got int"),
        ({"eos_token_id": "a"}, ParameterError, "eos_token_id must be a token id or a list of them, got 'a'"),
        ({"eos_token_id": [1, None]}, ParameterError, r"eos_token_id must be .* got \[1, None\]"),
        ({"pad_token_id": "a"}, ParameterError, "pad_token_id must be a token id, got 'a'"),
        ({"max_new_tokens": "5"}, ParameterError, "max_new_tokens must be an integer, got '5'"),
        ({"temperature": "hot"}, ParameterError, "temperature must be a number, got 'hot'"),
        ({"do_sample": "yes"}, ParameterError, "do_sample must be True or False, got 'yes'"),
        ({"stop_strings": 3}, ParameterError, "stop_strings must be a string or a list of strings, got 3"),
    ],
)
def test_generate_refuses_by_name(
    ours: CausalLM, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours.generate(ONE, **{"max_new_tokens": 4, **settings})


def test_end_ids_as_a_tensor(ours: CausalLM, free: list[list[int]]) -> None:
    first = torch.tensor(free[0][3])
    for eos in (first, first[None], [int(first)]):
        out = ours.generate(ONE, max_new_tokens=16, eos_token_id=eos)
        assert out[0, 7:].tolist() == free[0][: free[0].index(int(first)) + 1]


def test_inputs_that_are_no_prompt_are_refused(ours: CausalLM) -> None:
    with pytest.raises(ParameterError, match="must be a tensor"):
        ours.generate([[1, 2]], max_new_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="token_type_ids"):
        ours.generate({"input_ids": ONE, "token_type_ids": ONE}, max_new_tokens=2)
    with pytest.raises(ParameterError, match="no input_ids"):
        ours.generate({"attention_mask": ONE}, max_new_tokens=2)
    ours.generation_config.bos_token_id = None
    with pytest.raises(ParameterError, match="no bos_token_id"):
        ours.generate(max_new_tokens=2)


def test_settings_without_effect_are_taken(ours: CausalLM, free: list[list[int]]) -> None:
    out = ours.generate(ONE, max_new_tokens=16, num_beams=1, use_cache=True, length_penalty=1.0, top_h=None)
    assert out[0, 7:].tolist() == free[0]


def test_a_refused_setting_of_the_checkpoint_is_told_on_use(ours: CausalLM) -> None:
    ours.generation_config = GenerationConfig.from_dict({"num_beams": 3, "transformers_version": "4"})
    with pytest.raises(UnsupportedError, match="num_beams=3"):
        ours.generate(ONE, max_new_tokens=1)
    assert ours.generate(ONE, max_new_tokens=1, num_beams=1).shape == (1, 8)


def test_sampling_settings_without_sampling_warn(ours: CausalLM, caplog: pytest.LogCaptureFixture) -> None:
    ours.generate(ONE, max_new_tokens=1, temperature=0.5)
    assert "not used: temperature" in caplog.text


def test_a_minimum_above_the_maximum_warns(ours: CausalLM) -> None:
    with pytest.warns(UserWarning, match="at least 9 new tokens"):
        assert ours.generate(ONE, max_new_tokens=4, min_new_tokens=9).shape == (1, 11)


# -- the rest of the surface


def test_config_shows_transformers_names() -> None:
    for make in (hf_llama, hf_llama4):
        reference = make(eos_token_id=[2, 3], rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        model = CausalLM(puna_twin(reference), name_or_path="here")
        expected = reference.config.to_dict()
        values = model.config.to_dict()
        ours_only = {"name_or_path", "architectures", "dtype"}
        for name in values.keys() & expected.keys() - ours_only - {"rope_parameters"}:
            assert values[name] == expected[name], name
        assert model.config.rope_parameters["rope_theta"] == 5e5
        assert model.config.eos_token_id == [2, 3] and model.config.torch_dtype == torch.float32
        assert model.config.name_or_path == "here" and model.config.get_text_config() is not None
    with pytest.raises(AttributeError, match="no 'hidden_sizes'"):
        _ = model.config.hidden_sizes


def test_counts_dtype_and_moves(theirs: Any, ours: CausalLM) -> None:
    assert ours.num_parameters() == theirs.num_parameters() == sum(p.numel() for p in ours.parameters())
    assert ours.num_parameters(only_trainable=True) == 0
    assert ours.get_memory_footprint() >= 4 * ours.num_parameters()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.get_input_embeddings().weight.shape == (96, 64)
    assert ours.get_output_embeddings() is ours.lm_head
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert ours.to(torch.bfloat16).dtype == torch.bfloat16
    assert ours.eval() is ours and not ours.training


def test_quantised_weights_count_by_their_values(theirs: Any, ours: CausalLM) -> None:
    import gguf

    name = "model.layers.0.self_attn.q_proj.weight"
    packed = gguf.quants.quantize(ours.state_dict()[name].numpy(), gguf.GGMLQuantizationType.Q8_0)
    swap_in(ours.llama, name, QuantTensor(torch.from_numpy(packed), GGMLType.Q8_0))
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters() == sum(p.numel() for p in ours.parameters()) + 64 * 64
    torch.testing.assert_close(ours(ONE).logits, theirs(ONE).logits.detach(), atol=0.1, rtol=0.1)


def test_tied_embeddings_are_the_head() -> None:
    reference = hf_llama(tie_word_embeddings=True)
    model = CausalLM(puna_twin(reference))
    assert model.get_output_embeddings() is model.get_input_embeddings()
    assert model.num_parameters() == reference.num_parameters()


def test_generation_config_is_typed() -> None:
    config = GenerationConfig.from_dict({"eos_token_id": [3, 4], "temperature": 0.6, "num_beams": 1})
    assert config.to_dict() == {"eos_token_id": [3, 4], "temperature": 0.6}
    with pytest.raises(AttributeError):
        config.num_beams = 4  # type: ignore[attr-defined]
