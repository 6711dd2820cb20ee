# SPDX-License-Identifier: Apache-2.0
"""The PyTorch operators over packed weights: against numpy, with gradients, compiled, and without the native library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from native_cases import EPS, TYPES, bound, columns, fitted_weight, magnitudes, raw_weight

from gemma._torch import linear as linears
from gemma.errors import KernelError, PromptError, ShapeError, UnsupportedError
from gemma.kernels import _native, _torch
from gemma.quants import QuantType

NATIVE = _native.library() is not None
needs_native = pytest.mark.skipif(not NATIVE, reason=f"native library: {_native.why_missing()}")
Q8 = _native.TYPE_IDS[QuantType.Q8_0]


def operands(packed):
    scale = None if packed.scale is None else torch.from_numpy(packed.scale)
    return torch.from_numpy(packed.data), scale, _native.TYPE_IDS[packed.type], packed.shape[1]


def normal(*shape, seed=3):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


@pytest.fixture(params=["native", "blocks"])
def way(request, monkeypatch):
    """With the native library, and by unpacking blocks of rows."""
    if request.param == "native" and not NATIVE:
        pytest.skip(f"native library: {_native.why_missing()}")
    if request.param == "blocks":
        monkeypatch.setattr(_torch, "available", lambda: False)
        monkeypatch.setattr(_torch, "_BLOCK", 700)  # several blocks, the last one smaller
    return request.param


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_product_gradient_and_rows(type, way):
    packed = raw_weight(type, 37, columns(type, 2))
    weight, wide = operands(packed), packed.dequantize().astype(np.float64)
    cols = packed.shape[1]
    x, dy = normal(2, 3, cols).requires_grad_(), normal(2, 3, 37)
    y = _torch.packed_matmul(x, *weight)
    flat = x.detach().reshape(-1, cols).numpy()
    exact = flat.astype(np.float64) @ wide.T
    # By blocks, a plain product in float32: one rounding for each element, in any order.
    room = bound(packed, flat) if way == "native" else (cols + 8) * EPS * (np.abs(flat).astype(float) @ np.abs(wide).T)
    assert (np.abs(y.detach().reshape(-1, 37).numpy() - exact) <= room).all()
    dx = torch.autograd.grad(y, x, dy)[0].reshape(-1, cols).numpy()
    exact = dy.reshape(-1, 37).double().numpy() @ wide
    room = (37 + 8) * EPS * (dy.reshape(-1, 37).abs().double().numpy() @ magnitudes(packed))
    assert (np.abs(dx - exact) <= room).all()
    ids = torch.tensor([[0, 36], [5, 5]])
    assert torch.equal(_torch.packed_rows(ids, *weight), torch.from_numpy(packed.dequantize())[ids])
    with torch.no_grad():  # what plain calls take is the same function
        assert torch.equal(_torch.product(x, *weight), y)


def test_half_types_are_rounded_once(way):
    weight = operands(raw_weight(QuantType.Q4_K, 8, 256))
    x = normal(3, 256)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(_torch.packed_matmul(half, *weight), _torch.packed_matmul(half.float(), *weight).to(dtype))
        assert _torch.packed_matmul_grad(normal(3, 8).to(dtype), *weight).dtype == dtype


def test_opcheck():
    """Schema, fake, autograd and tracing of every operator, as PyTorch checks them."""
    weight = operands(raw_weight(QuantType.INT8, 6, 32))
    quick = dict(test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    torch.library.opcheck(_torch.packed_matmul, (normal(2, 32).requires_grad_(), *weight))
    torch.library.opcheck(_torch.packed_matmul_grad, (normal(2, 6).requires_grad_(), *weight), **quick)
    torch.library.opcheck(_torch.packed_rows, (torch.tensor([[1, 5]]), *weight), **quick)
    if NATIVE:
        pair = (normal(2, 8).bfloat16().requires_grad_(), normal(4, 8).bfloat16().requires_grad_())
        torch.library.opcheck(_torch.linear_bf16, pair)


def test_traced_as_one_operator():
    """torch.compile sees the operator, not its inside; a second gradient goes through it, too."""
    weight = operands(fitted_weight(QuantType.Q8_0, 8, 32))
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: torch.tanh(_torch.packed_matmul(x, *weight)), backend=backend, fullgraph=True)
    x = normal(2, 32)
    assert torch.equal(compiled(x), torch.tanh(_torch.product(x, *weight)))
    assert any("packed_matmul" in name for name in graphs[0])
    x = normal(2, 32).double().float().requires_grad_()
    slope = torch.autograd.grad(_torch.packed_matmul(x, *weight).square().sum(), x, create_graph=True)[0]
    v = normal(2, 32, seed=5)
    got = torch.autograd.grad((slope * v).sum(), x)[0]
    plain = torch.from_numpy(fitted_weight(QuantType.Q8_0, 8, 32).dequantize())
    torch.testing.assert_close(got, 2 * v @ plain.T @ plain, atol=1e-4, rtol=1e-3)


@needs_native
def test_linear_bf16():
    """bfloat16 in float32, rounded once; gradients of both operands; the layer takes it for few rows."""
    x, weight = normal(2, 5, 96).bfloat16().requires_grad_(), normal(33, 96, seed=4).bfloat16().requires_grad_()
    y = _torch.linear_bf16(x, weight)
    exact = x.double() @ weight.double().T
    size = (x.double().abs() @ weight.double().abs().T) * EPS * (96 + 8) + exact.abs() * 2**-8
    assert ((y - exact).abs() <= size).all() and y.dtype == torch.bfloat16
    dy = normal(2, 5, 33).bfloat16()
    got = torch.autograd.grad(y, (x, weight), dy)
    expected = torch.autograd.grad(exact, (x, weight), dy.double())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2**-6, rtol=2**-7)
    before = linears._NATIVE[torch.bfloat16]
    linears._NATIVE[torch.bfloat16] = False  # as on a CPU without such instructions
    try:
        with torch.no_grad():
            assert torch.equal(linears.linear(x, weight), _torch.product_bf16(x, weight))
    finally:
        linears._NATIVE[torch.bfloat16] = before


def test_nothing(way):
    weight = operands(raw_weight(QuantType.Q8_0, 4, 64))
    assert _torch.packed_matmul(torch.zeros(0, 64), *weight).shape == (0, 4)
    assert _torch.packed_matmul_grad(torch.zeros(0, 4), *weight).shape == (0, 64)
    assert _torch.packed_rows(torch.zeros(2, 0, dtype=torch.long), *weight).shape == (2, 0, 64)
    none = (torch.zeros(0, 68, dtype=torch.uint8), None, Q8, 64)
    assert _torch.packed_matmul(torch.zeros(2, 64), *none).shape == (2, 0)
    assert _torch.packed_matmul_grad(torch.ones(2, 0), *none).tolist() == [[0.0] * 64] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=torch.zeros(2, 64, dtype=torch.double)), r"x: expected float32, bfloat16 or float16 \[..., 64\]"),
        (dict(x=torch.zeros(2, 32)), r"\[..., 64\], got torch.float32 \(2, 32\)"),
        (dict(data=torch.zeros(4, 68, dtype=torch.int8)), r"data: expected uint8 \[rows, 68\] .* got torch.int8"),
        (dict(data=torch.zeros(4, 67, dtype=torch.uint8)), r"data: expected uint8 \[rows, 68\]"),
        (dict(cols=63), "whole blocks of 32"),
        (dict(type=77), r"type: expected one of 0 \(F32\)"),
        (dict(scale=torch.zeros(4)), "scale: Q8_0 needs none"),
        (dict(type=1001, data=torch.zeros(4, 64, dtype=torch.uint8)), r"INT8 needs float32 \(4,\), got None"),
        (
            dict(type=1001, data=torch.zeros(4, 64, dtype=torch.uint8), scale=torch.zeros(4).double()),
            r"INT8 needs float32 \(4,\), got \(torch.float64",
        ),
    ],
)
def test_refused(change, words):
    call = dict(x=torch.zeros(2, 64), data=torch.zeros(4, 68, dtype=torch.uint8), scale=None, type=Q8, cols=64) | change
    for function in (_torch.packed_matmul, _torch.product):
        with pytest.raises(ShapeError, match=words):
            function(**call)
    with pytest.raises(ShapeError, match=words), torch.device("meta"):  # while tracing
        _torch.packed_matmul(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()})


def test_ids_and_strides_and_devices(way):
    weight = operands(raw_weight(QuantType.Q8_0, 4, 64))
    for bad, number in ((-1, -1), (4, 4)):
        with pytest.raises(PromptError, match=rf"ids: expected 0..3, got {number}"):
            _torch.packed_rows(torch.tensor([0, bad]), *weight)
    with pytest.raises(ShapeError, match="ids: expected integers"):
        _torch.packed_rows(torch.zeros(2), *weight)
    x = normal(64, 3).T  # not contiguous
    assert torch.equal(_torch.packed_matmul(x, *weight), _torch.packed_matmul(x.contiguous(), *weight))
    every_other = (weight[0].repeat_interleave(2, 0)[::2], *weight[1:])  # rows apart from each other
    assert torch.equal(_torch.packed_matmul(x, *every_other), _torch.packed_matmul(x, *weight))
    with pytest.raises(UnsupportedError, match="run on the CPU"):
        _torch.product(torch.zeros(2, 64, device="meta"), weight[0].to("meta"), *weight[1:])


@needs_native
def test_errors_of_the_library_are_ours(monkeypatch):
    weight = operands(raw_weight(QuantType.Q8_0, 4, 64))
    with pytest.raises(ShapeError, match="contiguous rows"):
        _torch.product(torch.zeros(1, 64), weight[0].T.contiguous().T, *weight[1:])

    def failing(status, what):
        raise KernelError(f"{what}: {status}")

    monkeypatch.setattr(_native, "check", failing)
    with pytest.raises(KernelError, match="gk_matmul: 0"):
        _torch.product(torch.zeros(1, 64), *weight)


def test_numpy_twin():
    """ml_dtypes and torch agree on what bfloat16 bits mean at this border."""
    packed = raw_weight(QuantType.BF16, 3, 5)
    bits = torch.from_numpy(packed.data).view(torch.bfloat16)
    np.testing.assert_array_equal(bits.float().numpy(), packed.data.view(ml_dtypes.bfloat16).astype(np.float32))
