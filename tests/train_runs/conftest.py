# SPDX-License-Identifier: Apache-2.0
"""Runs that are saved, killed, moved and spread; the failing disk is that of tests/atomic."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "atomic"))


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where there is such a place: hundreds of syncs, and none of them needs the real drive."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="gemmakit-tests-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little, in subprocesses, too."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
