"""save_pretrained: what is written loads again, here and in Transformers, and gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from puna import AutoModelForCausalLM, AutoTokenizer, LoraConfig, get_peft_model
from puna.errors import ParameterError, UnsupportedError


def test_what_was_saved_loads_here_and_in_transformers(stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories / "hf")
    tokenizer = AutoTokenizer.from_pretrained(stories / "hf")
    with torch.no_grad():
        model.llama.model.norm.weight.mul_(0.5)  # not what the folder holds
    tokenizer.pad_token = tokenizer.eos_token
    out = tmp_path / "saved"
    written = tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    assert str(out / "tokenizer_config.json") in written
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected)
    again = AutoTokenizer.from_pretrained(out)
    assert (again.pad_token, again("a b")["input_ids"]) == (
        tokenizer.eos_token,
        tokenizer("a b")["input_ids"],
    )
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_saves(stories: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(stories / "hf"), LoraConfig(r=2, init_lora_weights=False)
    )
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ids = torch.tensor([[1, 40, 50]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(ids).logits, merged(ids).logits)


def test_a_changed_template_is_written(stories: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories / "hf")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "t")
    assert AutoTokenizer.from_pretrained(tmp_path / "t").chat_template == tokenizer.chat_template


def test_what_cannot_be_saved_is_refused_by_name(stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories / "hf")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ParameterError, match="new or an empty folder"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UnsupportedError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(ParameterError, match="save_directory must be a path, not 5"):
        model.save_pretrained(5)  # type: ignore[arg-type]
    gguf = stories / "gguf" / "stories260k-f32.gguf"
    with pytest.raises(UnsupportedError, match="Hugging Face folder"):
        AutoModelForCausalLM.from_pretrained(gguf).save_pretrained(tmp_path / "x")
    with pytest.raises(UnsupportedError, match="Hugging Face folder"):
        AutoTokenizer.from_pretrained(gguf).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
