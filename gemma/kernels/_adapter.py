# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter as the native decoder takes it: which of its changes it can run, and its factors as structs.

Factors are kept in bfloat16 where every value of them is one, else in float32: half the bytes, and nothing is rounded.
Reading adapters is `gemma/adapters.py`, the decoder `_model.py`, the C side `native/adapter.cpp`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from gemma.adapters import AdapterFile, LowRank
from gemma.errors import KernelError, UnsupportedError

_MATRICES = {f"attn.{name}": name for name in "qkvo"} | {f"mlp.{name}": name for name in ("gate", "up", "down")}
_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_TYPES = {"float32": 0, "bfloat16": 30}  # enum gk_type


class GkLowRank(ctypes.Structure):
    """struct gk_low_rank."""

    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int32), ("scale", ctypes.c_float))


class GkLayerAdapter(ctypes.Structure):
    """struct gk_layer_adapter."""

    _fields_ = tuple((name, GkLowRank) for name in _MATRICES.values())


def unserved(adapter: AdapterFile) -> str | None:
    """Why the native decoder cannot run an adapter beside its weights, as half a sentence; None where it can."""
    if adapter.use_dora:
        return "the adapter rescales the rows of its weights (DoRA)"
    for name in adapter.tensors:
        found = _NAME.fullmatch(name)
        if found is None or found[2] not in _MATRICES:
            return f"the adapter changes {name}, and it runs adapters of attention and MLP layers of the decoder"
    return None


def refuse_unserved(adapter: AdapterFile) -> None:
    """Raises UnsupportedError where `unserved` has a reason."""
    why = unserved(adapter)
    if why is not None:
        raise UnsupportedError(
            f"{adapter.path or 'adapter'}: not for the native CPU decoder: {why}; use JAX, or fold it into the weights "
            f"(gemma convert --adapter)"
        )


class PackedAdapter:
    """The structs of an adapter, and the arrays that they point to; needed only until the library has copied them.

    Attributes:
      layers: a ctypes array of GkLayerAdapter, one for each layer.
      type: of the factors, a number of enum gk_type.
      nbytes: of the factors.
    """

    def __init__(self, adapter: AdapterFile, num_layers: int):
        refuse_unserved(adapter)
        dtype = np.float32
        if all(_is_bfloat16(low.a) and _is_bfloat16(low.b) for low in adapter.tensors.values()):
            dtype = ml_dtypes.bfloat16
        self.type, self.nbytes = _TYPES[np.dtype(dtype).name], 0
        self.layers = (GkLayerAdapter * num_layers)()
        self._keep: list[np.ndarray] = []
        for name, low in adapter.tensors.items():
            layer, matrix = _NAME.fullmatch(name).groups()
            setattr(self.layers[int(layer)], _MATRICES[matrix], self._struct(low, dtype))

    def _struct(self, low: LowRank, dtype: Any) -> GkLowRank:
        a, b = (np.ascontiguousarray(part, dtype) for part in (low.a, low.b))
        self._keep += (a, b)
        self.nbytes += a.nbytes + b.nbytes
        return GkLowRank(a.ctypes.data, b.ctypes.data, low.rank, low.scale)


def _is_bfloat16(array: np.ndarray) -> bool:
    if array.dtype == ml_dtypes.bfloat16:
        return True
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return not (bits & 0xFFFF).any()


class SampledWeight:
    """A packed weight [rows, cols] from which single values can be taken: what the checksum of a base looks at.

    Attributes:
      shape: of the tensor.
      size: number of its values.
    """

    def __init__(self, shape: tuple[int, int], read_rows: Callable[[np.ndarray], np.ndarray]):
        """`read_rows`: row numbers int32 [n] to float32 [n, cols]."""
        self.shape, self.size, self._read = shape, shape[0] * shape[1], read_rows

    def __getitem__(self, places: tuple[np.ndarray, ...]) -> np.ndarray:
        if len(places) != 2:
            raise KernelError(f"sampled weight: expected places in a matrix, got {len(places)} axes")
        rows, columns = places
        some, inverse = np.unique(rows, return_inverse=True)
        return self._read(some.astype(np.int32))[inverse, columns]
