# SPDX-License-Identifier: Apache-2.0
"""The JAX API's tokenizers: signatures and errors; that ids are right is tested in tests/text."""

from __future__ import annotations

import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gemma import hub, testing
from gemma.errors import CheckpointNotFound, DependencyError, HubError, ShapeError, TokenizerError
from gemma.gm import text

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None, rope_scaling_factor=1.0)
    return str(testing.write_tiny_gguf(tmp_path_factory.mktemp("vocabulary") / "tiny.gguf", config))


@pytest.fixture
def tokenizer(path):
    return text.Gemma3Tokenizer(path)


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("ab c", add_bos=True, add_eos=True)
    assert ids[0] == tokenizer.special.bos and ids[-1] == tokenizer.special.eos
    assert tokenizer.decode(ids) == "ab c"  # neither has a text
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(jnp.array(ids)) == tokenizer.decode(tuple(ids)) == "ab c"
    assert tokenizer.decode(ids[1]) == tokenizer.decode(np.int32(ids[1])) == tokenizer.decode(jnp.array(ids[1])) == "a"
    assert tokenizer.decode([tokenizer.special.end_of_turn]) == "<end_of_turn>"
    with pytest.raises(ValueError, match="Array must be 0 or 1 dimensional"):
        tokenizer.decode(np.zeros((1, 1), np.int32))


def test_encode_pieces(tokenizer):
    space = tokenizer.encode(" ")
    assert tokenizer.encode([" ", SPACE, "<bos>"]) == [*space, *space, 2]
    assert tokenizer.encode([" "], add_bos=True, add_eos=True) == [2, *space, 1]
    with pytest.raises(ValueError, match="Cannot tokenize 'ab': it is an unknown token"):
        tokenizer.encode(["ab"])


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.tokens) == 320
    assert tokenizer.tokens[2] == "<bos>" and " " in tokenizer.tokens and SPACE not in tokenizer.tokens
    assert tokenizer.split("<bos> ")[-1] == " "


def test_it_is_a_value(tokenizer, path):
    tokenizer.encode("x")  # reads the vocabulary
    same = text.Gemma3Tokenizer(path)
    assert same == tokenizer and hash(same) == hash(tokenizer)
    assert same != text.Gemma3Tokenizer(path, custom_tokens={1: "<x>"})
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and copy.encode("x") == tokenizer.encode("x")


def test_custom_tokens(path, tokenizer):
    custom = text.Gemma3Tokenizer(path, custom_tokens={0: "<mine>", 7: "<other>"})
    [token] = custom.encode("<mine>")
    assert token == tokenizer.core.id_of("<unused0>") and custom.decode(token) == "<mine>"
    assert len(tokenizer.encode("<mine>")) == 6
    for wrong in ({99: "x"}, {-1: "x"}, {"0": "x"}):
        with pytest.raises(TokenizerError, match=r"custom_tokens: expected numbers in 0\.\.98"):
            text.Gemma3Tokenizer(path, custom_tokens=wrong).encode("x")


def test_versions(path):
    assert text.Tokenizer.from_version(2) == text.Gemma2Tokenizer()
    assert text.Tokenizer.from_version(3) == text.Gemma3Tokenizer()
    with pytest.raises(ValueError, match="Unsupported tokenizer version: 9"):
        text.Tokenizer.from_version(9)
    with pytest.raises(TokenizerError, match="a vocabulary of version 3; Gemma2Tokenizer expects 2"):
        text.Gemma2Tokenizer(path).encode("x")


def test_special_tokens():
    two, three = text.Gemma2Tokenizer.special_tokens, text.Gemma3Tokenizer.special_tokens
    assert (two.PAD, two.EOS, two.BOS, two.CUSTOM, two.START_OF_TURN, two.END_OF_TURN) == (0, 1, 2, 7, 106, 107)
    assert (three.CUSTOM, three.START_OF_TURN, three.END_OF_TURN) == (6, 105, 106)
    assert text.Gemma3Tokenizer.FORBIDDEN_TOKENS == (three.START_OF_IMAGE, three.END_OF_IMAGE) == (255_999, 256_000)
    with pytest.raises(AttributeError):
        two.START_OF_IMAGE  # noqa: B018


def test_where_the_default_path_leads(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(hub, "_demo_chunks", lambda: (_ for _ in ()).throw(HubError("not installed")))
    for kind in (text.Gemma2Tokenizer, text.Gemma3Tokenizer):
        with pytest.raises(HubError, match=rf"tokenizer_gemma{kind.VERSION}.model: put this file into .*tokenizer"):
            kind().encode("x")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_gemma2.model").write_bytes(b"no model")
    with pytest.raises(TokenizerError):  # found, and read
        text.Gemma2Tokenizer().encode("x")
    with pytest.raises(CheckpointNotFound):
        text.Gemma3Tokenizer(str(tmp_path / "nothing.model")).encode("x")


@pytest.mark.real
def test_the_published_ids():
    tokenizer = text.Gemma3Tokenizer()
    assert tokenizer.encode("The history of computing began", add_bos=True) == [2, 818, 4083, 529, 20124, 6074]
    for token in text.Gemma3Tokenizer.special_tokens:
        if token.name != "CUSTOM":
            assert tokenizer.core.piece(token) == f"<{token.name.lower()}>"
    assert tokenizer.decode(tokenizer.special_tokens.CUSTOM + 17) == "<unused17>"


def test_plot_logits(tokenizer, monkeypatch):
    logits = np.full(tokenizer.vocab_size, -20.0, np.float32)
    likely, next_likely = tokenizer.encode("a")[0], tokenizer.encode("$")[0]
    logits[likely], logits[next_likely] = 3.0, 2.0
    pytest.importorskip("matplotlib")  # of the extra [train]
    for values in (logits, jnp.asarray(logits)[None], jnp.asarray(logits, jnp.bfloat16)):
        [axes] = tokenizer.plot_logits(values, keep_top=5).axes
        heights = [bar.get_height() for bar in axes.patches]
        assert len(heights) == 5 and heights[0] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-2)
        assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["'a'", r"'\$'"]
    with pytest.raises(ShapeError, match=r"one position, got \(2, 3\)"):
        tokenizer.plot_logits(np.zeros((2, 3)))
    with pytest.raises(ShapeError, match="keep_top"):
        tokenizer.plot_logits(logits, keep_top=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"gemmakit\[train\]"):
        tokenizer.plot_logits(logits)
