# SPDX-License-Identifier: Apache-2.0
"""Quick compiles for tiny models, and strict JAX promotion."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def strict(strict_jax):
    """Implicit promotion is an error here as in the other JAX folders."""
