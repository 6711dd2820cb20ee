# SPDX-License-Identifier: Apache-2.0
"""Collects an importance matrix: a model reads a text, and the mean square of each input of each weight is kept.

The layers are listened to while they run (a Flax interceptor); nothing in the model knows of it. The embedding has none,
as in llama.cpp. Files are `gemma/imatrix.py`, windows of text `_windows.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma import weights
from gemma.errors import CheckpointError
from gemma.gm._evaluate import Model
from gemma.gm._windows import Batch
from gemma.gm.nn import _layers
from gemma.gm.typing import Array, Params


def collect(
    model: Model, batches: Sequence[Batch], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """Canonical tensor name to float32 [inputs], the mean of x**2 over all tokens of all windows.

    Raises:
      CheckpointError: the model computes NaN.
    """
    config = getattr(model.net.config, "gemma", model.net.config)
    matrices = weights.matrices(config)
    sums: dict[str, np.ndarray] = {}
    tokens = 0
    for number, batch in enumerate(batches):
        for leaf, squares in _squares(model.net, model.params, batch.tokens).items():
            sums[leaf] = sums.get(leaf, 0.0) + np.asarray(squares, np.float64)
        tokens += int((batch.tokens != 0).sum())
        if progress is not None:
            progress(number + 1, len(batches))
    found = {}
    for leaf, total in sums.items():
        if leaf not in matrices:  # what belongs to images is not quantized
            continue
        if not np.isfinite(total).all():
            raise CheckpointError(f"{leaf}: its inputs hold NaN or infinity; the model cannot be used")
        found |= {tensor.name: (total / tokens).astype(np.float32) for tensor in matrices[leaf].tensors}
    return found


@functools.partial(jax.jit, static_argnums=0)
def _squares(net: nn.Module, params: Params, tokens: Array) -> dict[str, Array]:
    """Leaf name to the sum of x**2 over the real tokens of [B, T], float32 [inputs]."""
    valid = tokens != 0
    found: dict[str, Array] = {}

    def listen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if isinstance(module, _layers.Einsum) and context.method_name == "__call__":
            x = args[1] if len(args) > 1 else kwargs["x"]
            if x.shape[:2] == valid.shape:
                inputs = x.reshape(*valid.shape, math.prod(x.shape[2:])).astype(jnp.float32)
                inputs = jnp.where(valid[..., None], inputs, 0)
                found["/".join((*module.path, module.weight_name))] = jnp.sum(inputs * inputs, axis=(0, 1))
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        net.apply({"params": params}, tokens, return_last_only=True)
    return found
