# SPDX-License-Identifier: Apache-2.0
"""The native library seen from numpy: finding and loading it, contexts, packed weights, products.

Every argument is checked here, before a pointer leaves Python. It holds no model: a whole decoder over the same library
is `_model.py`. The C interface is `native/gemmakit.h`; `build.py` compiles it. GEMMA_NATIVE=0 turns the library off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma.errors import CheckpointError, ConfigError, GemmaError, KernelError, ShapeError
from gemma.kernels import build
from gemma.quants import PackedTensor, QuantType

ABI_VERSION = 2  # GK_ABI_VERSION of gemmakit.h
TYPE_IDS = {type: type.ggml_id for type in QuantType if type.ggml_id is not None}
TYPE_IDS |= {QuantType.SFP8: 1000, QuantType.INT8: 1001, QuantType.INT4: 1002}  # enum gk_type
_FLOAT_TYPES = {"float32": QuantType.F32, "float16": QuantType.F16, "bfloat16": QuantType.BF16}
_OFF = ("0", "off", "false", "no")


class GkWeight(ctypes.Structure):
    """struct gk_weight."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
    )


def _declare(lib: ctypes.CDLL) -> None:
    """Argument and result types of what this module calls; `_model.py` declares its own."""
    pointer, i32, i64, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    weight = ctypes.POINTER(GkWeight)
    signatures = {
        "gk_last_error": (text,),
        "gk_instruction_sets": (text,),
        "gk_context_new": (pointer, ctypes.c_int, text),
        "gk_context_free": (None, pointer),
        "gk_context_isa": (text, pointer),
        "gk_context_threads": (ctypes.c_int, pointer),
        "gk_row_bytes": (i64, i32, i64),
        "gk_matmul": (ctypes.c_int, pointer, weight, pointer, i64, i64, pointer, i64),
        "gk_matmul_bf16": (ctypes.c_int, pointer, weight, pointer, i64, i64, pointer, i64),
        "gk_matmul_grad": (ctypes.c_int, pointer, weight, pointer, i64, i64, pointer, i64),
        "gk_rows": (ctypes.c_int, pointer, weight, pointer, i64, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


# ---- loading --------------------------------------------------------------------------------------------------------


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None, Path | None]:
    """(library, None, its path), or (None, why not, None)."""
    if os.environ.get("GEMMA_NATIVE", "").strip().lower() in _OFF:
        return None, "turned off by GEMMA_NATIVE=0", None
    again = "run `python -m gemma.kernels.build`"
    path = next((path for path in (build.LIBRARY, build.cached_library()) if path.is_file()), None)
    if path is None:
        return None, f"not built: {build.LIBRARY} is not there; install a C++20 compiler (g++) and {again}", None
    try:
        lib = ctypes.CDLL(os.fspath(path))
        lib.gk_abi_version.restype = ctypes.c_int
        version = lib.gk_abi_version()
        if version != ABI_VERSION:
            return None, f"{path} has interface {version}, this gemmakit needs {ABI_VERSION}: {again} --force", None
        _declare(lib)
    except (OSError, AttributeError) as error:  # made for another machine, cut short, or another library
        return None, f"{path} cannot be loaded ({error}): {again} --force", None
    return lib, None, path


def library() -> ctypes.CDLL | None:
    """The native library, loaded once and its interface version checked; None where there is none (`why_missing`)."""
    return _loaded()[0]


def why_missing() -> str | None:
    """Why `library()` is None and what to do about it, as half a sentence; None where it is there."""
    return _loaded()[1]


def library_path() -> Path | None:
    """The file that `library()` was loaded from."""
    return _loaded()[2]


def _needed() -> ctypes.CDLL:
    lib, why, _ = _loaded()
    if lib is None:
        raise KernelError(f"the native library is needed here, but it is {why}; or use the JAX or PyTorch model")
    return lib


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that the library holds and this CPU has, best first; empty without the library."""
    lib = library()
    return tuple(lib.gk_instruction_sets().decode().split()) if lib else ()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(status: int, what: str) -> None:
    """Raises the error that a negative status of the library stands for; `what` names the operation."""
    if status >= 0:
        return
    words = (_needed().gk_last_error() or b"").decode(errors="replace") or f"it failed with code {status}"
    # enum gk_status: BAD_ARGUMENT, NO_MEMORY, UNSUPPORTED, NOT_FINITE
    kinds: dict[int, type[GemmaError]] = {-1: ShapeError, -2: KernelError, -3: KernelError, -4: CheckpointError}
    raise kinds.get(status, KernelError)(f"{what}: {words}")


# ---- weights --------------------------------------------------------------------------------------------------------


class NativeWeight:
    """A weight [rows, cols] as the library sees it: the bytes stay where they are and are kept alive.

    Attributes:
      type: a QuantType.
      rows, cols: outputs and inputs; leading axes of outputs are flattened.
      struct: the gk_weight that points to it.
    """

    def __init__(self, packed: PackedTensor | np.ndarray):
        """Takes a packed weight, or a float32, float16 or bfloat16 matrix; rows may be strided, each row is whole."""
        if isinstance(packed, PackedTensor):
            self.type, self.cols, data, scale = packed.type, packed.shape[-1], packed.data, packed.scale
        elif isinstance(packed, np.ndarray):
            if packed.ndim != 2 or packed.dtype.name not in _FLOAT_TYPES or not packed.dtype.isnative:
                raise ShapeError(
                    f"weight: expected a matrix [rows, cols] of float32, float16 or bfloat16, or a PackedTensor, "
                    f"got {packed.dtype} {packed.shape}"
                )
            self.type, self.cols, data, scale = _FLOAT_TYPES[packed.dtype.name], packed.shape[1], packed, None
        else:
            raise ShapeError(f"weight: expected a PackedTensor or a numpy matrix, got {type(packed).__name__}")
        self.rows, width = data.shape[0], self.type.row_bytes(self.cols)
        stride = data.strides[0] if self.rows > 1 else width
        inner = data.shape[1] == 1 or data.strides[1] == data.itemsize
        if self.rows < 1 or not inner or stride < width:
            raise ShapeError(
                f"weight: expected one or more rows of contiguous bytes, got shape {data.shape} with strides "
                f"{data.strides}; pass np.ascontiguousarray(weight)"
            )
        if scale is not None and not (scale.flags.c_contiguous and scale.flags.aligned):
            raise ShapeError("weight: expected a contiguous, aligned scale; pass np.ascontiguousarray(scale)")
        self._kept = (data, scale)
        self.struct = GkWeight(
            TYPE_IDS[self.type],
            self.rows,
            self.cols,
            data.ctypes.data,
            stride,
            scale.ctypes.data if scale is not None else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.rows, self.cols

    def __repr__(self) -> str:
        return f"NativeWeight({self.type.name} [{self.rows}, {self.cols}])"


# ---- products -------------------------------------------------------------------------------------------------------


class Context:
    """A pool of threads and the kernels of one instruction set. One call runs at a time; others wait.

    Attributes:
      threads, isa: what it uses.
    """

    def __init__(self, threads: int | None = None, isa: str | None = None):
        """Starts the threads.

        Args:
          threads: 1 to the processors of this process; None: all of them. Results do not depend on it.
          isa: one of `instruction_sets()`; None: the best. Results depend on it in the last bits.

        Raises:
          KernelError: there is no native library, or the system refuses threads.
          ConfigError: threads or isa cannot be had on this machine.
        """
        lib = _needed()
        limit = processors()
        threads = limit if threads is None else threads
        if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= limit:
            raise ConfigError(f"threads: expected 1 to {limit}, the processors of this process, got {threads!r}")
        sets = instruction_sets()
        if isa is not None and isa not in sets:
            raise ConfigError(
                f"isa: expected one of {', '.join(sets)}, which this library holds and this CPU has, got {isa!r}"
            )
        handle = lib.gk_context_new(int(threads), isa.encode() if isa else None)
        if not handle:
            words = (lib.gk_last_error() or b"").decode(errors="replace")
            raise KernelError(f"a context of {threads} threads could not be made: {words}")
        self.threads, self.isa = int(threads), lib.gk_context_isa(handle).decode()
        self.lock = threading.RLock()  # models over this context share it
        self._handle = handle
        self._closer = weakref.finalize(self, lib.gk_context_free, handle)

    @property
    def handle(self) -> int:
        """The gk_context pointer; an error once closed. In a forked child, which has no threads, it runs on one."""
        if not self._closer.alive:
            raise KernelError("this native context is closed: make a new one")
        return self._handle

    def close(self) -> None:
        """Ends the threads; closing twice does no harm."""
        with self.lock:
            self._closer()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def matmul(self, weight: NativeWeight, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x @ W.T. A row of the result has the same bits whatever M, the other rows and the threads are.

        Packed integer types meet activations rounded to 15 bits and a sign with one scale for 32 of them; float types
        meet them as they are. Sums are float32. A row with NaN or infinity gives NaN where the type is packed.

        Args:
          weight: [rows, cols].
          x: float32 or bfloat16 [M, cols]; M may be 0, rows may be strided.
          out: [M, rows] of x's dtype to fill; it may not share memory with x.

        Returns:
          [M, rows] of x's dtype, bfloat16 rounded once.
        """
        return self._product("matmul", weight, x, weight.cols, weight.rows, out)

    def matmul_grad(self, weight: NativeWeight, dy: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """dy @ W, the gradient of `matmul` with respect to x: float32 [M, rows] to float32 [M, cols]."""
        return self._product("matmul_grad", weight, dy, weight.rows, weight.cols, out)

    def _product(self, name, weight, x, inner, outer, out):
        dtypes = ("float32",) if name == "matmul_grad" else ("float32", "bfloat16")
        self._check_matrix(f"{name}: x", x, (None, inner), dtypes)
        if out is None:
            out = np.empty((len(x), outer), x.dtype)
        else:
            self._check_matrix(f"{name}: out", out, (len(x), outer), (x.dtype.name,))
            if not out.flags.writeable or np.may_share_memory(x, out):
                raise ShapeError(f"{name}: out: expected writable memory that x has no part in")
        if not len(x):
            return out
        symbol = f"gk_{name}_bf16" if x.dtype == ml_dtypes.bfloat16 else f"gk_{name}"
        arguments = x.ctypes.data, len(x), _stride(x), out.ctypes.data, _stride(out)
        with self.lock:
            check(getattr(_needed(), symbol)(self.handle, weight.struct, *arguments), name)
        return out

    @staticmethod
    def _check_matrix(what: str, x: np.ndarray, shape: tuple[int | None, int], dtypes: tuple[str, ...]) -> None:
        if not isinstance(x, np.ndarray) or x.dtype.name not in dtypes or not x.dtype.isnative:
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise ShapeError(f"{what}: expected a numpy array of {' or '.join(dtypes)}, got {got}")
        if x.ndim != 2 or x.shape[1] != shape[1] or shape[0] not in (None, x.shape[0]):
            rows = "M" if shape[0] is None else shape[0]
            raise ShapeError(f"{what}: expected shape [{rows}, {shape[1]}], got {list(x.shape)}")
        step, lead = x.strides[1], x.strides[0]
        whole = (x.shape[1] == 1 or step == x.itemsize) and (len(x) <= 1 or lead >= x.shape[1] * x.itemsize)
        if x.size and (not whole or lead % x.itemsize or not x.flags.aligned):
            raise ShapeError(
                f"{what}: expected aligned rows of contiguous elements, got strides {x.strides}; "
                f"pass np.ascontiguousarray of it"
            )

    def rows(self, weight: NativeWeight, ids) -> np.ndarray:
        """Rows of a weight, as an embedding takes them: float32 [n, cols], equal to `gemma.quants` bit for bit.

        Args:
          ids: integers [n] from 0 to rows - 1, in any order, repeated or not; n may be 0.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise ShapeError(f"rows: ids: expected integers [n], got {ids.dtype} {list(ids.shape)}")
        if ids.size and not (ids.min() >= 0 and ids.max() < weight.rows):
            raise ShapeError(f"rows: ids: expected 0 to {weight.rows - 1}, got {ids.min()} to {ids.max()}")
        ids = np.ascontiguousarray(ids, np.int32)
        out = np.empty((ids.size, weight.cols), np.float32)
        if ids.size:
            with self.lock:
                status = _needed().gk_rows(self.handle, weight.struct, ids.ctypes.data, ids.size, out.ctypes.data)
                check(status, "rows")
        return out


def _stride(x: np.ndarray) -> int:
    """Elements from one row to the next."""
    return x.strides[0] // x.itemsize if len(x) > 1 else x.shape[1]
