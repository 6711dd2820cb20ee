# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose rows are whole blocks of 32, as files and as float parameters."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gemma import testing
from gemma.gm import ckpts, nn

SIZES = dict(hidden_size=64, num_hidden_layers=2, head_dim=32, intermediate_size=96, vocab_size=320)
# Between them every kind of leaf: kv and qkv, both layouts of the MLP, with and without caps and norms.
FAMILIES = {
    "gemma": dict(num_attention_heads=2, num_key_value_heads=2),
    "gemma3": dict(layer_pattern="LG", query_pre_attn_scalar=32),
}
IDS = jnp.array([[2, 5, 6, 7, 8, 250, 9]])
EMITTERS_CAN_BE_CHOSEN = jax.__version__.startswith("0.10.")


@functools.cache
def tiny(family: str, folder: Path):
    """(configuration, folder of a safetensors checkpoint, network)."""
    config = testing.tiny_config(family, **SIZES | FAMILIES[family])
    tensors = testing.random_tensors(config, std=0.3)
    # A channel of zeros, a row of the table of zeros, and weights above 1.875, which give SFP8 a scale of its own.
    tensors["layers.0.attn.q"][3] = 0
    tensors["embed"] = tensors["embed"] * np.float32(0.2)
    tensors["embed"][7] = 0
    tensors["layers.1.mlp.up"][0, 0] = 4.5
    tensors["layers.1.attn.v"][1, 2] = -2.25
    testing.write_tiny_safetensors(folder, config, tensors=tensors)
    return config, folder, nn.Transformer.from_config(config, dtype=jnp.float32)


@functools.cache
def program(net):
    """Compiled once for each kind of tree, by the emitters that users have: bits are compared (tests/conftest.py)."""
    options = {"xla_cpu_use_fusion_emitters": True} if EMITTERS_CAN_BE_CHOSEN else None
    return jax.jit(lambda p: net.apply({"params": p}, IDS).logits, compiler_options=options)


def logits(net, params) -> np.ndarray:
    """float32 [B, T, V]."""
    return np.asarray(program(net)(params))


def load(path: Path, **options):
    return ckpts.load_params(path, **options)
