# SPDX-License-Identifier: Apache-2.0
"""The XLA shim's file: kept, checked, compiled once for many, and what is said where there is none."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings

import pytest

from gemma.errors import KernelError
from gemma.kernels import _jax, _native, _shim_jax


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch):
    """Compiling, counted and replaced by writing a sound file of a few bytes."""
    made = []

    def fake(path):
        made.append(path)
        time.sleep(0.05)
        data = b"a library"
        path.write_bytes(data + _shim_jax._MAGIC + hashlib.sha256(data).digest())
        path.chmod(0o755)
        return path

    monkeypatch.setattr(_shim_jax, "_compile", fake)
    return made


def opened():
    with _shim_jax._file() as path:
        return path, path.read_bytes()


def test_compiled_once_and_kept(cache, builds):
    path, data = opened()
    assert path.parent == cache / "kernels" and opened() == (path, data) and len(builds) == 1
    assert "through" in _shim_jax.status() or _native.library() is None


def test_two_at_once_compile_once(cache, builds):
    threads = [threading.Thread(target=opened) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "shared"])
def test_damaged_or_open_to_others_is_made_anew(cache, builds, damage):
    path, data = opened()
    if damage == "shared":
        path.chmod(0o777)
    else:
        path.write_bytes({"cut": data[:-1], "changed": b"A" + data[1:], "empty": b""}[damage])
    assert not _shim_jax._is_sound(path)
    assert opened() == (path, data) and len(builds) == 2 and _shim_jax._is_sound(path)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, builds):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "file"))
    path, _ = opened()
    assert tmp_path not in path.parents and not path.exists() and len(builds) == 1


def test_name_depends_on_what_it_is_made_of(monkeypatch):
    name = _shim_jax._name.__wrapped__
    first = name()
    monkeypatch.setattr(_shim_jax.jaxlib, "__version__", "9.9.9")
    assert name() != first and "9.9.9" in name()


def test_no_compiler(cache, monkeypatch):
    if _native.library() is None:
        pytest.skip("no native library, so nothing would be compiled")

    def none_found(*_):
        raise KernelError("expected a C++20 compiler, got none")

    monkeypatch.setattr(_shim_jax.building, "find_compiler", none_found)
    monkeypatch.setattr(_shim_jax, "_opened", _shim_jax._open_once.__wrapped__)
    assert "expected a C++20 compiler" in _shim_jax.why_missing() and _shim_jax.shim() is None
    assert "uses XLA alone" in _shim_jax.status()
    _jax._available.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="packed weights run through XLA"):
            assert not _jax.available()
        with warnings.catch_warnings(action="error"):  # it is said once
            assert not _jax.available()
    finally:
        _jax._available.cache_clear()


def test_compiler_that_fails(cache, monkeypatch):
    """Nothing is left behind, and the words of the compiler are in the error."""
    if _native.library() is None:
        pytest.skip("no native library, so nothing would be compiled")
    broken = cache / "sources"
    broken.mkdir(parents=True)
    (broken / "ffi.cpp").write_text("#error made to fail\n")
    (broken / "gemmakit.h").write_text("")
    monkeypatch.setattr(_shim_jax, "_SOURCES", broken)
    with pytest.raises(KernelError, match="made to fail"):
        _shim_jax.build(cache)
    assert not list(cache.glob("*.so"))


def test_turned_off(monkeypatch):
    monkeypatch.setattr(_native, "_loaded", lambda: (None, "turned off by GEMMA_NATIVE=0", None))
    library, why = _shim_jax._open_once.__wrapped__()
    assert library is None and "GEMMA_NATIVE=0" in why and "GEMMA_NATIVE=0" in _shim_jax.status()
