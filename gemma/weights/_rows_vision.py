# SPDX-License-Identifier: Apache-2.0
"""The rows of a SigLIP tower, alone or inside Gemma 3 and PaliGemma. Data only; how to read a row: `_rows.py`.

E is the tower's width, A its heads of U values, M its MLP width, P its patches of Y x X pixels in C channels. The Flax
and big_vision trees share their names below the block; big_vision stacks the blocks of a PaliGemma (flag `stacked`).
Gemma.cpp's names for the tower are left out: no file of that kind with images is read.
"""

from __future__ import annotations

from gemma.weights._rows import Row, _row

_FLAX = "Transformer/encoderblock_{i}/"
_SCAN = "Transformer/encoderblock/"


def _block(name: str, axes: str, hf: str, jax: str, jax_axes: str, ckpt: str) -> Row:
    flat = f"{_FLAX}{jax} {jax_axes}"
    columns = dict(hf=f"encoder.layers.{{i}}.{hf}", flax=flat, ckpt=f"encoder_blocks.{{i}}.{ckpt}")
    return _row(
        "vision", f"vision.layers.{{i}}.{name}", axes, npz=f"stacked? {_SCAN}{jax} [i] {jax_axes} ; {flat}", **columns
    )


_ATTN = "MultiHeadDotProductAttention_0"

VISION_TOP = (
    _row(
        "vision",
        "vision.patch.weight",
        "E C Y X",
        hf="embeddings.patch_embedding.weight",
        flax="embedding/kernel Y X C E",
        ckpt="patch_embedding.weight",
        npz="embedding/kernel Y X C E",
    ),
    _row(
        "vision",
        "vision.patch.bias",
        "E",
        hf="embeddings.patch_embedding.bias",
        flax="embedding/bias",
        ckpt="patch_embedding.bias",
        npz="embedding/bias",
    ),
    _row(
        "vision",
        "vision.pos",
        "P E",
        hf="embeddings.position_embedding.weight",
        flax="pos_embedding 1 P E",
        ckpt="position_embedding.weight",
        npz="pos_embedding 1 P E",
    ),
)

VISION_LAYER = (
    _block("norm1.weight", "E", "layer_norm1.weight", "LayerNorm_0/scale", "E", "layer_norm1.weight"),
    _block("norm1.bias", "E", "layer_norm1.bias", "LayerNorm_0/bias", "E", "layer_norm1.bias"),
    *(
        row
        for part, jax in (("q", "query"), ("k", "key"), ("v", "value"))
        for row in (
            _block(
                f"attn.{part}.weight",
                "(A U) E",
                f"self_attn.{part}_proj.weight",
                f"{_ATTN}/{jax}/kernel",
                "E A U",
                f"self_attn.{part}_proj.weight",
            ),
            _block(
                f"attn.{part}.bias",
                "(A U)",
                f"self_attn.{part}_proj.bias",
                f"{_ATTN}/{jax}/bias",
                "A U",
                f"self_attn.{part}_proj.bias",
            ),
        )
    ),
    _block(
        "attn.o.weight",
        "E (A U)",
        "self_attn.out_proj.weight",
        f"{_ATTN}/out/kernel",
        "A U E",
        "self_attn.o_proj.weight",
    ),
    _block("attn.o.bias", "E", "self_attn.out_proj.bias", f"{_ATTN}/out/bias", "E", "self_attn.o_proj.bias"),
    _block("norm2.weight", "E", "layer_norm2.weight", "LayerNorm_1/scale", "E", "layer_norm2.weight"),
    _block("norm2.bias", "E", "layer_norm2.bias", "LayerNorm_1/bias", "E", "layer_norm2.bias"),
    _block("mlp.fc1.weight", "M E", "mlp.fc1.weight", "MlpBlock_0/Dense_0/kernel", "E M", "mlp.fc1.weight"),
    _block("mlp.fc1.bias", "M", "mlp.fc1.bias", "MlpBlock_0/Dense_0/bias", "M", "mlp.fc1.bias"),
    _block("mlp.fc2.weight", "E M", "mlp.fc2.weight", "MlpBlock_0/Dense_1/kernel", "M E", "mlp.fc2.weight"),
    _block("mlp.fc2.bias", "E", "mlp.fc2.bias", "MlpBlock_0/Dense_1/bias", "E", "mlp.fc2.bias"),
)

VISION_END = (
    _row(
        "vision",
        "vision.final_norm.weight",
        "E",
        hf="post_layernorm.weight",
        flax="Transformer/encoder_norm/scale",
        ckpt="final_norm.weight",
        npz="Transformer/encoder_norm/scale",
    ),
    _row(
        "vision",
        "vision.final_norm.bias",
        "E",
        hf="post_layernorm.bias",
        flax="Transformer/encoder_norm/bias",
        ckpt="final_norm.bias",
        npz="Transformer/encoder_norm/bias",
    ),
)


def _head(name: str, axes: str, hf: str, jax: str, jax_axes: str) -> Row:
    place = f"MAPHead_0/{jax} {jax_axes}"
    return _row("vision", f"vision.head.{name}", axes, "head", hf=f"head.{hf}", flax=place, npz=place)


# The attention pooling head of a stand-alone SigLIP. Hugging Face fuses its q, k and v.
VISION_HEAD = (
    _head("probe", "1 1 E", "probe", "probe", "1 1 E"),
    _head("attn.q.weight", "(A U) E", "attention.in_proj_weight <0:E>", f"{_ATTN}/query/kernel", "E A U"),
    _head("attn.k.weight", "(A U) E", "attention.in_proj_weight <E:2E>", f"{_ATTN}/key/kernel", "E A U"),
    _head("attn.v.weight", "(A U) E", "attention.in_proj_weight <2E:3E>", f"{_ATTN}/value/kernel", "E A U"),
    _head("attn.q.bias", "(A U)", "attention.in_proj_bias <0:E>", f"{_ATTN}/query/bias", "A U"),
    _head("attn.k.bias", "(A U)", "attention.in_proj_bias <E:2E>", f"{_ATTN}/key/bias", "A U"),
    _head("attn.v.bias", "(A U)", "attention.in_proj_bias <2E:3E>", f"{_ATTN}/value/bias", "A U"),
    _head("attn.o.weight", "E (A U)", "attention.out_proj.weight", f"{_ATTN}/out/kernel", "A U E"),
    _head("attn.o.bias", "E", "attention.out_proj.bias", f"{_ATTN}/out/bias", "E"),
    _head("norm.weight", "E", "layernorm.weight", "LayerNorm_0/scale", "E"),
    _head("norm.bias", "E", "layernorm.bias", "LayerNorm_0/bias", "E"),
    _head("mlp.fc1.weight", "M E", "mlp.fc1.weight", "MlpBlock_0/Dense_0/kernel", "E M"),
    _head("mlp.fc1.bias", "M", "mlp.fc1.bias", "MlpBlock_0/Dense_0/bias", "M"),
    _head("mlp.fc2.weight", "E M", "mlp.fc2.weight", "MlpBlock_0/Dense_1/kernel", "M E"),
    _head("mlp.fc2.bias", "E", "mlp.fc2.bias", "MlpBlock_0/Dense_1/bias", "E"),
)
