# SPDX-License-Identifier: Apache-2.0
"""Compiles, keeps and opens the XLA shim (`native/ffi.cpp`), the small library through which JAX calls libgemmakit.

It is compiled on first use, where a C++ compiler is at hand, against the headers of the installed jaxlib, and kept in
`kernels/` of the cache folder under a name made of everything that it depends on. One whose checksum is wrong or that
another user could have written is not opened, but made anew. A file of the same name beside the sources (in a wheel)
is taken first. The functions that trace calls of it are in `_jax.py`; libgemmakit itself is `_native.py`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from gemma.errors import KernelError
from gemma.hub import cache_dir
from gemma.kernels import _native
from gemma.kernels import build as building

_SOURCES = Path(__file__).parent / "native"
_MAGIC = b"GKXSHIM1"  # magic and SHA-256 end a kept file; the linker does not look behind what the header names
_TAIL = len(_MAGIC) + 32
_OPTIMIZE = "-O1"  # it computes nothing
TARGETS = {"gemmakit_matmul": "gkx_matmul", "gemmakit_matmul_grad": "gkx_matmul_grad", "gemmakit_rows": "gkx_rows"}
_lock = threading.Lock()


class Shim(NamedTuple):
    """What must live as long as the process: XLA holds pointers into both."""

    library: ctypes.CDLL
    context: _native.Context


def shim() -> Shim | None:
    """The shim, compiled if need be and registered with XLA for the CPU; None where that is impossible."""
    return _opened()[0]


def why_missing() -> str | None:
    """None if the shim can be used, else one sentence. Compiles it if that has not been done yet."""
    return _opened()[1]


def status() -> str:
    """One line for a report. Compiles nothing, opens nothing."""
    if _native.library() is None:
        return f"JAX uses XLA alone: the native library is {_native.why_missing()}"
    found = next((path for path in _places() if _is_sound(path)), None)
    if found is not None:
        return f"JAX calls the native kernels through {found}"
    try:
        building.find_compiler()
    except KernelError as error:
        return f"JAX uses XLA alone: the shim cannot be compiled: {error}"
    return f"JAX calls the native kernels; the shim is compiled on first use ({_places()[-1]})"


def build(folder: str | os.PathLike[str]) -> Path:
    """Compiles the shim into a folder, under the name that it is looked for; for wheels.

    Raises:
      KernelError: there is no compiler, it failed, or the folder cannot be written.
    """
    return _compile(Path(folder) / _name())


def _opened() -> tuple[Shim | None, str | None]:
    with _lock:  # two threads that trace at once must not compile twice
        return _open_once()


@functools.cache
def _open_once() -> tuple[Shim | None, str | None]:
    if _native.library() is None:
        return None, f"the native library is {_native.why_missing()}"
    try:
        with _file() as path:
            opened = ctypes.CDLL(str(path))
        context = _native.Context()
        opened.gkx_open.restype, opened.gkx_open.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_void_p]
        problem = opened.gkx_open(os.fsencode(_native.library_path()), context.handle)
        if problem:
            raise KernelError(problem.decode(errors="replace"))
    except (KernelError, OSError) as error:
        return None, f"the XLA shim of the native kernels cannot be used: {error}"
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(opened, symbol)), platform="cpu")
    return Shim(opened, context), None


@functools.cache
def _name() -> str:
    digest = hashlib.sha256()
    for part in (_SOURCES / "ffi.cpp", _SOURCES / "gemmakit.h"):
        digest.update(hashlib.sha256(part.read_bytes()).digest())
    about = (jaxlib.__version__, platform.system(), platform.machine(), _OPTIMIZE, *building.COMMON)
    digest.update("\0".join(about).encode())
    return f"gemmakit_ffi-{jaxlib.__version__}-{digest.hexdigest()[:24]}.so"


def _places() -> tuple[Path, Path]:
    return _SOURCES / _name(), cache_dir() / "kernels" / _name()


def _is_sound(path: Path) -> bool:
    """Whether a kept shim is whole, and only this user (or the system's administrator) can have written it."""
    try:
        with open(path, "rb") as file:
            about, data = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o022:
        return False
    return data[-_TAIL:] == _MAGIC + hashlib.sha256(data[:-_TAIL]).digest()


@contextlib.contextmanager
def _file() -> Iterator[Path]:
    """The path of a sound shim, for as long as it takes to open it."""
    found = next((path for path in _places() if _is_sound(path)), None)
    if found is not None:
        yield found
        return
    path = _places()[-1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard = open(path.parent / ".lock", "ab")  # noqa: SIM115 (closed below; the lock goes with it)
    except OSError:  # a cache that cannot be written costs the time of compiling at every start
        with tempfile.TemporaryDirectory() as folder:
            yield _compile(Path(folder) / path.name)
        return
    with guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # another process may be compiling it in this moment
        if not _is_sound(path):
            _compile(path)
    yield path


def _compile(path: Path) -> Path:
    """Makes the shim; it appears under its name complete."""
    flags = ("-isystem", jax.ffi.include_dir())
    link = ("-ldl", "-s") if platform.system() == "Linux" else ()
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        building.compile(
            made,
            sources=[_SOURCES / "ffi.cpp"],
            flags=flags,
            link=link,
            optimize=_OPTIMIZE,
            isa=(),
            objects=Path(folder),
        )
        data = made.read_bytes()
        made.write_bytes(data + _MAGIC + hashlib.sha256(data).digest())
        made.chmod(0o755)
        os.replace(made, path)
    return path
