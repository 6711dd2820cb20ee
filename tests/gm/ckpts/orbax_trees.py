# SPDX-License-Identifier: Apache-2.0
"""Small parameter trees for the tests of Orbax checkpoints: every JAX preset made tiny, and literal official trees."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from gemma import testing, weights
from gemma.config import PRESETS, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5GemmaConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
TOWER = SiglipVisionConfig(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)


def shrunk(config):
    """A preset with every trait of its own (kinds of layers, heads, tables) at the smallest sizes that keep them."""
    if isinstance(config, T5GemmaConfig):
        return T5GemmaConfig(shrunk(config.encoder), shrunk(config.decoder))
    alike = config.num_attention_heads == config.num_key_value_heads
    rows = None if config.flax_vocab_rows is None else 40 if config.flax_vocab_rows > config.vocab_size else 24
    return dataclasses.replace(
        config,
        vocab_size=32,
        flax_vocab_rows=rows,
        hidden_size=10,
        intermediate_size=14,
        num_hidden_layers=2 * len(config.layer_pattern) + len(config.layer_pattern) // 2,
        num_attention_heads=4,
        num_key_value_heads=4 if alike else 2,
        head_dim=6,
        vision=None if config.vision is None else TOWER,
    )


TINY = {
    name: shrunk(config)
    for name, config in PRESETS.items()
    if not isinstance(config, PaliGemmaConfig) and getattr(config, "is_classic", True)
}


def flat_tree(config, dtype=BF16, seed=0) -> dict[str, np.ndarray]:
    """Slash name to array, random, with the rows and dtypes of a published JAX checkpoint."""
    packed = weights.pack(testing.random_tensors(config, seed), config, format="flax")
    kept = ("vision_encoder", "embedder/mm_")
    return {name: a if name.startswith(kept) else a.astype(dtype) for name, a in packed.items()}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = leaf
    return tree


def flat(tree, prefix="") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def same(got: dict, expected: dict) -> None:
    """Equal names, shapes, dtypes and bytes."""
    got = flat(got)
    assert set(got) == set(expected)
    for name, array in expected.items():
        value = np.asarray(got[name])
        assert value.dtype == array.dtype and value.shape == array.shape, (name, value.dtype, value.shape)
        assert value.tobytes() == np.ascontiguousarray(array).tobytes(), name


# ---- what the official package writes, spelled out: two layers, a local and a global one, a tower of one block ---------

V, D, F, N, K, H, E, M, A, U = 24, 8, 12, 4, 2, 6, 10, 14, 2, 5


def numbers(name: str, *shape: int, dtype=BF16) -> np.ndarray:
    """The values of a leaf: they follow from its NESTED name, so that files made long ago can be checked."""
    start = sum(name.encode()) % 251
    return ((np.arange(np.prod(shape)) * 7 + start) % 251 / 64 - 2).astype(dtype).reshape(shape)


LAYER = {
    "pre_attention_norm/scale": (D,),
    "attn/q_einsum/w": (N, D, H),
    "attn/kv_einsum/w": (2, K, D, H),
    "attn/attn_vec_einsum/w": (N, H, D),
    "attn/_query_norm/scale": (H,),
    "attn/_key_norm/scale": (H,),
    "post_attention_norm/scale": (D,),
    "pre_ffw_norm/scale": (D,),
    "mlp/gating_einsum": (2, F, D),
    "mlp/linear": (F, D),
    "post_ffw_norm/scale": (D,),
}
BLOCK = {
    "LayerNorm_0/scale": (E,),
    "LayerNorm_0/bias": (E,),
    "LayerNorm_1/scale": (E,),
    "LayerNorm_1/bias": (E,),
    "MultiHeadDotProductAttention_0/query/kernel": (E, A, U),
    "MultiHeadDotProductAttention_0/query/bias": (A, U),
    "MultiHeadDotProductAttention_0/key/kernel": (E, A, U),
    "MultiHeadDotProductAttention_0/key/bias": (A, U),
    "MultiHeadDotProductAttention_0/value/kernel": (E, A, U),
    "MultiHeadDotProductAttention_0/value/bias": (A, U),
    "MultiHeadDotProductAttention_0/out/kernel": (A, U, E),
    "MultiHeadDotProductAttention_0/out/bias": (E,),
    "MlpBlock_0/Dense_0/kernel": (E, M),
    "MlpBlock_0/Dense_0/bias": (M,),
    "MlpBlock_0/Dense_1/kernel": (M, E),
    "MlpBlock_0/Dense_1/bias": (E,),
}
SHAPES = {
    "embedder/input_embedding": (V, D),
    "embedder/mm_soft_embedding_norm/scale": (E,),
    "embedder/mm_input_projection/w": (E, D),
    **{f"layer_{i}/{name}": shape for i in (0, 1) for name, shape in LAYER.items()},
    "final_norm/scale": (D,),
    "vision_encoder/siglip_encoder/embedding/kernel": (4, 4, 3, E),
    "vision_encoder/siglip_encoder/embedding/bias": (E,),
    "vision_encoder/siglip_encoder/pos_embedding": (1, 4, E),
    **{f"vision_encoder/siglip_encoder/Transformer/encoderblock_0/{n}": s for n, s in BLOCK.items()},
    "vision_encoder/siglip_encoder/Transformer/encoder_norm/scale": (E,),
    "vision_encoder/siglip_encoder/Transformer/encoder_norm/bias": (E,),
}
LITERAL_CONFIG = GemmaConfig(
    model_type="gemma3", vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=N,
    num_key_value_heads=K, head_dim=H, layer_pattern="LG", sliding_window=4, use_post_norms=True, use_qk_norm=True,
    transpose_gating_einsum=True,
    vision=SiglipVisionConfig(hidden_size=E, intermediate_size=M, num_hidden_layers=1, num_attention_heads=A,
                              image_size=8, patch_size=4),
)  # fmt: skip


def literal() -> dict[str, np.ndarray]:
    """The leaves by NESTED name; everything that follows the tower is float32, as published."""
    return {
        name: numbers(name, *shape, dtype=np.float32 if name.startswith(("vision_", "embedder/mm_")) else BF16)
        for name, shape in SHAPES.items()
    }


def official_flat() -> dict:
    leaf = literal()
    tree: dict = {
        "transformer/embedder": {"input_embedding": leaf["embedder/input_embedding"]},
        "transformer/embedder/mm_soft_embedding_norm": {"scale": leaf["embedder/mm_soft_embedding_norm/scale"]},
        "transformer/embedder/mm_input_projection": {"w": leaf["embedder/mm_input_projection/w"]},
        "transformer/final_norm": {"scale": leaf["final_norm/scale"]},
    }
    for i in (0, 1):
        at, to = f"layer_{i}", f"transformer/layer_{i}"
        for norm in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm", "attn/_query_norm",
                     "attn/_key_norm"):  # fmt: skip
            tree[f"{to}/{norm}"] = {"scale": leaf[f"{at}/{norm}/scale"]}
        for einsum in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            tree[f"{to}/attn/{einsum}"] = {"w": leaf[f"{at}/attn/{einsum}/w"]}
        tree[f"{to}/mlp/gating_einsum"] = {"w": leaf[f"{at}/mlp/gating_einsum"]}  # a `w` that the nested tree lacks
        tree[f"{to}/mlp/linear"] = {"w": leaf[f"{at}/mlp/linear"]}
    root = "vision_encoder/siglip_encoder"
    tree["SigLiPFromPatches_0/siglip_encoder"] = {"pos_embedding": leaf[f"{root}/pos_embedding"]}
    for name in SHAPES:
        if name.startswith(root) and not name.endswith("pos_embedding"):
            path, last = name.replace("vision_encoder", "SigLiPFromPatches_0").rsplit("/", 1)
            tree.setdefault(path, {})[last] = leaf[name]
    return tree


def official_stacked() -> dict:
    """Two kinds of attention, one layer of each."""
    tree = {key: value for key, value in official_flat().items() if "/layer_" not in key}
    for key, leaves in official_flat().items():
        if "/layer_" in key:
            to = key.replace("transformer/layer_", "transformer/stacked_layers/attention_type_")
            tree[to] = {last: array[None] for last, array in leaves.items()}
    return tree


def official_kauldron() -> dict:
    moment = np.ones((3,), np.float32)
    state = {"step": np.asarray(7), "params": nested(literal()), "collections": {}}
    return state | {"opt_state": {"0": {"mu": {"a": moment}, "count": np.asarray(7)}}}


OFFICIAL = {
    "nested": lambda: nested(literal()),
    "flat": official_flat,
    "stacked": official_stacked,
    "kauldron": official_kauldron,
}
