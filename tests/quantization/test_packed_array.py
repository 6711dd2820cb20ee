# SPDX-License-Identifier: Apache-2.0
"""The packed leaf: its numbers are those of `gemma.quants`, and JAX treats it as any other leaf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from gemma.errors import ShapeError
from gemma.gm.nn import _layers
from gemma.gm.nn._packed import Packed, PackedArray, PackedParts
from gemma.quants import PackedTensor, QuantType, quantize

ALL = [type.name for type in QuantType]


def random_bytes(type: QuantType, rows: int, columns: int, seed: int = 0) -> PackedTensor:
    """Every bit pattern, except that fp16 numbers are finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, type.row_bytes(columns)), np.uint8)
    if type.is_float:
        data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), type).data
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
    halves |= {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}
    blocks = data.reshape(rows, -1, type.block_bytes)
    for at in halves.get(type.name, ()):
        blocks[..., at + 1] &= 0xBB  # no exponent of ones; subnormal halves stay
    scale = None
    if type.has_scale:
        scale = rng.normal(size=1 if type is QuantType.SFP8 else rows).astype(np.float32)
    return PackedTensor(type, (rows, columns), data, scale)


@pytest.mark.parametrize("name", ALL)
def test_decoding_in_jax_equals_quants_bit_for_bit(name):
    packed = random_bytes(QuantType[name], 24, 512)
    leaf = PackedArray.of(packed, (2, 12, 512), (2, 1), jnp.float32)
    decode = jax.jit(lambda leaf: (leaf.dequantize(), leaf.dequantize(jnp.bfloat16), leaf.take(jnp.array([[1], [0]]))))
    values, half, rows = decode(leaf)
    expected = packed.dequantize()
    np.testing.assert_array_equal(np.asarray(values).reshape(24, 512), expected)
    np.testing.assert_array_equal(
        np.asarray(half).reshape(24, 512).astype(np.float32), expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(values)[[[1], [0]]])


def test_every_code_of_sfp8():
    packed = PackedTensor(
        QuantType.SFP8, (8, 32), np.arange(256, dtype=np.uint8).reshape(8, 32), np.ones(1, np.float32)
    )
    leaf = PackedArray.of(packed, (8, 32), (1, 1), jnp.float32)
    np.testing.assert_array_equal(np.asarray(leaf.dequantize()), packed.dequantize())


EQUATIONS = {
    "q": ("BTD,NDH->BTNH", (3, 64, 5), (1, 1), (2, 3, 64)),
    "kv": ("BTD,CKDH->CBTKH", (2, 2, 64, 4), (2, 1), (2, 3, 64)),
    "o": ("BTNH,NHD->BTD", (4, 16, 6), (0, 2), (2, 3, 4, 16)),
    "gating": ("...D,CFD->...CF", (2, 10, 64), (2, 1), (2, 3, 64)),
    "gating transposed": ("...D,CDF->...CF", (2, 64, 10), (1, 1), (2, 3, 64)),
    "linear": ("...F,FD->...D", (64, 10), (0, 1), (2, 3, 64)),
    "head": ("...D,VD->...V", (11, 64), (1, 1), (2, 64)),
    "other kind": ("BTD,NDH->BTNH", (3, 64, 32), (2, 1), (2, 3, 64)),  # summed along another axis than it is packed
}


def packed_weight(shape, summed, type=QuantType.INT4, dtype=jnp.float32) -> PackedArray:
    first, count = summed
    columns = int(np.prod(shape[first : first + count]))
    x = np.random.default_rng(1).normal(size=(int(np.prod(shape)) // columns, columns)).astype(np.float32)
    return PackedArray.of(quantize(x, type), shape, summed, dtype)


@pytest.mark.parametrize("name", EQUATIONS)
def test_einsum_is_that_of_the_decoded_weight(name):
    eqn, shape, summed, inputs = EQUATIONS[name]
    leaf = packed_weight(shape, summed)
    x = jnp.asarray(np.random.default_rng(2).normal(size=inputs), jnp.float32)
    ours = _layers.weight_einsum(eqn, x, leaf)
    exact = np.einsum(eqn, np.asarray(x, np.float64), np.asarray(leaf.dequantize(), np.float64))
    # the native product rounds activations to 15 bits of the largest of 32: half a unit each, over 64 summed values
    np.testing.assert_allclose(ours, exact, atol=np.abs(exact).max() * 2e-4)
    if summed == (2, 1) and len(shape) == 4:
        parts = [packed_weight(shape[1:], (1, 1), QuantType[t]) for t in ("Q4_0", "Q8_0")]
        stacked = PackedParts(tuple(parts))
        assert stacked.shape == shape and stacked.dequantize().shape == shape
        exact = np.einsum(eqn, np.asarray(x, np.float64), np.asarray(stacked.dequantize(), np.float64))
        np.testing.assert_allclose(stacked.einsum(eqn, x), exact, atol=np.abs(exact).max() * 2e-4)


def test_xla_product_is_exact_to_float32_rounding_and_in_runs_of_rows(monkeypatch):
    from gemma.gm.nn import _packed

    leaf = packed_weight((37, 64), (1, 1), QuantType.INT8)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 64)), jnp.float32)
    whole = leaf.einsum("BD,VD->BV", x, implementation="xla")
    monkeypatch.setattr(_packed, "_DECODED_AT_ONCE", 64 * 8)  # four runs of eight rows, and five left
    runs = jax.jit(lambda x, leaf: leaf.einsum("BD,VD->BV", x, implementation="xla"))(x, leaf)
    np.testing.assert_allclose(runs, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole, np.asarray(x) @ np.asarray(leaf.dequantize()).T, rtol=1e-5, atol=1e-5)


def test_gradient_to_the_activations_keeps_no_floats():
    leaf = packed_weight((64, 10), (0, 1))
    x = jnp.ones((3, 64), jnp.float32)

    def loss(x):
        return jnp.sum(leaf.einsum("BD,DF->BF", x, implementation="xla") ** 2)

    y = np.asarray(x) @ np.asarray(leaf.dequantize())
    np.testing.assert_allclose(jax.grad(loss)(x), 2 * y @ np.asarray(leaf.dequantize()).T, rtol=1e-4, atol=1e-4)
    kept = jax.tree.leaves(jax.vjp(loss, x)[1])
    assert all(leaf.size < 640 or leaf.dtype == jnp.uint8 for leaf in kept)


def test_a_leaf_for_jax():
    leaf = packed_weight((4, 64), (1, 1))
    tree = {"layer": {"w": leaf}}
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert paths == ["layer/w/data", "layer/w/scale"]
    moved = jax.device_put(tree, jax.devices()[0])["layer"]["w"]
    assert isinstance(moved, PackedArray) and isinstance(moved.data, jax.Array) and moved.nbytes == 4 * 32 + 4 * 4
    assert jax.jit(lambda t: t)(moved).shape == (4, 64)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), leaf, leaf)  # layers on top of each other, for a scan
    x = jnp.ones((1, 64), jnp.float32)
    total, _ = jax.lax.scan(lambda c, w: (c + w.einsum("BD,VD->BV", x), None), jnp.zeros((1, 4), jnp.float32), stacked)
    np.testing.assert_allclose(total, 2 * leaf.einsum("BD,VD->BV", x), rtol=1e-6)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    spread = jax.jit(lambda t: jax.lax.with_sharding_constraint(t, rows))(moved)
    assert spread.data.sharding.is_equivalent_to(rows, 2)
    donated = jax.jit(lambda t: jax.tree.map(lambda a: a + 0, t), donate_argnums=0)(spread)
    assert donated.type is QuantType.INT4 and spread.data.is_deleted()


def test_flax_checks_the_shape_it_stands_for():
    layer = _layers.Einsum(shape=(64, 10))
    x = jnp.ones((2, 64), jnp.float32)
    leaf = packed_weight((64, 10), (0, 1))
    assert layer.apply({"params": {"w": leaf}}, "BD,DF->BF", x).shape == (2, 10)
    with pytest.raises(ShapeError, match=r"w: expected a weight of shape \(64, 10\), got PackedArray\(INT4"):
        layer.apply({"params": {"w": packed_weight((64, 12), (0, 1))}}, "BD,DF->BF", x)
    with pytest.raises(ShapeError, match="do not fit the packed weight"):
        leaf.einsum("BD,DF->BF", jnp.ones((2, 32), jnp.float32))
    with pytest.raises(ShapeError, match="expected data uint8"):
        PackedArray(np.zeros((3, 3), np.uint8), None, QuantType.Q4_0, (4, 64), (1, 1))
    assert isinstance(leaf, Packed) and nn.Module is not None
