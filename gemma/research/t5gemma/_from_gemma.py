# SPDX-License-Identifier: Apache-2.0
"""A T5Gemma's first parameters out of those of Gemma 2: how the published models began, before they were adapted.

Embeddings, self-attention, MLPs and norms are taken as they are. Cross-attention is new: where both sides have one width
it begins as a copy of the decoder layer's self-attention, with its norms; else its kernels begin at random and have to be
trained first, with the rest held still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma import config as configs
from gemma.errors import ConfigError, WeightsMismatch
from gemma.gm.typing import Params
from gemma.research.t5gemma.t5gemma import T5GemmaConfig


def init_from_gemma(
    config: T5GemmaConfig | configs.T5GemmaConfig,
    decoder: Params,
    encoder: Params | None = None,
    *,
    rng: Any = 0,
) -> dict[str, Any]:
    """The parameters that a T5Gemma starts its training with.

    Args:
      config: of the T5Gemma to be.
      decoder: the parameters of a Gemma 2 of the decoder's sizes, as `gm.ckpts.load_params` gives them.
      encoder: of the encoder's sizes; None: the same ones. Arrays are shared, not copied.
      rng: an int or a JAX key, for cross-attention where the widths differ.

    Raises:
      ConfigError: a T5Gemma 2, whose attention has no weights of its own to begin with.
      WeightsMismatch: the parameters are not those of a Gemma 2 of these sizes.
    """
    source = config.source if isinstance(config, T5GemmaConfig) else config
    if not isinstance(source, configs.T5GemmaConfig) or isinstance(source, configs.T5Gemma2Config):
        raise ConfigError(f"init_from_gemma: expected the configuration of a T5Gemma, got {type(source).__name__}")
    model = T5GemmaConfig.of(source).make(dtype=jax.tree.leaves(decoder)[0].dtype)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]
    given = dict(encoder=decoder if encoder is None else encoder, decoder=decoder)
    tree: dict[str, Any] = {side: _taken(side, given[side], shapes[side]) for side in given}
    equal = source.encoder.hidden_size == source.decoder.hidden_size
    key = jax.random.key(rng) if isinstance(rng, int) else rng
    for number, name in enumerate(sorted(name for name in shapes["decoder"] if name.startswith("layer_"))):
        layer = tree["decoder"][name]
        if equal:
            layer["cross_attn"] = _crossed(layer["attn"])
        else:
            layer["cross_attn"] = _random(jax.random.fold_in(key, number), shapes["decoder"][name]["cross_attn"])
        for place in ("pre", "post"):
            own = layer[f"{place}_attention_norm"]["scale"]
            layer[f"{place}_cross_attention_norm"] = {"scale": own if equal else jnp.zeros_like(own)}
    return tree


def _taken(side: str, params: Params, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a decoder-only model, if it has exactly what a side has but for the cross-attention."""
    flat = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    wanted = {name: leaf for name, leaf in wanted.items() if "cross_att" not in name}
    misshaped = [
        f"{name}: expected {leaf.shape}, got {tuple(flat[name].shape)}"
        for name, leaf in wanted.items()
        if name in flat and tuple(flat[name].shape) != leaf.shape
    ]
    if set(flat) != set(wanted) or misshaped:
        raise WeightsMismatch(
            f"the Gemma 2 given for the {side}",
            missing=sorted(set(wanted) - set(flat)),
            unexpected=sorted(set(flat) - set(wanted)),
            misshaped=misshaped,
            hint=f"the {side} is built of a Gemma 2 of the same sizes",
        )
    return jax.tree.map(lambda leaf: leaf, dict(params))  # the dictionaries are new, the arrays are not


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _crossed(attn: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of a self-attention as a cross-attention has them: never fused."""
    if "qkv_einsum" not in attn:
        return {name: dict(attn[name]) for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")}
    fused = attn["qkv_einsum"]["w"]
    return {
        "q_einsum": {"w": fused[0]},
        "kv_einsum": {"w": fused[1:]},
        "attn_vec_einsum": dict(attn["attn_vec_einsum"]),
    }


def _random(key: jax.Array, shapes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, name in enumerate(sorted(shapes)):
        leaf = shapes[name]["w"]
        values = 0.02 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
        found[name] = {"w": values.astype(leaf.dtype)}
    return found
