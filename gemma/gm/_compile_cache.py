# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache, switched on once under the cache folder, so that a second start compiles nothing.

It changes only JAX's own settings, and only those that nobody has set. Samplers and sessions call it; a program that
compiles for itself may too. What is compiled, and for which shapes, is decided in `gm/text`.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from gemma import hub

_MIN_COMPILE_SECONDS = 0.2  # JAX's own default of 1 would leave out the smaller prompt buckets


def enable() -> Path | None:
    """Keeps compiled programs in `cache_dir()/xla` from now on.

    Nothing changes where a cache is configured already (`jax_compilation_cache_dir`, `JAX_COMPILATION_CACHE_DIR`),
    where `jax_enable_compilation_cache` is off, with `GEMMA_COMPILE_CACHE=0`, or where the folder cannot be written:
    programs are then compiled in every process.

    Returns:
      The folder in use, whoever chose it; None if there is none.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    configured = jax.config.jax_compilation_cache_dir
    if configured is not None:
        return Path(configured) if configured else None
    if os.environ.get("GEMMA_COMPILE_CACHE", "").strip() == "0":
        return None
    folder = hub.cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    # JAX decides once, at the first compilation, whether it has a cache; something may have been compiled already.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    return folder
