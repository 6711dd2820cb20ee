# SPDX-License-Identifier: Apache-2.0
"""ByteTokenizer has the interface of the real tokenizer, and every text survives it."""

import inspect

import pytest

from gemma.errors import TokenizerError
from gemma.testing import ByteTokenizer, tiny_config, tiny_pieces


def test_interface_is_that_of_the_real_one():
    from gemma.tokenizer import Tokenizer

    for name in ("encode", "decode", "decode_bytes", "stream", "piece", "id_of", "is_special"):
        real = inspect.signature(getattr(Tokenizer, name)).parameters
        double = inspect.signature(getattr(ByteTokenizer, name)).parameters
        assert [(p.name, p.kind, p.default) for p in real.values()] == [
            (p.name, p.kind, p.default) for p in double.values()
        ], name
    tokenizer = ByteTokenizer()
    for name in ("vocab_size", "pieces", "special", "version"):
        assert name in Tokenizer.__doc__ or hasattr(Tokenizer, name)
        assert getattr(tokenizer, name) is not None


@pytest.mark.parametrize(
    "text", ["", "plain", "ü 🙂 漢字", "  spaces\n\ttabs", "<bos> is spelled", "<start_of_turn>user"]
)
def test_round_trip(text):
    tokenizer = ByteTokenizer()
    for parse in (True, False):
        ids = tokenizer.encode(text, parse_special=parse)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.vocab_size <= tiny_config().vocab_size for i in ids)
    assert tokenizer.encode(text, add_bos=True, add_eos=True) == [2, *tokenizer.encode(text), 1]


def test_special_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<bos>a<eos>") == [2, 107, 1]
    assert len(tokenizer.encode("<bos>", parse_special=False)) == 5
    assert tokenizer.decode([2, 107, 1], skip_special=True) == "a"
    assert tokenizer.is_special(2) and not tokenizer.is_special(107)
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.end_of_turn) == (2, 1, 6)
    assert tokenizer.piece(6) == "<end_of_turn>" and tokenizer.id_of("<0x61>") == 107
    assert tokenizer.encode(b"\xff\x00") == [265, 10]


def test_stream_never_splits_a_character():
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode("a🙂b")]
    assert pieces == ["a", "", "", "", "🙂", "b"]
    assert stream.push(tokenizer.encode("é")[0]) == "" and stream.flush() == "\ufffd"


def test_errors():
    tokenizer = ByteTokenizer()
    with pytest.raises(TokenizerError, match=r"0\.\.265, got 266"):
        tokenizer.decode([266])
    with pytest.raises(TokenizerError, match="no piece"):
        tokenizer.id_of("x")


def test_tiny_pieces_agree_with_it():
    pieces = tiny_pieces(320)
    assert len(pieces) == 320 and len({p for p, _, _ in pieces}) == 320
    assert [p for p, _, _ in pieces[:266]] == ByteTokenizer().pieces
