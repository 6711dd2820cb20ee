# SPDX-License-Identifier: Apache-2.0
"""The persistent compilation cache: on by default, and hands off what somebody has set."""

from __future__ import annotations

import jax
import pytest

from gemma.gm import _compile_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """JAX's own defaults, and the settings of the test session afterwards."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name, value in zip(NAMES, (None, True, 1.0)):
        jax.config.update(name, value)
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GEMMA_COMPILE_CACHE", raising=False)
    yield
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept(tmp_path):
    jax.jit(lambda x: x + 1)(1)  # JAX has decided by now that it has no cache
    folder = _compile_cache.enable()
    assert folder == tmp_path / "cache" / "xla"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x * 3 - 1)(2)
    assert list(folder.glob("*-cache"))
    assert _compile_cache.enable() == folder


def test_it_can_be_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMA_COMPILE_CACHE", "0")
    assert _compile_cache.enable() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("GEMMA_COMPILE_CACHE")
    jax.config.update("jax_enable_compilation_cache", False)
    assert _compile_cache.enable() is None and not (tmp_path / "cache").exists()


def test_what_is_configured_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert _compile_cache.enable() == tmp_path / "mine"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert _compile_cache.enable() is None and jax.config.jax_compilation_cache_dir is None
