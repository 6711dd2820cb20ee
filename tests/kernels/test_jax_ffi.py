# SPDX-License-Identifier: Apache-2.0
"""Packed weights in JAX: the custom calls against numpy, inside every transformation, and what they refuse."""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from native_cases import EPS, TYPES, bound, columns, fitted_weight, magnitudes, raw_weight

from gemma.errors import KernelError, ShapeError
from gemma.kernels import _jax, _native
from gemma.quants import QuantType

pytestmark = pytest.mark.skipif(_jax.why_missing() is not None, reason=str(_jax.why_missing()))
Q8 = QuantType.Q8_0


def operands(packed):
    return jnp.asarray(packed.data), None if packed.scale is None else jnp.asarray(packed.scale)


def normal(*shape, seed=3):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def context():
    with _native.Context(threads=1) as made:
        yield made


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_product_gradient_and_rows(type, context):
    packed = raw_weight(type, 37, columns(type, 2))
    cols, (data, scale) = packed.shape[1], operands(packed)
    x, dy, ids = normal(2, 3, cols), normal(2, 3, 37), np.array([[0, 36, -1], [5, 99, -37]], np.int32)

    @jax.jit
    def everything(x, dy, ids, data, scale):
        call = functools.partial(_jax.packed_matmul, type=type, cols=cols)
        y, backwards = jax.vjp(lambda x: call(x, data, scale), x)
        half = call(x.astype(jnp.bfloat16), data, scale)
        return y, backwards(dy)[0], half, _jax.packed_rows(data, scale, ids, type=type, cols=cols)

    y, dx, half, rows = jax.device_get(everything(x, dy, ids, data, scale))
    flat, weight = x.reshape(-1, cols), packed.dequantize()
    exact = flat.astype(np.float64) @ weight.astype(np.float64).T
    assert (np.abs(y.reshape(-1, 37) - exact) <= bound(packed, flat)).all()
    np.testing.assert_array_equal(y.reshape(-1, 37), context.matmul(_native.NativeWeight(packed), flat))
    # The gradient sums floats over the 37 outputs; a weight is rounded once before.
    exact = dy.reshape(-1, 37).astype(np.float64) @ weight.astype(np.float64)
    room = (37 + 8) * EPS * (np.abs(dy.reshape(-1, 37)).astype(np.float64) @ magnitudes(packed))
    assert (np.abs(dx.reshape(-1, cols) - exact) <= room).all()
    # bfloat16 is widened, and the float32 result rounded once.
    wide = context.matmul(_native.NativeWeight(packed), flat.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert half.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(half.reshape(-1, 37), wide.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rows, weight[[[0, 36, 36], [5, 36, 0]]])


@pytest.fixture(scope="module")
def square():
    """A weight [64, 64] in Q8_0, of norm about 1, and the function of it."""
    packed = fitted_weight(Q8, 64, 64)
    return operands(packed)[0], functools.partial(_jax.packed_matmul, type=Q8, cols=64), packed.dequantize()


def test_loops_and_checkpoint(square):
    """In scan and while_loop, each under jit, the same bits as one call after the other; gradients through them."""
    data, call, weight = square
    x = jnp.asarray(normal(2, 64))

    def step(x):
        return jnp.tanh(call(x, data))

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (jax.checkpoint(step)(carry), None), x, None, length=3)[0]

    def looped(x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[1])), (0, x))[1]

    one = jax.jit(step)
    expected = one(one(one(x)))
    np.testing.assert_array_equal(jax.jit(scanned)(x), expected)
    np.testing.assert_array_equal(jax.jit(looped)(x), expected)
    plain = x
    for _ in range(3):
        plain = np.tanh(plain @ weight.T)
    gradient = jax.jit(jax.grad(lambda x: scanned(x).sum()))(x)
    dense = jax.grad(lambda x: functools.reduce(lambda h, _: jnp.tanh(h @ weight.T), range(3), x).sum())(x)
    # Activations are rounded to 15 bits: three layers of that, each amplified by at most the weight's norm.
    size = np.linalg.norm(weight, 2)
    room = 3 * 2**-15 * max(1, size) ** 3 * np.sqrt(64)
    np.testing.assert_allclose(expected, plain, atol=room)
    np.testing.assert_allclose(gradient, dense, atol=2 * room)


def test_gradient_of_gradient(square):
    """The gradient of x -> <grad f(x), v> is 2 W.T W v for f(x) = |W x|^2."""
    data, call, weight = square
    x, v = jnp.asarray(normal(64)), jnp.asarray(normal(64, seed=4))
    slope = jax.grad(lambda x: jnp.sum(call(x, data) ** 2))
    got = jax.jit(jax.grad(lambda x: jnp.vdot(slope(x), v)))(x)
    exact = 2 * weight.astype(np.float64).T @ (weight.astype(np.float64) @ np.asarray(v))
    np.testing.assert_allclose(got, exact, atol=2**-13 * np.linalg.norm(weight, 2) ** 2 * np.linalg.norm(v))


def test_vmap(square):
    """A batch of activations is one call; of weights, a loop; of both as well."""
    data, call, _ = square
    x = jnp.asarray(normal(3, 2, 64))
    folded = jax.jit(jax.vmap(lambda x: call(x, data)))
    expected = jax.jit(lambda x: call(x, data))(x)
    np.testing.assert_array_equal(folded(x), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: call(x, data), 1, 1))(x), expected)
    text = folded.lower(x).as_text()
    assert text.count("@gemmakit_matmul(") == 1 and "while" not in text
    weights = jnp.stack([data, data[::-1], data])
    each = jnp.stack([call(x[i], w) for i, w in enumerate(weights)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(call))(x, weights), each)
    one = jax.jit(jax.vmap(lambda w: call(x[0], w)))(weights)
    np.testing.assert_array_equal(one[1], call(x[0], weights[1]))
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: call(x, data).sum())))(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: call(x, data).sum())(x))
    table = jax.vmap(lambda i: _jax.packed_rows(data, None, i, type=Q8, cols=64))(jnp.array([3, 1]))
    np.testing.assert_array_equal(table, _jax.packed_rows(data, None, jnp.array([3, 1]), type=Q8, cols=64))


def test_no_weight_is_copied(square):
    """As an argument of jit, and in the body of a loop, the bytes reach the call as they are."""
    data, call, _ = square

    def repeated(x, data):
        x = call(x, data)
        return jax.lax.fori_loop(0, 5, lambda _, x: call(x, data) * 0.1, x)

    text = jax.jit(repeated).lower(jnp.zeros((1, 64)), data).compile().as_text()
    moved = [line for line in text.splitlines() if "u8[" in line.split("=")[-1].split("(")[0]]
    allowed = ("parameter(", "get-tuple-element(", "tuple(", "while(", "while.", "ENTRY", "->")
    assert [line for line in moved if not any(word in line for word in allowed)] == []
    assert text.count("gemmakit_matmul") >= 2


def test_called_from_several_threads(square):
    data, call, _ = square
    function = jax.jit(lambda x: call(call(x, data), data))
    inputs = [jnp.asarray(normal(4, 64, seed=i)) for i in range(8)]
    expected = [np.asarray(function(x)) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(function, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, right)


def test_nothing_and_not_finite(square):
    data, call, weight = square
    assert call(jnp.zeros((0, 64)), data).shape == (0, 64)
    assert _jax.packed_rows(data, None, jnp.zeros((2, 0), jnp.int32), type=Q8, cols=64).shape == (2, 0, 64)
    x = normal(3, 64)
    x[1, 5] = np.nan
    y = np.asarray(call(jnp.asarray(x), data))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=jnp.zeros((2, 64), jnp.float16)), r"x: expected float32 or bfloat16 \[..., 64\], got float16"),
        (dict(x=jnp.zeros((2, 32))), r"\[..., 64\], got float32 \(2, 32\)"),
        (dict(x=jnp.zeros(())), "x: expected"),
        (dict(data=jnp.zeros((4, 68), jnp.int8)), r"data: expected uint8 \[rows, 68\] .* got int8"),
        (dict(data=jnp.zeros((4, 67), jnp.uint8)), r"data: expected uint8 \[rows, 68\]"),
        (dict(data=jnp.zeros((2, 4, 68), jnp.uint8)), "data: expected uint8"),
        (dict(cols=63), "whole blocks of 32"),
        (dict(type="Q8_0"), "type: expected a gemma.quants.QuantType"),
        (dict(scale=jnp.zeros(4)), "scale: Q8_0 needs none"),
        (dict(type=QuantType.INT8, data=jnp.zeros((4, 64), jnp.uint8)), r"scale: INT8 needs float32 \(4,\), got None"),
        (
            dict(type=QuantType.SFP8, data=jnp.zeros((4, 64), jnp.uint8), scale=jnp.zeros(4)),
            r"scale: SFP8 needs float32 \(1,\)",
        ),
    ],
)
def test_refused_while_tracing(change, words):
    call = dict(x=jnp.zeros((2, 64)), data=jnp.zeros((4, 68), jnp.uint8), scale=None, type=Q8, cols=64) | change
    x, data, scale = (call.pop(name) for name in ("x", "data", "scale"))
    with pytest.raises(ShapeError, match=words):
        jax.eval_shape(lambda x, data, scale: _jax.packed_matmul(x, data, scale, **call), x, data, scale)


def test_rows_refuses():
    with pytest.raises(ShapeError, match="ids: expected integers, got float32"):
        _jax.packed_rows(jnp.zeros((4, 68), jnp.uint8), None, jnp.zeros(2), type=Q8, cols=64)
    with pytest.raises(ShapeError, match="a weight with rows"):
        _jax.packed_rows(jnp.zeros((0, 68), jnp.uint8), None, jnp.zeros(2, jnp.int32), type=Q8, cols=64)


def test_without_native_kernels(monkeypatch):
    monkeypatch.setattr(_jax, "available", lambda: False)
    with pytest.raises(KernelError, match="packed weights need the native kernels"):
        _jax.packed_matmul(jnp.zeros((2, 64)), jnp.zeros((4, 68), jnp.uint8), type=Q8, cols=64)
