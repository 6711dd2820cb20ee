# SPDX-License-Identifier: Apache-2.0
"""Strict promotion and quick compiles for the tests of the research corner."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict(strict_jax):
    """Implicit dtype and rank promotion are errors here, too."""


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
