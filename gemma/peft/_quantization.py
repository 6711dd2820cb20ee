# SPDX-License-Identifier: Apache-2.0
"""Quantization of raw arrays, of single Flax layers and of parameter trees, with the names of the official package.

`simulate_quantize` and `SimulateQuantized*` round while training, `quantize` and `Int*` keep integers: a kernel of int4
or int8 and a scale, with weight = kernel / scale. None of this knows a model. For a model use `gm.nn`'s
`QuantizationAwareWrapper`, whose grid is that of the exported file, and `load_params(quantize=...)`, which packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma import weights
from gemma.errors import CheckpointError, ConfigError, ShapeError
from gemma.gm.nn import _equation
from gemma.gm.nn._layers import common_dtype
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, DType
from gemma.peft import _quantization_methods as methods
from gemma.peft._quantization_methods import QuantizationMethod

Axes = int | tuple[int, ...] | None

_BITS = {QuantizationMethod.INT4: 4, QuantizationMethod.INT8: 8}
_LARGEST_SCALE_INVERSE = 1e-6  # a scale is never below it
_INTEGERS = {QuantizationMethod.INT4: jnp.int4, QuantizationMethod.INT8: jnp.int8}


def straight_through(x: Array, rounded: Array) -> Array:
    """`rounded`, with the gradient of x: bit for bit, since x - x is zero for every finite x."""
    return (x - jax.lax.stop_gradient(x)) + jax.lax.stop_gradient(rounded.astype(x.dtype))


def simulate_quantize(x: Array, method: QuantizationMethod | str, axis_to_reduce: Axes = None) -> Array:
    """Rounds an array as a method would; its gradient is that of x (straight through).

    INT4 and INT8: round(x * s) / s, where s brings the largest magnitude over `axis_to_reduce` to 7 or 127. Q4_0: 32
    values along the last axis share a half-precision scale (Q4_0_TRANSPOSE: the axis before it). SFP8: a scale for each
    index of the last axis, which brings its largest magnitude to 1.875. What is all zeros stays so.

    Args:
      x: any float array.
      method: a `QuantizationMethod` or its name.
      axis_to_reduce: of INT4 and INT8: the axes that share a scale. None: all but the last.

    Raises:
      ConfigError: an unknown method. ShapeError: an axis of Q4_0 that is not whole blocks of 32.
    """
    method = QuantizationMethod(method)
    if method is QuantizationMethod.NONE:
        return x
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    if method in _BITS:
        codes, scale = uniform_quantize(wide, method, axis_to_reduce)
        return straight_through(x, codes / scale)
    if method is QuantizationMethod.SFP8:
        high = jnp.max(jnp.abs(wide), axis=tuple(range(wide.ndim - 1)), keepdims=True)
        scale = methods._SFP8_MAX / jnp.maximum(high, _LARGEST_SCALE_INVERSE)
        return straight_through(x, methods.on_grid(wide * scale, method, scale=jnp.float32(1)) / scale)
    if method is QuantizationMethod.Q4_0_TRANSPOSE:
        if wide.ndim < 2:
            raise ShapeError(f"q4_0_transpose: expected at least two axes, got the shape {tuple(x.shape)}")
        rounded = methods.on_grid(jnp.swapaxes(wide, -1, -2), method, name="x")
        return straight_through(x, jnp.swapaxes(rounded, -1, -2))
    return straight_through(x, methods.on_grid(wide, method, name="x"))


def uniform_quantize(x: Array, method: QuantizationMethod, axis_to_reduce: Axes) -> tuple[Array, Array]:
    """(codes as float32, scale with the reduced axes kept): x ~ codes / scale. Zeros have scale 1."""
    largest = 2 ** (_BITS[method] - 1) - 1
    axes = tuple(range(x.ndim - 1)) if axis_to_reduce is None else axis_to_reduce
    high = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(high > 0, jnp.float32(largest) / jnp.where(high > 0, high, 1), 1)
    scale = jnp.where(jnp.isfinite(scale), scale, 1)
    scale = jnp.maximum(scale, _LARGEST_SCALE_INVERSE)
    return jnp.clip(jnp.round(x * scale), -largest - 1, largest), scale


def get_axis_to_reduce_from_einsum_str(einsum_str: str | None) -> tuple[int, ...] | None:
    """The axes of the weight that an equation of activations and weight sums over; None for other equations.

    "BTD,NDH->BTNH" gives (1,): with them as `axis_to_reduce` every output has a scale of its own.
    """
    found = _equation.roles(einsum_str or "")
    return None if found is None else tuple(range(found[0], found[0] + found[1]))


class _Wrapped(nn.Module):
    """Stands in for a layer, in its scope."""

    def __post_init__(self):
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.wrapped)

    def _equation(self, einsum_str: str | None) -> str:
        eqn = nn.merge_param("einsum_str", self.wrapped.einsum_str, einsum_str).replace(" ", "")
        if "->" not in eqn or eqn.count(",") != 1:
            raise ShapeError(
                f"einsum_str: expected two operands and an explicit result, as in 'BD,DF->BF', got {eqn!r}"
            )
        return eqn

    def _bias(self, y: Array, shape: tuple[int, ...]) -> Array:
        if not self.wrapped.use_bias:
            return y
        bias = self.param("bias", self.wrapped.bias_init, shape, self.wrapped.param_dtype)
        return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _met(x: Array, kernel: Array, dtype: DType | None) -> tuple[Array, Array]:
    dtype = common_dtype(x, kernel) if dtype is None else dtype
    return x.astype(dtype), kernel.astype(dtype)


class SimulateQuantizedDense(_Wrapped, kw_only=True):
    """`nn.Dense` with a rounded kernel.

    Attributes:
      wrapped: the layer.
      method: how to round; each output has its own scale.
    """

    wrapped: nn.Dense
    method: QuantizationMethod | str = QuantizationMethod.NONE

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        wrapped, shape = self.wrapped, (inputs.shape[-1], self.wrapped.features)
        kernel = self.param("kernel", wrapped.kernel_init, shape, wrapped.param_dtype)
        x, kernel = _met(inputs, simulate_quantize(kernel, self.method), wrapped.dtype)
        return self._bias(x @ kernel, shape[-1:])


class SimulateQuantizedEinsum(_Wrapped, kw_only=True):
    """`nn.Einsum` with a rounded kernel.

    Attributes:
      wrapped: the layer.
      method: how to round; INT4 and INT8 have a scale for each output of the equation.
    """

    wrapped: nn.Einsum
    method: QuantizationMethod | str = QuantizationMethod.NONE

    @nn.compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        eqn, wrapped = self._equation(einsum_str), self.wrapped
        kernel = self.param("kernel", wrapped.kernel_init, wrapped.shape, wrapped.param_dtype)
        kernel = simulate_quantize(kernel, self.method, get_axis_to_reduce_from_einsum_str(eqn))
        x, kernel = _met(inputs, kernel, wrapped.dtype)
        y = jnp.einsum(eqn, x, kernel, precision=wrapped.precision)
        return self._bias(y, wrapped._get_bias_shape(eqn, x, kernel)[0] if wrapped.use_bias else ())


class IntDense(_Wrapped, kw_only=True):
    """`nn.Dense` with an integer kernel and a scale [1, features]: `x @ (kernel / scale)`.

    Attributes:
      wrapped: the layer.
      dtype: of the kernel, int4 or int8.
    """

    wrapped: nn.Dense
    dtype: DType = jnp.int4

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        shape = (inputs.shape[-1], self.wrapped.features)
        kernel = _int_kernel(self, shape, (1, shape[1]), inputs)
        return self._bias(inputs.astype(kernel.dtype) @ kernel, shape[-1:])


class IntEinsum(_Wrapped, kw_only=True):
    """`nn.Einsum` with an integer kernel and a scale for each output.

    Attributes:
      wrapped: the layer.
      dtype: of the kernel, int4 or int8.
    """

    wrapped: nn.Einsum
    dtype: DType = jnp.int4

    @nn.compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        eqn, wrapped = self._equation(einsum_str), self.wrapped
        summed = get_axis_to_reduce_from_einsum_str(eqn) or tuple(range(len(wrapped.shape) - 1))
        scales = tuple(1 if axis in summed else size for axis, size in enumerate(wrapped.shape))
        kernel = _int_kernel(self, tuple(wrapped.shape), scales, inputs)
        x = inputs.astype(kernel.dtype)
        y = jnp.einsum(eqn, x, kernel, precision=wrapped.precision)
        return self._bias(y, wrapped._get_bias_shape(eqn, x, kernel)[0] if wrapped.use_bias else ())


def _int_kernel(module: Any, shape: tuple[int, ...], scales: tuple[int, ...], inputs: Array) -> Array:
    """The weight as floats; the scale may be of any shape that spreads over the kernel."""
    kernel = module.param("kernel", nn.initializers.ones_init(), shape, module.dtype)
    dtype = module.wrapped.dtype or inputs.dtype
    if module.has_variable("params", "scale"):
        scale = module.get_variable("params", "scale")
        if any(have not in (1, size) for have, size in zip(scale.shape, shape, strict=True)):
            raise ShapeError(f"{'/'.join((*module.path, 'scale'))}: {scale.shape} does not spread over {shape}")
    else:
        scale = module.param("scale", nn.initializers.ones_init(), scales, jnp.float32)
    return int_weight(kernel, scale, dtype)


def int_weight(kernel: Array, scale: Array, dtype: DType) -> Array:
    """kernel / scale, computed in float32."""
    wide = jnp.broadcast_to(scale.astype(jnp.float32), kernel.shape)
    return (kernel.astype(jnp.float32) / wide).astype(dtype)


# ---- trees -----------------------------------------------------------------------------------------------------------

_OWN_LEAF = ("gating_einsum", "linear")  # kernels of the MLP: leaves themselves, without a name of their own


def quantize(
    params: Mapping[str, Any],
    *,
    method: QuantizationMethod | str,
    checkpoint_kernel_key: str = "w",
    in_place_keys: bool = False,
    config: Any = None,
) -> dict[str, Any]:
    """A parameter tree with integer kernels, as `gm.nn.IntWrapper` runs it.

    Every leaf `w`, and the two kernels of an MLP, become `_IntEinsum_0/{kernel,scale}` and
    `_IntEinsum_gating_einsum/{kernel,scale}`; one scale for each output. The embedding and a vision tower keep their
    floats, as in the official package: `load_params(quantize="int4")` packs the embedding, too.

    Args:
      params: of a network of `gm.nn`.
      method: NONE, INT4 or INT8.
      checkpoint_kernel_key: the name of kernels.
      in_place_keys: put `kernel` and `scale` where the leaf was, instead of into a dictionary of their own.
      config: of the model; needed only where the shapes of the MLP do not tell its axes apart.

    Raises:
      ConfigError: an unknown method, or one without integers. CheckpointError: NaN or infinite weights.
    """
    method = QuantizationMethod(method)
    if method is QuantizationMethod.NONE:
        return dict(params)
    if method not in _INTEGERS:
        raise ConfigError(
            f"quantize: expected none, int4 or int8, got {method.value}: other types have no integer kernels; "
            f"gm.ckpts.load_params(path, quantize={method.recipe!r}) packs them"
        )
    summed = _summed(params, checkpoint_kernel_key, config)
    return _quantized(params, "", method, checkpoint_kernel_key, in_place_keys, summed)


def _summed(params: Mapping[str, Any], key: str, config: Any) -> Mapping[str, tuple[int, int]]:
    if config is not None:
        return {name: matrix.summed for name, matrix in weights.matrices(getattr(config, "gemma", config)).items()}
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Packed)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shapes[f"{name.removesuffix(key)}w" if name.endswith("/" + key) else name] = tuple(leaf.shape)
    return weights.summed_axes(shapes)


def _quantized(node: Any, path: str, method, key: str, in_place: bool, summed: Mapping[str, tuple[int, int]]) -> Any:
    if not isinstance(node, Mapping):
        return node
    done: dict[str, Any] = {}
    for name, leaf in node.items():
        own = name in _OWN_LEAF and not isinstance(leaf, Mapping)
        if name != key and not own:
            done[name] = _quantized(leaf, f"{path}{name}/", method, key, in_place, summed)
            continue
        where = summed.get(f"{path}{'w' if name == key else name}")
        packed = _int_leaf(leaf, method, where, f"{path}{name}")
        if in_place:
            done |= packed if name == key else {name: packed}
        else:
            done["_IntEinsum_0" if name == key else f"_IntEinsum_{name}"] = packed
    return done


def _int_leaf(leaf: Any, method: QuantizationMethod, summed: tuple[int, int] | None, name: str) -> dict[str, Array]:
    if isinstance(leaf, Packed):
        raise CheckpointError(f"{name}: is packed already; quantize the parameters that were loaded as floats")
    wide = jnp.asarray(leaf, jnp.float32)
    if not isinstance(wide, jax.core.Tracer) and not bool(jnp.isfinite(wide).all()):
        raise CheckpointError(f"{name}: holds NaN or infinite values and cannot be quantized; repair the weights first")
    axes = None if summed is None else tuple(range(summed[0], summed[0] + summed[1]))
    codes, scale = uniform_quantize(wide, method, axes)
    return {"kernel": codes.astype(_INTEGERS[method]), "scale": scale}


__all__ = [
    "IntDense",
    "IntEinsum",
    "SimulateQuantizedDense",
    "SimulateQuantizedEinsum",
    "get_axis_to_reduce_from_einsum_str",
    "int_weight",
    "quantize",
    "simulate_quantize",
    "straight_through",
    "uniform_quantize",
]
