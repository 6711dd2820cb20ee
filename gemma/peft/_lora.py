# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as Flax modules: a layer's result plus `scale * (x @ a) @ b`, whatever the layer's weight is made of.

    y = wrapped(x) + scale * (dropout(x) @ a) @ b                                    LoRA
    y = c * (wrapped(x) + scale * (x @ a) @ b),  c = m * |W| / |W + scale * a @ b|   DoRA, per output channel

The wrapped layer computes its own part, so its weight may be packed. `a` starts random and `b` at zero: a fresh adapter
changes nothing. The magnitude m of DoRA is kept relative to the norm of the weight and starts at one, so that it stays
right when other weights are loaded. Which layers of a model are wrapped is decided in `gm/nn/_lora.py`; einsum strings
are `_einsum_utils.py`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.errors import ConfigError, ShapeError
from gemma.gm.nn._layers import common_dtype, weight_einsum
from gemma.gm.typing import Array, DType
from gemma.peft import _einsum_utils
from gemma.peft._einsum_utils import Equation

_Init = Callable[..., Array]


class Adapter(nn.Module, kw_only=True):
    """The two factors. Its subclasses say what shapes they have.

    Attributes:
      rank: r.
      dtype: in which the factors are created.
      a_init: `f(key, shape, dtype)`.
      b_init: likewise.
      use_dora: there is a `magnitude`, too.
      any_rank: the rank may be above that of the layer, as that of several adapters side by side.
    """

    rank: int
    dtype: DType = jnp.float32
    a_init: _Init = nn.initializers.kaiming_uniform()
    b_init: _Init = nn.initializers.zeros_init()
    use_dora: bool = False
    any_rank: bool = False

    def product(self, x: Array, eqn: Equation, shape: tuple[int, ...], weight: Any = None, scale: float = 1.0):
        """(x @ a @ b in the layout of the result, and with a weight the factor c of DoRA, of the kept axes).

        Args:
          x: activations.
          eqn: of activations and weight.
          shape: of the weight.
          weight: the weight itself, for DoRA only.
          scale: what the low-rank part is multiplied by, for DoRA only.
        """
        sizes = dict(zip(eqn.w, shape)) | {eqn.rank: self.rank}
        inner = math.prod(sizes[axis] for axis in eqn.summed)
        check_rank(self.rank, inner, math.prod(shape) // inner, "/".join(self.path), any_rank=self.any_rank)
        a = self.leaf("a", self.a_init, tuple(sizes[axis] for axis in eqn.a))
        b = self.leaf("b", self.b_init, tuple(sizes[axis] for axis in eqn.b))
        low = weight_einsum(eqn.up, weight_einsum(eqn.down, x, a), b)
        if not self.use_dora:
            return low, None
        m = self.leaf("magnitude", nn.initializers.ones_init(), tuple(sizes[axis] for axis in eqn.kept))
        return low, m.astype(jnp.float32) * dora_ratio(weight, a, b, eqn, scale)

    def leaf(self, name: str, init: _Init, shape: tuple[int, ...]) -> Array:
        """One parameter; what is missing or of another rank is named."""
        if not self.is_initializing():
            found = self.get_variable("params", name)
            where = "/".join((*self.path, name))
            if found is None:
                raise ShapeError(
                    f"{where}: the parameters have no adapter here; take them from this model's `init`, or add an "
                    f"adapter with gemma.peft.merge_params"
                )
            if tuple(found.shape) != shape:
                raise ShapeError(f"{where}: expected {shape} for rank {self.rank}, got {tuple(found.shape)}")
        return self.param(name, init, shape, self.dtype)


def check_rank(rank: int, inner: int, outer: int, where: str, *, any_rank: bool = False) -> None:
    """Refuses a rank that the layer cannot have: more than full rank adds parameters and no freedom."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank: expected a whole number of at least 1, got {rank!r}")
    if rank > min(inner, outer) and not any_rank:
        raise ConfigError(
            f"{where}: rank {rank} is above that of the layer, {min(inner, outer)} ({inner} in, {outer} out): choose a "
            f"smaller rank, or leave the layer out with `targets`"
        )


def dora_ratio(weight: Any, a: Array, b: Array, eqn: Equation, scale: float) -> Array:
    """|W| / |W + scale * a @ b|, float32, of the kept axes; no gradient flows through it. 1 where both are zero."""
    dense = weight.dequantize(jnp.float32) if hasattr(weight, "dequantize") else jnp.asarray(weight)
    dense = dense.astype(jnp.float32)
    low = jnp.einsum(eqn.delta, a.astype(jnp.float32), b.astype(jnp.float32))
    axes = tuple(i for i, axis in enumerate(eqn.w) if axis in eqn.summed)
    own, moved = norm(dense, axes), norm(dense + scale * low, axes)
    return jax.lax.stop_gradient(jnp.where(moved > 0, own / jnp.where(moved > 0, moved, 1.0), 1.0))


def norm(values: Array, axes: tuple[int, ...]) -> Array:
    """The Euclidean norm over some axes."""
    return jnp.sqrt(jnp.sum(jnp.square(values), axis=axes))


class LoRADenseAdapter(Adapter, kw_only=True):
    """`x @ a @ b` beside a dense layer: a [in, r], b [r, features].

    Attributes: those of `Adapter`, and
      features: outputs.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array, *, weight: Any = None, scale: float = 1.0):
        eqn = _einsum_utils.parse("...i,io->...o")
        return _result(self.product(x, eqn, (x.shape[-1], self.features), weight, scale), self.use_dora)


class LoRAEinsumAdapter(Adapter, kw_only=True):
    """The low-rank part of an einsum with a weight.

    Attributes: those of `Adapter`, and
      einsum_str: of activations and weight.
      shape: of the weight.
    """

    einsum_str: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, *, weight: Any = None, scale: float = 1.0):
        names = _einsum_utils.get_lora_einsum_str_and_shapes
        names(einsum_str=self.einsum_str, weights_shape=tuple(self.shape), rank=self.rank)
        eqn = _einsum_utils.parse(self.einsum_str)
        return _result(self.product(x, eqn, tuple(self.shape), weight, scale), self.use_dora)


class LoRADenseGeneralAdapter(Adapter, kw_only=True):
    """The low-rank part of a dense layer over several axes: a [*in, r], b [r, *features].

    Attributes: those of `Adapter`, and
      features: axes of the result.
      axis: of the activations that are summed over.
      batch_dims: must be empty.
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    batch_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Array, *, weight: Any = None, scale: float = 1.0):
        if self.batch_dims:
            raise ConfigError(f"batch_dims {self.batch_dims}: a dense layer with batch axes has no low-rank adapter")
        axis = _tuple(self.axis)
        features = _tuple(self.features)
        eqn = dense_general(len(axis), len(features))
        x = jnp.moveaxis(x, axis, range(x.ndim - len(axis), x.ndim))
        shape = (*x.shape[x.ndim - len(axis) :], *features)
        return _result(self.product(x, eqn, shape, weight, scale), self.use_dora)


def dense_general(inner: int, outer: int) -> Equation:
    """The equation of a dense layer that sums over `inner` trailing axes and gives `outer` ones."""
    ins, outs = string.ascii_lowercase[:inner], string.ascii_uppercase[:outer]
    return _einsum_utils.parse(f"...{ins},{ins}{outs}->...{outs}")


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _result(found: tuple[Array, Array | None], use_dora: bool):
    return found if use_dora else found[0]


class Wrapper(nn.Module, kw_only=True):
    """A layer with an adapter named `lora` in its scope.

    Attributes:
      rank: r.
      wrapped: the layer.
      dtype: in which the factors are created.
      a_init: of the first factor.
      b_init: of the second factor.
      scale: what the low-rank part is multiplied by.
      dropout: share of the activations that the adapter does not see in training.
      use_dora: rescale the output channels; see the head of the file.
      deterministic: no dropout. None: dropout where a random stream named "dropout" was given.
      any_rank: see `Adapter`.
    """

    rank: int
    wrapped: nn.Module
    dtype: DType = jnp.float32
    a_init: _Init = nn.initializers.kaiming_uniform()
    b_init: _Init = nn.initializers.zeros_init()
    scale: float = 1.0
    dropout: float = 0.0
    use_dora: bool = False
    deterministic: bool | None = None
    any_rank: bool = False

    def __repr__(self):  # the wrapped layer has this module among its children
        return f"{type(self).__name__}(rank={self.rank}, wrapped={type(self.wrapped).__name__})"

    @property
    def factors(self) -> dict[str, Any]:
        """The fields of the adapter."""
        names = ("rank", "dtype", "a_init", "b_init", "use_dora", "any_rank")
        return {name: getattr(self, name) for name in names} | {"name": "lora"}

    def joined(self, y: Array, x: Array, adapter: nn.Module, eqn: Equation, weight: str, bias: str | None) -> Array:
        """The result of the wrapped layer with the adapter's part.

        Args:
          y: the result of the layer.
          x: its input.
          adapter: to be called with the input.
          eqn: of the layer.
          weight: name of the layer's parameter, which DoRA looks at.
          bias: name of its bias, which DoRA leaves alone.
        """
        quiet = self.deterministic if self.deterministic is not None else not self.has_rng("dropout")
        if self.dropout and not quiet:
            if not self.has_rng("dropout"):
                raise ConfigError('deterministic=False: dropout needs a random stream, rngs={"dropout": key}')
            x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=False)
        if not self.use_dora:
            low = adapter(x)
            return _add(y, low, self.scale)
        held = self.wrapped.variables.get("params", {}).get(weight)
        if held is None:
            raise ConfigError(
                f"{'/'.join(self.path)}: DoRA needs the weight {weight!r}, which this layer does not hold"
            )
        low, ratio = adapter(x, weight=held, scale=self.scale)
        shift = self.wrapped.variables["params"][bias].astype(jnp.float32) if bias else None
        moved = y.astype(jnp.float32)
        if shift is not None:
            shift = shift.reshape((1,) * (moved.ndim - shift.ndim) + shift.shape)
            moved = moved - shift
        moved = jnp.einsum(f"{eqn.out},{eqn.kept}->{eqn.out}", _add(moved, low, self.scale), ratio)
        return (moved if shift is None else moved + shift).astype(y.dtype)


def _add(y: Array, low: Array, scale: float) -> Array:
    dtype = common_dtype(y, low)
    low = low.astype(dtype)
    return (y.astype(dtype) + (low if scale == 1.0 else low * scale)).astype(y.dtype)


class LoRADense(Wrapper, kw_only=True):
    """`nn.Dense` with an adapter: parameters kernel, bias, lora/{a, b}. Attributes: those of `Wrapper`."""

    def setup(self):
        nn.share_scope(self, self.wrapped)

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        y = self.wrapped(inputs)
        adapter = LoRADenseAdapter(features=self.wrapped.features, **self.factors)
        eqn = _einsum_utils.parse("...i,io->...o")
        return self.joined(y, inputs, adapter, eqn, "kernel", "bias" if self.wrapped.use_bias else None)


class LoRADenseGeneral(Wrapper, kw_only=True):
    """`nn.DenseGeneral` with an adapter: parameters kernel, bias, lora/{a, b}. Attributes: those of `Wrapper`."""

    def setup(self):
        nn.share_scope(self, self.wrapped)

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        layer = self.wrapped
        y = layer(inputs)
        shape = dict(features=layer.features, axis=layer.axis, batch_dims=tuple(layer.batch_dims))
        adapter = LoRADenseGeneralAdapter(**shape, **self.factors)
        eqn = dense_general(len(_tuple(layer.axis)), len(_tuple(layer.features)))
        return self.joined(y, inputs, adapter, eqn, "kernel", "bias" if layer.use_bias else None)


class LoRAEinsum(Wrapper, kw_only=True):
    """`nn.Einsum` with an adapter: parameters kernel, bias, lora/{a, b}. Attributes: those of `Wrapper`."""

    def setup(self):
        nn.share_scope(self, self.wrapped)

    @nn.compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        layer = self.wrapped
        string_ = nn.merge_param("einsum_str", layer.einsum_str, einsum_str)
        y = layer(inputs) if einsum_str is None else layer(inputs, einsum_str)
        adapter = LoRAEinsumAdapter(einsum_str=string_, shape=layer.shape, **self.factors)
        if self.use_dora and layer.use_bias:
            raise ConfigError(f"{'/'.join(self.path)}: DoRA of an nn.Einsum with a bias is not defined; use_bias=False")
        return self.joined(y, inputs, adapter, _einsum_utils.parse(string_), "kernel", None)
