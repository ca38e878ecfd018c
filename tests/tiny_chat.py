"""A tiny chat checkpoint in Hugging Face's files: a byte-level vocabulary with Llama 3's special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import hf_llama

BOS, END, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIALS = [BOS, END, PAD, "<|start_header_id|>", "<|end_header_id|>", EOT]
TEMPLATE = (
    "{{- bos_token }}{%- if date_string is defined %}{{ date_string }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_CORPUS = ["Once upon a time a llama said hello to the user and the assistant. system, be brief: why?"] * 3


def save_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json and its company as Transformers does; return the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pipeline: Any = Tokenizer(models.BPE(ignore_merges=True))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator(_CORPUS, trainer)
    pipeline.add_special_tokens(SPECIALS)
    bos = pipeline.token_to_id(BOS)
    pipeline.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline, bos_token=BOS, eos_token=EOT, model_max_length=256
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_chat_model(folder: Path) -> Path:
    """Write a whole random checkpoint, tokenizer and model; return the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(folder))
    model = hf_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    model.save_pretrained(folder)
    return folder
