# SPDX-License-Identifier: Apache-2.0
"""What is looked at before anything is compiled: do these parameters belong to this model?

The networks check the shapes of their own inputs (`gm/nn/_transformer.py`); prompts are checked by `_engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gemma.errors import ConfigError, ShapeError


def check_params(config: Any, params: Any) -> None:
    """Refuses parameters of another model by one look at their table and layers, before anything is compiled.

    Raises:
      ConfigError: float16 for a family whose activations it cannot hold.
      ShapeError: not the tree of `model.init(...)["params"]`, or of other sizes; the message names the leaf.
    """
    keys = sorted(params) if isinstance(params, Mapping) else []
    table = params["embedder"].get("input_embedding") if "embedder" in keys else None
    if table is None:
        inner = ' (is it params["params"] that is meant?)' if "params" in keys else ""
        got = ", ".join(keys[:4]) or type(params).__name__
        raise ShapeError(f"params: expected a tree with embedder/input_embedding, got {got}{inner}")
    expected = (config.num_embed, config.embed_dim)
    if hasattr(table, "shape") and tuple(table.shape) != expected:
        raise ShapeError(
            f"params: embedder/input_embedding: the model expects the shape {expected}, got {tuple(table.shape)}: "
            f"these are the parameters of another size"
        )
    if getattr(table, "dtype", None) == jnp.float16 and config.use_qk_norm:
        raise ConfigError(
            "float16 cannot run Gemma 3: its activations pass 65504, the largest float16, and the text becomes NaN; use "
            "bfloat16 or float32 parameters"
        )
    layers = sum(key.startswith("layer_") for key in keys)
    if layers != config.num_layers:
        raise ShapeError(f"params: the model has {config.num_layers} layers, the parameters {layers}")
