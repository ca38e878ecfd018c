"""The chat formats of Llama as templates of Ollama (Go's text/template), and which one a jinja text means.

A jinja template is taken to be one of these only if it writes the same text for conversations that use all
that the format has: with and without a system message, over several turns. Formats that write today's date
in words are left out, for Ollama's language cannot. BOS is the tokenizer's, here as in Ollama.
"""

from __future__ import annotations

from collections.abc import Mapping

from puna.errors import PunaError
from puna.text.chat import render_chat_text
from puna.text.tokenizer import Tokenizer

_LLAMA2 = """{{- $first := true }}
{{- range .Messages }}
{{- if eq .Role "user" }}{{ if not $first }}<s>{{ end }}[INST] {{ if and $first $.System }}<<SYS>>
{{ $.System }}
<</SYS>>

{{ end }}{{ .Content }} [/INST]{{ $first = false }}
{{- else if eq .Role "assistant" }} {{ .Content }} </s>
{{- end }}
{{- end }}"""

_LLAMA3 = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|eot_id|>{{ end }}
{{- if and $last (ne .Role "assistant") }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}"""

_LLAMA3_1 = """<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

{{ .System }}<|eot_id|>
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|eot_id|>{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}"""

_LLAMA4 = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}<|header_start|>{{ .Role }}<|header_end|>

{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|eot|>{{ end }}
{{- if and $last (ne .Role "assistant") }}<|header_start|>assistant<|header_end|>

{{ end }}
{{- end }}"""

GO_TEMPLATES: Mapping[str, str] = {
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3_1,
    "llama4": _LLAMA4,
}

_TURNS = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "One more.\nPlease."},
)
_PROBES = (_TURNS[:1], _TURNS, ({"role": "system", "content": "Be brief."}, *_TURNS))


def find_format(tokenizer: Tokenizer, template: str) -> str | None:
    """Return the name in `GO_TEMPLATES` of the format that a jinja template writes, None if it is another."""
    written = _written(tokenizer, template)
    if written is None:
        return None
    return next((name for name in GO_TEMPLATES if _written(tokenizer, name) == written), None)


def _written(tokenizer: Tokenizer, template: str) -> list[str] | None:
    try:
        return [render_chat_text(tokenizer, probe, template=template) for probe in _PROBES]
    except PunaError:  # a template that refuses a plain conversation is none of Llama's
        return None
