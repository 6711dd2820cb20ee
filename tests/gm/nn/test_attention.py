# SPDX-License-Identifier: Apache-2.0
"""Attention and blocks through their public constructors, against slow numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_helpers import compiled, ids, numpy_attention, random_like, tiny

from gemma import gm
from gemma.gm.nn import _attend

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("T", [1, 5], ids=["token", "chunk"])
@pytest.mark.parametrize(("K", "softcap"), [(1, None), (2, 2.0), (4, None)])
def test_grouped_heads(T, K, softcap):
    B, S, N, H = 2, 6, 4, 8
    q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
    mask = RNG.random((B, T, S)) < 0.6
    mask[..., 0] = True

    @jax.jit
    def attend(q, k, v):
        weights = _attend.attention_weights(q, k, jnp.asarray(mask), softcap=softcap)
        return weights, _attend.weighted_values(weights, v)

    weights, ours = attend(q, k, v)
    assert weights.shape == (B, T, N, S)
    np.testing.assert_allclose(ours, numpy_attention(q, k, v, mask, softcap=softcap), rtol=0, atol=2e-6)


@pytest.mark.parametrize("T", [1, 2])
def test_a_row_without_keys_is_finite_and_so_are_its_gradients(T):
    q, k, v = normal(1, T, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 4)
    mask = jnp.zeros((1, T, 3), bool)

    def loss(q, k, v):
        return jnp.sum(_attend.weighted_values(_attend.attention_weights(q, k, mask), v))

    np.testing.assert_allclose(_attend.attention_weights(q, k, mask), np.full((1, T, 2, 3), 1 / 3), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))


def test_the_softmax_of_a_bfloat16_model_is_float32():
    weights = _attend.attention_weights(
        normal(1, 1, 2, 4).astype(jnp.bfloat16), normal(1, 3, 1, 4).astype(jnp.bfloat16), jnp.ones((1, 1, 3), bool)
    )
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1.0, atol=1e-6)


def variables_of(layer, *arguments):
    return random_like(jax.eval_shape(layer.init, jax.random.key(0), *arguments))


def attention(**fields):
    fields = dict(num_heads=2, num_kv_heads=2, features=8, head_dim=4, query_pre_attn_scalar=0.5) | fields
    return gm.nn.Attention(attn_type=fields.pop("attn_type", gm.nn.AttentionType.GLOBAL), **fields)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 4)])
def test_public_call_with_a_cache(heads, kv_heads):
    """As the official tests call it: float mask, everything positional; then against numpy."""
    B, T, S, H = 3, 6, 7, 4
    layer = attention(num_heads=heads, num_kv_heads=kv_heads)
    cache = gm.nn.Attention.init_cache(cache_size=S, num_heads=kv_heads, head_dim=H, batch_size=B, dtype=jnp.float32)
    x, positions = normal(B, T, 8), jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = jnp.tril(jnp.ones((T, S)))[None].repeat(B, 0)
    variables = variables_of(layer, x, positions, cache, mask)
    new, out = jax.jit(layer.apply)(variables, x, positions, cache, mask)
    assert out.shape == (B, T, 8)
    assert new["k"].shape == new["v"].shape == (B, S, kv_heads, H)
    np.testing.assert_array_equal(new["end_index"], [T] * B)
    np.testing.assert_array_equal(new["positions"], np.pad(np.tile(np.arange(T), (B, 1)), ((0, 0), (0, S - T))))

    p = {name: np.asarray(leaf["w"]) for name, leaf in variables["params"].items()}
    if heads == kv_heads:
        q, k, v = np.einsum("BTD,CNDH->CBTNH", x, p["qkv_einsum"])
    else:
        q = np.einsum("BTD,NDH->BTNH", x, p["q_einsum"])
        k, v = np.einsum("BTD,CKDH->CBTKH", x, p["kv_einsum"])
    turn = jax.jit(lambda a: gm.math.apply_rope(a, positions, base_frequency=10_000))
    mixed = numpy_attention(turn(q) * 0.5, turn(k), v, np.asarray(mask)[:, :, :T] > 0)
    np.testing.assert_allclose(out, np.einsum("BTNH,NHD->BTD", mixed, p["attn_vec_einsum"]), rtol=0, atol=2e-6)


def test_positions_and_masks_may_be_floats():
    layer, x = attention(), normal(1, 3, 8)
    positions, mask = jnp.arange(3)[None], jnp.tril(jnp.ones((1, 3, 3)))
    variables = variables_of(layer, x, positions, None, mask)

    @jax.jit
    def both(variables, x):
        exact = layer.apply(variables, x, positions, None, mask.astype(bool))
        return exact, layer.apply(variables, x, positions.astype(jnp.float32), None, mask)

    (cache, exact), (_, ours) = both(variables, x)
    assert cache is None
    np.testing.assert_array_equal(ours, exact)


def test_a_sliding_window_needs_its_size():
    layer = attention(attn_type=gm.nn.AttentionType.LOCAL_SLIDING)
    with pytest.raises(ValueError, match="Sliding_window_size must be set if Local Sliding attention type"):
        layer.init(jax.random.key(0), normal(1, 2, 8), jnp.arange(2)[None], None, jnp.ones((1, 2, 2), bool))


def test_a_sliding_layer_sees_its_window_only():
    T, x = 6, normal(1, 6, 8)
    layer = attention(attn_type=gm.nn.AttentionType.LOCAL_SLIDING, sliding_window_size=2)
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    variables = variables_of(layer, x, jnp.arange(T)[None], None, mask)
    run = jax.jit(lambda x: layer.apply(variables, x, jnp.arange(T)[None], None, mask)[1])
    moved = np.abs(np.asarray(run(x.at[0, 1].add(1.0)) - run(x)))[0].max(-1)
    assert list(moved > 0) == [False, True, True, False, False, False]


@pytest.mark.parametrize("post_attn", [False, True])
@pytest.mark.parametrize("post_ffw", [False, True])
def test_block_constructor_and_its_norms(post_attn, post_ffw):
    block = gm.nn.Block(
        num_heads=2,
        num_kv_heads=2,
        embed_dim=4,
        head_dim=6,
        hidden_dim=3,
        use_post_attn_norm=post_attn,
        use_post_ffw_norm=post_ffw,
        attn_type=gm.nn.AttentionType.GLOBAL,
        query_pre_attn_scalar=6**-0.5,
        transpose_gating_einsum=False,
    )
    cache = gm.nn.Attention.init_cache(cache_size=3, num_heads=2, head_dim=6, batch_size=5, dtype=jnp.float32)
    x, positions, mask = jnp.ones((5, 1, 4)), jnp.zeros((5, 1)), jnp.ones((5, 1, 3))
    variables = variables_of(block, x, positions, cache, mask)
    new, out = jax.eval_shape(block.apply, variables, x, positions, cache, mask)
    assert out.shape == (5, 1, 4)
    assert new["end_index"].shape == (5,)
    names = {"pre_attention_norm", "attn", "pre_ffw_norm", "mlp"}
    names |= {"post_attention_norm"} if post_attn else set()
    assert set(variables["params"]) == names | ({"post_ffw_norm"} if post_ffw else set())


def test_a_layer_built_alone_equals_the_same_layer_of_a_network():
    """`of` and the public constructor state the same layer: block 1 of the network, rebuilt from its fields."""
    model, variables = tiny("gemma3")
    config = model.config
    block = gm.nn.Block.of(config.layers[1], config)
    again = gm.nn.Block(
        **{name: getattr(block, name) for name in block.__dataclass_fields__ if name not in ("parent", "name")}
    )
    x, positions = normal(1, 9, config.embed_dim), jnp.arange(9)[None]
    mask = jnp.tril(jnp.ones((1, 9, 9), bool))
    layer = {"params": variables["params"]["layer_1"]}
    one, other = (str(jax.make_jaxpr(b.apply)(layer, x, positions, None, mask)) for b in (block, again))
    assert one == other


def test_attention_weights_can_be_captured():
    model, variables = tiny("gemma3")
    tokens = jnp.asarray(ids(2, 6))
    _, state = jax.jit(lambda v: model.apply(v, tokens, capture_intermediates=True))(variables)
    (weights,) = state["intermediates"]["layer_0"]["attn"]["attention_weights"]["__call__"]
    assert weights.shape == (2, 6, 4, 6)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1.0, atol=1e-5)
    seen = np.asarray(weights)[0, :, 0] > 0
    assert list(seen.sum(-1)) == [1, 2, 3, 4, 4, 4]  # a local layer with a window of four


def test_a_bfloat16_model_is_near_its_float32_twin():
    tokens = ids(2, 15)
    _, variables = tiny("gemma2", "bfloat16")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    exact = compiled("gemma2")(tokens, variables=wide).logits
    ours = compiled("gemma2", "bfloat16")(tokens).logits
    assert ours.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: two layers of roundings stay within some hundredths of logits capped at 3.
    assert np.abs(np.asarray(ours, np.float32) - exact).max() < 0.15
