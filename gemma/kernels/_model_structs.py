# SPDX-License-Identifier: Apache-2.0
"""The structs through which a decoder's sizes, weights and norms reach the native library; they own nothing.

The decoder itself is `_model.py`, the C side `native/gemmakit.h`.
"""

from __future__ import annotations

import ctypes

import numpy as np

from gemma.config import GemmaConfig, LayerSpec
from gemma.kernels._native import GkWeight

_NORMS = {
    "attn_norm": "norm.pre_attn",
    "post_attn_norm": "norm.post_attn",
    "mlp_norm": "norm.pre_mlp",
    "post_mlp_norm": "norm.post_mlp",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
}
_MATRICES = {name: f"attn.{name}" for name in "qkvo"} | {name: f"mlp.{name}" for name in ("gate", "up", "down")}


class GkLayer(ctypes.Structure):
    """struct gk_layer."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, GkWeight) for name in _MATRICES),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, ctypes.c_float) for name in ("query_scale", "attn_softcap", "rope_base", "rope_scale")),
    )


class GkModelConfig(ctypes.Structure):
    """struct gk_model_config."""

    _fields_ = (
        ("vocab_size", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("final_softcap", ctypes.c_float),
        ("embed_scale", ctypes.c_float),
        ("embedding", GkWeight),
        ("head", GkWeight),
        ("final_norm", ctypes.c_void_p),
    )


def layer_struct(spec: LayerSpec, weights: dict[str, GkWeight], norms: dict[str, int]) -> GkLayer:
    """A layer; `weights` and `norms` are by canonical name."""
    prefix = f"layers.{spec.index}."
    layer = GkLayer(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        window=spec.window or 0,
        query_scale=spec.query_scale,
        attn_softcap=spec.attn_softcap or 0.0,
        rope_base=spec.rope_base,
        rope_scale=spec.rope_scale,
    )
    for field, name in _NORMS.items():
        setattr(layer, field, norms.get(prefix + name))
    for field, name in _MATRICES.items():
        setattr(layer, field, weights[prefix + name])
    return layer


def config_struct(config: GemmaConfig, weights: dict[str, GkWeight], norms: dict[str, int]) -> GkModelConfig:
    """What surrounds the layers; a model without a head of its own uses its embedding."""
    return GkModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        norm_eps=config.rms_norm_eps,
        final_softcap=config.final_logit_softcapping or 0.0,
        embed_scale=float(np.sqrt(np.float32(config.hidden_size))),
        embedding=weights["embed"],
        head=weights.get("head", weights["embed"]),
        final_norm=norms["final_norm"],
    )
