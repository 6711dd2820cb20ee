# SPDX-License-Identifier: Apache-2.0
"""Files of every kind and format to examples; broken and hostile rows become counted problems, never other errors."""

import base64
import io
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image

from gemma import gm
from gemma.chat import Turn
from gemma.errors import DataError, GemmaError
from gemma.gm.data import Completion, Conversation, Labelled, Preference, Rated, Text, _rows, read_examples

CHAT = Conversation((Turn("system", "Be brief."), Turn("user", "Hi"), Turn("model", "Hello")))
PLAIN = Conversation((Turn("user", "Hi"), Turn("model", "Hello")))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def picture():
    file = io.BytesIO()
    Image.new("RGB", (9, 5), (250, 10, 20)).save(file, "PNG")
    return file.getvalue()


MESSAGES = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
ANSWER = dict(role="assistant", content="Hello")
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

FORMS = {
    "messages": (dict(messages=[*MESSAGES, ANSWER]), "messages", CHAT),
    "parts": (
        dict(messages=[dict(role="user", content=[dict(type="text", text=" Hi ")]), ANSWER]),
        "messages",
        PLAIN,
    ),
    "sharegpt": (dict(conversations=SHARE, system="Be brief."), "sharegpt", CHAT),
    "alpaca": (dict(instruction="Hi", input="", output="Hello", system="Be brief."), "alpaca", CHAT),
    "alpaca with input and history": (
        dict(instruction="Add", context="1 2", response="3", history=[["a", "b"]]),
        "alpaca",
        Conversation((Turn("user", "a"), Turn("model", "b"), Turn("user", "Add\n\n1 2"), Turn("model", "3"))),
    ),
    "completion": (dict(prompt="1 + 1 =", completion=" 2"), "prompt_completion", Completion("1 + 1 =", " 2")),
    "completion of messages": (
        dict(prompt=[*MESSAGES, ANSWER, MESSAGES[1]], completion=[ANSWER]),
        "prompt_completion",
        Conversation((*CHAT.turns, *PLAIN.turns), mute=(2,)),
    ),
    "weights": (
        dict(messages=[MESSAGES[1], ANSWER | dict(weight=0), MESSAGES[1], ANSWER | dict(weight=1)]),
        "messages",
        Conversation((*PLAIN.turns, *PLAIN.turns), mute=(1,)),
    ),
    "preference": (
        dict(prompt="Hi", chosen="Hello", rejected="No"),
        "preference",
        Preference((Turn("user", "Hi"),), "Hello", "No"),
    ),
    "preference of messages": (
        dict(prompt=MESSAGES, chosen=[ANSWER], rejected=[dict(role="assistant", content="No")]),
        "preference",
        Preference(CHAT.turns[:2], "Hello", "No"),
    ),
    "preference, implicit prompt": (
        dict(chosen=[*MESSAGES, ANSWER], rejected=[*MESSAGES, dict(role="assistant", content="No")]),
        "preference",
        Preference(CHAT.turns[:2], "Hello", "No"),
    ),
    "preference, conversations": (
        dict(conversations=SHARE[:1], chosen=SHARE[1], rejected={"from": "gpt", "value": "No"}),
        "preference",
        Preference((Turn("user", "Hi"),), "Hello", "No"),
    ),
    "preference, marked text": (
        dict(chosen="\n\nHuman: Hi\n\nAssistant: Hello", rejected="\n\nHuman: Hi\n\nAssistant: No"),
        "preference",
        Preference((Turn("user", "Hi"),), "Hello", "No"),
    ),
    "kto": (dict(prompt="Hi", completion="Hello", label=True), "kto", Rated((Turn("user", "Hi"),), "Hello", True)),
    "kto of messages": (
        dict(messages=[*MESSAGES, ANSWER], label=False),
        "kto",
        Rated(CHAT.turns[:2], "Hello", False),
    ),
    "labelled": (dict(text="Fine.", label=1), "labelled", Labelled("Fine.", "1")),
    "text": (dict(text="Fine."), "text", Text("Fine.")),
    "tools": (
        dict(
            messages=[
                MESSAGES[1],
                dict(
                    role="assistant",
                    content=None,
                    tool_calls=[dict(function=dict(name="clock", arguments='{"zone": "UTC"}'))],
                ),
                dict(role="tool", content="12:00"),
                dict(role="tool", content="noon"),
                dict(role="assistant", content="Noon"),
            ],
            tools=[dict(type="function", function=dict(name="clock", description="The time."))],
        ),
        "messages",
        Conversation(
            (
                Turn("user", "Hi"),
                Turn("model", '{"tool_name": "clock", "zone": "UTC"}'),
                Turn("user", "[Tool result: 12:00]\n[Tool result: noon]"),
                Turn("model", "Noon"),
            ),
            tools=(dict(name="clock", description="The time."),),
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_formats_are_told_by_their_columns(tmp_path, form):
    row, format, wanted = FORMS[form]
    examples = read_examples(write(tmp_path / "rows.jsonl", [row | dict(id=7)] * 2))
    assert (examples.format, list(examples)) == (format, [wanted, wanted])
    assert examples.kind == {Preference: "preference", Rated: "kto", Labelled: "classification"}.get(
        type(wanted), "supervised"
    )


def test_kinds_of_files(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [dict(question='a,\n"b"', answer="ü"), dict(question="c", answer="d")]
    wanted = [Completion('a,\n"b"', "ü"), Completion("c", "d")]
    columns = dict(format="prompt_completion", prompt="question", completion="answer")
    (tmp_path / "a.json").write_text(" \n" + json.dumps(rows, indent=1))
    (tmp_path / "b.csv").write_text('\ufeffquestion,answer\n"a,\n""b""",ü\n\nc,d\n')
    (tmp_path / "c.tsv").write_text('question\tanswer\n"a,\n""b"""\tü\nc\td\n')
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    write(tmp_path / "e.jsonl", rows)
    (tmp_path / "f.json").write_text("\ufeff" + (tmp_path / "e.jsonl").read_text())
    for path in sorted(tmp_path.iterdir()):
        examples = read_examples(path, **columns)
        assert list(examples) == wanted, path
        assert list(examples[1:]) == wanted[1:] and examples[-1] == wanted[1]
    assert read_examples(tmp_path / "b.csv", **columns).where(1).endswith("b.csv:5")
    assert read_examples(tmp_path / "a.json", **columns).where(1).endswith("a.json:7")
    assert len(read_examples(sorted(tmp_path.iterdir()), limit=7, **columns)) == 7

    chats = dict(messages=[[dict(role="user", content="Hi"), ANSWER]], extra=[None])
    pq.write_table(pyarrow.table(chats), tmp_path / "chats.parquet")
    assert read_examples(tmp_path / "chats.parquet")[0] == PLAIN  # structs come back with all their keys
    text = tmp_path / "t.txt"
    text.write_text("one\ntwo\n\n \nthree\r\n")
    assert [e.text for e in read_examples(text)] == ["one", "two", "three"]
    assert [e.text for e in read_examples(text, sample_by="paragraph")] == ["one\ntwo", "three"]
    assert [e.text for e in read_examples(text, sample_by="document")] == ["one\ntwo\n\n \nthree"]


def test_images(tmp_path, picture):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(picture)
    path = str(tmp_path / "pics/a.png")
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    asked = [dict(type="image", image="pics/a.png"), dict(type="text", text="What?")]
    rows = [
        dict(messages=[dict(role="user", content=asked), ANSWER]),
        dict(messages=[dict(role="user", content="<image>What?"), ANSWER], images=["pics/a.png"]),
        dict(messages=[dict(role="user", content="What?"), ANSWER], image="pics/a.png"),
        dict(messages=[dict(role="user", content=[dict(type="image"), "What?"]), ANSWER], images=["pics/a.png"]),
        dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url=url)), "What?"]), ANSWER]),
    ]
    examples = list(read_examples(write(tmp_path / "rows.jsonl", rows), format="messages"))
    turns = (Turn("user", "<start_of_image>What?"), Turn("model", "Hello"))
    assert examples == [Conversation(turns, (path,))] * 4 + [Conversation(turns, (picture,))]
    (tmp_path / "pics/b.png").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pics/pipe.png")
    refused = {"pics/b.png": "expected a PNG", "pics/c.png": "No such file", "https://x/a.png": "web"}
    refused |= {"pics": "a folder, a pipe", "pics/pipe.png": "a folder, a pipe", "\ud800.png": "lone surrogate"}
    for bad, why in refused.items():
        with pytest.raises(DataError, match=why):
            read_examples(write(tmp_path / "bad.jsonl", [rows[2] | dict(image=bad)]))
    for text in (dict(chosen="a", rejected="b"), dict(completion="a", label=True)):
        with pytest.raises(DataError, match="images: they are read in conversations and completions only"):
            read_examples(write(tmp_path / "bad.jsonl", [dict(prompt="p", images=["pics/a.png"]) | text]))
    with pytest.raises(DataError, match="1 images, but 2 image markers"):
        read_examples(
            write(
                tmp_path / "bad.jsonl", [rows[1] | dict(messages=[dict(role="user", content="<image><image>"), ANSWER])]
            )
        )


def test_bad_rows_are_listed_with_their_lines(tmp_path):
    good = json.dumps(dict(messages=[MESSAGES[1], ANSWER]))
    bad = [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"messages": []}', "at least one turn"),
        ('{"messages": "x"}', "messages: expected a list, got text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the model"),
        ('{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]}', r"\[0\].content"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "wizard"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "expected role 'user'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "empty"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(f"{good}\n{row}\n".encode() for row, _ in bad) + b'"\xff"\n\n' + good.encode())
    with pytest.raises(
        DataError, match=r"13 of 26 rows cannot be used:\n.*rows.jsonl:2: not valid JSON(.|\n)*and 3 more"
    ):
        read_examples(path)
    examples = read_examples(path, skip_bad=True)
    assert list(examples) == [PLAIN] * 13 and examples.bad_rows == 13
    assert [problem.line for problem in examples.problems] == [*range(2, 25, 2), 25]
    for problem, (_, why) in zip(examples.problems, [*bad, ("", "not UTF-8 at byte 1")], strict=True):
        assert re.search(why, problem.why), problem
    path.write_text("{\n" * 3)
    with pytest.raises(DataError, match="no row is left"):
        read_examples(path, skip_bad=True)


@pytest.mark.parametrize(
    ("content", "name", "options", "why"),
    [
        ("", "a.jsonl", {}, "expected rows of examples, found none"),
        ('{"a": 1}', "a.jsonl", {}, r"columns \(a\) are of no known format.*alpaca \(instruction \+ output\)"),
        ('{"messages": [], "text": "x"}', "a.jsonl", {}, "can be read as messages or text: pass format="),
        ('{"text": "x"}', "a.xyz", {}, "expected a file ending in"),
        ('{"text": "x"}', "a.jsonl", dict(format="nope"), "format: expected one of auto, messages"),
        ('{"text": "x"}', "a.jsonl", dict(txt="x"), "'txt' is no field; the fields are: messages"),
        ('{"text": "x"}', "a.jsonl", dict(format="text", label="x"), "'label' is no field of text"),
        ('{"text": "x"}', "a.jsonl", dict(limit=0), "limit"),
        ("a,a\n1,2", "a.csv", {}, "header of different column names"),
        ("text\n1,2", "a.csv", {}, "expected 1 cells as in the header, got 2"),
        ('text\n"x', "a.csv", {}, "no valid row of cells"),
        ('[{"text": "x"}, {', "a.json", {}, "a.json:1: row 2 of the list: no valid JSON from here on"),
        ('[{"text": "x"} 3]', "a.json", {}, "expected a comma"),
        ('[{"text": "x"}]\n[{"text": "y"}]', "a.json", {}, "a.json:2: expected nothing after the list"),
        (
            '[{"text": "x"}, {"text": 1}, {"text": []}]',
            "a.json",
            {},
            "a.json:1: row 3 of the list: text: expected text",
        ),
        ('{"text": NaN}', "a.jsonl", {}, "text: expected text, got nan"),
        ('{"prompt": "a", "completion": -Infinity}', "a.jsonl", {}, "completion: expected text, got -inf"),
        ("[", "a.json", {}, "no valid JSON from here on"),
        ("PAR1", "a.parquet", {}, "no readable Parquet file"),
        ("x", "a.txt", dict(sample_by="page"), "sample_by"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "a.jsonl", {}, "the same"),
        ('{"prompt": "a", "completion": "b", "label": 2}', "a.jsonl", {}, "label: expected true or false, got 2"),
        ('{"text": "a", "label": 0.5}', "a.jsonl", {}, "label: expected the name or number"),
        ('{"text": "a", "label": 1}\n{"text": "a", "label": null}', "a.jsonl", {}, "a.jsonl:2: label"),
    ],
)
def test_clear_refusals(tmp_path, content, name, options, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=why):
        read_examples(tmp_path / name, **options)


def test_files_that_are_none_or_do_not_go_together(tmp_path):
    for path, why in [(tmp_path, "a folder"), (tmp_path / "a.jsonl", "no such file"), ([], "at least one file")]:
        with pytest.raises(DataError, match=why):
            read_examples(path)
    one, two = write(tmp_path / "1.jsonl", [dict(text="a")]), write(tmp_path / "2.jsonl", [dict(text="a", label=1)])
    with pytest.raises(DataError, match="different kinds"):
        read_examples([one, two])
    mixed = read_examples([one, write(tmp_path / "3.jsonl", [dict(prompt="a", completion="b")])])
    assert list(mixed) == [Text("a"), Completion("a", "b")] and mixed.format == "text+prompt_completion"
    with pytest.raises(DataError, match="expected one kind, got classification and supervised"):
        gm.data.Examples.of([Text("a"), Labelled("a", "b")])
    with pytest.raises(DataError, match=r"examples\[0\]: expected one of"):
        gm.data.Examples.of(["a"])
    one.write_text('{"text": []}\n')
    with pytest.raises(DataError, match="1.jsonl:1: text: .*did the file change"):
        gm.data.Loader(mixed, None, batch_size=1, max_length=8).report  # noqa: B018


def test_a_line_above_the_limit_is_one_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "MAX_ROW", 100)
    rows = [dict(text="a"), dict(text="b" * 350), dict(text="c")]
    examples = read_examples(write(tmp_path / "rows.jsonl", rows), skip_bad=True)
    assert [e.text for e in examples] == ["a", "c"] and [p.line for p in examples.problems] == [2]


def test_split_parts_the_examples(tmp_path):
    examples = read_examples(write(tmp_path / "rows.jsonl", [dict(text=f"{n}") for n in range(50)]))
    rest, held = examples.split(0.2, seed=3)
    assert (len(rest), len(held)) == (40, 10)
    assert sorted(int(e.text) for part in (rest, held) for e in part) == list(range(50))
    assert [int(e.text) for e in rest] == sorted(int(e.text) for e in rest)
    assert list(examples.split(10, seed=3)[1]) == list(held) != list(examples.split(10, seed=4)[1])
    for wrong in (0, 50, 1.0, True, "3"):
        with pytest.raises(DataError, match="held_out"):
            examples.split(wrong)


def test_hostile_rows_end_in_our_errors(tmp_path):
    """Values and bytes of good rows are replaced at random; whatever comes of it, only our errors come out."""
    random.seed(1)
    odd = [
        None,
        0,
        -1,
        1e300,
        True,
        "",
        "x",
        "\0",
        "[",
        [],
        {},
        [[]],
        [{}],
        [None],
        {"role": []},
        {"type": "image"},
        "[{",
    ]
    refused = 0

    def mutated(value, depth=0):
        if random.random() < 0.12 + 0.05 * depth:
            return random.choice(odd)
        if isinstance(value, dict):
            return {(k if random.random() < 0.95 else "x"): mutated(v, depth + 1) for k, v in value.items()}
        return [mutated(v, depth + 1) for v in value] if isinstance(value, list) else value

    for format, name in [(f, n) for n, (_, f, _) in FORMS.items()]:
        path = write(tmp_path / "rows.jsonl", [mutated(FORMS[name][0]) for _ in range(40)])
        data = bytearray(path.read_bytes())
        for _ in range(10):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(data)
        for options in (dict(format=format), dict()):
            try:
                examples = read_examples(path, skip_bad=True, **options)
                refused += examples.bad_rows
                assert len(list(examples)) + examples.bad_rows >= 20
            except GemmaError:
                refused += 1
        for ending in ("json", "csv", "tsv", "parquet", "txt"):
            other = tmp_path / f"rows.{ending}"
            other.write_bytes((b"[" if ending == "json" else b"") + bytes(data[: random.randrange(len(data))]))
            try:
                read_examples(other, skip_bad=True)
            except GemmaError:
                refused += 1
    assert refused > 200


def test_examples_are_a_source_of_random_access(tmp_path):
    import pickle

    examples = read_examples(write(tmp_path / "rows.jsonl", [dict(text=f"{n}") for n in range(5)]))
    again = pickle.loads(pickle.dumps(examples))  # other processes can be sent it
    assert list(again) == list(examples) and next(reversed(again)) == Text("4")
    with pytest.raises(IndexError):
        examples[5]
    assert examples[np.int64(2)] == Text("2") and "5 of format text from rows.jsonl" in repr(examples)
