# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random adapters, compiled once per file, for the tests of gemma.peft."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma import gm, peft

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOKENS = np.random.default_rng(3).integers(3, 200, (2, 11), dtype=np.int32)
ALL = ("attention", "mlp", "embedder")


@functools.cache
def tiny(family: str = "gemma3", **changes):
    """A `LoadedModel` in float32."""
    return gm.testing.tiny_model(family, **changes)


def adapted(family: str = "gemma3", seed: int = 0, *, size: float = 0.1, base=None, **fields):
    """(gm.nn.LoRA, merged parameters): the tiny model with adapters whose every number is random.

    Magnitudes of DoRA are random around one.
    """
    loaded = tiny(family) if base is None else base
    model = gm.nn.LoRA(**{"rank": 3, "model": loaded.model, "dtype": jnp.float32, **fields})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS[:, :2]))["params"]
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        values = rng.normal(0, size, leaf.shape).astype(np.float32)
        return jnp.asarray(values + (path[-1].key == "magnitude"), leaf.dtype)

    lora = jax.tree_util.tree_map_with_path(random, peft.split_params(shapes).lora)
    return model, peft.merge_params(loaded.params, lora)


@functools.cache
def program(model):
    """`model.apply(...).logits`, compiled quickly."""
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits, compiler_options=QUICK)


def logits(model, params, tokens=TOKENS) -> np.ndarray:
    """float32 [B, T, V]."""
    return np.asarray(program(model)(params, jnp.asarray(tokens)))
