# SPDX-License-Identifier: Apache-2.0
"""The decoder as a whole: its tree, batch dimensions, options, errors, and that it keeps no state between calls."""

from __future__ import annotations

import dataclasses
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nn_helpers import CONFIGS, QUICK, TINY, WINDOW, compiled, ids, tiny

from gemma import gm
from gemma.gm.nn import _layers

SAME = dict(rtol=0, atol=1e-5)


def shapes(model, **arguments):
    tokens = arguments.pop("tokens", jnp.ones((1, 4), jnp.int32))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, **arguments))["params"]


def paths(tree) -> dict[str, tuple]:
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# ---- parameter trees ------------------------------------------------------------------------------------------------


def test_tree_of_gemma3_270m():
    tree = paths(shapes(gm.nn.Gemma3_270M()))
    layer = {
        "pre_attention_norm/scale": (640,),
        "attn/q_einsum/w": (4, 640, 256),
        "attn/kv_einsum/w": (2, 1, 640, 256),
        "attn/attn_vec_einsum/w": (4, 256, 640),
        "attn/_query_norm/scale": (256,),
        "attn/_key_norm/scale": (256,),
        "post_attention_norm/scale": (640,),
        "pre_ffw_norm/scale": (640,),
        "mlp/gating_einsum": (2, 2048, 640),
        "mlp/linear": (2048, 640),
        "post_ffw_norm/scale": (640,),
    }
    expected = {f"layer_{i}/{name}": shape for i in range(18) for name, shape in layer.items()}
    assert len(tree) == 200
    assert sum(int(np.prod(shape)) for shape in tree.values()) == 268_098_176
    assert tree == expected | {"embedder/input_embedding": (262_144, 640), "final_norm/scale": (640,)}


def test_trees_that_differ():
    seven = paths(shapes(gm.nn.Gemma_7B()))
    assert seven["layer_0/attn/qkv_einsum/w"] == (3, 16, 3072, 256)
    assert not any("/q_einsum/" in name or "/kv_einsum/" in name or "post_" in name for name in seven)
    two = paths(shapes(gm.nn.Gemma2_2B()))
    assert len(two) == 236
    assert sum(int(np.prod(shape)) for shape in two.values()) == 2_614_636_800
    assert two["layer_0/mlp/gating_einsum"] == (2, 2304, 9216)
    assert two["embedder/input_embedding"] == (256_128, 2304)


def test_dtype_of_new_parameters():
    def dtypes(model):
        return {leaf.dtype.name for leaf in jax.tree.leaves(shapes(model))}

    assert dtypes(gm.nn.Transformer.from_config(CONFIGS["gemma3"])) == {"bfloat16"}
    assert dtypes(gm.nn.Transformer.from_config(CONFIGS["gemma3"], dtype=jnp.float32)) == {"float32"}


# ---- models as values -----------------------------------------------------------------------------------------------


def test_equal_models_are_one_static_argument():
    assert gm.nn.Gemma3_270M() == gm.nn.Gemma3_270M()
    assert hash(gm.nn.Gemma3_270M()) == hash(gm.nn.Gemma3_270M())
    assert gm.nn.Gemma3_270M() != gm.nn.Gemma3_270M(dtype=jnp.float32)
    assert pickle.loads(pickle.dumps(gm.nn.Gemma3_4B(text_only=True))) == gm.nn.Gemma3_4B(text_only=True)


def test_text_only_belongs_to_models_with_vision():
    for name in ("Gemma3_4B", "Gemma3_12B", "Gemma3_27B"):
        model = getattr(gm.nn, name)(text_only=True)
        assert model.config.gemma.vision is None
        assert model.vision_encoder is None
    for name in ("Gemma3_270M", "Gemma3_1B", "Gemma2_2B"):
        with pytest.raises(TypeError):
            getattr(gm.nn, name)(text_only=True)


def test_tokenizer_versions():
    assert gm.nn.Gemma_2B.INFO.tokenizer_version == gm.nn.Gemma2_9B.INFO.tokenizer_version == 2
    assert gm.nn.Gemma3_270M.INFO.tokenizer_version == gm.nn.Gemma3_27B().INFO.tokenizer_version == 3


def test_a_subclass_states_a_model_of_its_own():
    class Mine(gm.nn.Transformer):
        config: gm.nn.config.TransformerConfig = gm.nn.config.TransformerConfig.of(CONFIGS["gemma2"])
        INFO = gm.nn.config.ModelInfo(tokenizer_version=3)

    assert Mine().config.num_layers == 2
    out = jax.eval_shape(lambda: Mine().init_with_output(jax.random.key(0), jnp.ones((2, 3), jnp.int32))[0])
    assert out.logits.shape == (2, 3, 50)


def test_places_of_inputs_in_a_trainers_batch():
    model = gm.nn.Gemma3_270M(tokens="batch.input")
    assert model.__kontext_keys__() == {
        "tokens": "batch.input",
        "images": None,
        "positions": None,
        "attention_mask": None,
    }
    assert gm.nn.Gemma3_270M().__kontext_keys__()["tokens"] == "__KEY_REQUIRED__"


def test_a_model_is_transformer_like():
    assert isinstance(gm.nn.Gemma3_270M(), gm.nn.TransformerLike)


# ---- batch dimensions -----------------------------------------------------------------------------------------------


def test_batch_dimensions():
    run, tokens = compiled("gemma3"), ids(2, 3, 5)
    out = run(tokens, return_hidden_states=True)
    assert out.logits.shape == (2, 3, 5, 50)
    assert out.hidden_states.shape == (2, 3, 5, 24)
    assert out.cache is None
    flat = run(tokens.reshape(6, 5))
    assert flat.hidden_states is None
    np.testing.assert_allclose(np.asarray(out.logits).reshape(6, 5, 50), flat.logits, **SAME)

    positions = np.broadcast_to(np.arange(5, dtype=np.int32), tokens.shape)
    mask = np.broadcast_to(np.tril(np.ones((5, 8), bool)), (2, 3, 5, 8))
    cache = tiny("gemma3")[0].init_cache(batch_size=6, dtype=jnp.float32, cache_length=8)
    cached = run(tokens, positions=positions, attention_mask=mask, cache=cache)
    assert cached.cache["layer_0"]["k"].shape[0] == 6  # a cache has one batch dimension
    np.testing.assert_allclose(cached.logits, out.logits, **SAME)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_shapes_of_the_last_token_only(batch):
    model, variables = tiny("gemma3")
    out = jax.eval_shape(
        lambda: model.apply(variables, jnp.asarray(ids(*batch, 5)), return_last_only=True, return_hidden_states=True)
    )
    assert out.logits.shape == (*batch, 50)
    assert out.hidden_states.shape == (*batch, 24)


def test_lists_are_tokens_too():
    model, variables = tiny("gemma3")
    assert jax.eval_shape(lambda: model.apply(variables, [[3, 4, 5]])).logits.shape == (1, 3, 50)


# ---- options and errors ---------------------------------------------------------------------------------------------


def test_last_only_is_said_once():
    model, variables = tiny("gemma3")
    last = model.clone(return_last_only=True)
    assert jax.eval_shape(last.apply, variables, jnp.ones((2, 3), jnp.int32)).logits.shape == (2, 50)
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        last.apply(variables, jnp.ones((2, 3), jnp.int32), return_last_only=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: gm.nn.Transformer.from_config(CONFIGS["gemma3"]),
            r"The model 'Transformer' does not have vision encoder, yet images are provided\.",
        ),
        (
            lambda: gm.nn.Gemma3_4B(text_only=True),
            r"'Gemma3_4B' does not have vision encoder, .* The model was created with `text_only=True`\.",
        ),
    ],
)
def test_images_need_a_vision_encoder(model, message):
    with pytest.raises(ValueError, match=message):
        shapes(model(), images=jnp.zeros((1, 1, 8, 8, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=np.ones((1, 3), np.float32)), "tokens: expected integers, got float32"),
        (dict(tokens=np.int32(3)), "tokens: expected at least 1 axes"),
        (dict(tokens=np.ones((1, 0), np.int32)), "at least one token per row, got none"),
        (dict(positions=np.zeros((1, 3), np.float32)), "positions: expected integers, got float32"),
        (dict(positions=np.zeros((1, 2), np.int32)), r"positions: expected 3 queries as in tokens, got .*\(1, 2\)"),
        (dict(positions=np.zeros((2, 3), np.int32)), r"Could not infer batch shape. Got conflicting values: .*\(2,\)"),
        (dict(attention_mask=np.ones((1, 3, 3))), "attention_mask: expected booleans, got float"),
        (dict(attention_mask=np.ones((1, 2, 3), bool)), "attention_mask: expected 3 queries"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model, variables = tiny("gemma3")
    with pytest.raises(ValueError, match=message):
        model.apply(variables, **dict(tokens=np.ones((1, 3), np.int32)) | arguments)


def test_float16_is_refused_where_it_overflows():
    with pytest.raises(ValueError, match="float16 cannot hold the activations of Gemma 3"):
        shapes(gm.nn.Transformer.from_config(CONFIGS["gemma3"], dtype=jnp.float16))
    shapes(gm.nn.Transformer.from_config(CONFIGS["gemma2"], dtype=jnp.float16))


def test_an_untied_head_is_refused():
    config = dataclasses.replace(CONFIGS["gemma3"], tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings is False"):
        shapes(gm.nn.Transformer.from_config(config))


def test_a_bidirectional_model_sees_the_future_and_takes_no_cache():
    config = dataclasses.replace(CONFIGS["gemma3"], use_bidirectional_attention=True)
    model, (_, variables) = gm.nn.Transformer.from_config(config), tiny("gemma3")
    run = jax.jit(lambda tokens: model.apply(variables, tokens).logits, compiler_options=QUICK)
    tokens = ids(1, 9)
    moved = []
    for changed in range(9):
        other = tokens.copy()
        other[0, changed] = 1 + tokens[0, changed] % 40
        moved.append(np.abs(run(other) - run(tokens))[0].max(-1) > 1e-6)
    # Through the global layer everything sees everything.
    assert np.all(moved)
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=9, windowed=True)
    with pytest.raises(ValueError, match="cannot use a cache"):
        model.apply(variables, jnp.asarray(tokens), cache=cache)


# ---- purity ---------------------------------------------------------------------------------------------------------


def test_an_interceptor_changes_its_own_calls_only():
    """What a wrapper such as LoRA does: intercept layers during a call. No other call may see it, in any order."""
    model, variables = tiny("gemma3")
    met = []

    def doubled(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if not isinstance(context.module, _layers.Einsum):
            return out
        met.append(context.module.name)
        return out * 2

    def program():
        return str(jax.make_jaxpr(model.apply)(variables, jnp.asarray(ids(1, 4))))

    plain = program()
    with nn.intercept_methods(doubled):
        inside = program()
    # Per layer: q, k and v, the output, gate and up, down.
    assert len(met) == TINY["num_hidden_layers"] * 5
    assert inside != plain
    assert program() == plain
    with nn.intercept_methods(doubled):
        assert program() == inside


def test_gradients_are_finite_with_padding():
    model, variables = tiny("gemma3")
    tokens = ids(2, 3 * WINDOW)
    tokens[1, 1:] = 0  # the padding reaches far beyond the window

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grads(variables):
        def loss(variables):
            logits = model.apply(variables, tokens).logits
            return jnp.mean(jnp.where((jnp.asarray(tokens) != 0)[..., None], logits, 0.0) ** 2)

        return jax.grad(loss)(variables)

    leaves = jax.tree.leaves(grads(variables))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


def test_all_names_of_the_packages():
    for module in (gm, gm.nn, gm.math):
        for name in module.__all__:
            assert getattr(module, name) is not None
