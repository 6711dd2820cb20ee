# SPDX-License-Identifier: Apache-2.0
"""A quantized weight as one node of the parameter tree, where the float leaf would stand: kept packed, used packed.

`PackedArray` holds the bytes of one weight; `PackedParts` stacks weights of different types along their first axis (keys
and values of a mixed GGUF file). Both do what a layer asks of its weight: an einsum, and the rows of the embedding. On
a CPU the product runs in the native kernels (`gemma.kernels._jax`) where they are there, else XLA decodes the weight
inside of the product. Which tensors are packed, and how, is `_packed_tree.py`; bytes to floats is `_packed_decode.py`.

The rows of a packed weight are its outputs, the columns its summed axes, as in a GGUF file:

    q_einsum [N, D, H]          rows (N H), columns D          gating_einsum [2, F, D]   rows (2 F), columns D
    attn_vec_einsum [N, H, D]   rows D, columns (N H)          input_embedding [V, D]    rows V, columns D
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ShapeError
from gemma.gm.nn import _equation, _packed_decode
from gemma.gm.typing import Array, DType
from gemma.quants import PackedTensor, QuantType

# A weight with more values than this is decoded in runs of rows: the floats of an embedding are never there as a whole.
_DECODED_AT_ONCE = 1 << 24


class Packed(abc.ABC):
    """What `weight_einsum` and the embedding ask of a packed weight.

    Attributes:
      shape: of the float weight that it stands for, in the layout of `gm.nn`.
      dtype: in which activations meet it: that of the float weight that it stands for.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the weight that it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @abc.abstractmethod
    def dequantize(self, dtype: DType | None = None) -> Array:
        """The values as an array of `shape`: those of `gemma.quants`, bit for bit, rounded once to `dtype`."""

    @abc.abstractmethod
    def einsum(self, eqn: str, x: Array, *, accumulate: DType | None = None) -> Array:
        """`jnp.einsum(eqn, x, weight)`; `accumulate` as in `weight_einsum`."""

    @abc.abstractmethod
    def take(self, ids: Array) -> Array:
        """Rows along the first axis, [*ids, ...], in `dtype`; ids outside are clipped."""

    @abc.abstractmethod
    def astype(self, dtype: DType) -> Packed:
        """The same weight, for activations of another dtype; the bytes stay."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedArray(Packed):
    """A weight of one type.

    A pytree with the children `data` and `scale`: `jax.jit`, `scan`, donation, `device_put` and shardings see these two
    arrays below the path of the float leaf.

    Attributes:
      data: uint8 [rows, row_bytes], blocks along the summed axes.
      scale: float32, [rows] for INT8 and INT4, [1] for SFP8, else None.
      type: how values are stored.
      shape: see `Packed`.
      summed: (first, count) of the axes of `shape` that a product sums over; the others are the rows, in their order.
      dtype: see `Packed`.
    """

    data: Array
    scale: Array | None
    type: QuantType
    shape: tuple[int, ...]
    summed: tuple[int, int]
    dtype: Any = np.dtype(np.float32)

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        expected = (self.rows, self.type.row_bytes(self.columns))
        if tuple(self.data.shape) != expected or self.data.dtype != jnp.uint8:
            raise ShapeError(
                f"{self.type.name} for a weight {self.shape} summed over {self.summed[1]} axes from {self.summed[0]}: "
                f"expected data uint8 {expected}, got {self.data.dtype} {tuple(self.data.shape)}"
            )

    @property
    def columns(self) -> int:
        """Values that one output sums over."""
        first, count = self.summed
        return math.prod(self.shape[first : first + count])

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.size // self.columns

    @property
    def _kept(self) -> tuple[int, ...]:
        first, count = self.summed
        return self.shape[:first] + self.shape[first + count :]

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        static = (self.type, self.shape, self.summed, self.dtype)
        return ((key("data"), self.data), (key("scale"), self.scale)), static

    @classmethod
    def tree_unflatten(cls, static, children):
        leaf = object.__new__(cls)  # unchecked: transformations put other things than such arrays into the children
        for name, value in zip(
            ("data", "scale", "type", "shape", "summed", "dtype"), (*children, *static), strict=True
        ):
            object.__setattr__(leaf, name, value)
        return leaf

    def __repr__(self) -> str:
        return f"PackedArray({self.type.name}, shape={self.shape}, dtype={self.dtype.name})"

    @classmethod
    def of(cls, packed: PackedTensor, shape: tuple[int, ...], summed: tuple[int, int], dtype: DType) -> PackedArray:
        """From the bytes of a file; nothing is copied."""
        return cls(packed.data, packed.scale, packed.type, tuple(shape), summed, dtype)

    def astype(self, dtype: DType) -> PackedArray:
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def dequantize(self, dtype: DType | None = None) -> Array:
        values = _decoded(self.data, self.scale, self.type, self.dtype if dtype is None else dtype)
        first, count = self.summed
        values = values.reshape(*self._kept, *self.shape[first : first + count])
        behind = len(self._kept)
        return jnp.moveaxis(values, range(behind, behind + count), range(first, first + count))

    def take(self, ids: Array) -> Array:
        if self.summed[0] == 0:
            raise ShapeError(f"rows of a packed weight {self.shape} are its outputs; its first axis is summed over")
        ids = jnp.clip(ids, 0, self.shape[0] - 1)
        each = self.rows // self.shape[0]
        data = jnp.asarray(self.data).reshape(self.shape[0], each, -1)[ids]
        scale = self.scale
        if scale is not None and scale.size == self.rows and self.rows > 1:
            scale = jnp.asarray(scale).reshape(self.shape[0], each)[ids]
        values = _decoded(data, scale, self.type, self.dtype)
        first, count = self.summed
        kept, summed = self._kept[1:], self.shape[first : first + count]
        values = values.reshape(*ids.shape, *kept, *summed)
        behind = ids.ndim + len(kept)
        start = ids.ndim + first - 1
        return jnp.moveaxis(values, range(behind, behind + count), range(start, start + count))

    def einsum(
        self, eqn: str, x: Array, *, accumulate: DType | None = None, implementation: str | None = None
    ) -> Array:
        """See `Packed.einsum`.

        Args:
          eqn: the equation, activations first.
          x: activations.
          accumulate: dtype of the sum and of the result.
          implementation: "native" or "xla"; None: native on a CPU where the kernels are there.
        """
        dtype = _common(x, self.dtype)
        x = x.astype(dtype)
        roles = _equation.roles(eqn)
        if roles is None or roles[:2] != self.summed:
            return jnp.einsum(eqn, x, self.dequantize(dtype), preferred_element_type=accumulate)
        lead, contracted, ahead = roles
        first, summed = x.shape[: x.ndim - contracted], x.shape[x.ndim - contracted :]
        if summed != self.shape[lead : lead + contracted]:
            raise ShapeError(f"einsum {eqn!r}: activations {x.shape} do not fit the packed weight {self.shape}")
        y = self._product(x.reshape(-1, self.columns), accumulate, implementation)
        y = y.reshape(*first, *self._kept)
        return jnp.moveaxis(y, range(len(first), len(first) + ahead), range(ahead)) if ahead else y

    def _product(self, x: Array, accumulate: DType | None, implementation: str | None) -> Array:
        """[M, columns] to [M, rows]."""
        native = _native() if implementation != "xla" else None
        if native is None and implementation == "native":
            raise ShapeError("the native kernels are not there: `gemma doctor` says why")
        if native is not None and x.dtype in (jnp.float32, jnp.bfloat16) and not self.type.is_float:
            wide = x.astype(jnp.float32) if accumulate == jnp.float32 else x
            return native(wide, self.data, self.scale, type=self.type, cols=self.columns)
        return _xla_product(self.type, accumulate, x, self.data, self.scale)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedParts(Packed):
    """Weights of several types, stacked along a first axis.

    Attributes:
      parts: of equal shape and dtype, one for each index of the first axis.
    """

    parts: tuple[PackedArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Packed`."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> jnp.dtype:
        """See `Packed`."""
        return self.parts[0].dtype

    def tree_flatten_with_keys(self):
        key = jax.tree_util.SequenceKey
        return tuple((key(i), part) for i, part in enumerate(self.parts)), None

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(tuple(children))

    def __repr__(self) -> str:
        return f"PackedParts({', '.join(part.type.name for part in self.parts)}, shape={self.shape})"

    def astype(self, dtype: DType) -> PackedParts:
        return PackedParts(tuple(part.astype(dtype) for part in self.parts))

    def dequantize(self, dtype: DType | None = None) -> Array:
        return jnp.stack([part.dequantize(dtype) for part in self.parts])

    def take(self, ids: Array) -> Array:
        return self.dequantize()[ids]

    def einsum(self, eqn: str, x: Array, *, accumulate: DType | None = None) -> Array:
        sliced = _equation.without_first(eqn)
        if sliced is None:
            dtype = _common(x, self.dtype)
            return jnp.einsum(eqn, x.astype(dtype), self.dequantize(dtype), preferred_element_type=accumulate)
        part_eqn, place = sliced
        return jnp.stack([part.einsum(part_eqn, x, accumulate=accumulate) for part in self.parts], axis=place)


def _common(x: Array, dtype: jnp.dtype) -> jnp.dtype:
    from gemma.gm.nn._layers import common_dtype  # that module imports this one

    return common_dtype(x, jax.ShapeDtypeStruct((), dtype))


def _decoded(data: Array, scale: Array | None, type: QuantType, dtype: DType) -> Array:
    """uint8 [*R, row_bytes] to [*R, columns]; the scale is [1], or one for each row."""
    values = _packed_decode.decode(jnp.asarray(data), type)
    if scale is not None:
        per_row = scale.reshape(*((1,) * values.ndim)) if scale.size == 1 else scale.reshape(*values.shape[:-1], 1)
        values = values * per_row
    return values.astype(dtype)


def _native():
    """`packed_matmul` of the native kernels, or None: no CPU, no kernels."""
    if jax.default_backend() != "cpu":
        return None
    try:
        from gemma.kernels import _jax
    except ModuleNotFoundError:
        return None
    return _jax.packed_matmul if _jax.available() else None


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _xla_product(type: QuantType, accumulate: DType | None, x: Array, data: Array, scale: Array | None) -> Array:
    """[M, columns] times the transposed weight. Under a gradient the weight is decoded again, not kept as floats."""

    def product(data: Array, scale: Array | None) -> Array:
        w = _decoded(data, scale, type, x.dtype)
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=accumulate)

    rows, columns = data.shape[0], x.shape[1]
    step = max(1, _DECODED_AT_ONCE // columns)
    if rows <= step:
        return product(data, scale)
    whole = rows // step * step
    per_row = scale is not None and scale.size == rows
    runs = data[:whole].reshape(-1, step, data.shape[1])
    if per_row:
        y = jax.lax.map(lambda run: product(*run), (runs, scale[:whole].reshape(-1, step)))
    else:
        y = jax.lax.map(lambda run: product(run, scale), runs)
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return y
    rest = product(data[whole:], scale[whole:] if per_row else scale)
    return jnp.concatenate([y, rest], axis=1)
