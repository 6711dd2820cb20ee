# SPDX-License-Identifier: Apache-2.0
"""The float kernels of one instruction set as numpy functions, over the library's gk_test_* functions.

Arrays may be handed over misaligned on purpose (`misaligned`): a kernel may not assume more than what its element needs.
"""

import ctypes

import numpy as np
import pytest

from gemma.kernels import _native

EPS = 2.0**-24  # half a unit in the last place of float32, relative
SIZES = (1, 3, 7, 8, 9, 31, 33, 255, 257, 640)
CACHE_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
_POINTER, _I64, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class AttendArgs(ctypes.Structure):
    """struct gk::AttendArgs of kernels.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "out")),
        *((name, _I64) for name in ("q_stride", "out_stride", "tokens", "first_pos")),
        *((name, _POINTER) for name in ("k", "v", "k_scale", "v_scale")),
        ("capacity", _I64),
        *((name, _POINTER) for name in ("ck", "cv", "ck_scale", "cv_scale")),
        ("chunk_capacity", _I64),
        *((name, ctypes.c_int32) for name in ("cache_type", "num_heads", "num_kv_heads", "head_dim", "window")),
        ("softcap", _F32),
    )


_SIGNATURES = {
    "gk_test_kernels": (_POINTER, ctypes.c_char_p),
    "gk_test_rms_norm": (None, _POINTER, _POINTER, _POINTER, _F32, _I64, _POINTER),
    "gk_test_add_rms_norm": (None, _POINTER, _POINTER, _POINTER, _POINTER, _F32, _I64),
    "gk_test_add": (None, _POINTER, _POINTER, _POINTER, _I64),
    "gk_test_rope": (None, _POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER),
    "gk_test_gelu_mul": (None, _POINTER, _POINTER, _POINTER, _I64, _POINTER),
    "gk_test_softcap": (None, _POINTER, _POINTER, _I64, _F32),
    "gk_test_scale": (None, _POINTER, _POINTER, _I64, _F32),
    "gk_test_store": (None, _POINTER, _POINTER, _I64, ctypes.c_int32, _POINTER, _POINTER),
    "gk_test_bf16_to_f32": (None, _POINTER, _POINTER, _I64, _POINTER),
    "gk_test_f32_to_bf16": (None, _POINTER, _POINTER, _I64, _POINTER),
    "gk_test_argmax": (_I64, _POINTER, _POINTER, _I64),
    "gk_test_top_k": (_I64, _POINTER, _POINTER, _I64, _I64, _I64, _POINTER, _POINTER, _I64),
    "gk_test_sum_exp": (ctypes.c_double, _POINTER, _POINTER, _I64, _F32),
    "gk_test_exp": (None, _POINTER, _POINTER, _I64, _POINTER),
    "gk_test_attend_args_bytes": (_I64,),
    "gk_test_attend": (ctypes.c_int, _POINTER, ctypes.POINTER(AttendArgs), _I64, _I64, _I64, _I64),
    "gk_test_attend_blocks": (ctypes.c_int, _POINTER, ctypes.POINTER(AttendArgs), _I64, _I64, _I64),
    "gk_test_attend_parallel": (ctypes.c_int, _POINTER, ctypes.POINTER(AttendArgs), ctypes.c_int32, _I64),
    "gk_argmax": (_I64, _POINTER, _POINTER, _I64),
    "gk_top_k": (_I64, _POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER, ctypes.POINTER(ctypes.c_double)),
}


def hooks() -> ctypes.CDLL:
    """The library with the test functions declared; skips where it is not built."""
    lib = _native.library()
    if lib is None:
        pytest.skip(f"native library: {_native.why_missing()}")
    lib = ctypes.CDLL(lib._name)  # an object of its own: its declarations are not those of the package
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def instruction_sets() -> tuple[str, ...]:
    """For parametrize: every set that can run here; one entry that skips without the library."""
    return _native.instruction_sets() or ("none",)


def misaligned(x: np.ndarray) -> np.ndarray:
    """A copy that begins one element after a multiple of 64 bytes."""
    x = np.ascontiguousarray(x)
    room = np.empty(x.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


class Kernels:
    """Kernels of an instruction set, or the scalar ones ("reference"). Inputs are copied misaligned; results are new."""

    def __init__(self, isa: str):
        self.lib, self.isa = hooks(), isa
        self.table = self.lib.gk_test_kernels(isa.encode())
        assert self.table, f"{isa} is not in this library"

    def rms_norm(self, x, weight, eps):
        x, weight, y = misaligned(x), misaligned(weight), misaligned(np.empty_like(x))
        self.lib.gk_test_rms_norm(self.table, x.ctypes.data, weight.ctypes.data, eps, x.size, y.ctypes.data)
        self.lib.gk_test_rms_norm(self.table, x.ctypes.data, weight.ctypes.data, eps, x.size, x.ctypes.data)
        assert np.array_equal(x, y, equal_nan=True)  # in place
        return y

    def add_rms_norm(self, residual, x, weight, eps):
        y, x, weight = misaligned(residual), misaligned(x), misaligned(weight)
        self.lib.gk_test_add_rms_norm(self.table, y.ctypes.data, x.ctypes.data, weight.ctypes.data, eps, x.size)
        return y

    def add(self, residual, x):
        y, x = misaligned(residual), misaligned(x)
        self.lib.gk_test_add(self.table, y.ctypes.data, x.ctypes.data, x.size)
        return y

    def rope(self, x, cos, sin):  # x [heads, H]
        y, cos, sin = misaligned(x), misaligned(cos), misaligned(sin)
        self.lib.gk_test_rope(self.table, y.ctypes.data, *y.shape, cos.ctypes.data, sin.ctypes.data)
        return y

    def gelu_mul(self, gate, up):
        gate, up, y = misaligned(gate), misaligned(up), misaligned(np.empty_like(gate))
        self.lib.gk_test_gelu_mul(self.table, gate.ctypes.data, up.ctypes.data, gate.size, y.ctypes.data)
        return y

    def softcap(self, x, cap):
        y = misaligned(x)
        self.lib.gk_test_softcap(self.table, y.ctypes.data, y.size, cap)
        return y

    def scale(self, x, factor):
        y = misaligned(x)
        self.lib.gk_test_scale(self.table, y.ctypes.data, y.size, factor)
        return y

    def store(self, x, cache_type):
        """(values as stored, scale) of one vector."""
        dtype = {0: np.float32, 1: np.uint16, 2: np.int8}[cache_type]
        x, y, scale = misaligned(x), misaligned(np.empty(x.size, dtype)), np.full(1, np.nan, np.float32)
        self.lib.gk_test_store(self.table, x.ctypes.data, x.size, cache_type, y.ctypes.data, scale.ctypes.data)
        return y, scale[0]

    def bf16_to_f32(self, x):
        x, y = misaligned(x), misaligned(np.empty(x.size, np.float32))
        self.lib.gk_test_bf16_to_f32(self.table, x.ctypes.data, x.size, y.ctypes.data)
        return y

    def f32_to_bf16(self, x):
        x, y = misaligned(x), misaligned(np.empty(x.size, np.uint16))
        self.lib.gk_test_f32_to_bf16(self.table, x.ctypes.data, x.size, y.ctypes.data)
        return y

    def exp(self, x):
        x, y = misaligned(x), np.empty_like(x)
        self.lib.gk_test_exp(self.table, x.ctypes.data, x.size, y.ctypes.data)
        return y

    def argmax(self, x):
        x = misaligned(x)
        return self.lib.gk_test_argmax(self.table, x.ctypes.data, x.size)

    def top_k(self, x, k, pieces=1):
        """(ids, values), sorted by value and then id; x is handed over in pieces."""
        ids, values, held, first = np.empty(k, np.int32), np.empty(k, np.float32), 0, 0
        for piece in np.array_split(x, pieces):
            piece = misaligned(piece)
            held = self.lib.gk_test_top_k(
                self.table, piece.ctypes.data, piece.size, first, k, ids.ctypes.data, values.ctypes.data, held
            )
            first += piece.size
        order = np.lexsort((ids[:held], -values[:held]))
        return ids[:held][order], values[:held][order]

    def sum_exp(self, x, shift):
        x = misaligned(x)
        return self.lib.gk_test_sum_exp(self.table, x.ctypes.data, x.size, shift)


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """How far float32 `got` is from float64 `exact`, in units of the last place of a float32 as large as `exact`."""
    tiny = 2.0**-149
    unit = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), tiny))) - 23), tiny)
    return np.abs(got.astype(np.float64) - exact) / unit
