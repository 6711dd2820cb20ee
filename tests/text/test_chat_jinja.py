# SPDX-License-Identifier: Apache-2.0
"""The Jinja form of a chat format says what `gemma.chat` says, rendered as Transformers renders it."""

import jinja2
import pytest

from gemma._chat_jinja import jinja
from gemma.chat import FORMATS, Turn, render

CHATS = [
    [("user", "Hi")],
    [("system", " Be brief.\n"), ("user", "Hi "), ("model", "Yes?"), ("user", "Why {{ x }}?")],
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system"])
@pytest.mark.parametrize("ask", [True, False])
def test_it_says_the_same(name, chat, ask):
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(jinja(FORMATS[name]))
    messages = [{"role": role.replace("model", "assistant"), "content": text} for role, text in chat]
    found = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=ask)
    assert found == render([Turn(*turn) for turn in chat], format=FORMATS[name], add_generation_prompt=ask)


def test_pictures_have_their_marker():
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(jinja(FORMATS["gemma3"]))
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    found = template.render(messages=[{"role": "user", "content": parts}], bos_token="<bos>")
    assert found == "<bos><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n"
