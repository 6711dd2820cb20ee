# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors: prompts, batches by length, the folder of sentence-transformers, and the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma import embedding, gm
from gemma.cli.__main__ import run
from gemma.embedding import prompt, read_modules
from gemma.errors import CheckpointError, ConfigError, FormatError, GemmaError, PromptError, UnsupportedError

TEXTS = ["the red planet", "a", "venus is hot and bright and near", "mars", "the moon goes round the earth " * 2]


@pytest.fixture(scope="module")
def embedder(oracle):
    return gm.text.TextEmbedder.load(oracle.folder)


# ---- prompts


def test_prompts():
    assert prompt("x", "query") == "task: search result | query: x"
    assert prompt("x", "document") == "title: none | text: x"
    assert prompt("x", "document", title=" a\nb ") == "title: a b | text: x"
    assert prompt("x") == "x"
    with pytest.raises(PromptError, match="expected one of query, document"):
        prompt("x", "search")
    with pytest.raises(PromptError, match="no place for one"):
        prompt("x", "query", title="a")


def test_cosine():
    a = np.array([[1, 0], [3, 4]], np.float32)
    assert np.allclose(embedding.cosine(a, a), [[1, 0.6], [0.6, 1]])
    with pytest.raises(GemmaError, match=r"expected \[Q, D\] and \[M, D\]"):
        embedding.cosine(a, a[:, :1])


# ---- the folder


def test_the_folder_is_that_of_sentence_transformers(oracle, embedder):
    modules = json.loads((oracle.folder / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]
    for number, expected in enumerate(oracle.dense, 2):
        stored = load_file(oracle.folder / f"{number}_Dense" / "model.safetensors")
        assert set(stored) == {"linear.weight"} and np.array_equal(stored["linear.weight"], expected)
    assert not any("Dense" in name for name in load_file(oracle.folder / "model.safetensors"))
    found = read_modules(oracle.folder)
    assert [(d.width_in, d.width_out) for d in found.dense] == [(72, 100), (100, 48)]
    assert found.prompts == dict(embedding.TASKS)
    assert embedder.model.config.gemma == oracle.config and embedder.width == 48


def test_stated_prompts_count(oracle, tmp_path):
    shutil.copytree(oracle.folder, tmp_path / "m")
    (tmp_path / "m" / "config_sentence_transformers.json").write_text('{"prompts": {"STS": "same? ", "query": "q: "}}')
    prompts = read_modules(tmp_path / "m").prompts
    assert (prompts["STS"], prompts["query"], prompts["document"]) == ("same? ", "q: ", embedding.TASKS["document"])


@pytest.mark.parametrize(
    ("file", "content", "error", "said"),
    [
        ("modules.json", "{}", FormatError, "expected a JSON list"),
        ("modules.json", "[]", FormatError, "expected 1..64 modules"),
        ("modules.json", '[{"type": "x.models.LSTM", "path": "l"}]', UnsupportedError, "LSTM"),
        ("modules.json", '[{"type": "x.Dense", "path": "../2_Dense"}]', ConfigError, "inside of this one"),
        ("2_Dense/config.json", '{"in_features": 72}', ConfigError, "states its widths"),
        ("2_Dense/config.json", '{"in_features": 72, "out_features": 9, "bias": false}', ConfigError, "in_features 9"),
        ("3_Dense/config.json", '{"in_features": 100, "out_features": 48, "bias": true}', ConfigError, "bias"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true}', UnsupportedError, "mean of the tokens"),
        ("config_sentence_transformers.json", '{"prompts": {"a": 1}}', FormatError, "object of texts"),
    ],
)
def test_bad_folders(oracle, tmp_path, file, content, error, said):
    shutil.copytree(oracle.folder, tmp_path / "m")
    (tmp_path / "m" / file).write_text(content)
    with pytest.raises(error, match=said):
        gm.text.TextEmbedder.load(tmp_path / "m")


def test_a_dense_layer_of_another_size_is_reported(oracle, tmp_path):
    shutil.copytree(oracle.folder, tmp_path / "m")
    config = tmp_path / "m" / "3_Dense" / "config.json"
    config.write_text(config.read_text().replace('"out_features": 48', '"out_features": 47'))
    with pytest.raises(GemmaError, match=r"3_Dense/linear.weight: expected \(47, 100\), got \(48, 100\)"):
        gm.text.TextEmbedder.load(tmp_path / "m")


def test_an_encoder_without_its_dense_layers_is_refused(oracle, tmp_path):
    shutil.copytree(oracle.folder, tmp_path / "m")
    (tmp_path / "m" / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected modules\.json"):
        gm.text.TextEmbedder.load(tmp_path / "m")


def test_a_decoder_is_no_encoder(tmp_path):
    from gemma import testing

    testing.write_tiny_safetensors(tmp_path, testing.tiny_config("gemma3"))
    with pytest.raises(UnsupportedError, match="expected an EmbeddingGemma"):
        gm.text.TextEmbedder.load(tmp_path)


# ---- texts


def test_tokens_of_a_text(embedder):
    ids = embedder.ids("ab", "query")
    core = embedder.tokenizer
    assert ids[0] == core.special.bos and ids[-1] == core.special.eos
    assert core.decode(ids[1:-1]) == "task: search result | query: ab"
    with pytest.raises(PromptError, match="got an empty one"):
        embedder.ids("  ")
    long = "ab " * 200
    with pytest.raises(PromptError, match="the model holds 128"):
        embedder.ids(long)
    assert len(embedder.ids(long, truncate=True)) == 128


def test_batches_give_what_single_texts_give(embedder):
    alone = np.stack([embedder.embed(text) for text in TEXTS])
    assert alone.shape == (5, 48)
    assert np.abs(embedder.embed(TEXTS, batch_size=4) - alone).max() < 2e-6
    short = embedder.embed(TEXTS, dim=8)
    assert np.abs(short - embedding.shortened(alone, 8)).max() < 2e-6
    streamed = embedder.embed_ids((embedder.ids(text) for text in TEXTS * 20), batch_size=4)
    assert np.abs(np.stack(list(streamed)) - np.concatenate([alone] * 20)).max() < 2e-6
    assert embedder.embed([]).shape == (0, 48)
    with pytest.raises(PromptError, match="text 1: expected a text"):
        embedder.embed(["a", 3])
    with pytest.raises(ConfigError, match="batch_size"):
        embedder.embed("a", batch_size=0)


# ---- the command


@pytest.fixture
def command(oracle, capsys):
    def call(*arguments):
        code = run(["embed", "-m", str(oracle.folder), *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_one_text(command, embedder):
    code, out, _ = command("mars", "--task", "query", "--dim", "16")
    assert code == 0
    line = json.loads(out)
    expected = embedder.embed("mars", task="query", dim=16)
    assert line["line"] == 1 and np.abs(np.array(line["embedding"], np.float32) - expected).max() < 2e-6


def test_a_file_of_lines(command, embedder, tmp_path):
    source, target = tmp_path / "x.txt", tmp_path / "x.npy"
    source.write_bytes("\ufeff".encode() + "\n".join([*TEXTS[:3], "", *TEXTS[3:]]).encode())
    code, _, err = command("--input", source, "--output", target, "--batch", "4")
    assert (code, err.count("line")) == (0, 0)
    found = np.load(target)
    assert found.dtype == np.float32 and np.abs(found - embedder.embed(TEXTS)).max() < 2e-6
    code, _, err = command("--input", source, "--output", target)
    assert code != 0 and "x.npy" in err
    assert command("--input", source, "--output", target, "--force", "--dim", "8")[0] == 0
    assert np.load(target).shape == (5, 8)


def test_bad_lines_are_reported_and_the_rest_is_embedded(command, embedder, tmp_path):
    source, target = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    lines = ['"mars"', '{"text": "venus", "title": "Planets"}', "{", '{"body": 1}', '"\xff"', json.dumps("ab " * 200)]
    source.write_bytes("\n".join([*lines, '"moon"']).encode("latin-1"))
    code, _, err = command("--input", source, "--output", target, "--task", "document")
    assert code == 1 and "4 of 7 lines could not be embedded" in err
    assert "line 3: not valid JSON" in err and 'line 4: expected a text, or an object with a "text"' in err
    assert "line 5: expected UTF-8" in err and "line 6: a text of" in err
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["line"] for line in found] == [1, 2, 7]
    expected = embedder.embed("venus", task="document", title="Planets")
    assert np.abs(np.array(found[1]["embedding"]) - expected).max() < 2e-6


def test_a_line_too_long_is_not_cut_in_two(command, monkeypatch, tmp_path):
    from gemma.cli import embed

    monkeypatch.setattr(embed, "_LONGEST", 16)
    (tmp_path / "x.txt").write_text("short\n" + "long " * 8)
    code, _, err = command("--input", tmp_path / "x.txt", "--output", tmp_path / "x.npy", "--truncate")
    assert code == 2 and "line 2 is longer than 16 bytes" in err and not (tmp_path / "x.npy").exists()


def test_damaged_weights_give_no_vector(embedder):
    damaged = jax.tree.map(lambda leaf: leaf * np.float32("nan"), embedder.params)
    with pytest.raises(CheckpointError, match="not finite"):
        dataclasses.replace(embedder, params=damaged).embed("a")


def test_standard_input(command, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    code, out, _ = command("--input", "-")
    assert code == 0 and [json.loads(line)["line"] for line in out.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected either TEXT or --input FILE"),
        (("a", "--input", "b.txt"), "got both"),
        (("a", "--output", "x.csv"), "ends with .npy or .jsonl"),
        (("a", "--task", "find"), "--task: expected one of query"),
        (("a", "--dim", "49"), "dim: expected 1..48"),
        (("a", "--dtype", "float16"), "--dtype"),
        (("--input", "nowhere.txt"), "cannot be read"),
        (("--input", "/dev/null"), "no texts in it"),
        (("",), "empty"),
    ],
)
def test_usage(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 2 and said in err and err.count("\n") == 1
