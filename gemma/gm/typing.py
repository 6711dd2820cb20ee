# SPDX-License-Identifier: Apache-2.0
"""Type aliases of the JAX API. Shapes are written beside them with the axis letters of docs/axes.md.

It holds no code; the checks of shapes that come from users are in `gm/utils/_jax_utils.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

Params = Mapping[str, Any]
"""A tree of parameters: nested dictionaries that end in arrays."""

DType = Any
"""Anything that `jnp.dtype` accepts: `jnp.bfloat16`, `"float32"`, ..."""

Sharding = jax.sharding.Sharding
"""Where the parts of an array live."""

__all__ = ["Array", "Bool", "DType", "Float", "Int", "Params", "Sharding", "UInt8"]
