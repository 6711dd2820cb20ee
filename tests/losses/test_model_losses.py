# SPDX-License-Identifier: Apache-2.0
"""Losses of whole models: heads of wrapped models, packed rows, rematerialization."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm, quants
from gemma.errors import ConfigError, DataError, ShapeError
from gemma.gm import losses
from gemma.gm.nn import PackedArray

T = 12
WHOLE_BLOCKS = dict(hidden_size=64, intermediate_size=96, head_dim=32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(5, 300, (2, T)))


@functools.cache
def tiny(family="gemma3", **changes):
    return gm.testing.tiny_model(family, **changes)


def lora(model, **fields):
    return gm.nn.LoRA(rank=2, model=model, dtype=jnp.float32, **fields)


def moved(model, params, seed=3):
    """The parameters of a LoRA around a model, whose factors are no longer zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(seed)
    fresh = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.2, x.dtype), shapes)
    return gm.peft.merge_params(params, gm.peft.split_params(fresh).lora)


def packed(params):
    """With the table and one layer's weights as they stand in a Q8_0 file."""

    def of(leaf, summed):
        tensor = quants.quantize(np.asarray(leaf).reshape(-1, leaf.shape[-1]), quants.QuantType.Q8_0)
        return PackedArray.of(tensor, leaf.shape, summed, jnp.float32)

    tree = jax.tree.map(lambda leaf: leaf, params)
    tree["embedder"]["input_embedding"] = of(params["embedder"]["input_embedding"], (1, 1))
    tree["layer_0"]["mlp"]["gating_einsum"] = of(params["layer_0"]["mlp"]["gating_einsum"], (2, 1))
    return tree


def wrapped(kind):
    """(model, params) of a tiny model with caps, small enough to compile quickly."""
    found = tiny("gemma2", num_hidden_layers=1, layer_pattern="L", **WHOLE_BLOCKS)
    model, params = found.model, found.params
    if kind == "plain":
        return model, params
    if kind == "everything":  # dropout, packed leaves, rounded leaves, an adapter on the table
        inner = gm.nn.QuantizationAwareWrapper(method="int4", model=model)
        model, params = lora(inner, alpha=6.0, dropout=0.3, targets=("mlp", "embedder")), packed(params)
    elif kind == "rounded table":
        model = lora(gm.nn.QuantizationAwareWrapper(method="int4", model=model), targets=("embedder",))
    elif kind == "untied adapter":
        model = lora(model, tie_embedder=False, targets=("embedder",))
    return model, moved(model, params)


@pytest.mark.parametrize("kind", ["plain", "everything", "rounded table", "untied adapter"])
def test_the_head_is_the_models(kind):
    model, params = wrapped(kind)

    @jax.jit
    def run(params):
        hidden = losses.hidden_states(model, params, dict(tokens=TOKENS))
        return model.apply({"params": params}, TOKENS).logits, losses.head(model, params)(hidden)

    expected, got = run(params)
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if kind != "plain":  # and the parameters in question were there to be seen
        plain = losses.head(*wrapped("plain"))
        assert (losses.head(model, params).a is None) == (kind == "untied adapter")
        assert losses.head(model, params).cap == plain.cap == 3.0


def test_a_missing_adapter_is_named():
    model, params = lora(tiny().model, targets=("embedder",)), tiny().params
    with pytest.raises(ShapeError, match="embedder/lora/"):
        losses.head(model, params)
    with pytest.raises(ShapeError, match="embedder/input_embedding"):
        losses.head(tiny().model, {"layer_0": {}})


# ---- packed rows -----------------------------------------------------------------------------------------------------

ROWS = (7, 4, 9)  # longer than the window of 5


def rows():
    rng = np.random.default_rng(5)
    ids = [rng.integers(5, 300, n + 1) for n in ROWS]
    return [(row[:-1], row[1:], rng.random(len(row) - 1) < 0.7) for row in ids]


def laid_out(*lines, length=22):
    """A batch of lines, each of several rows."""
    fields = dict(tokens=int, targets=int, loss_mask=bool, positions=int, segment_ids=int)
    batch = {name: np.zeros((len(lines), length), kind) for name, kind in fields.items()}
    for line, chosen in enumerate(lines):
        at = 0
        for number, (tokens, targets, mask) in enumerate(chosen, 1):
            part = slice(at, at + len(tokens))
            values = (tokens, targets, mask, np.arange(len(tokens)), number)
            for name, value in zip(fields, values, strict=True):
                batch[name][line, part] = value
            at += len(tokens)
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("family", ["gemma3", "gemma2"])
def test_packed_rows_lose_as_much_as_single_ones(family):
    found = tiny(family)
    one, two, three = rows()

    @jax.jit
    def run(batch):
        hidden = losses.hidden_states(found.model, found.params, batch)
        return hidden, losses.token_nll(found.model, found.params, hidden, batch["targets"], batch["loss_mask"])

    empty = ()
    together = laid_out((one, two, three), empty, empty)
    hidden, (total, count) = run(together)
    single, (expected, labels) = run(laid_out((one,), (two,), (three,)))
    assert count == labels > 0
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(hidden[0, 7:11], single[1, :4], atol=1e-5 * float(jnp.abs(single).max()))

    other = (one[0] + 1, *one[1:])
    changed, _ = run(laid_out((other, two, three), empty, empty))
    assert np.asarray(changed[0, 7:20]).tobytes() == np.asarray(hidden[0, 7:20]).tobytes()
    assert not np.array_equal(changed[0, :7], hidden[0, :7])

    mixed = run(together | dict(segment_ids=jnp.ones_like(together["tokens"])))[1][0]
    assert abs(float(mixed) - float(expected)) > 1e-3  # what it costs when segments see each other


def test_packing_mask():
    expected = ["x.....", "xx....", "..x...", "..xx..", "..xxx.", "......"]
    got = losses.packing_mask(jnp.asarray([[1, 1, 2, 2, 2, 0]]))
    assert ["".join(".x"[int(seen)] for seen in row) for row in got[0]] == expected
    with pytest.raises(ShapeError, match="segment_ids: expected integers"):
        losses.packing_mask(jnp.ones((2, 3)))
    found, batch = tiny(), dict(tokens=TOKENS, segment_ids=jnp.ones_like(TOKENS))
    with pytest.raises(DataError, match="need positions that restart"):
        losses.hidden_states(found.model, found.params, batch)
    with pytest.raises(DataError, match="rows with images cannot be packed"):
        losses.hidden_states(found.model, found.params, batch | dict(images=jnp.zeros((2, 1, 16, 16, 3))))


# ---- rematerialization -----------------------------------------------------------------------------------------------


def remat_case(kind):
    """(model, params, batch)."""
    batch = dict(tokens=TOKENS)
    if kind == "images":
        found = tiny(images=True, num_hidden_layers=1, layer_pattern="L")
        start = found.tokenizer.special.start_of_image
        pictures = np.random.default_rng(1).uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
        return found.model, found.params, dict(tokens=TOKENS.at[:, 3].set(start), images=jnp.asarray(pictures))
    if kind == "plain":
        return *wrapped("plain"), batch
    return *wrapped(kind), batch


@pytest.mark.parametrize(
    "kind", ["plain", *(pytest.param(k, marks=pytest.mark.slow) for k in ("everything", "images"))]
)
def test_remat_changes_no_number(kind):
    model, params, batch = remat_case(kind)
    leaves, tree = jax.tree.flatten(params)
    trained = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    rngs = {"dropout": jax.random.key(1)} if kind == "everything" else None

    def gradient(remat):
        network = model.clone(remat=remat)

        def loss(chosen):
            whole = list(leaves)
            for i, leaf in zip(trained, chosen, strict=True):
                whole[i] = leaf
            whole = jax.tree.unflatten(tree, whole)
            hidden = losses.hidden_states(network, whole, batch, rngs=rngs)
            return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape))

        return jax.value_and_grad(loss)

    chosen = [leaves[i] for i in trained]
    value, expected = jax.jit(gradient(None))(chosen)
    for remat in ("block", "dots") if kind == "plain" else ("block",):
        assert str(jax.make_jaxpr(gradient(remat))(chosen)).count("prevent_cse") == model.config.num_layers
        other, found = jax.jit(gradient(remat))(chosen)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        for a, b in zip(expected, found, strict=True):
            # Run operation by operation the plain model gives the same bytes; compiled, other operations are fused:
            # more of them with pictures, and packed products round activations that differ in the last bit.
            assert np.linalg.norm(b - a) <= (1e-6 if kind == "plain" else 5e-6) * np.linalg.norm(a)
        moved = [bool(np.any(a)) for a in expected]  # all but the tower's, which is not trained
        assert sum(moved) > len(expected) // (3 if kind == "images" else 2)


def test_remat_leaves_parameters_and_sampling_alone():
    found = tiny()
    model = found.model.clone(remat="block")
    shapes = [jax.eval_shape(m.init, jax.random.key(0), TOKENS) for m in (model, found.model)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    cache = model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=16)

    def step(model, tokens, cache=None):
        return model.apply({"params": found.params}, tokens, cache=cache).logits

    programs = [str(jax.make_jaxpr(lambda t, m=m: step(m, t, cache))(TOKENS)) for m in (model, found.model)]
    assert programs[0] == programs[1] and "prevent_cse" not in programs[0]
    assert "custom_vjp" in str(jax.make_jaxpr(lambda t: step(model, t))(TOKENS))
    with pytest.raises(ConfigError, match="remat: expected None, 'block' or 'dots', got 'all'"):
        jax.eval_shape(found.model.clone(remat="all").init, jax.random.key(0), TOKENS)
