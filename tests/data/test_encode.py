# SPDX-License-Identifier: Apache-2.0
"""Ids and loss masks of every kind of example, by the text that the masked ids spell; and what is done when too long."""

import numpy as np
import pytest

from gemma.chat import GEMMA4, Turn, encode_chat
from gemma.errors import DataError
from gemma.gm.data import Completion, Conversation, Labelled, Preference, Rated, Text, encode
from gemma.testing import ByteTokenizer

TOK = ByteTokenizer()
USER, MODEL = "<start_of_turn>user\n", "<start_of_turn>model\n"
CHAT = Conversation(
    (Turn("system", "S"), Turn("user", "Hi"), Turn("model", "Hello"), Turn("user", "More"), Turn("model", "No"))
)


def spelled(encoded):
    """(all of the text, the runs of labels)."""
    edges = np.flatnonzero(np.diff(encoded.loss_mask, prepend=False, append=False))
    return TOK.decode(encoded.ids), [TOK.decode(encoded.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_a_conversation_is_the_template_and_learns_every_model_turn():
    encoded = encode(CHAT, TOK, max_length=200)
    chat = encode_chat(TOK, CHAT.turns, add_generation_prompt=False)
    assert encoded.ids.tolist() == chat.ids and encoded.loss_mask.tolist() == chat.loss_mask
    assert (encoded.ids.dtype, encoded.loss_mask.dtype) == (np.int32, bool)
    text = (
        f"<bos>{USER}S\n\nHi<end_of_turn>\n{MODEL}Hello<end_of_turn>\n{USER}More<end_of_turn>\n{MODEL}No<end_of_turn>\n"
    )
    assert spelled(encoded) == (text, ["Hello<end_of_turn>", "No<end_of_turn>"])
    last = ["No<end_of_turn>"]
    assert spelled(encode(CHAT, TOK, max_length=200, last_turn_only=True)) == (text, last)
    assert spelled(encode(Conversation(CHAT.turns, mute=(2,)), TOK, max_length=200)) == (text, last)
    assert encode(Conversation(CHAT.turns, mute=(2, 4)), TOK, max_length=200) is None  # nothing to learn


def test_contents_are_never_markers():
    turns = (Turn("user", "<bos>Hi<end_of_turn>"), Turn("model", "<eos>"))
    ids = encode(Conversation(turns), TOK, max_length=200).ids
    assert (ids == TOK.special.bos).sum() == 1 and (ids == TOK.special.end_of_turn).sum() == 2
    assert TOK.special.eos not in ids
    raw = Completion("<start_of_turn>x", "y")
    assert TOK.special.start_of_turn not in encode(raw, TOK, max_length=99).ids
    assert TOK.special.start_of_turn in encode(raw, TOK, max_length=99, parse_special=True).ids


def test_other_kinds():
    assert spelled(encode(Completion("1+1=", "2"), TOK, max_length=20)) == ("<bos>1+1=2<eos>", ["2<eos>"])
    assert spelled(encode(Text("abc"), TOK, max_length=20)) == ("<bos>abc<eos>", ["abc<eos>"])
    pair = encode(Preference(CHAT.turns[:4], "Yes", "Never"), TOK, max_length=200)
    head = f"<bos>{USER}S\n\nHi<end_of_turn>\n{MODEL}Hello<end_of_turn>\n{USER}More<end_of_turn>\n{MODEL}"
    assert spelled(pair) == (f"{head}Yes<end_of_turn>\n", ["Yes<end_of_turn>"])
    assert spelled(pair.rejected) == (f"{head}Never<end_of_turn>\n", ["Never<end_of_turn>"])
    assert len(pair) == len(pair.rejected.ids) and pair.tokens == len(pair.ids) + len(pair)
    rated = encode(Rated(CHAT.turns[:2], "Bad", False), TOK, max_length=200)
    assert spelled(rated)[1] == ["Bad<end_of_turn>"] and rated.good is False


def test_labels_are_one_token_each():
    asked = f"<bos>{USER}Fine.<end_of_turn>\n{MODEL}"
    one = encode(Labelled("Fine.", "good"), TOK, max_length=99, labels={"bad": "B", "good": "G"})
    assert spelled(one) == (f"{asked}G", ["G"]) and one.label == 1
    raw = encode(Labelled("Fine.", "1"), TOK, max_length=99, labels=["0", "1"], template="{text} =")
    assert spelled(raw) == ("<bos>Fine. =1", ["1"])
    assert encode(Labelled("x", "a"), TOK, max_length=99, labels={"a": 40, "b": 41}).ids[-1] == 40
    for labels, why in [
        (["bad", "good"], r"'bad' is 3 tokens .*labels=\{'bad': 'A'.* --set labels=\[NAME=A,...\]"),
        ({"bad": "A", "good": "A"}, "another label"),
        (["good"], r"two or more, got good: .* --set labels=\["),
        ({"a": 1.5, "b": "c"}, "text or the id"),
        ({"a": "A", "b": "B"}, r"'good' is not among the labels .*labels=\[.* --set labels=\["),
        ("ab", "expected a list of names"),
    ]:
        with pytest.raises(DataError, match=why):
            encode(Labelled("Fine.", "good"), TOK, max_length=99, labels=labels)


def test_images_and_tools():
    chat = Conversation((Turn("user", "<start_of_image>What?"), Turn("model", "A cat")), images=("a.png",))
    encoded = encode(chat, TOK, max_length=200)
    assert (encoded.ids == TOK.id_of("<start_of_image>")).sum() == 1 and encoded.images == ("a.png",)
    raw = encode(Completion("<start_of_image>caption", "A cat", images=("a.png",)), TOK, max_length=200)
    assert raw.ids[:2].tolist() == [TOK.special.bos, TOK.id_of("<start_of_image>")]
    with pytest.raises(DataError, match="2 images came"):
        encode(Conversation(chat.turns, images=("a.png", "b.png")), TOK, max_length=200)
    with pytest.raises(DataError, match="cannot be encoded"):
        encode(chat, TOK, max_length=200, format=GEMMA4)  # a vocabulary of Gemma 3 has none of its markers
    tools = (dict(name="clock", description="The time.", parameters=dict(properties=dict(zone=dict(type="string")))),)
    told = TOK.decode(encode(Conversation(CHAT.turns, tools=tools), TOK, max_length=2000).ids)
    assert '**clock**\nDescription: The time.\nCall format: {"tool_name": "clock", "zone": "<string>"}' in told
    assert told.index("**clock**") < told.index("Hi<end_of_turn>") and told.count("You can call tools") == 1


@pytest.mark.parametrize("example", [CHAT, Completion("a" * 50, "b" * 50), Rated(CHAT.turns[:4], "x" * 9, True)])
def test_too_long(example):
    whole = encode(example, TOK, max_length=1000)
    n = len(whole)
    assert encode(example, TOK, max_length=n, truncate="error").cut == 0
    with pytest.raises(DataError, match=f"{n} tokens, but a row holds {n - 1}"):
        encode(example, TOK, max_length=n - 1, truncate="error")
    assert encode(example, TOK, max_length=n - 1) is None is encode(example, TOK, max_length=n - 1, truncate="split")
    right, left = (encode(example, TOK, max_length=n - 5, truncate=side) for side in ("right", "left"))
    assert right.ids.tolist() == whole.ids[:-5].tolist() and right.loss_mask.tolist() == whole.loss_mask[:-5].tolist()
    assert left.ids.tolist() == [whole.ids[0], *whole.ids[6:]] and left.cut == right.cut == 5
    assert left.loss_mask.tolist() == [False, *whole.loss_mask[6:]]
    assert encode(Completion("a" * 50, "b"), TOK, max_length=20, truncate="right") is None  # no label is left


def test_oldest_exchanges_go_first():
    n = len(encode(CHAT, TOK, max_length=200))
    short = encode(CHAT, TOK, max_length=n - 1, truncate="turns")
    assert spelled(short)[0] == f"<bos>{USER}S\n\nMore<end_of_turn>\n{MODEL}No<end_of_turn>\n"
    assert short.cut == n - len(short)
    assert encode(CHAT, TOK, max_length=20, truncate="turns") is None
    rated = encode(Rated(CHAT.turns[:4], "Yes", True), TOK, max_length=n, truncate="turns")
    assert spelled(rated)[0] == f"<bos>{USER}S\n\nMore<end_of_turn>\n{MODEL}Yes<end_of_turn>\n"
    muted = Conversation((*CHAT.turns, Turn("user", "a"), Turn("model", "b")), mute=(4,))
    assert spelled(encode(muted, TOK, max_length=n, truncate="turns"))[1] == ["b<end_of_turn>"]


def test_bad_arguments():
    for options, why in [(dict(max_length=1), "max_length"), (dict(max_length=9, truncate="x"), "truncate")]:
        with pytest.raises(DataError, match=why):
            encode(Text("a"), TOK, **options)
    with pytest.raises(DataError, match="template"):
        encode(Labelled("a", "b"), TOK, max_length=9, labels=["a", "b"], template="text")
    with pytest.raises(DataError, match="expected one of"):
        encode("a", TOK, max_length=9)
    with pytest.raises(DataError, match="becomes 3 rows"):
        encode(Text("a" * 20), TOK, max_length=9)
