# SPDX-License-Identifier: Apache-2.0
"""The table against the published counts, the JAX package's trees as listed in its documentation, and itself."""

from __future__ import annotations

import math
import re

import pytest
from families import FAMILIES, PAIRS, WHOLE

from gemma.config import PRESETS, GemmaConfig, PaliGemmaConfig, T5Gemma2Config, T5GemmaConfig
from gemma.errors import ConfigError
from gemma.weights import FORMATS, expected, tensors
from gemma.weights._axes import shape_of

TREES = {  # leaves and parameters of the official JAX package's trees (release 3.3.0)
    "gemma2_2b": (236, 2_614_636_800),
    "gemma2_9b": (None, 9_242_164_736),
    "gemma2_27b": (None, 27_227_718_144),
    "gemma3_270m": (200, 268_098_176),
    "gemma3_1b": (288, 999_885_952),
    "gemma3_4b": (815, 4_299_915_632),
    "gemma3_12b": (None, 12_187_079_280),
    "gemma3_27b": (None, 27_432_062_576),
    "t5gemma_s_s": (172, 312_648_704),
    "t5gemma_ml_ml": (550, 2_200_640_256),
    "t5gemma_2b_2b": (602, 5_597_443_584),
    "t5gemma_9b_2b": (746, 12_293_128_960),
}
LEAVES = {
    ("gemma2_2b", "layer_25/mlp/gating_einsum"): (2, 2304, 9216),
    ("gemma2_2b", "embedder/input_embedding"): (256128, 2304),
    ("gemma2_27b", "layer_0/mlp/gating_einsum"): (2, 36864, 4608),
    ("gemma3_270m", "layer_0/attn/q_einsum/w"): (4, 640, 256),
    ("gemma3_270m", "layer_17/attn/kv_einsum/w"): (2, 1, 640, 256),
    ("gemma3_270m", "layer_0/attn/attn_vec_einsum/w"): (4, 256, 640),
    ("gemma3_270m", "layer_0/mlp/gating_einsum"): (2, 2048, 640),
    ("gemma3_270m", "layer_0/mlp/linear"): (2048, 640),
    ("gemma3_270m", "layer_0/attn/_query_norm/scale"): (256,),
    ("gemma3_1b", "layer_0/mlp/gating_einsum"): (2, 6912, 1152),
    ("gemma3_4b", "layer_33/attn/kv_einsum/w"): (2, 4, 2560, 256),
    ("gemma3_4b", "embedder/input_embedding"): (262144, 2560),
    ("gemma3_4b", "embedder/mm_input_projection/w"): (1152, 2560),
    ("gemma3_4b", "embedder/mm_soft_embedding_norm/scale"): (1152,),
    ("gemma3_4b", "vision_encoder/siglip_encoder/embedding/kernel"): (14, 14, 3, 1152),
    ("gemma3_4b", "vision_encoder/siglip_encoder/pos_embedding"): (1, 4096, 1152),
    ("gemma_7b", "layer_0/attn/qkv_einsum/w"): (3, 16, 3072, 256),
    ("gemma_7b", "layer_0/mlp/gating_einsum"): (2, 3072, 24576),
    ("t5gemma_9b_2b", "decoder/layer_0/cross_attn/kv_einsum/w"): (2, 4, 3584, 256),
    ("t5gemma_9b_2b", "decoder/layer_0/cross_attn/q_einsum/w"): (8, 2304, 256),
    ("t5gemma_s_s", "encoder/layer_0/attn/qkv_einsum/w"): (3, 8, 512, 64),
    ("t5gemma_s_s", "decoder/layer_0/cross_attn/kv_einsum/w"): (2, 8, 512, 64),
    ("t5gemma_s_s", "decoder/layer_7/pre_cross_attention_norm/scale"): (512,),
}
_BLOCK = "vision_encoder/siglip_encoder/Transformer/encoderblock_26/"
LEAVES |= {
    ("gemma3_4b", _BLOCK + "MultiHeadDotProductAttention_0/query/kernel"): (1152, 16, 72),
    ("gemma3_4b", _BLOCK + "MultiHeadDotProductAttention_0/value/bias"): (16, 72),
    ("gemma3_4b", _BLOCK + "MultiHeadDotProductAttention_0/out/kernel"): (16, 72, 1152),
    ("gemma3_4b", _BLOCK + "MultiHeadDotProductAttention_0/out/bias"): (1152,),
    ("gemma3_4b", _BLOCK + "MlpBlock_0/Dense_0/kernel"): (1152, 4304),
    ("gemma3_4b", _BLOCK + "MlpBlock_0/Dense_1/bias"): (1152,),
    ("gemma3_4b", _BLOCK + "LayerNorm_1/bias"): (1152,),
}
OTHERS = {  # (preset, format, name): shape, as the descriptions of those formats state them
    ("paligemma_3b_224", "npz", "params/llm/layers/attn/q_einsum/w"): (18, 8, 2048, 256),
    ("paligemma_3b_224", "npz", "params/llm/layers/attn/kv_einsum/w"): (18, 2, 1, 2048, 256),
    ("paligemma_3b_224", "npz", "params/llm/layers/attn/attn_vec_einsum/w"): (18, 8, 256, 2048),
    ("paligemma_3b_224", "npz", "params/llm/layers/mlp/gating_einsum"): (18, 2, 2048, 16384),
    ("paligemma_3b_224", "npz", "params/llm/layers/mlp/linear"): (18, 16384, 2048),
    ("paligemma_3b_224", "npz", "params/llm/embedder/input_embedding"): (257152, 2048),
    ("paligemma_3b_448", "npz", "params/img/pos_embedding"): (1, 1024, 1152),
    ("paligemma_3b_224", "npz", "params/img/head/kernel"): (1152, 2048),
    (
        "paligemma2_10b_224",
        "npz",
        "params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
    ): (27, 1152, 16, 72),
    ("paligemma2_10b_224", "npz", "params/llm/layers/post_ffw_norm/scale"): (42, 3584),
    ("paligemma_3b_224", "hf", "model.multi_modal_projector.linear.weight"): (2048, 1152),
    ("gemma2_9b", "ckpt", "model.layers.41.self_attn.qkv_proj.weight"): ((16 + 2 * 8) * 256, 3584),
    ("gemma2_9b", "ckpt", "embedder.weight"): (256000, 3584),
    ("gemma3_4b", "ckpt", "text_token_embedder.weight"): (262144, 2560),
    ("gemma3_4b", "ckpt", "mm_input_projection.weight"): (2560, 1152),
    ("gemma3_4b", "ckpt", "siglip_vision_model.encoder_blocks.0.self_attn.o_proj.weight"): (1152, 1152),
    ("gemma3_1b", "gguf", "token_embd.weight"): (262144, 1152),
    ("gemma3_1b", "gguf", "blk.25.attn_k_norm.weight"): (256,),
    ("gemma2_2b", "sbs", "qkv_ein_3"): (8 + 2 * 4, 256, 2304),
    ("gemma2_2b", "sbs", "att_ein_3"): (8, 2304, 256),
    ("gemma2_2b", "sbs", "gating_ein_3"): (2, 9216, 2304),
}


@pytest.mark.parametrize("name", PRESETS)
def test_table_counts_as_the_formula(name):
    assert sum(t.size for t in tensors(PRESETS[name])) == PRESETS[name].num_parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_table_counts_as_the_formula(name):
    assert sum(t.size for t in tensors(FAMILIES[name])) == FAMILIES[name].num_parameters


@pytest.mark.parametrize("name", TREES)
def test_flax_trees(name):
    leaves, parameters = TREES[name]
    tree = expected(PRESETS[name], "flax")
    assert sum(map(math.prod, tree.values())) == parameters
    assert leaves in (None, len(tree))


def test_leaves_by_name():
    for (name, path), shape in LEAVES.items():
        assert expected(PRESETS[name], "flax")[path] == shape, path


def test_other_formats_by_name():
    for (name, format, path), shape in OTHERS.items():
        assert expected(PRESETS[name], format)[path] == shape, (format, path)


def test_gemma1_has_two_norms_and_their_names_mislead():
    slots = {t.name: t.slots for t in tensors(PRESETS["gemma_2b"])}
    assert not any("post_" in name for name in slots)
    assert slots["layers.3.norm.pre_mlp"]["hf"].name == "model.layers.3.post_attention_layernorm.weight"
    assert slots["layers.3.norm.pre_mlp"]["flax"].name == "layer_3/pre_ffw_norm/scale"
    assert slots["layers.3.norm.pre_mlp"]["gguf"].name == "blk.3.ffn_norm.weight"
    later = {t.name: t.slots for t in tensors(PRESETS["gemma2_2b"])}
    assert later["layers.3.norm.post_attn"]["hf"].name == "model.layers.3.post_attention_layernorm.weight"
    assert later["layers.3.norm.pre_mlp"]["hf"].name == "model.layers.3.pre_feedforward_layernorm.weight"


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_norms_carry_the_offset_and_nothing_else_does(name):
    for tensor in tensors(FAMILIES[name]):
        for format, slot in tensor.slots.items():
            wanted = 1.0 if format == "gguf" and slot.name.endswith("norm.weight") else 0.0
            assert slot.offset == wanted, (format, slot.name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_names_and_places_are_one_to_one(name, format):
    """No two tensors share a place, and the places of a fused or stacked array fill it exactly."""
    table = [t for t in tensors(FAMILIES[name]) if format in t.slots]
    assert len({t.name for t in table}) == len(table)
    places, filled, shapes = set(), {}, {}
    for tensor in table:
        slot = tensor.slots[format]
        assert (slot.name, slot.index, slot.rows) not in places
        places.add((slot.name, slot.index, slot.rows))
        rows = set(range(*slot.rows)) if slot.rows else set(range(slot.shape[len(slot.index)]))
        assert not filled.setdefault((slot.name, slot.index), set()) & rows
        filled[slot.name, slot.index] |= rows
        assert shapes.setdefault(slot.name, slot.shape) == slot.shape
        sizes = dict(tensor.dims) | ({"V": slot.shape[0]} if tensor.axes[0] == "V" else {})
        inner = shape_of(slot.axes, sizes)
        assert slot.shape[len(slot.index) + 1 :] == inner[1:]
        assert len(rows) == inner[0], "the range of rows is not as long as the tensor"
    for (array, index), rows in filled.items():
        assert rows == set(range(shapes[array][len(index)]))
    for array, shape in shapes.items():
        indices = {index for other, index in filled if other == array}
        depth = len(next(iter(indices)))
        assert len(indices) == math.prod(shape[:depth])
    if format in WHOLE[name]:
        assert len(table) == len(tensors(FAMILIES[name]))


@pytest.mark.parametrize("name, format", PAIRS)
def test_expected_is_what_the_slots_say(name, format):
    config = FAMILIES[name]
    arrays = expected(config, format)
    slots = [t.slots[format] for t in tensors(config)]
    assert arrays == {slot.name: slot.shape for slot in slots}


@pytest.mark.parametrize("name", FAMILIES)
def test_canonical_is_the_orientation_of_hugging_face(name):
    for tensor in tensors(FAMILIES[name]):
        slot = tensor.slots["hf"]
        assert slot.axes == tensor.axes and not slot.index and slot.offset == 0
        assert tensor.shape == shape_of(tensor.axes, tensor.dims) and len(tensor.sharding) == len(tensor.shape)
        assert slot.rows is not None or slot.shape == tensor.shape


def test_canonical_names():
    """The names that other code spells."""
    per_layer = {"attn.q", "attn.k", "attn.v", "attn.o", "attn.q_norm", "attn.k_norm", "mlp.gate", "mlp.up", "mlp.down"}
    per_layer |= {f"norm.{place}" for place in ("pre_attn", "post_attn", "pre_mlp", "post_mlp")}
    names = {t.name for t in tensors(FAMILIES["gemma3"])}
    assert names == {"embed", "final_norm"} | {f"layers.{i}.{tail}" for i in range(3) for tail in per_layer}
    assert {t.name for t in tensors(FAMILIES["gemma2-untied"])} - {t.name for t in tensors(FAMILIES["gemma2"])} == {
        "head"
    }
    extra = {t.name for t in tensors(FAMILIES["gemma3-vision"])} - names
    assert all(name.startswith("vision.") or name in ("mm.norm", "mm.proj") for name in extra)
    t5 = {re.sub(r"\d+", "i", t.name) for t in tensors(FAMILIES["t5gemma"])}
    assert {f"decoder.layers.i.cross.{x}" for x in "qkvo"} < t5 and "encoder.layers.i.cross.q" not in t5
    assert {"decoder.layers.i.norm.pre_cross", "decoder.layers.i.norm.post_cross", "encoder.embed"} < t5
    assert {"projector.kernel", "projector.bias"} < {t.name for t in tensors(FAMILIES["paligemma"])}


@pytest.mark.parametrize(
    "config, format, what",
    [
        (PRESETS["gemma_2b"], "onnx", "format: expected one of hf, flax, gguf, ckpt, npz, sbs, got 'onnx'"),
        (PRESETS["gemma_2b"], "npz", "GemmaConfig has no names in the format 'npz'"),
        (PRESETS["t5gemma_s_s"], "gguf", "T5GemmaConfig has no names in the format 'gguf'"),
        ("gemma_2b", "hf", "expected a GemmaConfig, PaliGemmaConfig, T5GemmaConfig or SiglipVisionConfig"),
        (PaliGemmaConfig(projection_dim=7), "hf", "projection_dim: the projector writes into the text model"),
    ],
)
def test_refusals(config, format, what):
    with pytest.raises(ConfigError, match=what):
        expected(config, format)


def test_the_kinds_of_presets_are_all_there():
    assert {type(c) for c in PRESETS.values()} == {GemmaConfig, PaliGemmaConfig, T5GemmaConfig, T5Gemma2Config}
