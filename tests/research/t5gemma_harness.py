# SPDX-License-Identifier: Apache-2.0
"""Tiny random T5Gemmas of Hugging Face and ours with the same weights; shared by the tests of this folder.

Configurations and weight layout are written by hand, a second time on purpose: `gemma.hf_config` and `gemma.weights` are
compared with them. The layers of both sides are those of `parity_harness.hand_tree`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hf_tiny_oracles import BUILD, randomize
from parity_harness import TOLERANCE, gap, hand_tree, nest

from gemma import config as configs
from gemma.config import GemmaConfig, SiglipVisionConfig
from gemma.research import t5gemma

__all__ = ["QUICK", "TOLERANCE", "Pair", "gap", "pair", "write_hf"]
QUICK = dict(xla_backend_optimization_level=0)
WINDOW = 5

_TINY = dict(vocab_size=320, hidden_size=72, intermediate_size=100, head_dim=24, num_attention_heads=4)
_TINY |= dict(num_key_value_heads=2, max_position_embeddings=128, sliding_window=WINDOW, query_pre_attn_scalar=18.0)
_TINY |= dict(use_post_norms=True)
_G2 = _TINY | dict(model_type="t5_gemma_module", layer_pattern="LG", num_hidden_layers=2)
_G2 |= dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
_G3 = _TINY | dict(model_type="t5gemma2", layer_pattern="LG", num_hidden_layers=2, use_qk_norm=True)
_G3 |= dict(rope_theta=1e6, rope_local_base_freq=1e4, transpose_gating_einsum=True)
_VISION = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
_IMAGES = dict(mm_tokens_per_image=4, boi_token_index=298, eoi_token_index=299, image_token_index=300)

CONFIGS: dict[str, Any] = {
    "t5gemma": configs.T5GemmaConfig(GemmaConfig(**_G2), GemmaConfig(**_G2)),
    "t5gemma_unbalanced": configs.T5GemmaConfig(GemmaConfig(**_G2 | dict(hidden_size=88)), GemmaConfig(**_G2)),
    "t5gemma2": configs.T5Gemma2Config(GemmaConfig(**_G3, **_IMAGES, vision=_VISION), GemmaConfig(**_G3)),
}
_NORMS = dict(pre_self_attn_layernorm="input_layernorm", post_self_attn_layernorm="post_attention_layernorm")


def _side(state: dict[str, np.ndarray], root: str) -> dict[str, np.ndarray]:
    """One side's tensors under the names of a decoder-only model."""
    found = {}
    for name, value in state.items():
        if name.startswith(root):
            for theirs, plain in _NORMS.items():
                name = name.replace(theirs, plain)
            found["model." + name.removeprefix(root)] = value
    return found


def tree_of(name: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{nested Flax path: array} of a Hugging Face state dict."""
    config = CONFIGS[name]
    flat: dict[str, np.ndarray] = {}
    two = isinstance(config, configs.T5Gemma2Config)
    for part, side in (("encoder", config.encoder), ("decoder", config.decoder)):
        root = "model.encoder.text_model." if two and part == "encoder" else f"model.{part}."
        text = dataclasses.replace(side, vision=None)
        flat |= {f"{part}/{path}": leaf for path, leaf in hand_tree(_side(state, root), text).items()}
    if not two:
        return flat | _cross(state, config)
    flat["embedder/input_embedding"] = flat.pop("encoder/embedder/input_embedding")
    flat.pop("decoder/embedder/input_embedding")
    flat["embedder/eoi_embedding"] = state["model.encoder.text_model.embed_tokens.eoi_embedding"]
    return flat | _vision(state)


def _cross(state: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    flat, d = {}, config.decoder
    n, k, h = d.num_attention_heads, d.num_key_value_heads, d.head_dim
    for i in range(d.num_hidden_layers):
        theirs, ours = f"model.decoder.layers.{i}", f"decoder/layer_{i}"
        q, key, value, o = (state[f"{theirs}.cross_attn.{x}_proj.weight"] for x in "qkvo")
        flat[f"{ours}/cross_attn/q_einsum/w"] = q.reshape(n, h, -1).transpose(0, 2, 1)
        kv = np.stack([x.reshape(k, h, -1).transpose(0, 2, 1) for x in (key, value)])
        flat[f"{ours}/cross_attn/kv_einsum/w"] = kv
        flat[f"{ours}/cross_attn/attn_vec_einsum/w"] = o.reshape(-1, n, h).transpose(1, 2, 0)
        for which in ("pre", "post"):
            scale = state[f"{theirs}.{which}_cross_attn_layernorm.weight"]
            flat[f"{ours}/{which}_cross_attention_norm/scale"] = scale
    return flat


def _vision(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tower, by the weight table: its layout is tested by tests/gm/vision."""
    from gemma import weights

    config = dataclasses.replace(CONFIGS["t5gemma2"].encoder, model_type="gemma3")
    table = [t for t in weights.tensors(config) if t.part in ("vision", "mm")]
    flat: dict[str, np.ndarray] = {}
    for tensor in table:
        hf, flax = tensor.slots["hf"], tensor.slots["flax"]
        source = state[
            hf.name.replace("model.vision", "model.encoder.vision").replace("model.multi", "model.encoder.multi")
        ]
        value = weights.convert(source, tensor.axes, flax.axes, tensor.dims)
        if flax.index:
            flat.setdefault(flax.name, np.zeros(flax.shape, value.dtype))[flax.index] = value
        else:
            flat[flax.name] = value
    return flat


@dataclasses.dataclass(eq=False)
class Pair:
    """An oracle and our network with its weights."""

    name: str
    hf: Any
    hf_config: Any
    flat: dict[str, np.ndarray]

    @property
    def config(self) -> Any:
        return CONFIGS[self.name]

    @functools.cached_property
    def model(self) -> t5gemma.T5Gemma:
        return t5gemma.T5GemmaConfig.of(self.config).make(dtype=jnp.float32)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return jax.tree.map(jnp.asarray, nest(self.flat))

    @functools.cached_property
    def apply(self):
        """The jitted network: (params, target_tokens, input_tokens=None, cache=None, images=None)."""
        return jax.jit(
            lambda params, target, **more: self.model.apply({"params": params}, target, **more), compiler_options=QUICK
        )

    def expected(self, target, tokens, **more) -> np.ndarray:
        """The oracle's logits [B, T, V]; 0 is padding in `tokens`."""
        ids = torch.as_tensor(np.asarray(tokens)).long()
        with torch.no_grad():
            out = self.hf(
                input_ids=ids,
                attention_mask=(ids != 0).long(),
                decoder_input_ids=torch.as_tensor(np.asarray(target)).long(),
                **more,
            )
        return out.logits.numpy()

    def logits(self, target, tokens, params=None, **more) -> np.ndarray:
        """Ours."""
        out = self.apply(self.params if params is None else params, jnp.asarray(target), input_tokens=tokens, **more)
        return np.asarray(out.logits)


def oracle(name: str) -> tuple[Any, Any]:
    """Class and configuration of an oracle, with as few layers as show both kinds: programs are compiled for each."""
    cls, config = BUILD[name]()
    layers = [spec.attention for spec in CONFIGS[name].decoder.layers]
    words = {"local": "sliding_attention", "global": "full_attention"}
    for side in (config.decoder, getattr(config.encoder, "text_config", config.encoder)):
        side.num_hidden_layers, side.layer_types = len(layers), [words[kind] for kind in layers]
    return cls, config


@functools.cache
def pair(name: str) -> Pair:
    """The pair of an oracle of hf_tiny_oracles, made once per process."""
    cls, config = oracle(name)
    hf = randomize(cls._from_config(config, attn_implementation="eager"))
    state = {key: tensor.numpy() for key, tensor in hf.state_dict().items()}
    return Pair(name, hf, config, tree_of(name, state))


def ids(shape: tuple[int, int], seed: int = 1, lengths: tuple[int, ...] | None = None) -> np.ndarray:
    """Random ids, rows cut to `lengths` and padded with 0."""
    table = np.random.default_rng(seed).integers(3, 290, shape).astype(np.int32)
    for row, length in zip(table, lengths or ()):
        row[length:] = 0
    return table


def write_hf(found: Pair, folder: Path) -> Path:
    """The oracle as transformers saves it."""
    found.hf.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == found.hf.config.model_type
    return folder
