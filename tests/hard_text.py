"""Texts that tokenizers get wrong, strategies that look for more, a writer of vocabulary-only GGUF files."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter
from hypothesis import strategies as st

HARD_TEXTS = [
    "",
    " ",
    "  ",
    "   leading, trailing   ",
    "\n",
    "\n\n\n \n\t\r\n \r \x0b\x0c",
    "a\n\n\n  b\n   \n",
    "\t\tdef f(x):\n\t    return {'a': [1, 2.5e-10], \"b\": x**2}  # done\n\n\n",
    "I'm we'LL they'Re it'S 'tis ' 's 'S O'Neill \u017f'\u017f k'\u212a",
    (
        "1 12 123 1234 12345 1234567890123456789 3.14159 1,000,000 \u0663\u0664\u0665\u0666 \u00b2"
        "\u00bd\u2167 0x1F"
    ),
    "Hello, world!!! ... ??!?! --- ___ /// \\\\ <<>> (([[{{}}]]))",
    "https://example.com/a/b?c=d&e=%20f#g user@example.com C:\\path\\file.txt",
    (
        "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m A\u030angstro\u0308m \u1e9b\u0323 "
        "\ufb01 \u01c5\u01f2"
    ),
    (
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u30ac"
        "\u304b\u3099 \u20bb7\U00020bb7\u91ce\u5bb6"
    ),
    (
        "\u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u05e9\u05b8\u05dc\u05d5\u05b9\u05dd \u200f"
        "x\u200e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"
    ),
    (
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd \u1019"
        "\u103c\u1014\u103a\u1019\u102c"
    ),
    (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1f5\U0001f1ea\U0001f3f4"
        "\U000e0067\U000e0062\U000e007f \U0001f44d\U0001f3fd\u2764\ufe0f\U0001f999"
    ),
    (
        "\u0000\u0001\u0007\u001b[31m\u007f\u0080\u0085\u009f\u00a0\u00ad\u1680\u180e\u2000\u2003"
        "\u2028\u2029\u202f\u205f\u3000\ufeff"
    ),
    "\ue000\uf8ff\ufdd0\ufffd\ufffe\uffff\U0010ffff\U000f0000 \u0378",
    "z\u0351\u036b\u0343\u036aa\u0302\u0301\u0308\u0327l\u0334\u0321g\u0337o\u0338 " + "e" + "\u0301" * 40,
    "\u2581\u2581a \u2581 \u2581b\u2581",
    "<s>x</s><unk><0x41><0x0A> <|eot_id|><|begin_of_text|>[INST] <<SYS>> <|eot|>",
    "camelCaseHTTPServer XMLHttpRequest snake_case_name SCREAMING aB1c2D3 don'T",
    "a" * 300 + " " * 300 + "b" + "\n" * 100 + "=" * 200 + "ab" * 150,
]


def random_letters(count: int) -> str:
    """Return one very long word."""
    return "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=count))


LONG_WORDS = {
    "one letter": "a" * 200_000,
    "spaces": " " * 200_000,
    "letters": random_letters(200_000),
    "emoji": "\U0001f999" * 50_000,
}

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
word_text = st.lists(
    st.one_of(
        st.sampled_from(HARD_TEXTS),
        st.sampled_from(
            [" ", "  ", "\n", "\t", "'s", "'LL", "1", "123", "The", " the", "\u0301", "\u200d", "\u2581"]
        ),
        any_text,
    ),
    max_size=12,
).map("".join)


def write_gguf(path: Path, keys: Mapping[str, Any]) -> None:
    """Write a GGUF file with these keys and no tensors."""
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
