# SPDX-License-Identifier: Apache-2.0
"""A chat format as a Jinja template, for the files of other programs: Hugging Face folders and GGUF.

gemmakit itself writes conversations down by `gemma/chat.py`, where a format is data. Official checkpoints bring templates
of their own, which are carried on unchanged; this one is for weights that learnt to chat from a base without one.
"""

from __future__ import annotations

from gemma.chat import ChatFormat

_SYSTEM = {
    "fold": """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
""",
    "turn": "{%- set before = '' -%}\n{%- set turns = messages -%}\n",
}
_TURNS = """\
{%- for turn in turns -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {{- 'START' + role + '\\n' + (before if loop.first else '') -}}
    {%- if turn['content'] is string -%}
        {{- turn['content'] | trim -}}
    {%- else -%}
        {%- for part in turn['content'] -%}
            {{- 'IMAGE' if part['type'] == 'image' else part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- 'END\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'STARTmodel\\n' -}}
{%- endif -%}
"""


def jinja(format: ChatFormat) -> str:
    """The template; a system text goes where the format has it. Roles may be named as in Hugging Face ("assistant")."""
    text = "{{- bos_token -}}\n" + _SYSTEM[format.system] + _TURNS
    words = {"START": format.start_of_turn, "END": format.end_of_turn, "IMAGE": format.image or ""}
    for word, marker in words.items():
        text = text.replace(word, marker)
    return text
