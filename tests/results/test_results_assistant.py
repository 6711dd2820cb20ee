# SPDX-License-Identifier: Apache-2.0
"""The assistant's data, its evaluation, and what ships: an adapter that fits the demo model and a card that is honest."""

import json
import re
from pathlib import Path

import _assistant_card
import _runs
import pytest

from gemma import adapters
from gemma.config import PRESETS
from gemma.errors import DataError

FOLDER = Path(_runs.ROOT) / "scripts" / "results" / "assistant_data"
ASSET = Path(_runs.ROOT) / "gemma" / "_assets" / "assistant"
HELD = FOLDER / "held_out" / "prompts.jsonl"
MARKERS = re.compile(r"<(bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_image|image_soft_token|unused\d+)>")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TRAIN = [row for path in sorted(FOLDER.glob("*.jsonl")) for row in rows(path)]


def asked(row: dict) -> tuple[str, ...]:
    """What a model reads before its last answer, without case and punctuation."""
    texts = (m["content"] for m in row["messages"][:-1])
    return tuple(" ".join(re.findall(r"[\w+*/=<>-]+", text.lower())) for text in texts)


def test_conversations_are_well_formed():
    for row in [*TRAIN, *rows(HELD)]:
        roles = [m["role"] for m in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns, row
        for message in row["messages"]:
            text = message["content"]
            assert text == text.strip() and 0 < len(text) <= 600, row
            assert not MARKERS.search(text), row
            assert not re.search(r"\|\||\\n|\s[.,;]\s", text.replace('\\n");', "")), row
    assert len(TRAIN) >= 760 and sum(len(row["messages"]) > 2 for row in TRAIN) >= 60 and len(rows(HELD)) == 60


def test_no_conversation_twice_and_no_held_out_prompt_in_training():
    prompts = [asked(row) for row in TRAIN]
    assert sorted(prompts) == sorted(set(prompts))
    first = {prompt[0] for prompt in prompts} | {prompt[-1] for prompt in prompts}
    assert not [row for row in rows(HELD) if asked(row)[-1] in first]


def test_it_never_says_that_it_is_a_person():
    for row in [*TRAIN, *rows(HELD)]:
        for message in row["messages"]:
            if message["role"] == "assistant":
                claim = re.search(r"\bI am (a|the) (human|person|man|woman)\b|I have feelings", message["content"])
                assert claim is None, message


def test_held_out_references_are_accepted_answers():
    closed = [row for row in rows(HELD) if "accept" in row]
    assert len(closed) >= 30
    for row in closed:
        assert _assistant_card.accepted(row["messages"][-1]["content"], row["accept"]), row
        assert _assistant_card.exactly(row["messages"][-1]["content"], row)


def test_counting_answers():
    accepted, exactly = _assistant_card.accepted, _assistant_card.exactly
    assert accepted("It is PARIS, of course", ["Paris"]) and not accepted("Parisian", ["Paris"])
    assert accepted("4", ["four", "4"]) and not accepted("14", ["4"])
    row = {"messages": [{"content": "q"}, {"content": "The capital is Paris."}], "accept": ["Paris"]}
    assert exactly("paris.", row) and exactly("The capital is Paris", row) and not exactly("Paris, I think", row)


def test_a_block_of_the_page_is_replaced_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n")
    _runs.write_block("one", "\nnew\n", page)
    _runs.write_block("two", "x", page)
    _runs.write_block("two", "y", page)
    assert page.read_text() == "a\n<!-- one -->\nnew\n<!-- /one -->\nb\n<!-- two -->\ny\n<!-- /two -->\n"
    with pytest.raises(DataError, match="<!-- three -->"):
        _runs.write_block("three", "z", page)


def test_what_ships_fits_the_demo_model_and_is_small():
    config = PRESETS["gemma3_270m"]
    file = adapters.open_adapter(ASSET, config)
    file.check(config)
    assert file.chat, "gemma chat speaks to it in the template"
    assert file.base_checksum, "another base would be refused"
    assert {low.rank for low in file.tensors.values()} <= set(range(4, 17))
    assert len(file.tensors) == 7 * config.num_hidden_layers
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 6e6


def test_the_card_says_what_it_must_and_shows_twenty_samples():
    card = (ASSET / "README.md").read_text(encoding="utf-8")
    plain = " ".join(card.split())
    for words in ("Gemma Terms of Use", "Prohibited Use", "Model Derivative", "modifications", "Apache-2.0", "bad at"):
        assert words in plain, words
    wanted = [row["messages"][-2]["content"] for row in rows(HELD)[::3]]
    assert len(wanted) == 20
    places = [card.find(f"**{n}.** {prompt}\n\n>") for n, prompt in enumerate(wanted, 1)]
    assert -1 not in places and places == sorted(places)
    count = len(TRAIN)
    assert f"{count:,} conversations" in card, "the card counts the data that is here"
