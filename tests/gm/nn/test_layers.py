# SPDX-License-Identifier: Apache-2.0
"""The layers that hold one parameter, against naive numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma import gm
from gemma.errors import ShapeError
from gemma.gm.nn import _layers

RNG = np.random.default_rng(0)
EPS32 = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["ordinary", "small"])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_norm(size, eps):
    x = (RNG.normal(size=(2, 3, 72)) * size).astype(np.float32)
    scale = RNG.normal(size=72).astype(np.float32)
    ours = gm.nn.RMSNorm(eps=eps).apply({"params": {"scale": scale}}, jnp.asarray(x))
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * (1 + scale.astype(np.float64))
    # A mean of 72 squares and four more roundings: a few units in the last place of the result.
    np.testing.assert_allclose(ours, exact, rtol=16 * EPS32, atol=0)


def test_norm_of_the_official_example_is_exact():
    x = jnp.asarray([[0.1, 0.2]])
    norm = gm.nn.RMSNorm()
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(ours, np.asarray([[0.6324429, 1.2648858]], np.float32))


def test_norm_in_bfloat16_rounds_once():
    x = RNG.normal(size=(5, 64)).astype(ml_dtypes.bfloat16)
    scale = (RNG.normal(size=64) * 1e-3).astype(ml_dtypes.bfloat16)
    ours = gm.nn.RMSNorm().apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale.astype(np.float64))
    assert ours.dtype == jnp.bfloat16
    # float32 inside: only a value within 1e-6 of a rounding boundary may fall on the other side of it.
    assert np.mean(np.asarray(ours) != exact.astype(ml_dtypes.bfloat16)) < 0.01


EQUATIONS = [
    ("BTD,NDH->BTNH", (2, 3, 6), (4, 6, 5)),  # the summed axis in the middle of the weight
    ("BTD,CKDH->CBTKH", (2, 3, 6), (2, 4, 6, 5)),
    ("BTD,CNDH->CBTNH", (2, 40, 6), (3, 4, 6, 5)),  # more rows than are multiplied head by head
    ("BTNH,NHD->BTD", (2, 3, 4, 5), (4, 5, 6)),
    ("...D,CFD->...CF", (2, 3, 6), (2, 7, 6)),
    ("...D,CDF->...CF", (6,), (2, 6, 7)),
    ("...F,FD->...D", (2, 3, 7), (7, 6)),
    ("...D,VD->...V", (3, 6), (9, 6)),
    ("...D,VD->...V", (3, 6), (4096, 6)),  # a table in blocks, for a few rows
    ("TD,SNDH->STNH", (1, 4), (3, 2, 4, 3)),
    ("ANH,NHD->AD", (1, 2, 4), (2, 4, 8)),
    ("BD,BDF->BF", (3, 6), (3, 6, 7)),  # an equation of another kind
    ("DB,DF->FB", (6, 3), (6, 7)),
]


@pytest.mark.parametrize(("eqn", "x_shape", "w_shape"), EQUATIONS, ids=[e[0] for e in EQUATIONS])
def test_einsum_is_numpys(eqn, x_shape, w_shape):
    x, w = RNG.normal(size=x_shape).astype(np.float32), RNG.normal(size=w_shape).astype(np.float32)
    ours = _layers.weight_einsum(eqn, jnp.asarray(x), jnp.asarray(w))
    exact = np.einsum(eqn, x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=40 * EPS32 * np.abs(exact).max())


def test_einsum_refuses_weights_of_another_size():
    with pytest.raises(ShapeError, match=r"BTD,NDH->BTNH.*\(1, 2, 8\).*\(2, 4, 3\)"):
        _layers.weight_einsum("BTD,NDH->BTNH", jnp.ones((1, 2, 8)), jnp.ones((2, 4, 3)))


@pytest.mark.parametrize(
    ("x", "w", "result"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),
        ("int32", "bfloat16", "bfloat16"),
    ],
)
def test_activations_meet_weights_in_the_wider_dtype(x, w, result):
    y = _layers.weight_einsum("BD,DF->BF", jnp.ones((1, 2), x), jnp.ones((2, 3), w))
    assert y.dtype == jnp.dtype(result)


def test_a_weight_is_never_copied_in_a_decoding_step():
    """The compiled program of one row makes no array as large as the weight, so it holds no copy of it."""
    w = jnp.zeros((4, 64, 32))
    for eqn, x in (("BTD,NDH->BTNH", jnp.zeros((1, 1, 64))), ("BTNH,NHD->BTD", jnp.zeros((1, 1, 4, 64)))):
        text = jax.jit(_layers.weight_einsum, static_argnums=0).lower(eqn, x, w).compile().as_text()
        entry = text[text.index("ENTRY") :]
        made = [line.split(" = ")[1] for line in entry.splitlines() if " = " in line and "parameter(" not in line]
        weights = [line for line in made if "bitcast(" not in line and f"{w.size}" in _sizes(line)]
        assert not weights, weights


def _sizes(instruction: str) -> list[str]:
    shape = instruction.split("{")[0].partition("[")[2].rstrip("]")
    return [str(np.prod([int(n) for n in shape.split(",") if n.isdigit()]))]


def test_embedder_official_examples():
    table = {"params": {"input_embedding": jnp.ones((10, 4))}}
    embedder = gm.nn.Embedder(vocab_size=10, embed_dim=4)
    for tokens in ([2, 3], [[2, 3, 4], [5, 6, 7]]):
        encoded = embedder.apply(table, jnp.asarray(tokens), method="encode")
        np.testing.assert_array_equal(encoded, np.full((*np.shape(tokens), 4), 2.0))
    for vector, logit in (([1, 2, 0, 0], 3.0), ([[1, 2, 0, 0], [3, 4, 0, 0]], [[3.0], [7.0]])):
        decoded = embedder.apply(table, jnp.asarray(vector), method="decode")  # integers are taken too
        np.testing.assert_array_equal(decoded, np.ones((*np.shape(vector)[:-1], 10)) * logit)


def test_logits_are_summed_in_float32():
    """512 products of 1 and 1/256: a bfloat16 accumulator stops growing at 1 (1 + 1/256 rounds back to 1)."""
    table = {"params": {"input_embedding": jnp.full((3, 512), 1 / 256, jnp.bfloat16)}}
    logits = gm.nn.Embedder(3, 512).apply(table, jnp.ones((1, 512), jnp.bfloat16), method="decode")
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(logits, np.float32), 2.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_feed_forward(transposed):
    D, F = 6, 10
    x, gate, up, down = (RNG.normal(size=s).astype(np.float32) for s in ((2, 3, D), (D, F), (D, F), (F, D)))
    both = np.stack([gate.T, up.T]) if transposed else np.stack([gate, up])
    layer = gm.nn.FeedForward(D, F, transposed)
    ours = layer.apply({"params": {"gating_einsum": both, "linear": down}}, jnp.asarray(x))
    g = (x @ gate).astype(np.float64)
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    exact = (gelu * (x @ up)) @ down
    np.testing.assert_allclose(ours, exact, rtol=0, atol=20 * EPS32 * np.abs(exact).max())


def test_parameters_have_the_dtype_they_were_asked_in():
    x = jnp.ones((1, 2, 6))
    for dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        for layer in (gm.nn.RMSNorm(dtype=dtype), gm.nn.FeedForward(6, 10, True, dtype=dtype)):
            tree = jax.eval_shape(layer.init, jax.random.key(0), x)
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(expected)}


def test_other_flax_modules_may_still_create_parameters_without_a_shape():
    """Importing gm.nn changes nothing in flax: `self.param(name, init)` works."""
    import flax.linen as nn

    class Plain(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("p", lambda key: jnp.ones((2,)))

    assert Plain().init_with_output(jax.random.key(0))[0].shape == (2,)
