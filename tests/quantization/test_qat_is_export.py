# SPDX-License-Identifier: Apache-2.0
"""What is trained is what is shipped: the forward pass under quantization-aware training equals, bit for bit, that of
the exported file; and the packed forms of memory and file have the same bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_models import FAMILIES, IDS, load, logits, tiny

from gemma import peft, saving
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import ShapeError
from gemma.gm import nn
from gemma.gm.nn._packed import Packed
from gemma.gm.nn._quantization import on_grid
from gemma.peft._quantization_methods import on_grid as on_grid_rows
from gemma.quants import quantize

FILES = {
    "int4": ("safetensors", "int4"),
    "int8": ("ckpt", "int8"),
    "q4_0": ("gguf", "q4_0_pure"),
    "sfp8": ("sbs", "sfp8"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return lambda family: tiny(family, tmp_path_factory.getbasetemp() / f"quant-{family}")


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_trained_is_the_grid_shipped(family, method, models, tmp_path):
    config, folder, net = models(family)
    trained = load(folder)
    seen = jax.jit(lambda p: on_grid(p, config, method))(trained)
    format, recipe = FILES[method]
    path = tmp_path / ("m.gguf" if format == "gguf" else "m")
    with open_checkpoint(folder) as source:
        saving.save(path, load_tensors(source), config, format=format, quantize=recipe)
    shipped = load(path)
    for (where, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(seen), jax.tree.leaves(shipped), strict=True):
        if where[-1].key != "scale":  # norms: a GGUF keeps 1 + w, which loses the last bits of w and none of 1 + w
            theirs = theirs[: len(ours)]  # a GGUF of Gemma 1 does not say that this table has no padding
            np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(where))
    packed, kept = load(folder, quantize=peft.QuantizationMethod(method)), load(path, quantize="keep")
    pick = [leaf for leaf in jax.tree.leaves(packed, is_leaf=_packed) if _packed(leaf)]
    same = [leaf for leaf in jax.tree.leaves(kept, is_leaf=_packed) if _packed(leaf)]
    assert len(pick) == len(same) > 8
    for ours, theirs in zip(jax.tree.leaves(pick), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
    if family == "gemma3":  # the same numbers in the same program: the logits, too
        wrapper = nn.QuantizationAwareWrapper(method=method, model=net)
        own = logits(wrapper, trained)
        there = logits(net, shipped)
        np.testing.assert_array_equal(logits(net, seen), there)
        np.testing.assert_array_equal(own, there)  # the wrapper's program has the rounding in it
        if method in ("int4", "q4_0"):  # decoded inside of the product, or native products with 15-bit activations
            np.testing.assert_allclose(logits(net, kept), own, atol=np.abs(own).max() * 2e-3)
        assert not np.array_equal(jax.tree.leaves(trained)[0], jax.tree.leaves(seen)[0])  # it does quantize


def _packed(leaf) -> bool:
    return isinstance(leaf, Packed)


@pytest.mark.parametrize("method", FILES)
def test_rows_of_every_magnitude(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 128)).astype(np.float32) * np.logspace(-20, 3, 96).astype(np.float32)[:, None]
    x[3], x[4, :32], x[5] = 0, 0, np.float32(0.125) * rng.integers(-8, 9, 128)  # zeros, and exact halves of steps
    found = peft.QuantizationMethod(method)
    np.testing.assert_array_equal(
        jax.jit(lambda x: on_grid_rows(x, found))(x), quantize(x, found.type).dequantize(), err_msg=method
    )


def test_sfp8_of_every_bfloat16_and_its_neighbours():
    """Every code and every midpoint is a bfloat16."""
    near = np.arange(1 << 15, dtype=np.uint32) << 16
    x = np.concatenate([near, near + 1, near[1:] - 1]).view(np.float32)
    x = x[x <= 1.875]
    x = np.concatenate([x, -x])
    rows = np.zeros((32, -(-x.size // 32)), np.float32)
    rows.reshape(-1)[: x.size] = x
    got = jax.jit(lambda x: on_grid_rows(x, peft.QuantizationMethod.SFP8))(rows)
    np.testing.assert_array_equal(got, quantize(rows, peft.QuantizationMethod.SFP8.type).dequantize())


def test_gradients_pass_straight_through_and_zeros_stay(models):
    config, folder, net = models("gemma3")
    params = {"layer_0": {"attn": load(folder)["layer_0"]["attn"]}}
    values, pull = jax.vjp(jax.jit(lambda p: on_grid(p, config, "int4")), params)
    for leaf in jax.tree.leaves(pull(jax.tree.map(jnp.ones_like, params))[0]):
        np.testing.assert_array_equal(leaf, 1)
    assert not np.asarray(values["layer_0"]["attn"]["q_einsum"]["w"])[0, :, 3].any()


def test_the_wrapper_is_transparent(models):
    config, folder, net = models("gemma3")
    wrapper = nn.QuantizationAwareWrapper(method="INT4", model=net)
    shapes = jax.eval_shape(lambda: wrapper.init(jax.random.key(0), IDS))["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(load(folder))
    assert wrapper.config is net.config and wrapper.method is peft.QuantizationMethod.INT4
    assert wrapper.clone(return_last_only=True).model.return_last_only
    params = load(folder)
    assert nn.QuantizationAwareWrapper(model=net).seen(params)["final_norm"] is params["final_norm"]


def test_blocks_that_do_not_divide_a_row_are_named(models, tmp_path):
    from gemma import testing

    config = testing.tiny_config("gemma3")  # rows of 72
    testing.write_tiny_safetensors(tmp_path, config)
    for quantize_to in ("int4", "q4_0_pure", peft.QuantizationMethod.Q4_0):
        with pytest.raises(ShapeError, match="embed: its rows of 72 values are not whole blocks of 32"):
            load(tmp_path, quantize=quantize_to)
    with pytest.raises(ShapeError, match="embed: its rows of 72"):
        on_grid(load(tmp_path), config, "q4_0")
    mixed = load(tmp_path, quantize="q4_0")  # a mix falls back, as llama.cpp does
    assert isinstance(mixed["layer_0"]["mlp"]["linear"], jax.Array) or mixed["layer_0"]["mlp"]["linear"].type.name
    assert load(tmp_path, quantize="int8")["layer_0"]["mlp"]["linear"].type.name == "INT8"
