# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as JAX parameter trees. `gemma.checkpoint` reads the files, `gemma.weights` knows names and axes."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"_load": ["load_params"]})
