# SPDX-License-Identifier: Apache-2.0
"""`gemma tokenize`: ids with names, one token a line, special spellings on and off."""

import json

import pytest

from gemma.testing import ByteTokenizer, tiny_config, write_tiny_gguf


@pytest.fixture
def model(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3", query_pre_attn_scalar=None))


def test_lines(cli, model):
    out = cli("tokenize", "a b", "--model", model).out
    expected = ["2 <bos> special", "107 <0x61>", "266 ▁", "108 <0x62>"]
    assert [" ".join(line.split()) for line in out.splitlines()] == expected


def test_json_and_bos(cli, model):
    data = json.loads(cli("tokenize", "ü", "--model", model, "--json", "--no-bos").out)
    assert data["ids"] == ByteTokenizer().encode("ü") and data["count"] == 2
    assert data["tokens"][0] == {"id": data["ids"][0], "piece": "<0xC3>", "special": False}


def test_special_spellings(cli, model):
    flags = ("--model", model, "--json", "--no-bos")
    assert json.loads(cli("tokenize", "<eos>", *flags).out)["ids"] == [1]
    assert json.loads(cli("tokenize", "<eos>", "--no-special", *flags).out)["count"] == 5


def test_pipe_and_empty_text(cli, model):
    assert json.loads(cli("tokenize", "--json", "--model", model, stdin=b"a\n").out)["ids"] == [2, 107]
    assert json.loads(cli("tokenize", "", "--json", "--model", model).out)["ids"] == [2]
    assert cli("tokenize", "", "--no-bos", "--model", model) == (0, "", "")


@pytest.mark.real
def test_demo(cli):
    out = cli("tokenize", "The history of computing began").out
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["2", "<bos>"],
        ["818", "The"],
        ["4083", "▁history"],
        ["529", "▁of"],
        ["20124", "▁computing"],
        ["6074", "▁began"],
    ]
