"""Models from every format through the door: golden ids, loading settings, Transformers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna import AutoModelForCausalLM, AutoTokenizer
from puna.errors import ModelNotFoundError, ParameterError, UnsupportedError
from tiny_chat import END, EOT, save_chat_model

PROMPTS = ["Once upon a time", "a llama said hello to", "why"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM as Theirs

    return Theirs.from_pretrained(folder)


@pytest.mark.parametrize("place", ["hf", "meta", "gguf", "gguf/stories260k-f32.gguf"])
def test_the_golden_story(stories: Path, place: str) -> None:
    golden = json.loads((stories / "golden_ids.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(stories / place)
    model = AutoModelForCausalLM.from_pretrained(stories / place)
    inputs = tokenizer("", return_tensors="pt")
    assert inputs.input_ids.tolist() == [[1]]
    outputs = model.generate(**inputs, max_new_tokens=256)
    assert outputs.tolist() == [golden]
    expected = (stories / "golden.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(outputs[0], skip_special_tokens=True).strip() == expected.strip()
    assert model.generation_config.eos_token_id in (2, [2])


def test_a_padded_batch_of_texts_as_transformers_continues_it(folder: Path, theirs: Any) -> None:
    from transformers import AutoTokenizer as TheirTokenizer

    settings: dict[str, Any] = {"max_new_tokens": 24, "repetition_penalty": 1.2, "min_new_tokens": 3}
    rows = []
    for tokenizer, model in (
        (AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)),
        (TheirTokenizer.from_pretrained(folder), theirs),
    ):
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        outputs = model.generate(**batch, **settings, pad_token_id=tokenizer.pad_token_id)
        rows.append((outputs.tolist(), tokenizer.batch_decode(outputs, skip_special_tokens=True)))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("stop", [" named", "re was", ["zebra", "little girl"], "time, th", ["a", "park"]])
def test_stop_strings_as_transformers_stops_at_them(stories: Path, stop: str | list[str]) -> None:
    from transformers import AutoModelForCausalLM as TheirModel
    from transformers import AutoTokenizer as TheirTokenizer

    rows = []
    for tokenizers, models in ((AutoTokenizer, AutoModelForCausalLM), (TheirTokenizer, TheirModel)):
        tokenizer, model = tokenizers.from_pretrained(stories / "hf"), models.from_pretrained(stories / "hf")
        prompt = tokenizer("Once upon a", return_tensors="pt")
        outputs = model.generate(**prompt, max_new_tokens=30, stop_strings=stop, tokenizer=tokenizer)
        rows.append(outputs.tolist())
    assert rows[0] == rows[1] and len(rows[0][0]) < 34


def test_transformers_own_streamer_prints_the_text(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(stories / "hf")
    model = AutoModelForCausalLM.from_pretrained(stories / "hf")
    prompt = tokenizer("Once upon", return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    outputs = model.generate(**prompt, max_new_tokens=40, streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(outputs[0], skip_special_tokens=True) + "\n"


def test_the_checkpoints_generation_config_is_the_models(folder: Path, theirs: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids([EOT, END])
    assert model.generation_config.eos_token_id == theirs.generation_config.eos_token_id == ends
    assert model.config.vocab_size == len(tokenizer) and model.name_or_path == str(folder)


def test_dtypes(folder: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="auto", torch_dtype=torch.bfloat16).dtype == torch.float32
    for name in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        model = load(folder, torch_dtype=name)
        assert {p.dtype for p in model.parameters()} == {
            torch.bfloat16
        } and model.config.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", None, torch.device("cpu"), {"": "cpu"}, "auto"])
def test_devices(folder: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    expected = torch.accelerator.current_accelerator() if device_map == "auto" else None
    assert model.device.type == (expected or torch.device("cpu")).type


def test_settings_without_effect_are_taken(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        low_cpu_mem_usage=True,
        attn_implementation="sdpa",
        trust_remote_code=False,
        quantization_config=None,
        revision="main",
    )
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config="),
        ({"load_in_4bit": True}, UnsupportedError, "load_in_4bit=True"),
        (
            {"attn_implementation": "flash_attention_2"},
            UnsupportedError,
            "attn_implementation='flash_attention_2'",
        ),
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=True"),
        ({"max_memory": {0: "1GB"}}, UnsupportedError, "max_memory"),
        ({"device_map": "balanced"}, UnsupportedError, "device_map='balanced'"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, UnsupportedError, "one device"),
        ({"device_map": "gpu0"}, ParameterError, "device_map must be .* got 'gpu0'"),
        ({"dtype": "int8"}, ParameterError, "dtype must be .* got 'int8'"),
        ({"dtype": {"": "float32"}}, ParameterError, "dtype must be"),
        ({"device": "cpu"}, ParameterError, "has no parameter 'device'"),
    ],
)
def test_loading_refuses_by_name(
    folder: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **settings)


def test_use_safetensors_says_which_files_are_read(folder: Path, stories: Path, tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    head = load(folder, use_safetensors=True).state_dict()["lm_head.weight"]
    with pytest.raises(ModelNotFoundError, match="no weights: looked for pytorch_model.bin, .*index.json$"):
        load(folder, use_safetensors=False)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            state = {name: -tensor for name, tensor in load_file(file).items()}
            torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / file.name).symlink_to(file)
    for choice, expected in ((None, head), (True, head), (False, -head)):
        assert torch.equal(load(tmp_path, use_safetensors=choice).state_dict()["lm_head.weight"], expected)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ModelNotFoundError, match="looked for model.safetensors, model.safetensors.index.json$"
    ):
        load(tmp_path, use_safetensors=True)
    for place in ("meta", "gguf", "gguf/stories260k-f32.gguf"):
        with pytest.raises(ModelNotFoundError, match="this model is not in safetensors files"):
            load(stories / place, use_safetensors=True)
    with pytest.raises(ParameterError, match="use_safetensors must be True, False or None, got 'yes'"):
        load(folder, use_safetensors="yes")  # type: ignore[arg-type]


def test_names_of_the_hub_are_refused_with_advice() -> None:
    with pytest.raises(
        ModelNotFoundError, match="'meta-llama/Llama-3.3-70B-Instruct'.*later release.*'cria'"
    ):
        AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.3-70B-Instruct")
    with pytest.raises(UnsupportedError, match="AutoModelForCausalLM.from_pretrained"):
        AutoModelForCausalLM()


def test_meta_checkpoints_end_where_their_tokenizer_says(stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories / "meta")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, [2])
    for file in (stories / "meta").iterdir():
        if file.name != "tokenizer.model":
            (tmp_path / file.name).symlink_to(file)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert alone.generation_config.eos_token_id is None
