# SPDX-License-Identifier: Apache-2.0
"""What users' XLA computes is what the XLA of these tests computes: they run on another, quicker loop emitter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

LOGITS = """
import sys, jax, jax.numpy as jnp, numpy as np
from gemma import gm
loaded = gm.testing.tiny_model()
tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 24)), jnp.int32)
apply = jax.jit(lambda params, tokens: loaded.model.apply({"params": params}, tokens).logits)
np.save(sys.argv[1], apply(loaded.params, tokens))
"""


def test_the_default_settings_give_the_same_logits(tmp_path):
    """Both kinds of layer, past the window; one process with XLA's defaults, one with the flags of tests/conftest.py."""
    found = []
    for name, flags in (("users", ""), ("tests", os.environ["XLA_FLAGS"])):
        path = tmp_path / f"{name}.npy"
        env = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", LOGITS, str(path)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(np.load(path))
    users, tests = found
    assert users.shape == (2, 24, 320) and users.std() > 0.1
    # sums of up to some hundred terms in another order: 2**-24 each, and two layers
    assert np.abs(users - tests).max() <= 1e-5 * np.abs(users).max()
