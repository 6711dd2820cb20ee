# SPDX-License-Identifier: Apache-2.0
"""Hostile vocabularies: SentencePiece files and `tokenizer.json`, truncated, doubled, oversized, with a regex bomb."""

from __future__ import annotations

import json
import os

import hostile_files as h
import pytest
from guard import bounded, refused, survives

from gemma.errors import GemmaError, TokenizerError
from gemma.tokenizer import Tokenizer

TEXT = "hello the  world\n\n日é<table> <start_of_turn>"


def use(path):
    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode(TEXT, add_bos=True)
    tokenizer.decode(ids)
    tokenizer.decode_bytes(ids)


@pytest.fixture
def put(tmp_path):
    def write(data, name="tokenizer.model"):
        path = tmp_path / name
        path.write_bytes(json.dumps(data).encode() if isinstance(data, dict) else data)
        return path

    return write


# --- the valid files


@pytest.mark.parametrize("family", [2, 3])
def test_three_sources_agree(put, tmp_path, family):
    pieces, scores, types = h.vocabulary(family)
    gguf = h.gguf_bytes(h.gguf_keys(pieces, scores, types, arch=f"gemma{family}"), h.gguf_tensors(len(pieces)))
    files = [
        put(h.sentencepiece_bytes(family=family)),
        put(h.tokenizer_json(family=family), "tokenizer.json"),
        put(bytes(gguf.data), "vocab.gguf"),
    ]
    ids = []
    for file in files:
        with bounded():
            tokenizer = Tokenizer.from_file(file)
            ids.append(tokenizer.encode(TEXT))
        assert tokenizer.vocab_size == len(pieces) and tokenizer.version == family
        assert tokenizer.decode(ids[-1]) == TEXT
    assert ids[0] == ids[1] == ids[2]


# --- SentencePiece


def test_truncated_model_files(put):
    data = h.sentencepiece_bytes()
    path = put(data)
    for length in sorted({*range(0, 40), *range(40, len(data), 97), *range(len(data) - 90, len(data))}, reverse=True):
        os.truncate(path, length)
        with pytest.raises(GemmaError):
            use(path)


def changed(**edits):
    """A model file with pieces replaced: `edits` maps "p<i>", "s<i>", "t<i>" to new pieces, scores, types."""
    pieces, scores, types = (list(x) for x in h.vocabulary())
    for key, value in edits.items():
        {"p": pieces, "s": scores, "t": types}[key[0]][int(key[1:])] = value
    return h.sentencepiece_bytes(pieces, scores, types)


LAST = len(h.vocabulary()[0]) - 1
BYTE_41 = h.vocabulary()[0].index("<0x41>")
MODELS = {
    "empty": b"",
    "text": b"hello world, this is no model\n" * 20,
    "zeros": bytes(500),
    "a piece of 10^6 characters": changed(**{f"p{LAST}": "x" * 10**6}),
    "a piece twice": changed(**{f"p{LAST}": h.vocabulary()[0][LAST - 1]}),
    "a control piece twice": changed(**{f"p{LAST}": "<bos>"}),
    "an empty piece": changed(**{f"p{LAST}": ""}),
    "a piece in invalid UTF-8": changed(**{f"p{LAST}": b"\xff\xfe"}),
    "NaN score": changed(**{f"s{LAST}": float("nan")}),
    "infinite score": changed(**{f"s{LAST}": float("inf")}),
    "type 0": changed(**{f"t{LAST}": 0}),
    "type 99": changed(**{f"t{LAST}": 99}),
    "two unknown pieces": changed(**{f"t{LAST}": h.UNKNOWN}),
    "no unknown piece": changed(t3=h.CONTROL),
    "byte <0x-1>": changed(**{f"p{BYTE_41}": "<0x-1>"}),
    "byte <0x100>": changed(**{f"p{BYTE_41}": "<0x100>"}),
    "byte twice": changed(**{f"p{BYTE_41}": "<0x42>"}),
    "byte missing": changed(**{f"t{BYTE_41}": h.NORMAL}),
    "no bos": changed(p2="<unused999>"),
    "unigram": h.sentencepiece_bytes(model_type=1),
    "model type 77": h.sentencepiece_bytes(model_type=77),
    "no pieces": h.sentencepiece_bytes([], [], []),
    "only special pieces": h.sentencepiece_bytes(*(x[:5] for x in h.vocabulary())),
    "length beyond the file": h.sentencepiece_bytes() + h.varint(1 << 3 | 2) + h.varint(2**40),
    "length 2^64-1": h.sentencepiece_bytes() + h.varint(1 << 3 | 2) + h.varint(2**64 - 1),
    "endless varint": h.sentencepiece_bytes() + b"\xff" * 64,
    "group wire type": h.sentencepiece_bytes() + h.varint(1 << 3 | 3),
    "field number 0": h.sentencepiece_bytes() + b"\x02\x00",
}


@pytest.mark.parametrize("fault", MODELS)
def test_model_files_that_lie(put, fault):
    refused(put(MODELS[fault]), GemmaError, act=use)


def test_half_a_million_empty_pieces(put):
    """Two bytes each on disk; the price of the refusal is bounded all the same."""
    refused(put(h.field(1, b"") * 500_000), GemmaError, act=use)


def test_normalizer_that_rewrites_text(put):
    """Gemma's normalizer is the identity; a file whose normalizer adds a leading space is another tokenizer."""
    data = h.sentencepiece_bytes()
    cut = data.rindex(h.field(1, b"identity")) - 2
    changed = data[:cut] + h.field(3, h.field(1, b"nmt_nfkc") + h.field(3, 1) + h.field(4, 1) + h.field(5, 1))
    error = survives(put(changed), use)
    if error is None:  # accepted: then the text must still come back as it was given
        tokenizer = Tokenizer.from_file(put(changed))
        assert tokenizer.decode(tokenizer.encode("a  b")) == "a  b"


def test_nothing_there(tmp_path):
    refused(tmp_path / "absent.model", GemmaError, act=use)
    refused(tmp_path, GemmaError, act=use)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.model")
    refused(tmp_path / "tokenizer.model", GemmaError, act=use)


# --- tokenizer.json


def edited(change) -> dict:
    content = h.tokenizer_json()
    change(content)
    return content


def _pattern(regex):
    return dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False)


JSONS = {
    "a regex bomb before the model": edited(lambda c: c.update(pre_tokenizer=_pattern(r"(x+x+)+y"))),
    "a regex bomb in the normalizer": edited(
        lambda c: c.update(normalizer=dict(type="Replace", pattern=dict(Regex=r"(a|a)*$"), content=""))
    ),
    "a byte-level pre-tokenizer": edited(
        lambda c: c.update(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True))
    ),
    "another model": edited(lambda c: c["model"].update(type="WordPiece")),
    "no model": edited(lambda c: c.pop("model")),
    "no vocabulary": edited(lambda c: c["model"].pop("vocab")),
    "empty vocabulary": edited(lambda c: c["model"].update(vocab={}, merges=[])),
    "vocabulary is a list": edited(lambda c: c["model"].update(vocab=["a"])),
    "an id is a string": edited(lambda c: c["model"]["vocab"].update({"zz": "7"})),
    "an id is negative": edited(lambda c: c["model"]["vocab"].update({"zz": -1})),
    "an id is 10^12": edited(lambda c: c["model"]["vocab"].update({"zz": 10**12})),
    "an id is a float": edited(lambda c: c["model"]["vocab"].update({"zz": 1.5})),
    "an id twice": edited(lambda c: c["model"]["vocab"].update({"zz": 500})),
    "a hole in the ids": edited(lambda c: c["model"]["vocab"].update({"zz": LAST + 10})),
    "a merge of unknown pieces": edited(lambda c: c["model"]["merges"].append(["qq", "zz"])),
    "a merge of three": edited(lambda c: c["model"]["merges"].append(["a", "b", "c"])),
    "a merge that is a number": edited(lambda c: c["model"]["merges"].append(7)),
    "an added token elsewhere": edited(lambda c: c["added_tokens"][2].update(id=400)),
    "an added token without id": edited(lambda c: c["added_tokens"][2].pop("id")),
    "no byte fallback": edited(lambda c: c["model"].update(byte_fallback=False)),
    "a piece of 10^6 characters": edited(lambda c: c["model"]["vocab"].update({"x" * 10**6: LAST + 1})),
    "dropout": edited(lambda c: c["model"].update(dropout=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("fault", JSONS)
def test_json_files_that_lie(put, fault):
    refused(put(JSONS[fault], "tokenizer.json"), TokenizerError, act=use)


def test_a_regex_bomb_costs_nothing_even_with_its_fuse(put):
    def light(path):
        Tokenizer.from_file(path).encode("x" * 40)

    survives(put(JSONS["a regex bomb before the model"], "tokenizer.json"), light)


RAW_JSONS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "invalid UTF-8": b'{"model": "\xff"}',
    "deep": b'{"model":' * 100_000 + b"1" + b"}" * 100_000,
    "duplicate field": json.dumps(h.tokenizer_json()).encode()[:-1] + b', "model": {}}',
}


@pytest.mark.parametrize("fault", RAW_JSONS)
def test_json_files_that_are_no_tokenizers(put, fault):
    refused(put(RAW_JSONS[fault], "tokenizer.json"), GemmaError, act=use)


def test_truncated_json(put):
    data = json.dumps(h.tokenizer_json()).encode()
    path = put(data, "tokenizer.json")
    for length in range(len(data) - 1, 0, -len(data) // 60):
        os.truncate(path, length)
        refused(path, TokenizerError, act=use)


# --- hostile text


TEXTS = {
    "empty": "",
    "nul": "\0",
    "lone surrogate": "\ud800",
    "low surrogate": "a\udfffb",
    "noncharacters": "\ufffe\uffff",
    "x": "x" * 100_000,
    "spaces": " " * 100_000,
    "newlines": "\n" * 100_000,
    "blocks": "▁" * 1000,
    "astral": "𐍈" * 1000,
    "markers": "<start_of_turn>" * 1000,
    "angles": "<" * 10_000,
    "marks": "e" + "\u0301" * 10_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_at_the_edge(put, name):
    """Linear work, and either ids or one error (a lone surrogate is no text)."""
    tokenizer, text = Tokenizer.from_file(put(h.sentencepiece_bytes())), TEXTS[name]
    with bounded():
        try:
            ids = tokenizer.encode(text)
        except GemmaError as e:
            assert "\ud800" in text or "\udfff" in text, e
            return
        assert "\ud800" not in text and "\udfff" not in text
        if "▁" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("ids", [[-1], [10**9], [2**63], [LAST + 1], [None], ["a"], [1.5]], ids=repr)
def test_ids_that_are_no_ids(put, ids):
    tokenizer = Tokenizer.from_file(put(h.sentencepiece_bytes()))
    for decode in (tokenizer.decode, tokenizer.decode_bytes, lambda x: tokenizer.stream().push(x[0])):
        with pytest.raises((TokenizerError, TypeError)) as caught:
            decode(ids)
        if isinstance(ids[0], int):
            assert isinstance(caught.value, TokenizerError) and str(ids[0]) in str(caught.value)
