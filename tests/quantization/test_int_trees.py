# SPDX-License-Identifier: Apache-2.0
"""The official names: raw simulation, single layers, integer trees and their wrapper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quant_models import FAMILIES, IDS, load, logits, tiny

from gemma import peft
from gemma.errors import CheckpointError, ConfigError, ShapeError
from gemma.gm import nn as gm_nn


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return lambda family: tiny(family, tmp_path_factory.getbasetemp() / f"quant-{family}")


SCALES = {
    "q_einsum": (4, 1, 32),
    "kv_einsum": (2, 2, 1, 32),
    "qkv_einsum": (3, 2, 1, 32),
    "attn_vec_einsum": (1, 1, 64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_integers(family, models):
    config, folder, net = models(family)
    params = load(folder)
    tree = peft.quantize(params, method="INT8")
    for name, leaf in tree["layer_0"]["attn"].items():
        if name in SCALES:
            found = leaf["_IntEinsum_0"]
            assert (
                found["kernel"].dtype == jnp.int8
                and found["kernel"].shape == params["layer_0"]["attn"][name]["w"].shape
            )
            assert found["scale"].shape == SCALES[name]
    gating = tree["layer_0"]["mlp"]["_IntEinsum_gating_einsum"]
    assert gating["scale"].shape == ((2, 96, 1) if config.transpose_gating_einsum else (2, 1, 96))
    assert tree["layer_0"]["mlp"]["_IntEinsum_linear"]["scale"].shape == (1, 64)
    assert tree["embedder"]["input_embedding"] is params["embedder"]["input_embedding"]
    in_place = peft.quantize(params, method="INT8", in_place_keys=True)
    assert set(in_place["layer_0"]["attn"]["attn_vec_einsum"]) == {"kernel", "scale"}
    wrapper = gm_nn.IntWrapper(model=net, dtype=jnp.int8)
    seen, other = wrapper.seen(tree), wrapper.seen(in_place)
    for one, two in zip(jax.tree.leaves(seen), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)
    if family == "gemma":
        return
    exact = logits(net, params)
    ours = logits(wrapper, tree)
    assert 0 < np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
    if family == "gemma3":
        # kernel / scale of the tree and codes * scale of the packed form: the same codes, scales one rounding apart
        packed = load(folder, quantize="int8")["layer_0"]["attn"]["q_einsum"]["w"].dequantize()
        leaf = tree["layer_0"]["attn"]["q_einsum"]["_IntEinsum_0"]
        np.testing.assert_allclose(leaf["kernel"].astype(jnp.float32) / leaf["scale"], packed, rtol=3e-7)


def test_init_makes_integers(models):
    _, _, net = models("gemma3")
    made = jax.eval_shape(lambda: gm_nn.IntWrapper(model=net).init(jax.random.key(0), IDS))["params"]
    leaf = made["layer_0"]["attn"]["q_einsum"]["_IntEinsum_0"]
    assert leaf["kernel"].dtype == jnp.int4 and leaf["scale"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="int4 or int8"):
        gm_nn.IntWrapper(model=net, dtype=jnp.float32)


def test_wrappers_do_not_see_each_other(models):
    _, folder, net = models("gemma3")
    params = load(folder)
    plain = logits(net, params)
    four = gm_nn.QuantizationAwareWrapper(method="int4", model=net)
    eight = gm_nn.QuantizationAwareWrapper(method="int8", model=net)
    a, b = (logits(w, params) for w in (four, eight))
    assert np.abs(a - plain).max() > 4 * np.abs(b - plain).max() > 0
    np.testing.assert_array_equal(logits(net, params), plain)
    with pytest.raises(ConfigError, match="inner ones"):
        gm_nn.IntWrapper(model=four)


def test_simulation_of_raw_arrays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 32)), jnp.float32).at[:, :, 5].set(0)
    for method, levels in (("INT4", 15), ("int8", 255)):
        y = np.asarray(peft.simulate_quantize(x, method))
        assert len(np.unique(y[..., 0])) <= levels and not y[..., 5].any()
        per_row = np.asarray(peft.simulate_quantize(x, method, axis_to_reduce=(1,)))
        assert np.abs(per_row - x).max() <= np.abs(y - x).max() * 1.001
        step = np.abs(np.asarray(x)).max(axis=(0, 1)) / (levels // 2)
        assert (np.abs(y - np.asarray(x)) <= step * 0.5001).all()
    swapped = peft.simulate_quantize(jnp.swapaxes(x, 1, 2), "q4_0")
    np.testing.assert_array_equal(jnp.swapaxes(peft.simulate_quantize(x, "Q4_0_TRANSPOSE"), 1, 2), swapped)
    sfp = np.asarray(peft.simulate_quantize(x, "sfp8"))
    np.testing.assert_allclose(np.abs(sfp).max(axis=(0, 1)), np.abs(x).max(axis=(0, 1)), rtol=1e-6)
    assert peft.simulate_quantize(x, "none") is x
    np.testing.assert_array_equal(jax.grad(lambda x: peft.simulate_quantize(x, "INT4").sum())(x), 1)
    with pytest.raises(ConfigError, match="expected one of none, int4"):
        peft.simulate_quantize(x, "int3")
    with pytest.raises(ShapeError, match="not whole blocks of 32"):
        peft.simulate_quantize(x[..., :7], "q4_0")


def test_equations():
    axes = peft.get_axis_to_reduce_from_einsum_str
    assert axes("BTD,NDH->BTNH") == (1,) and axes("BTNH,NHD->BTD") == (0, 1)
    assert axes("BSD,CKDH->CBSKH") == (2,) and axes("...F,FD->...D") == (0,)
    assert axes("q_einsum") is None and axes(None) is None


def test_single_layers():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), jnp.float32)
    dense = nn.Dense(8, bias_init=nn.initializers.ones_init())
    params = dense.init(jax.random.key(0), x)["params"]
    exact = dense.apply({"params": params}, x)
    rounded = peft.SimulateQuantizedDense(wrapped=dense, method="int8").apply({"params": params}, x)
    kernel = peft.simulate_quantize(params["kernel"], "int8")
    np.testing.assert_allclose(rounded, x @ kernel + 1, rtol=1e-5, atol=1e-5)
    high = jnp.abs(params["kernel"]).max(axis=0, keepdims=True)
    ints = {
        "kernel": jnp.round(params["kernel"] * (127 / high)).astype(jnp.int8),
        "scale": 127 / high,
        "bias": params["bias"],
    }
    int_dense = peft.IntDense(wrapped=dense, dtype=jnp.int8)
    np.testing.assert_allclose(int_dense.apply({"params": ints}, x), rounded, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rounded, exact, atol=0.05)
    einsum = nn.Einsum(shape=(4, 64, 8), einsum_str="BTD,NDH->BTNH", use_bias=False)
    made = einsum.init(jax.random.key(1), x)["params"]
    simulated = peft.SimulateQuantizedEinsum(wrapped=einsum, method="int8").apply({"params": made}, x)
    tree = {"kernel": jnp.zeros((4, 64, 8), jnp.int8), "scale": jnp.ones((4, 1, 8), jnp.float32)}
    assert (
        simulated.shape == (2, 3, 4, 8)
        and not peft.IntEinsum(wrapped=einsum, dtype=jnp.int8).apply({"params": tree}, x).any()
    )
    fresh = peft.IntEinsum(wrapped=einsum).init(jax.random.key(0), x)["params"]
    assert fresh["kernel"].dtype == jnp.int4 and fresh["scale"].shape == (4, 1, 8)
    with pytest.raises(ShapeError, match="does not spread"):
        peft.IntEinsum(wrapped=einsum).apply({"params": tree | {"scale": jnp.ones((4, 2, 8))}}, x)


def test_what_cannot_be_quantized(models):
    _, folder, _ = models("gemma3")
    params = load(folder)
    with pytest.raises(ConfigError, match="q4_0_pure.*packs them"):
        peft.quantize(params, method="q4_0")
    bad = params | {"layer_0": params["layer_0"] | {"mlp": {"linear": jnp.full((96, 64), jnp.nan)}}}
    with pytest.raises(CheckpointError, match="layer_0/mlp/linear: holds NaN"):
        peft.quantize(bad, method="int4")
    with pytest.raises(CheckpointError, match="is packed already"):
        peft.quantize(load(folder, quantize="int8"), method="int4")
    assert peft.QuantizationMethod("Int8") is peft.QuantizationMethod.INT8
    assert [m.name for m in peft.QuantizationMethod] == ["NONE", "INT4", "INT8", "Q4_0", "Q4_0_TRANSPOSE", "SFP8"]
