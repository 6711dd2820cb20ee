# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders with random parameters, and a slow numpy attention, for the tests of gm.nn."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma import gm
from gemma.config import GemmaConfig

QUICK = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)  # halves compilation
WINDOW = 4
TINY = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    layer_pattern="LG",
    sliding_window=WINDOW,
    query_pre_attn_scalar=6.0,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling_factor=8.0,
)
CONFIGS = {
    "gemma2": GemmaConfig(
        **TINY,
        num_key_value_heads=2,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        use_post_norms=True,
    ),
    "gemma3": GemmaConfig(
        **TINY,
        num_key_value_heads=1,
        use_post_norms=True,
        use_qk_norm=True,
        transpose_gating_einsum=True,
    ),
}


def random_like(shapes, seed: int = 0):
    """Random arrays of the given shapes and dtypes, for parameters whose values must not be trivial."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)), shapes)


@functools.cache
def tiny(name: str, dtype: str = "float32"):
    """(model, variables) of a configuration; every parameter random, norms included."""
    model = gm.nn.Transformer.from_config(CONFIGS[name], dtype=jnp.dtype(dtype))
    return model, random_like(jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32)))


@functools.cache
def compiled(name: str, dtype: str = "float32"):
    """`f(tokens, **arguments) -> Output` of a tiny model, jitted; its own variables unless others are given."""
    model, variables = tiny(name, dtype)
    static = ("return_last_only", "return_hidden_states")
    apply = jax.jit(model.apply, static_argnames=static, compiler_options=QUICK)
    return lambda tokens, variables=variables, **arguments: apply(variables, jnp.asarray(tokens), **arguments)


def ids(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, TINY["vocab_size"], shape, dtype=np.int32)


def numpy_attention(q, k, v, mask, *, softcap=None):
    """Loops over batch, query and head in float64: q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, :, n // groups] @ q[b, t, n]
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        seen = np.where(mask[b, t])[0]
        weights = np.exp(scores[seen] - scores[seen].max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, seen, n // groups]
    return out
