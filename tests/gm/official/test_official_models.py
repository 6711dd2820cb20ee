# SPDX-License-Identifier: Apache-2.0
"""Calls of `gm.nn` as official scripts and tests make them: shapes, batch dimensions, errors, building blocks."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_models import FIELDS, Small, call, config

from gemma import gm
from gemma.gm.nn import _transformer

V, D = 14, 16


def shapes_of(model, **kwargs):
    """(output, parameters) of `init_with_output`, as shapes."""
    return jax.eval_shape(lambda **k: model.init_with_output(jax.random.key(0), **k), **kwargs)


# ---- Transformer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_leading_batch_shape(small, batch):
    model, params = small
    tokens = jnp.ones((*batch, 5), jnp.int32)
    out = jax.eval_shape(lambda t: model.apply({"params": params}, t, return_hidden_states=True), tokens)
    assert isinstance(out, gm.nn.Output)
    assert out.logits.shape == (*batch, 5, V) and out.hidden_states.shape == (*batch, 5, D) and out.cache is None
    last = jax.eval_shape(lambda t: model.apply({"params": params}, tokens=t, return_last_only=True), tokens)
    assert last.logits.shape == (*batch, V) and last.hidden_states is None


def test_values_do_not_depend_on_the_batch(small):
    """Two batch dimensions, and the last token of rows that are padded: each as alone."""
    model, params = small
    tokens = jax.random.randint(jax.random.key(2), (2, 3, 5), 3, 13).at[0, 1, 3:].set(0)
    every = call(model, params, tokens).logits
    last = call(model, params, tokens, return_last_only=True).logits
    for row, length in (((0, 0), 5), ((0, 1), 3), ((1, 2), 5)):
        np.testing.assert_allclose(last[row], every[row][length - 1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(call(model, params, tokens[1, 2]).logits, every[1, 2], rtol=0, atol=1e-5)


def test_numpy_tokens_and_init_by_keyword(small):
    model, params = small
    tokens = np.asarray([[3, 4, 5]])
    assert jax.eval_shape(lambda: model.apply({"params": params}, tokens=tokens)).logits.shape == (1, 3, V)
    _, made = shapes_of(model, tokens=jnp.asarray(tokens))
    assert jax.tree.structure(made["params"]) == jax.tree.structure(params)


def test_conflicting_batch_shapes(small):
    model, params = small
    with pytest.raises(ValueError, match="Could not infer batch shape. Got conflicting values"):
        model.apply({"params": params}, jnp.ones((2, 5), jnp.int32), positions=jnp.zeros((3, 5), jnp.int32))


def test_last_only_in_two_places(small):
    _, params = small
    twice = Small(dtype=jnp.float32, return_last_only=True)
    out = jax.eval_shape(lambda: twice.apply({"params": params}, jnp.asarray([3, 4])))
    assert out.logits.shape == (V,)
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        twice.apply({"params": params}, jnp.asarray([3, 4]), return_last_only=True)


def test_outputs_are_in_the_compute_dtype(dummy):
    model, params = dummy
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = jnp.asarray([4, 5, 6])
    out = jax.eval_shape(lambda: model.apply({"params": params}, tokens, return_hidden_states=True))
    assert out.logits.dtype == jnp.bfloat16 and out.hidden_states.dtype == jnp.bfloat16


def test_cache_and_explicit_arguments(small):
    """Prefill into a cache, then one token: positions, mask and cache given as the official loop gives them."""
    model, params = small
    tokens = jnp.asarray([[3, 4, 5, 6]])
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=8)
    assert set(cache) == {"layer_0", "layer_1"}
    assert set(cache["layer_0"]) >= {"k", "v", "end_index", "positions"}
    assert cache["layer_0"]["k"].shape == (1, 8, 1, 8) and cache["layer_0"]["end_index"].shape == (1,)
    assert cache["layer_0"]["positions"].shape == (1, 8)
    causal, positions = jnp.tril(jnp.ones((3, 8), bool))[None], jnp.arange(3)[None]
    out = call(model, params, tokens[:, :3], cache=cache, positions=positions, attention_mask=causal)
    assert out.cache["layer_1"]["end_index"].tolist() == [3]
    mask = (jnp.arange(8) < 4)[None, None, :]
    step = call(model, params, tokens[:, 3:], cache=out.cache, positions=jnp.asarray([[3]]), attention_mask=mask)
    whole = call(model, params, tokens).logits
    np.testing.assert_allclose(out.logits, whole[:, :3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(step.logits, whole[:, 3:], rtol=0, atol=1e-5)


def test_equal_fields_are_equal_models():
    assert Small() == Small() and hash(Small()) == hash(Small())
    assert Small() != Small(dtype=jnp.float32)
    assert Small(tokens="batch.input").tokens == "batch.input"


def test_keys_of_a_trainer():
    """A trainer finds out what to pass from this method alone, with no import of its library."""
    keys = gm.nn.Gemma3_4B(tokens="batch.input", images="batch.image").__kontext_keys__()
    assert keys["tokens"] == "batch.input" and keys["images"] == "batch.image"


def test_a_foreign_transformer_is_like_ours():
    class Other(nn.Module):
        config: gm.nn.config.TransformerConfig
        INFO = _transformer.ModelInfo(tokenizer_version=3)

        @nn.compact
        def __call__(self, tokens, **kwargs):
            return gm.nn.Output(logits=nn.Dense(10)(tokens), cache=None, hidden_states=None)

    def apply(model: gm.nn.TransformerLike, tokens):
        return model.apply(model.init(jax.random.key(0), tokens), tokens).logits

    with jax.numpy_dtype_promotion("standard"):
        assert apply(Other(config=config()), jnp.ones((1, 10), jnp.int32)).shape == (1, 10)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_shapes_and_text_only():
    model = gm.nn.Gemma3_4B()
    tokens, images = jnp.ones((2, 16), jnp.int32), jnp.ones((2, 1, 64, 64, 3), jnp.uint8)
    out, variables = shapes_of(model, tokens=tokens)
    assert out.logits.shape == (2, 16, 262144)
    assert "vision_encoder" in variables["params"]  # created without images too
    f32 = [variables["params"]["vision_encoder"], variables["params"]["embedder"]["mm_input_projection"]]
    assert {leaf.dtype for leaf in jax.tree.leaves(f32)} == {jnp.dtype(jnp.float32)}
    assert variables["params"]["embedder"]["input_embedding"].dtype == jnp.bfloat16
    text_only = gm.nn.Gemma3_4B(text_only=True)
    said = "The model 'Gemma3_4B' does not have vision encoder, yet images are provided."
    with pytest.raises(ValueError, match=said + ".*text_only=True"):
        shapes_of(text_only, tokens=tokens, images=images)
    with pytest.raises(ValueError, match="does not have vision encoder"):
        shapes_of(gm.nn.Gemma3_270M(), tokens=tokens, images=images)


def test_images_as_part_of_the_call():
    """With images the logits have as many rows as the text had; `[B, H, W, C]` is one image per row."""
    loaded = gm.testing.tiny_model(images=True)
    shape = lambda tokens, **k: (
        jax.eval_shape(lambda: loaded.model.apply({"params": loaded.params}, tokens, **k)).logits.shape
    )
    tokens = jnp.full((2, 16), 50, jnp.int32).at[:, 3].set(loaded.tokenizer.special.start_of_image)
    for images in (jnp.zeros((2, 1, 24, 32, 3), jnp.uint8), jnp.zeros((2, 24, 32, 3), jnp.uint8)):
        assert shape(tokens, images=images) == (2, 16, 320)
    assert shape(tokens[0], images=jnp.zeros((24, 32, 3), jnp.uint8), return_last_only=True) == (320,)
    assert loaded.model.vision_encoder == loaded.model.config.vision_encoder  # on a module that is not bound


# ---- config ---------------------------------------------------------------------------------------------------------


def test_config():
    ours = config()
    assert ours.num_layers == 2 and hash(ours) == hash(config()) and ours == config()
    with pytest.raises(ValueError, match=r"Missing `cache_length=` kwarg when calling `init_cache\(\)`."):
        ours.init_cache(2, cache_length=None)
    cache = ours.init_cache(batch_size=2, cache_length=5)
    assert cache["layer_1"]["v"].shape == (2, 5, 1, 8) and cache["layer_1"]["v"].dtype == jnp.bfloat16
    norm = gm.nn.config.QueryPreAttentionNormalisation
    scalar = lambda kind: config(query_pre_attn_norm=kind).query_pre_attn_scalar()
    assert scalar(norm.BY_ONE_OVER_SQRT_HEAD_DIM) == 8**-0.5
    assert scalar(norm.BY_EMBED_DIM_DIV_NUM_HEADS) == 8
    assert scalar(norm.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS) == 8**-0.5
    inputs = ours.input_config
    assert inputs.support_images is False
    assert gm.nn.Gemma3_4B().config.input_config.support_images is True
    assert gm.nn.Gemma3_4B().config.input_config.num_tokens_per_image == 256


def test_layer_patterns():
    make, types = gm.nn.config.make_attention_layers_types, gm.nn.AttentionType
    assert types.GLOBAL.value == 1 and types.LOCAL_SLIDING.value == 2
    pattern = gm.nn.config.GEMMA3_ATTENTION_PATTERN
    assert tuple(pattern) == (types.LOCAL_SLIDING,) * 5 + (types.GLOBAL,)
    made = make(pattern, num_layers=8)
    assert tuple(made) == tuple(pattern) + (types.LOCAL_SLIDING,) * 2


def test_positional_config():
    """The first ten fields have no default and are positional."""
    ours = gm.nn.config.TransformerConfig(*list(FIELDS.values())[:10])
    assert ours.num_embed == FIELDS["num_embed"] and ours.attention_types == FIELDS["attention_types"]


# ---- building blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "w", "eqn", "shape"),
    [((1, 4), (3, 2, 4, 3), "TD,SNDH->STNH", (3, 1, 2, 3)), ((1, 2, 4), (2, 4, 8), "ANH,NHD->AD", (1, 8))],
)
def test_einsum(x, w, eqn, shape):
    out = gm.nn.Einsum(w).apply({"params": {"w": jnp.ones(w)}}, eqn, jnp.ones(x))
    assert out.shape == shape
    named = gm.nn.Einsum(w, "kernel", nn.initializers.zeros).init(jax.random.key(0), eqn, jnp.ones(x))
    assert named["params"]["kernel"].shape == w and not named["params"]["kernel"].any()


def test_rms_norm():
    x = jnp.array([[0.1, 0.2]])
    params = gm.nn.RMSNorm().init(jax.random.key(0), x)
    assert params["params"]["scale"].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(gm.nn.RMSNorm().apply(params, x), jnp.array([[0.6324429, 1.2648858]]))


def test_embedder():
    embedder = gm.nn.Embedder(vocab_size=10, embed_dim=4)
    params = {"params": {"input_embedding": jnp.ones((10, 4))}}
    for shape in ((2,), (2, 3)):
        out = embedder.apply(params, jnp.ones(shape, jnp.int32), method=gm.nn.Embedder.encode)
        np.testing.assert_array_equal(out, jnp.full((*shape, 4), 2.0))
    with jax.numpy_dtype_promotion("standard"):  # an int vector on a float table, as the official test has it
        out = embedder.apply(params, jnp.array([1, 2, 3, 4]), method=gm.nn.Embedder.decode)
    np.testing.assert_array_equal(out, jnp.full((10,), 10.0))
    out = embedder.apply(params, jnp.ones((3, 4)), method=gm.nn.Embedder.decode)
    np.testing.assert_array_equal(out, jnp.full((3, 10), 4.0))


def attention(kind=gm.nn.AttentionType.GLOBAL, kv=2, **changes):
    return gm.nn.Attention(
        num_heads=2, num_kv_heads=kv, features=8, head_dim=4, attn_type=kind, query_pre_attn_scalar=0.5, **changes
    )


def attention_inputs(batch, length, kv, slots):
    x = jax.random.normal(jax.random.key(0), (batch, length, 8))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cache = gm.nn.Attention.init_cache(slots, kv, 4, batch, dtype=jnp.float32)
    return x, positions, cache, jnp.ones((batch, length, slots))


@pytest.mark.parametrize("kv", [1, 2])
def test_attention(kv):
    """Called by position, with a mask of floats."""
    inputs = attention_inputs(3, 6, kv, 7)
    module = attention(kv=kv)
    params = jax.jit(module.init)(jax.random.key(0), *inputs)
    cache, out = jax.jit(module.apply)(params, *inputs)
    assert cache["k"].shape == cache["v"].shape == (3, 7, kv, 4) and out.shape == (3, 6, 8)
    assert cache["end_index"].tolist() == [6, 6, 6]
    bare = (inputs[0], inputs[1], None, jnp.ones((3, 6, 6), bool))
    no_cache, out = jax.eval_shape(lambda: module.apply(params, *bare))
    assert no_cache is None and out.shape == (3, 6, 8)


def test_attention_weights_can_be_captured():
    inputs = attention_inputs(1, 3, 2, 3)
    module = attention()
    params = jax.jit(module.init)(jax.random.key(0), *inputs)
    _, state = jax.jit(functools.partial(module.apply, capture_intermediates=True))(params, *inputs)
    weights = state["intermediates"]["attention_weights"]["__call__"][0]
    assert weights.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(weights.sum(-1), np.ones((1, 3, 2)), rtol=0, atol=1e-6)


def test_sliding_window():
    inputs = attention_inputs(2, 6, 2, 7)
    params = jax.jit(attention().init)(jax.random.key(0), *inputs)
    _, everything = jax.jit(attention().apply)(params, *inputs)
    local = attention(gm.nn.AttentionType.LOCAL_SLIDING, sliding_window_size=2)
    _, windowed = jax.jit(local.apply)(params, *inputs)
    assert not np.allclose(everything, windowed)
    with pytest.raises(ValueError, match="Sliding_window_size must be set if Local Sliding attention type"):
        attention(gm.nn.AttentionType.LOCAL_SLIDING).apply(params, *inputs)


@pytest.mark.parametrize("transposed", [False, True])
def test_feed_forward(transposed):
    module = gm.nn.FeedForward(features=4, hidden_dim=3, transpose_gating_einsum=transposed)
    gating = (2, 3, 4) if transposed else (2, 4, 3)
    params = {"linear": jnp.ones((3, 4)), "gating_einsum": jnp.ones(gating)}
    x = jnp.full((5, 1, 4), 0.25)
    out = module.apply({"params": params}, x)
    np.testing.assert_allclose(out, np.full((5, 1, 4), 3 * 0.841192), rtol=1e-5)  # 3 * gelu(1), tanh form


def test_block():
    inputs = attention_inputs(5, 1, 2, 3)
    fields = dict(num_heads=2, num_kv_heads=2, embed_dim=8, head_dim=4, hidden_dim=3, query_pre_attn_scalar=0.5)
    fields |= dict(attn_type=gm.nn.AttentionType.GLOBAL, transpose_gating_einsum=False)
    variables = jax.jit(gm.nn.Block(**fields, use_post_attn_norm=True, use_post_ffw_norm=True).init)(
        jax.random.key(0), *inputs
    )
    assert {"post_attention_norm", "post_ffw_norm"} < set(variables["params"])
    outs = []
    for attn, ffw in ((False, False), (True, False), (False, True)):
        block = gm.nn.Block(**fields, use_post_attn_norm=attn, use_post_ffw_norm=ffw)
        cache, out = jax.jit(block.apply)(variables, *inputs)
        assert cache["k"].shape == (5, 3, 2, 4) and cache["end_index"].shape == (5,) and out.shape == (5, 1, 8)
        outs.append(out)
    assert not np.allclose(outs[0], outs[1]) and not np.allclose(outs[0], outs[2])


# ---- math -----------------------------------------------------------------------------------------------------------


def test_rope():
    out = gm.math.apply_rope(jnp.ones((2, 1, 2, 4)), jnp.array([[1], [0]]), base_frequency=100)
    turned = [-0.30116868, 0.89517075, 1.3817732, 1.0948375]
    np.testing.assert_array_almost_equal(out, jnp.array([[[turned] * 2], [[[1.0] * 4] * 2]]))
    half = gm.math.apply_rope(jnp.ones((1, 1, 1, 8)), jnp.array([[3]]), base_frequency=100, rope_proportion=0.5)
    moved = np.flatnonzero(np.asarray(half).reshape(-1) != 1).tolist()
    assert moved == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="scale_factor must be >= 1.0, got"):
        gm.math.apply_rope(jnp.ones((1, 1, 1, 4)), jnp.array([[1]]), base_frequency=100, scale_factor=0.5)


def test_count_consecutive_and_positions():
    from gemma.gm.math import _pos_utils

    assert gm.math.count_consecutive([1, 1, 2, 1]) == ((1, 2), (2, 1), (1, 1))
    mask = jnp.asarray([[1, 1, 1, 0], [0, 1, 1, 0]], bool)
    assert _pos_utils.build_positions_from_mask(mask).tolist() == [[0, 1, 2, 2], [0, 0, 1, 1]]
