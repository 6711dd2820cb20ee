# SPDX-License-Identifier: Apache-2.0
"""Adapters over a base in fewer bits: packed weights, integer trees, and weights rounded as in training for a file."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_models import QUICK, TOKENS, adapted

from gemma import gm, peft, testing
from gemma.errors import CheckpointError, ConfigError
from gemma.gm.ckpts import load_params
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.nn._packed import Packed
from gemma.peft import _einsum_utils, _lora

TARGETS = ("attention", "mlp")
IDS = jnp.asarray(TOKENS[:1, :6])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, network, parameters): one layer, rows of whole blocks."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=32, num_hidden_layers=1, layer_pattern="G")
    loaded = gm.testing.tiny_model("gemma3", **sizes)
    folder = tmp_path_factory.mktemp("base")
    testing.write_tiny_safetensors(folder, loaded.model.config.gemma)
    return folder, loaded.model, load_params(folder)


@pytest.fixture(scope="module")
def lora(base):
    """Random adapters; their tree is the same over every base."""
    _, net, params = base
    return peft.split_params(
        adapted(base=types.SimpleNamespace(model=net, params=params), rank=2, targets=TARGETS)[1]
    ).lora


def gradients(model):
    """f(base, lora): ((loss, logits), gradients by the adapter's numbers)."""

    def loss(lora, base):
        out = model.apply({"params": peft.merge_params(base, lora)}, IDS).logits
        picked = jnp.take_along_axis(jax.nn.log_softmax(out[:, :-1]), IDS[:, 1:, None], axis=-1)
        return -jnp.mean(picked), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return lambda base, lora: run(lora, base)


@pytest.fixture(scope="module")
def plain(base):
    return gradients(gm.nn.LoRA(rank=2, model=base[1], targets=TARGETS, dtype=jnp.float32))


def wrapped(kind, base):
    """(the model inside of the adapters, the base's parameters, those as the floats that they stand for)."""
    folder, net, floats = base
    if kind == "packed":
        params = load_params(folder, quantize="q8_0")
        return net, params, jax.tree.map(_dense, params, is_leaf=lambda leaf: isinstance(leaf, Packed))
    if kind == "int":
        inner, params = gm.nn.IntWrapper(model=net, dtype=jnp.int8), peft.quantize(floats, method="int8")
    else:
        inner, params = gm.nn.QuantizationAwareWrapper(model=net, method="int4"), floats
    return inner, params, jax.jit(inner.seen)(params)


def _dense(leaf):
    return leaf.dequantize() if isinstance(leaf, Packed) else leaf


@pytest.mark.parametrize("kind", ["packed", "int", "qat"])
def test_a_step_of_training_moves_the_adapter_alone(kind, base, lora, plain):
    inner, params, floats = wrapped(kind, base)
    model = gm.nn.LoRA(rank=2, model=inner, targets=TARGETS, dtype=jnp.float32)
    run = gradients(model)
    before = jax.tree.map(np.array, params)
    (loss, logits), grads = run(params, lora)
    (_, want), expected = plain(floats, lora)
    (_, exact), _ = plain(base[2], lora)
    # native products round activations to 15 bits of the largest of 32; the others are the same sums
    near = 3e-3 if kind == "packed" else 1e-5
    np.testing.assert_allclose(logits, want, rtol=0, atol=near * np.abs(want).max())
    assert np.abs(want - exact).max() > 1e-4 * np.abs(want).max()  # the base is not the one of floats
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        size = np.abs(theirs).max()
        assert size > 0, path
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * near * size, err_msg=jax.tree_util.keystr(path))
    chosen = peft.mask_tree(peft.merge_params(params, lora), "lora")
    assert {path for path, on in jax.tree_util.tree_leaves_with_path(chosen) if on} == {
        path for path, _ in jax.tree_util.tree_leaves_with_path(lora)
    }
    moved = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, lora, grads)
    assert run(params, moved)[0][0] < loss
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, params), before)


def test_the_tree_of_a_wrapper_inside_is_that_of_the_base_with_adapters(base, lora):
    for kind in ("int", "qat"):
        inner, params, _ = wrapped(kind, base)
        model = gm.nn.LoRA(rank=2, model=inner, targets=TARGETS)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
        assert set(flatten(shapes)) == set(flatten(peft.merge_params(params, lora)))
        assert model.config is base[1].config


def test_wrappers_in_the_wrong_order(base):
    net = base[1]
    adapter = gm.nn.LoRA(rank=2, model=net)
    with pytest.raises(ConfigError, match="AdapterSet"):
        gm.nn.LoRA(rank=2, model=adapter)
    for outer in (gm.nn.QuantizationAwareWrapper, gm.nn.IntWrapper):
        with pytest.raises(ConfigError, match=r"the inner ones: gm.nn.LoRA\(model="):
            outer(model=adapter)


def test_packed_weights_are_not_fused_into_and_dora_looks_at_them(base, lora):
    _, params, floats = wrapped("packed", base)
    model = gm.nn.LoRA(rank=2, model=base[1], targets=TARGETS)
    with pytest.raises(CheckpointError, match="is packed .*; fuse into float weights"):
        peft.fuse_params(peft.merge_params(params, lora), model)
    eqn, place = _einsum_utils.parse("BTD,NDH->BTNH"), ("layer_0", "attn", "q_einsum")
    a, b = (flatten(lora)["/".join(place) + f"/_LoRAEinsum_0/lora/{part}"] for part in "ab")
    ratios = [_lora.dora_ratio(tree["layer_0"]["attn"]["q_einsum"]["w"], a, b, eqn, 2.0) for tree in (params, floats)]
    np.testing.assert_array_equal(*ratios)
    assert np.abs(ratios[0] - 1).max() > 1e-3


@pytest.mark.parametrize("kind", ["int", "qat"])
def test_the_base_of_a_saved_adapter_is_the_rounded_one(kind, base, lora, tmp_path):
    inner, params, floats = wrapped(kind, base)
    model = gm.nn.LoRA(rank=2, model=inner, targets=TARGETS, dtype=jnp.float32)
    merged = peft.merge_params(params, lora)
    with pytest.raises(ConfigError, match=rf"on the weights that {type(inner).__name__} makes"):
        peft.fuse_params(merged, model)
    peft.save_adapter(tmp_path / "adapter", merged, model)
    for network, tree in ((inner, params), (base[1], floats)):  # the same base
        again = peft.load_adapter(tmp_path / "adapter", network, tree)
        jax.tree.map(np.testing.assert_array_equal, again.lora, lora)
    with pytest.raises(CheckpointError, match="other weights"):
        peft.load_adapter(tmp_path / "adapter", base[1], base[2])
