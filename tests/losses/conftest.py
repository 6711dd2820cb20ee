# SPDX-License-Identifier: Apache-2.0
"""Tiny programs that run a few times: compiling them is the cost, so XLA optimizes little."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
