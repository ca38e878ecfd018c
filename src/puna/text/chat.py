"""Turn chat messages into the prompt of a model: choose the template, render it, encode what it wrote.

The template is the one given, else the checkpoint's, else a built-in one where the vocabulary shows which.
Exactly one BOS stands at the front whatever template and tokenizer do, and nothing in a message becomes a
special token (see `content_marks`). Ids equal those of Transformers' `apply_chat_template(tokenize=True)`,
but for contents with special tokens in them and for templates that write no BOS. Knows no model.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import ParameterError, TemplateError, UnsupportedError
from puna.text.chat_messages import check_json, check_messages, check_tools
from puna.text.content_marks import ContentMarks, strings
from puna.text.formats import BUILT_IN
from puna.text.template import compile_template
from puna.text.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

_LLAMA4_TOKENS = {"<|header_start|>", "<|header_end|>", "<|eot|>"}
_LLAMA3_TOKENS = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
_LLAMA3_1_TOKENS = {"<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"}

_ROLE_NAMES = ("bos", "eos", "pad", "unk")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    template: str | None = None,
    chat_format: str | None = None,
    date: datetime.date | None = None,
    **variables: Any,
) -> list[int]:
    """Return the ids of a chat, with one BOS at the front.

    `template` is jinja text, or the name of one of the checkpoint's or of `BUILT_IN`; `chat_format` is a name
    of `BUILT_IN` only. `add_generation_prompt` opens the assistant's turn (by default, unless the final
    message is continued). `date` is what the template writes as today; without it, what the official ones
    take: today, or Llama 3.1's fixed date. `variables` are what the template asks for beyond these.

    Raises `ParameterError` for a message, tool or variable that is wrong, `TemplateError` when there is no
    template or it fails, `UnsupportedError` for images and for tools that the template has no place for.
    """
    text, marks = _render(
        tokenizer,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template=template,
        chat_format=chat_format,
        date=date,
        variables=variables,
    )
    parts = [part if isinstance(part, int) else marks.remove(part) for part in tokenizer.split_special(text)]
    return _with_one_bos(tokenizer, tokenizer.encode_parts(parts))


def render_chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    template: str | None = None,
    chat_format: str | None = None,
    date: datetime.date | None = None,
    **variables: Any,
) -> str:
    """Return the text that the template writes, for people to read; takes and raises what `encode_chat` does.

    Encoding this text is not safe: in it a special token that a user wrote looks like one of the template.
    """
    text, marks = _render(
        tokenizer,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        template=template,
        chat_format=chat_format,
        date=date,
        variables=variables,
    )
    return marks.remove(text)


def find_built_in(tokenizer: Tokenizer) -> str | None:
    """Return the name in `BUILT_IN` of the format that a vocabulary has the special tokens for, or None.

    Llama 2 is never found: its vocabulary has no special tokens for chat, and a base model has the same.
    """
    names = set(tokenizer.special_tokens)
    if names >= _LLAMA4_TOKENS:
        return "llama4"
    if names >= _LLAMA3_TOKENS:
        return "llama3.1" if names & _LLAMA3_1_TOKENS else "llama3"
    return None


def choose_template(
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat_format: str | None = None,
    has_tools: bool = False,
) -> str:
    """Return the jinja text to use; raise `TemplateError` saying what to do when there is none."""
    if template is not None and chat_format is not None:
        raise ParameterError("template and chat_format: give one of them")
    if template is not None:
        return tokenizer.chat_templates.get(template) or BUILT_IN.get(template, template)
    if chat_format is not None:
        if chat_format not in BUILT_IN:
            raise ParameterError(f"chat_format is {chat_format!r}; known are {', '.join(BUILT_IN)}")
        return BUILT_IN[chat_format]
    if has_tools and "tool_use" in tokenizer.chat_templates:
        return tokenizer.chat_templates["tool_use"]
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if tokenizer.chat_templates:
        raise TemplateError(f"name one of the model's templates: {', '.join(tokenizer.chat_templates)}")
    if name := find_built_in(tokenizer):
        return BUILT_IN[name]
    raise TemplateError(
        "the model has no chat template: give one with template=, or a built-in one with chat_format= "
        f"({', '.join(BUILT_IN)}); a base model continues plain text instead"
    )


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    template: str | None,
    chat_format: str | None,
    date: datetime.date | None,
    variables: Mapping[str, Any],
) -> tuple[str, ContentMarks]:
    """Return the rendered text, contents marked, and the marks."""
    if add_generation_prompt and continue_final_message:
        raise ParameterError("add_generation_prompt and continue_final_message exclude one another")
    inputs: dict[str, Any] = {"messages": check_messages(messages), "tools": check_tools(tools)}
    source = choose_template(
        tokenizer, template=template, chat_format=chat_format, has_tools=inputs["tools"] is not None
    )
    compiled = compile_template(source)
    settings = _special_names(tokenizer)
    settings["add_generation_prompt"] = (
        not continue_final_message if add_generation_prompt is None else add_generation_prompt
    )
    inputs |= _check_variables(variables, compiled.variables, reserved={*inputs, *settings})
    if inputs["tools"] is not None and "tools" not in compiled.variables:
        raise UnsupportedError("the chat template has no place for tools")
    if date is not None:
        inputs.setdefault("date_string", date.strftime("%d %b %Y"))
    marks = ContentMarks(tokenizer.special_tokens, "\n".join([source, *strings(inputs)]))
    marked = marks.apply(inputs)
    if continue_final_message:
        _mark_end(marked["messages"][-1], marks.end)
    text = compiled.render({**settings, **marked}, date=date)
    return (_cut_at_end(text, marks.end) if continue_final_message else text), marks


def _special_names(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return bos_token, eos_token and so on, as far as the vocabulary has them."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in _ROLE_NAMES}
    return {
        f"{name}_token": tokenizer.id_to_token(token_id)
        for name, token_id in ids.items()
        if token_id is not None
    }


def _check_variables(
    variables: Mapping[str, Any], known: frozenset[str], *, reserved: set[str]
) -> dict[str, Any]:
    for name in variables:
        if name in reserved or name == "strftime_now":
            raise ParameterError(f"{name} is not for the chat template's variables")
        if name not in known:
            raise ParameterError(f"the chat template has no variable {name!r}")
    checked: dict[str, Any] = check_json(variables, "variables")
    return checked


def _mark_end(message: dict[str, Any], end: str) -> None:
    if message["role"] != "assistant" or "tool_calls" in message:
        raise ParameterError(
            "continue_final_message: the final message must be the assistant's, without calls"
        )
    message["content"] += f"{end} "  # the space shows whether the template trims


def _cut_at_end(text: str, end: str) -> str:
    head, found, tail = text.rpartition(end)
    if not found:
        raise TemplateError("the chat template does not write the final message, so it cannot be continued")
    return head if tail.startswith(" ") else head.rstrip()


def _with_one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    count = next((index for index, token_id in enumerate(ids) if token_id != bos), len(ids))
    if count > 1:
        _logger.warning("the chat template writes %d BOS tokens at the front; one is kept", count)
    return [bos, *ids[count:]]
