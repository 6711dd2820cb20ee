# SPDX-License-Identifier: Apache-2.0
"""Packed weights in PyTorch on a CPU: operators `gemmakit::...` over the native kernels, with fakes and gradients.

    packed_matmul(x, data, scale, type, cols)        x @ W.T, x [..., D] to [..., O]
    packed_matmul_grad(dy, data, scale, type, cols)  dy @ W, its gradient with respect to x
    packed_rows(ids, data, scale, type, cols)        W[ids] as float32 [..., D]
    linear_bf16(x, weight)                           x @ weight.T of bfloat16, for CPUs that have no instructions for it

`type` is a number of `_native.TYPE_IDS`. Kernels get pointers; no weight is copied. Without the native library the same
operators unpack a block of rows at a time, slower. `torch.compile` and autograd go through the operators; plain calls
take the functions behind them (`product`, `rows`), which saves the dispatcher's microseconds. The modules that hold
packed weights are in `gemma/_torch/packed.py`. Axis letters: D inputs, O outputs, W bytes of a row.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from torch import Tensor

from gemma.errors import PromptError, ShapeError, UnsupportedError
from gemma.kernels import _native
from gemma.quants import PackedTensor, QuantType

TYPES = {number: type for type, number in _native.TYPE_IDS.items()}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1 << 22  # weights unpacked at once where there is no native library
_lock = threading.Lock()


def available() -> bool:
    """Whether there is a native library; without it the operators still work."""
    return _native.library() is not None


# PyTorch's own threads spin for milliseconds after each of their loops. Threads of ours then share a core with them, and
# a step of few rows takes more than twice as long as on one thread; with many rows the products outlast the spinning.
_ALONE = 8


@functools.cache
def _made_context(threads: int) -> _native.Context:
    return _native.Context(threads)


def _context(rows: int = 1) -> _native.Context:
    """One of the two contexts of this process: one thread for few rows, for many as many as PyTorch has."""
    threads = 1 if rows <= _ALONE else min(torch.get_num_threads(), _native.processors())
    with _lock:
        return _made_context(threads)


def check(data: Tensor, scale: Tensor | None, type: int, cols: int) -> None:
    """Refuses, with a ShapeError, what does not make a weight of D = `cols` inputs."""
    kind = TYPES.get(type)
    if kind is None:
        names = ", ".join(f"{number} ({known.name})" for number, known in TYPES.items())
        raise ShapeError(f"type: expected one of {names}, got {type}")
    expected = kind.row_bytes(cols)
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != expected:
        raise ShapeError(
            f"data: expected uint8 [rows, {expected}] for rows of {cols} {kind.name} values, "
            f"got {data.dtype} {tuple(data.shape)}"
        )
    if scale is None and not kind.has_scale:
        return
    wanted = None if not kind.has_scale else (1,) if kind is QuantType.SFP8 else (data.shape[0],)
    got = None if scale is None else tuple(scale.shape)
    if got != wanted or (scale is not None and scale.dtype != torch.float32):
        got = got if scale is None else (scale.dtype, got)
        raise ShapeError(f"scale: {kind.name} needs {f'float32 {wanted}' if wanted else 'none'}, got {got}")


def _check_activations(x: Tensor, size: int, name: str) -> None:
    if x.dtype not in _FLOATS or x.ndim < 1 or x.shape[-1] != size:
        raise ShapeError(f"{name}: expected float32, bfloat16 or float16 [..., {size}], got {x.dtype} {tuple(x.shape)}")


def _on_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise UnsupportedError(
            f"packed weights run on the CPU, got a tensor on {tensor.device}: load the model without `quantize` there"
        )


def plain(x: Tensor) -> bool:
    """Whether a call can skip the dispatcher: an ordinary tensor, nothing that traces, records or maps."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


# ---- what the operators compute -------------------------------------------------------------------------------------


def product(x: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`x @ W.T` in x's dtype, without the dispatcher; arguments and errors as those of the operator packed_matmul."""
    check(data, scale, type, cols)
    _check_activations(x, cols, "x")
    _on_cpu(data)
    out = x.new_empty((*x.shape[:-1], data.shape[0]))
    if out.numel() == 0:
        return out
    if not available():
        return _by_blocks(x, data, scale, type, cols, out)
    if x.dtype == torch.float16:
        return product(x.float(), data, scale, type, cols).to(x.dtype)
    return _matmul(x, _weight(data, scale, type, cols), out)


def gradient(dy: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`dy @ W`, computed in float32, in dy's dtype."""
    check(data, scale, type, cols)
    _check_activations(dy, data.shape[0], "dy")
    _on_cpu(data)
    wide = dy.float().contiguous()
    out = wide.new_zeros((*dy.shape[:-1], cols))
    if out.numel() and data.shape[0]:
        if available():
            _call("gk_matmul_grad", wide, _weight(data, scale, type, cols), out)
        else:
            for part, block in _blocks(data, scale, type, cols):
                out += wide[..., part] @ block
    return out.to(dy.dtype)


def rows(ids: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`W[ids]` as float32, equal to `gemma.quants` bit for bit."""
    check(data, scale, type, cols)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"ids: expected integers, got {ids.dtype} {tuple(ids.shape)}")
    _on_cpu(data)
    out = torch.empty((*ids.shape, cols), dtype=torch.float32)
    if out.numel() == 0:
        return out
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= data.shape[0]:
        raise PromptError(f"ids: expected 0..{data.shape[0] - 1}, got {low if low < 0 else high}")
    if available():
        weight, picked, context = _weight(data, scale, type, cols), ids.int().contiguous(), _context()
        with context.lock:
            status = _native.library().gk_rows(
                context.handle, weight, picked.data_ptr(), picked.numel(), out.data_ptr()
            )
        _native.check(status, "packed_rows")
        return out
    flat = ids.reshape(-1).long()
    scales = scale if scale is None or scale.numel() == 1 else scale[flat]
    return _unpacked(data[flat], scales, type, cols).view(out.shape)


def product_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of bfloat16 in float32, rounded once; the native library must be there."""
    _check_bf16(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if out.numel() == 0:
        return out
    struct = _native.GkWeight(
        _native.TYPE_IDS[QuantType.BF16], *weight.shape, weight.data_ptr(), weight.shape[1] * 2, None
    )
    return _matmul(x, struct, out)


def _check_bf16(x: Tensor, weight: Tensor) -> None:
    if weight.dtype != torch.bfloat16 or weight.ndim != 2 or not weight.is_contiguous() or not weight.shape[1]:
        raise ShapeError(
            f"weight: expected a contiguous bfloat16 matrix, got {weight.dtype} {tuple(weight.shape)} with strides "
            f"{weight.stride()}"
        )
    if x.dtype != torch.bfloat16 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"x: expected bfloat16 [..., {weight.shape[1]}], got {x.dtype} {tuple(x.shape)}")


def _weight(data: Tensor, scale: Tensor | None, type: int, cols: int) -> _native.GkWeight:
    """The library's view of a weight; the caller keeps the tensors alive during the call."""
    if data.stride(1) != 1 or (scale is not None and not scale.is_contiguous()):
        raise ShapeError(f"data: expected contiguous rows, got strides {data.stride()}; pass data.contiguous()")
    return _native.GkWeight(
        type, data.shape[0], cols, data.data_ptr(), data.stride(0), None if scale is None else scale.data_ptr()
    )


def _matmul(x: Tensor, weight: _native.GkWeight, out: Tensor) -> Tensor:
    return _call("gk_matmul" if x.dtype == torch.float32 else "gk_matmul_bf16", x, weight, out)


def _call(name: str, x: Tensor, weight: _native.GkWeight, out: Tensor) -> Tensor:
    """A product of the library; ctypes lets other Python threads run during it."""
    x, inner, outer = x.contiguous(), x.shape[-1], out.shape[-1]
    context = _context(x.numel() // inner)
    function = getattr(_native.library(), name)
    with context.lock:
        status = function(context.handle, weight, x.data_ptr(), x.numel() // inner, inner, out.data_ptr(), outer)
    _native.check(status, name)
    return out


def _by_blocks(x: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int, out: Tensor) -> Tensor:
    wide = x.float().contiguous()
    for part, block in _blocks(data, scale, type, cols):
        out[..., part] = (wide @ block.T).to(out.dtype)
    return out


def _blocks(data: Tensor, scale: Tensor | None, type: int, cols: int):
    """The weight in float32, some rows at a time: (slice, [rows, D])."""
    step = max(1, _BLOCK // cols)
    for start in range(0, data.shape[0], step):
        part = slice(start, min(start + step, data.shape[0]))
        scales = scale if scale is None or scale.numel() == 1 else scale[part]
        yield part, _unpacked(data[part], scales, type, cols)


def _unpacked(data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    packed = PackedTensor(
        TYPES[type],
        (data.shape[0], cols),
        np.ascontiguousarray(data.detach().numpy()),
        None if scale is None else scale.detach().numpy(),
    )
    return torch.from_numpy(packed.dequantize())


# ---- operators ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gemmakit::packed_matmul", mutates_args=(), device_types="cpu")
def packed_matmul(x: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`x @ W.T` with a packed weight W [O, D], differentiable in x.

    Args:
      x: float32, bfloat16 or float16 [..., D].
      data: uint8 [O, W], as in `gemma.quants.PackedTensor`.
      scale: float32 [O] of INT8 and INT4, [1] of SFP8, None for the others.
      type: a number of `gemma.kernels._native.TYPE_IDS`.
      cols: D.

    Returns:
      [..., O] in x's dtype.

    Raises:
      ShapeError: an operand of the wrong shape or dtype; `torch.compile` raises it while tracing.
    """
    return product(x, data, scale, type, cols)


@torch.library.custom_op("gemmakit::packed_matmul_grad", mutates_args=(), device_types="cpu")
def packed_matmul_grad(dy: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`dy @ W`: [..., O] to [..., D] in dy's dtype, differentiable in dy; arguments as in `packed_matmul`."""
    return gradient(dy, data, scale, type, cols)


@torch.library.custom_op("gemmakit::packed_rows", mutates_args=(), device_types="cpu")
def packed_rows(ids: Tensor, data: Tensor, scale: Tensor | None, type: int, cols: int) -> Tensor:
    """`W[ids]`: integers [...] to float32 [..., D]; the weight as in `packed_matmul`. PromptError: an id outside."""
    return rows(ids, data, scale, type, cols)


@torch.library.custom_op("gemmakit::linear_bf16", mutates_args=(), device_types="cpu")
def linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of bfloat16, x [..., D] and weight [O, D], summed in float32; differentiable in both."""
    return product_bf16(x, weight)


@packed_matmul.register_fake
def _(x, data, scale, type, cols):
    check(data, scale, type, cols)
    _check_activations(x, cols, "x")
    return x.new_empty((*x.shape[:-1], data.shape[0]))


@packed_matmul_grad.register_fake
def _(dy, data, scale, type, cols):
    check(data, scale, type, cols)
    _check_activations(dy, data.shape[0], "dy")
    return dy.new_empty((*dy.shape[:-1], cols))


@packed_rows.register_fake
def _(ids, data, scale, type, cols):
    check(data, scale, type, cols)
    return data.new_empty((*ids.shape, cols), dtype=torch.float32)


@linear_bf16.register_fake
def _(x, weight):
    _check_bf16(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_weight(ctx, inputs, output) -> None:
    _, data, scale, ctx.type, ctx.cols = inputs
    ctx.save_for_backward(data, scale)


def _backward_of_matmul(ctx, dy):
    return packed_matmul_grad(dy, *ctx.saved_tensors, ctx.type, ctx.cols), None, None, None, None


def _backward_of_grad(ctx, dx):
    return packed_matmul(dx, *ctx.saved_tensors, ctx.type, ctx.cols), None, None, None, None


packed_matmul.register_autograd(_backward_of_matmul, setup_context=_keep_weight)
packed_matmul_grad.register_autograd(_backward_of_grad, setup_context=_keep_weight)


def _keep_both(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_linear(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        data = weight.detach().view(torch.uint8)
        dx = packed_matmul_grad(dy, data, None, _native.TYPE_IDS[QuantType.BF16], weight.shape[1])
    if ctx.needs_input_grad[1]:
        columns = math.prod(dy.shape[:-1])
        dw = (dy.reshape(columns, -1).float().T @ x.reshape(columns, -1).float()).to(weight.dtype)
    return dx, dw


linear_bf16.register_autograd(_backward_of_linear, setup_context=_keep_both)
