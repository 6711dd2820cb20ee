# SPDX-License-Identifier: Apache-2.0
"""Perplexity and its windows, importance matrices, and the verbs `gemma eval` and `gemma quantize`."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_models import load, tiny

from gemma import imatrix, testing
from gemma.cli import _measure
from gemma.cli.__main__ import run
from gemma.errors import CheckpointError, ConfigError, PromptError, ShapeError
from gemma.gm._evaluate import Model, Reference, evaluate
from gemma.gm._importance import collect
from gemma.gm._windows import batches
from gemma.gm.nn._packed import Packed

BOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config, folder, net = tiny("gemma3", tmp_path_factory.mktemp("evaluated"))
    return config, folder, Model(net, load(folder))


def test_every_token_counts_once_and_sees_enough():
    ids = np.arange(100, 160)
    for context, stride in ((9, 8), (9, 3), (64, 10), (61, 60), (2, 1)):
        counted = []
        for batch in batches(ids, BOS, context=context, stride=stride, batch=3):
            assert batch.tokens.shape == batch.targets.shape == (batch.tokens.shape[0], context)
            for tokens, targets, counts in zip(batch.tokens, batch.targets, batch.counts):
                counted += targets[counts].tolist()
                for at in np.flatnonzero(counts):  # what is predicted stands behind what is seen
                    assert tokens[0] == BOS and (
                        at == context - 1 or tokens[at + 1] == targets[at] or tokens[at + 1] == 0
                    )
                    if targets[at] >= 100 + context:
                        assert at >= context - 1 - stride
        assert counted == ids.tolist()
    with pytest.raises(ConfigError, match=r"stride: expected 1\.\.7"):
        batches(ids, BOS, context=8, stride=8, batch=1)
    with pytest.raises(PromptError, match="no tokens"):
        batches([], BOS, context=8, stride=4, batch=1)


def test_scores_are_those_written_out_by_hand(model):
    _, folder, exact = model
    ids = np.random.default_rng(0).integers(3, 300, 40)
    cut = batches(ids, BOS, context=17, stride=8, batch=2)
    packed = Model(exact.net, jax.tree.map(jnp.asarray, _floats(load(folder, quantize="int4"))))
    scores = evaluate(packed, cut, reference=Reference(exact, cut))
    forward = jax.jit(lambda p, tokens: exact.net.apply({"params": p}, tokens).logits)
    nll, kl, same = [], [], []
    for batch in cut:
        logs = []
        for one in (packed, exact):
            z = np.asarray(forward(one.params, jnp.asarray(batch.tokens)), np.float64)
            logs.append(
                z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
            )
        p, q = (log[batch.counts] for log in logs)
        nll += (-p[np.arange(len(p)), batch.targets[batch.counts]]).tolist()
        kl += (np.exp(q) * (q - p)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert scores.tokens == 40 == len(nll)
    np.testing.assert_allclose(
        [scores.nll, scores.kl, scores.agreement], [np.mean(nll), np.mean(kl), np.mean(same)], rtol=2e-4
    )
    assert scores.worst_kl >= scores.kl > 0 and scores.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=2e-4)
    own = evaluate(exact, cut, reference=Reference(exact, cut))
    assert own.kl == 0 and own.agreement == 1 and own.nll == own.reference_nll


def _floats(params):
    """Decoded: packed products are tested elsewhere, here they would only be compiled once more."""

    def decoded(leaf):
        return leaf.dequantize() if isinstance(leaf, Packed) else leaf

    return jax.tree.map(decoded, params, is_leaf=lambda leaf: isinstance(leaf, Packed))


def test_importance_is_the_mean_square_of_inputs(model, tmp_path):
    config, _, exact = model
    ids = np.random.default_rng(1).integers(3, 300, 25)
    cut = batches(ids, BOS, context=12, stride=11, batch=3)
    found = collect(exact, cut)
    assert set(found) == {
        f"layers.{i}.{r}"
        for i in (0, 1)
        for r in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    table, scale = np.asarray(exact.params["embedder"]["input_embedding"]), np.float32(np.sqrt(64))
    total, count = 0.0, 0
    for batch in cut:
        x = (table[batch.tokens] * scale)[batch.tokens != 0].astype(np.float64)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        x = x * (1 + np.asarray(exact.params["layer_0"]["pre_attention_norm"]["scale"], np.float64))
        total, count = total + (x**2).sum(0), count + len(x)
    np.testing.assert_allclose(found["layers.0.attn.q"], total / count, rtol=1e-4)
    np.testing.assert_array_equal(found["layers.0.attn.q"], found["layers.0.attn.v"])
    imatrix.write(tmp_path / "m.gguf", found, config, tokens=count, context=12, dataset="x")
    again = imatrix.canonical(imatrix.read(tmp_path / "m.gguf"), config)
    assert set(again) == set(found)
    np.testing.assert_allclose(again["layers.1.mlp.down"], found["layers.1.mlp.down"], rtol=1e-6)
    with pytest.raises(ShapeError, match=r"layers\.0\.attn\.q: expected float32 \(64,\)"):
        imatrix.canonical({"layers.0.attn.q": np.ones(3, np.float32)}, config)
    with pytest.raises(CheckpointError, match="expected an importance matrix"):
        imatrix.read(model[1] / "model.safetensors")


def test_models_that_cannot_be_compared(model):
    _, _, exact = model
    cut = batches(range(5, 10), BOS, context=8, stride=4, batch=1)
    other = Reference(exact, cut)
    small = exact.params | {"embedder": {"input_embedding": exact.params["embedder"]["input_embedding"][:200]}}
    with pytest.raises(ShapeError, match="200 ids, and 320 in the reference"):
        evaluate(Model(exact.net, small), cut, reference=other)
    bad = exact.params | {"final_norm": {"scale": jnp.full(64, jnp.nan)}}
    with pytest.raises(CheckpointError, match="gives NaN"):
        evaluate(Model(exact.net, bad), cut)


def test_verbs(model, tmp_path, monkeypatch, capsys):
    config, folder, _ = model
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 3)

    def bytes_of(path, source, tokens):  # the tiny model has no tokenizer of its own
        return _measure.Text("text", "0", tuple(testing.ByteTokenizer().encode(text.read_text()))[:tokens])

    monkeypatch.setattr(_measure, "read_text", bytes_of)
    out = tmp_path / "out"
    arguments = [
        "quantize",
        str(folder),
        "--to",
        "q4_0_pure",
        "--to",
        "int8",
        "--out",
        str(out),
        "--imatrix",
        str(text),
    ]
    assert run([*arguments, "--text", str(text), "--tokens", "40", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["choices"]
    assert [row["type"] for row in rows] == ["q4_0_pure", "int8"] and (
        out / f"{folder.name}-int8/model.safetensors"
    ).is_file()
    assert rows[0]["rmse"] > 4 * rows[1]["rmse"] > 0 and rows[0]["scores"]["kl"] > rows[1]["scores"]["kl"] >= 0
    assert rows[0]["imatrix"] and rows[1]["imatrix"] is None and 4.4 < rows[0]["bits_per_weight"] < 6
    assert run(["eval", str(out / f"{folder.name}-q4_0_pure.gguf"), "--against", str(folder), "--tokens", "40"]) == 0
    page = capsys.readouterr().out
    assert "perplexity" in page and "nats per token" in page and f"{rows[0]['scores']['kl']:.6f}" in page
    assert run(["quantize", str(folder), "--to", "q9"]) == 2 and "expected one of" in capsys.readouterr().err
    assert run(["quantize", str(folder), "--to", "int8", "--out", str(folder)]) == 2
