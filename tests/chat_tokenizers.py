"""Tokenizers for chat tests: one token a byte, and the special tokens that the test wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import TokenizerParts

LLAMA2 = ("<s>", "</s>", "<unk>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3_1 = (*LLAMA3, "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")
LLAMA4 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|image|>",
    "<|step|>",
)


class _Bytes:
    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return list(text.encode())


def byte_tokenizer(
    specials: Sequence[str],
    *,
    templates: Mapping[str, str] | None = None,
    has_bos: bool = True,
    add_bos: bool = True,
) -> Tokenizer:
    """Return a tokenizer whose ids below 256 are bytes; the first two special tokens are BOS and EOS."""
    ids = {name: 256 + index for index, name in enumerate(specials)}
    parts = TokenizerParts(
        tokens=[f"<0x{byte:02X}>" for byte in range(256)] + list(specials),
        token_bytes=[bytes([byte]) for byte in range(256)] + [name.encode() for name in specials],
        encoder=_Bytes(),
        special_tokens=ids,
        bos_token_id=256 if has_bos else None,
        eos_token_id=257,
        prefix_ids=(256,) if add_bos else (),
        chat_templates=templates or {},
    )
    return Tokenizer(parts, Path("tokenizer"))


def split(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return ids as texts and, each alone, names of special tokens."""
    pieces: list[str] = []
    plain = bytearray()
    for token_id in [*ids, -1]:
        if 0 <= token_id < 256:
            plain.append(token_id)
            continue
        if plain:
            pieces.append(plain.decode())
            plain.clear()
        if token_id >= 0:
            pieces.append(tokenizer.id_to_token(token_id))
    return pieces
