# SPDX-License-Identifier: Apache-2.0
"""Finding calls in a model's text: what is one, what is a broken one, what is prose; and that it stays linear."""

import json
import re
import sys

import pytest

from gemma.gm.tools._calls import MAX_NESTING, Call, Malformed, find_call


@pytest.mark.parametrize(
    "text",
    [
        '{"tool_name": "calculator", "expression": "1+1"}',
        'I will look.\n{"tool_name": "calculator", "expression": "1+1"}\n',
        '```json\n{\n  "tool_name": "calculator",\n  "expression": "1+1"\n}\n```',
        '```tool_code\n{"tool_name": "calculator", "expression": "1+1"}\n```<end_of_turn>',
        'The set {1, 2} and {"answer": 4}: {"tool_name": "calculator", "expression": "1+1"}',
        '\\{a\\} is a set. {"tool_name": "calculator", "expression": "1+1"} [Tool result: 3]',
    ],
)
def test_a_call(text):
    assert find_call(text) == Call("calculator", {"expression": "1+1"})


def test_values_are_json_values_and_nothing_more():
    text = '{"tool_name": "t", "a": [1, 2.5, true, null], "b": {"c": "}{ \\" \\\\ \\u0041"}, "d": "__import__(\'os\')"}'
    found = find_call(text)
    assert found.arguments == {"a": [1, 2.5, True, None], "b": {"c": '}{ " \\ A'}, "d": "__import__('os')"}


def test_a_raw_newline_in_a_text_is_taken():
    assert find_call('{"tool_name": "t", "text": "one\ntwo"}').arguments == {"text": "one\ntwo"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        '{"answer": 42}',
        "{}",
        "{not json}",
        "f(x) = { x if x > 0",
        "calculator(expression='1+1')",
        "tool_name: calculator",
        "```python\nprint({'a': 1})\n```",
        '{"answer": [1, 2}',
        "} {",
    ],
)
def test_prose(text):
    assert find_call(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"tool_name": "calculator", "expression": "1+1"', "not complete"),
        ('{"tool_name": "calculator, "expression": "1+1"}', "not complete|not valid JSON"),
        ("{'tool_name': 'calculator', 'expression': '1+1'}", "double quotes"),
        ('{"tool_name": "calculator", expression: 1}', "not valid JSON: .*char"),
        ('{"tool_name": "calculator", "x": 1,}', "not valid JSON"),
        ('{"tool_name": "calculator", "x": NaN}', "NaN is not a JSON number"),
        ('{"tool_name": "calculator", "x": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"tool_name": 7}', "must be the name of a tool"),
        ('{"tool_name": ""}', "must be the name of a tool"),
        ('{"tool_name": ["a"]}', "must be the name of a tool"),
        ('{"tool_name": "a", "tool_name": "b"}', "stands twice"),
        ('{"tool_name": "a", "x": {"y": 1, "y": 2}}', "stands twice"),
        ('{"tool_calls": [{"tool_name": "a"}]}', "one flat JSON object"),
        ('{"tool_name": "a", "x": "' + "y" * 70_000 + '"}', "at most"),
        ('{"tool_name": "a", "x": ' + "[" * 40 + "]" * 40 + "}", "levels"),
        ('{"tool_name": "a", "x": ' + "[" * 100_000, "not complete"),
    ],
)
def test_broken_calls_say_what_is_wrong(text, reason):
    found = find_call(text)
    assert isinstance(found, Malformed)
    assert re.search(reason, found.reason), found.reason


def test_the_first_call_counts_and_others_are_noted():
    two = find_call('{"tool_name": "a", "x": 1} {"tool_name": "b"}')
    assert two == Call("a", {"x": 1}, more=True)
    assert isinstance(find_call('{"tool_name": 1} {"tool_name": "b"}'), Malformed)


def test_nesting_within_the_limit_is_read():
    deep = "[" * (MAX_NESTING - 1) + "]" * (MAX_NESTING - 1)
    assert find_call('{"tool_name": "a", "x": ' + deep + "}").arguments == {"x": json.loads(deep)}


HOSTILE = {
    "open braces": "{" * 200_000,
    "keys that never close": '{"a":' * 50_000,
    "keys that close": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "empty objects": "{}" * 100_000,
    "open strings": '{"' * 100_000,
    "quotes": '"' * 200_000,
    "backslashes": '{"' + "\\" * 200_000,
    "spaces": '{"tool_name"' + " " * 1_000_000,
    "brackets": "{[" * 100_000,
    "wanted key, never closed": '{"tool_name": ' * 20_000,
}


def events(text: str) -> int:
    """How many bytecode lines and calls the search makes: a clock that other processes do not disturb."""
    count = 0

    def tick(frame, event, argument):
        nonlocal count
        count += 1
        return tick

    sys.settrace(tick)
    try:
        find_call(text)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_ends_and_is_no_call(kind):
    assert not isinstance(find_call(HOSTILE[kind]), Call)


@pytest.mark.parametrize("kind", HOSTILE)
def test_work_grows_with_the_length_only(kind):
    text = HOSTILE[kind]
    short, long = events(text[:2000]), events(text[:8000])
    assert long <= 4 * short + 200  # four times the text; a quadratic search would need sixteen times the work
