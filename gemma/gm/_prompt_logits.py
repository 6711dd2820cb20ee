# SPDX-License-Identifier: Apache-2.0
"""The logits of one prompt, straight from a checkpoint: what two files of the same model are compared by.

Nothing is sampled or cached here; that is `gm/text`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma.config import GemmaConfig, text_only
from gemma.gm.ckpts import load_params
from gemma.gm.nn import Transformer


def prompt_logits(path: str | os.PathLike[str], config: GemmaConfig, ids: Sequence[int]) -> np.ndarray:
    """float32 [T, V]: the text decoder's logits after each of the ids, computed in float32.

    Args:
      path: of a checkpoint that `gm.ckpts.load_params` reads.
      config: of the model; an image tower is left out.
      ids: the prompt, T tokens.
    """
    decoder = text_only(config)
    params = load_params(path, dtype="float32", text_only=True, config=decoder)
    return np.asarray(_compiled(decoder)(params, jnp.asarray([list(ids)], jnp.int32)), np.float32)[
        0, :, : config.vocab_size
    ]


@functools.lru_cache(maxsize=1)
def _compiled(decoder: GemmaConfig) -> Callable[..., jax.Array]:
    """The forward pass of a decoder; kept, because the files that are compared hold the same one."""
    model = Transformer.from_config(decoder, dtype=jnp.float32)
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
