"""Hold the chat formats of the Llama models, for checkpoints that come without a chat template.

Each is a jinja text of our own that writes, byte for byte, what the model's official template writes (Llama
2, 3, 3.1, 3.2 and 4 as published on the Hugging Face hub; 3.3 is taken to use 3.1's). Without a date, 3.1
writes a fixed one and 3.2 today's. They take the official variables: tools, custom_tools,
tools_in_user_message, builtin_tools (3.1 only), date_string. Where an official template would leave tools out
without a word, ours refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_TOOLS = """
{%- if tools %}{{ raise_exception("this chat format has no tools") }}{% endif %}
{%- if messages | selectattr("tool_calls", "defined") | list %}
  {{- raise_exception("this chat format has no tool calls") }}
{%- endif %}
"""

LLAMA2 = (
    _NO_TOOLS
    + """
{%- set system, turns = "", messages %}
{%- if messages[0].role == "system" %}
  {%- set system = "<<SYS>>\\n" + messages[0].content + "\\n<</SYS>>\\n\\n" %}
  {%- set turns = messages[1:] %}
{%- endif %}
{%- if not turns %}{{ raise_exception("there is no user message") }}{% endif %}
{%- for message in turns %}
  {%- if message.role != loop.cycle("user", "assistant") %}
    {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
  {%- endif %}
  {%- if message.role == "user" %}
    {{- bos_token + "[INST] " + ((system if loop.first else "") + message.content).strip() + " [/INST]" }}
  {%- else %}
    {{- " " + message.content.strip() + " " + eos_token }}
  {%- endif %}
{%- endfor %}
"""
)

LLAMA3 = (
    _NO_TOOLS
    + """
{{- bos_token }}
{%- for message in messages %}
  {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
  {{- message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
"""
)

_HEADERS_3 = """
{%- macro header(role) %}{{ "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}{% endmacro %}
"""

_HEADERS_4 = """
{%- macro header(role) %}{{ "<|header_start|>" + role + "<|header_end|>\\n\\n" }}{% endmacro %}
"""

# How Llama 3.1 and later are told of tools. The missing spaces after full stops belong to the protocol.
_TOOL_MACROS = """
{%- macro list_tools(tools) %}
  {{- 'Respond in the format {"name": function name, "parameters": ' }}
  {{- "dictionary of argument name and its value}.Do not use variables.\\n\\n" }}
  {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endmacro %}

{%- macro tools_for_system(tools) %}
  {{- "You have access to the following functions. To call a function, please respond with JSON " }}
  {{- "for a function call." + list_tools(tools) }}
{%- endmacro %}

{%- macro tools_for_user(tools) %}
  {{- "Given the following functions, please respond with a JSON for a function call with its proper " }}
  {{- "arguments that best answers the given prompt.\\n\\n" + list_tools(tools) }}
{%- endmacro %}

{%- macro json_call(function) %}
  {{- '{"name": "' + function.name + '", "parameters": ' + function.arguments | tojson + "}" }}
{%- endmacro %}
"""

_SETTINGS = """
{{- bos_token }}
{%- set tools = custom_tools if custom_tools is defined else tools %}
{%- set tools_in_user_message = tools_in_user_message | default(true) %}
{%- set system, turns = none, messages %}
{%- if messages[0].role == "system" %}
  {%- set system, turns = messages[0].content | trim, messages[1:] %}
{%- endif %}
{%- if tools is not none and tools_in_user_message and not turns %}
  {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
"""

_SYSTEM_3 = """
{{- header("system") }}
{%- if tools is not none or builtin_tools is defined %}{{ "Environment: ipython\\n" }}{% endif %}
{%- if builtin_tools is defined %}
  {{- "Tools: " + builtin_tools | reject("equalto", "code_interpreter") | join(", ") + "\\n\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}{{ tools_for_system(tools) }}{% endif %}
{{- (system or "") + "<|eot_id|>" }}
"""

_TURNS_3 = """
{%- if tools is not none and tools_in_user_message %}
  {{- header("user") + tools_for_user(tools) + turns[0].content | trim + "<|eot_id|>" }}
  {%- set turns = turns[1:] %}
{%- endif %}
{%- for message in turns %}
  {%- if message.tool_calls is defined %}
    {%- if message.tool_calls | length != 1 %}
      {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- endif %}
    {%- set function = message.tool_calls[0].function %}
    {{- header("assistant") }}
    {%- if builtin_tools is defined and function.name in builtin_tools %}
      {{- "<|python_tag|>" + function.name + ".call(" }}
      {%- for name, value in function.arguments.items() %}
        {{- name ~ '="' ~ value ~ '"' ~ ("" if loop.last else ", ") }}
      {%- endfor %}
      {{- ")" }}
    {%- else %}
      {{- json_call(function) }}
    {%- endif %}
    {{- "<|eom_id|>" if builtin_tools is defined else "<|eot_id|>" }}
  {%- elif message.role in ("tool", "ipython") %}
    {{- header("ipython") + message.content | tojson + "<|eot_id|>" }}
  {%- else %}
    {{- header(message.role) + message.content | trim + "<|eot_id|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header("assistant") }}{% endif %}
"""

_FIXED_DATE = '{%- set date_string = date_string | default("26 Jul 2024") %}'
_TODAY = '{%- set date_string = date_string | default(strftime_now("%d %b %Y")) %}'
_NO_BUILTIN_TOOLS = """
{%- if builtin_tools is defined %}{{ raise_exception("this chat format has no builtin_tools") }}{% endif %}
"""

_LLAMA3_1_PARTS = _HEADERS_3 + _TOOL_MACROS + _SETTINGS + _SYSTEM_3 + _TURNS_3

LLAMA3_1 = _FIXED_DATE + _LLAMA3_1_PARTS
LLAMA3_2 = _TODAY + _NO_BUILTIN_TOOLS + _LLAMA3_1_PARTS

LLAMA4 = (
    _HEADERS_4
    + _TOOL_MACROS
    + _SETTINGS
    + """
{%- if system is not none %}
  {{- header("system") }}
  {%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
  {%- if tools is not none and not tools_in_user_message %}{{ tools_for_system(tools) }}{% endif %}
  {{- system + "<|eot|>" }}
{%- elif tools is not none and not tools_in_user_message %}
  {{- raise_exception("tools outside of the user message need a system message") }}
{%- endif %}
{%- if tools is not none and tools_in_user_message %}
  {{- header("user") + tools_for_user(tools) + turns[0].content | trim + "<|eot|>" }}
  {%- set turns = turns[1:] %}
{%- endif %}
{%- for message in turns %}
  {%- if message.tool_calls is defined %}
    {{- header("assistant") + "<|python_start|>" + message.content + "<|python_end|>" }}
    {%- for call in message.tool_calls %}{{ json_call(call.function) }}{% endfor %}
    {{- "<|eot|>" }}
  {%- elif message.role in ("tool", "ipython") %}
    {{- header("ipython") + message.content | tojson + "<|eot|>" }}
  {%- else %}
    {{- header(message.role) + message.content + "<|eot|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header("assistant") }}{% endif %}
"""
)

BUILT_IN: Mapping[str, str] = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3.1": LLAMA3_1,
    "llama3.2": LLAMA3_2,
    "llama3.3": LLAMA3_1,
    "llama4": LLAMA4,
}
