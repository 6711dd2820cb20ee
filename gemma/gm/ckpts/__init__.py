# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as JAX parameter trees. Files are read by `gemma.checkpoint`, names and axes come from `gemma.weights`."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"_load": ["load_params"]})
