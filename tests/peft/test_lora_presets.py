# SPDX-License-Identifier: Apache-2.0
"""Folding adapters in changes nothing that a model says: every size of Gemma 1 to 3, every target, float32 and bfloat16."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_models import ALL, QUICK, TOKENS

from gemma import config as configs
from gemma import gm, peft

SIZES = [name for name in configs.PRESETS if name.startswith(("gemma_", "gemma2_", "gemma3_"))]
WITHIN = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest logit
TOKENS1 = TOKENS[:1, :6]


def small(name: str):
    """One layer of a preset with its ratio of heads and every other trait; sizes that differ in width alone are one."""
    config = configs.preset(name)
    queries = config.num_attention_heads // config.num_key_value_heads
    alike = queries == 1
    return dataclasses.replace(
        config,
        vocab_size=320,
        flax_vocab_rows=None,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4 if alike else min(4, 2 * queries),
        num_key_value_heads=4 if alike else 1 if config.num_key_value_heads == 1 else 2,
        head_dim=16,
        vision=None,
    )


@functools.cache
def found(config) -> dict[str, tuple[np.ndarray, ...]]:
    """Logits with the adapter, with the adapter folded in, and without one, by dtype."""
    programs, arguments = {}, {}
    for dtype in WITHIN:
        model = gm.nn.Transformer.from_config(config, dtype=jnp.dtype(dtype))
        lora = gm.nn.LoRA(rank=3, model=model, dtype=jnp.dtype(dtype), targets=ALL, alpha=5.0)
        rng = np.random.default_rng(1)
        shapes = jax.eval_shape(lora.init, jax.random.key(0), jnp.asarray(TOKENS1))["params"]
        params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.15, x.dtype), shapes)  # noqa: B023
        programs[dtype] = model, lora
        plain = peft.split_params(params).original
        arguments[dtype] = params, peft.fuse_params(params, lora), plain

    def run(arguments):
        out = {}
        for dtype, (model, lora) in programs.items():
            used = zip((lora, model, model), arguments[dtype], strict=True)
            out[dtype] = tuple(network.apply({"params": p}, jnp.asarray(TOKENS1)).logits for network, p in used)
        return out

    result = jax.jit(run, compiler_options=QUICK)(arguments)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), result)


def cases():
    """The default run takes one size; `test_lora.py` has the families in float32."""
    return [pytest.param(name, marks=[] if name == "gemma3_270m" else pytest.mark.slow) for name in SIZES]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("name", cases())
def test_folded_in_it_says_the_same(name, dtype):
    adapter, fused, plain = found(small(name))[dtype]
    size = np.abs(adapter).max()
    assert np.abs(adapter - plain).max() > 0.2 * size  # ten times what bfloat16 may lose
    np.testing.assert_allclose(fused, adapter, rtol=0, atol=WITHIN[dtype] * size)
