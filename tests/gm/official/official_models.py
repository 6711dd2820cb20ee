# SPDX-License-Identifier: Apache-2.0
"""A user's own architecture, as the official documents show it: configuration, class variable, nothing else."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gemma import gm

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
FIELDS = dict(
    num_embed=14,
    embed_dim=16,
    hidden_dim=24,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(LOCAL, GLOBAL),
    sliding_window_size=6,
    use_qk_norm=True,
    transpose_gating_einsum=True,
    global_base_frequency=1_000_000,
)


def config(**changes) -> gm.nn.config.TransformerConfig:
    return gm.nn.config.TransformerConfig(**(FIELDS | changes))


class Small(gm.nn.Transformer, kw_only=True):
    config: gm.nn.config.TransformerConfig = config()

    INFO: ClassVar[gm.nn.config.ModelInfo] = gm.nn.config.ModelInfo()


def small_model(**changes):
    """A `Small` in float32 and its parameters: strong enough that every token matters."""
    model = Small(dtype=jnp.float32, config=config(**changes)) if changes else Small(dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.4 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return model, jax.tree.unflatten(tree, drawn)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("return_last_only", "return_hidden_states"))
def call(model: Any, params: Any, tokens: jax.Array, **arguments: Any) -> gm.nn.Output:
    """`model.apply`, jitted: operation by operation each of them would be compiled alone."""
    return model.apply({"params": params}, tokens, **arguments)
