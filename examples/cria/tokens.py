"""cria's tokenizer: a byte-level BPE in Llama 3's form, learned from the corpus, and documents as token ids.

    python -m examples.cria.tokens FOLDER      # learn it and write the files

The files are the standard ones (tokenizer.json, tokenizer_config.json), with Llama 3's chat template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from examples.cria.corpus import Document, make_document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEED = 20250405
VOCAB_SIZE = 4096
SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{index}|>" for index in range(3, 8)),
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learn_tokenizer(documents: int) -> Tokenizer:
    """Learn the merges from that many training documents."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    bos = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def _texts(documents: int) -> Iterator[str]:
    for number in range(documents):
        document = make_document(number, SEED)
        if isinstance(document, str):
            yield document
        else:
            yield from (message.content for message in document)


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a document, and for each whether the model learns to predict it.

    All of a plain text is learned; of a chat, what the assistant says, with the token that ends its turn.
    """
    special = {name: token_id for name in SPECIALS if (token_id := tokenizer.token_to_id(name)) is not None}
    ids, learned = [special["<|begin_of_text|>"]], [False]
    if isinstance(document, str):
        text = tokenizer.encode(document, add_special_tokens=False).ids
        return [*ids, *text, special["<|end_of_text|>"]], [*learned, *[True] * (len(text) + 1)]
    newlines = tokenizer.encode("\n\n", add_special_tokens=False).ids
    for message in document:
        role = tokenizer.encode(message.role, add_special_tokens=False).ids
        header = [special["<|start_header_id|>"], *role, special["<|end_header_id|>"], *newlines]
        body = [*tokenizer.encode(message.content, add_special_tokens=False).ids, special["<|eot_id|>"]]
        ids += header + body
        learned += [False] * len(header) + [message.role == "assistant"] * len(body)
    return ids, learned


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(name)): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for name in SPECIALS
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "bos_token": "<|begin_of_text|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 2048,
            "pad_token": "<|finetune_right_pad_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|begin_of_text|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
            "pad_token_id": ids["<|finetune_right_pad_id|>"],
            "temperature": 0.3,
            "top_p": 0.9,
        },
    )


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Learn the tokenizer and write it."""
    write_tokenizer(learn_tokenizer(40_000), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
