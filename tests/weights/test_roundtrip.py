# SPDX-License-Identifier: Apache-2.0
"""Values through every format and back, bit for bit, and each format against the transforms written out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from families import FAMILIES, PAIRS

from gemma.errors import ShapeError, WeightsMismatch
from gemma.weights import bind, convert, expected, fit_rows, pack, tensors, unpack


def values_of(config, dtype=np.float32) -> dict[str, np.ndarray]:
    """Every element distinct per tensor; norms are multiples of 2^-8, and no -0, so that adding
    the 1 of a GGUF is exact."""
    rng = np.random.default_rng(7)
    out = {}
    for tensor in tensors(config):
        draw = rng.standard_normal(tensor.shape).astype(np.float32)
        out[tensor.name] = (np.round(draw * 64) / 256 + 0.0 if len(tensor.shape) == 1 else draw).astype(dtype)
    return out


@pytest.mark.parametrize("name, format", PAIRS)
def test_pack_and_unpack(name, format):
    config = FAMILIES[name]
    values = values_of(config)
    packed = pack(values, config, format=format)
    assert {k: v.shape for k, v in packed.items()} == expected(config, format)
    back = unpack(packed, config, format=format)
    for tensor in tensors(config):
        got, want = back[tensor.name], values[tensor.name]
        assert got.shape == want.shape == tensor.shape
        if tensor.axes[0] == "V":  # a format with fewer rows loses the padding, which no token reaches
            want = fit_rows(want[: tensor.slots[format].shape[0]], tensor.shape[0])
        assert got.tobytes() == want.tobytes(), tensor.name


@pytest.mark.parametrize("name, format", PAIRS)
def test_every_tensor_converts_there_and_back(name, format):
    for tensor in tensors(FAMILIES[name]):
        slot = tensor.slots[format]
        want = np.arange(tensor.size, dtype=np.uint32).reshape(tensor.shape)
        there = convert(want, tensor.axes, slot.axes, tensor.dims)
        assert convert(there, slot.axes, tensor.axes, tensor.dims).tobytes() == want.tobytes()


def test_flax_by_hand():
    config = FAMILIES["gemma2"]
    values = values_of(config)
    tree = pack(values, config, format="flax")
    n, k, h, d = 4, 2, 24, 72
    q, key, value = (values[f"layers.1.attn.{x}"] for x in "qkv")
    assert np.array_equal(tree["layer_1/attn/q_einsum/w"], q.reshape(n, h, d).transpose(0, 2, 1))
    assert np.array_equal(tree["layer_1/attn/kv_einsum/w"][0], key.reshape(k, h, d).transpose(0, 2, 1))
    assert np.array_equal(tree["layer_1/attn/kv_einsum/w"][1], value.reshape(k, h, d).transpose(0, 2, 1))
    o = values["layers.1.attn.o"]
    assert np.array_equal(tree["layer_1/attn/attn_vec_einsum/w"], o.reshape(d, n, h).transpose(1, 2, 0))
    assert np.array_equal(tree["layer_1/mlp/gating_einsum"][0], values["layers.1.mlp.gate"].T)
    assert np.array_equal(tree["layer_1/mlp/gating_einsum"][1], values["layers.1.mlp.up"].T)
    assert np.array_equal(tree["layer_1/mlp/linear"], values["layers.1.mlp.down"].T)
    table = tree["embedder/input_embedding"]
    assert table.shape == (384, d) and np.array_equal(table[:320], values["embed"]) and not table[320:].any()


def test_flax_tower_by_hand():
    config = FAMILIES["gemma3-vision"]
    values = values_of(config)
    tree = pack(values, config, format="flax")
    root = "vision_encoder/siglip_encoder/"
    assert np.array_equal(tree[root + "embedding/kernel"], values["vision.patch.weight"].transpose(2, 3, 1, 0))
    assert np.array_equal(tree[root + "pos_embedding"], values["vision.pos"][None])
    block, ours = root + "Transformer/encoderblock_1/", "vision.layers.1."
    for part, jax in (("q", "query"), ("k", "key"), ("v", "value")):
        kernel = tree[f"{block}MultiHeadDotProductAttention_0/{jax}/kernel"]
        assert np.array_equal(kernel, values[f"{ours}attn.{part}.weight"].T.reshape(48, 4, 12))
        bias = tree[f"{block}MultiHeadDotProductAttention_0/{jax}/bias"]
        assert np.array_equal(bias, values[f"{ours}attn.{part}.bias"].reshape(4, 12))
    out = tree[f"{block}MultiHeadDotProductAttention_0/out/kernel"]
    assert np.array_equal(out, values[f"{ours}attn.o.weight"].T.reshape(4, 12, 48))
    for jax, part in (("LayerNorm_0", "norm1"), ("LayerNorm_1", "norm2")):
        assert np.array_equal(tree[f"{block}{jax}/scale"], values[f"{ours}{part}.weight"])
    for jax, part in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        assert np.array_equal(tree[f"{block}MlpBlock_0/{jax}/kernel"], values[f"{ours}mlp.{part}.weight"].T)
    assert np.array_equal(tree["embedder/mm_input_projection/w"], values["mm.proj"])


def test_fused_pooling_head_by_hand():
    config = FAMILIES["siglip-head"]
    values = values_of(config)
    fused = pack(values, config, format="hf")
    q, k, v = (values[f"vision.head.attn.{part}.weight"] for part in "qkv")
    assert np.array_equal(fused["head.attention.in_proj_weight"], np.concatenate([q, k, v]))


# ours: (hf and ckpt, flax, gguf, sbs)
NORMS = {
    "pre_attn": ("input_layernorm", "pre_attention_norm", "attn_norm", "pre_att_ns"),
    "post_attn": ("post_attention_layernorm", "post_attention_norm", "post_attention_norm", "post_att_ns"),
    "pre_mlp": ("pre_feedforward_layernorm", "pre_ffw_norm", "ffn_norm", "pre_ff_ns"),
    "post_mlp": ("post_feedforward_layernorm", "post_ffw_norm", "post_ffw_norm", "post_ff_ns"),
}


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_norms_by_hand(family):
    """Equal shapes hide an exchange, so the name of every norm is spelled here once more."""
    config = FAMILIES[family]
    values = values_of(config)
    packed = {format: pack(values, config, format=format) for format in ("hf", "flax", "gguf", "ckpt", "sbs")}
    for ours, (hf, flax, gguf, sbs) in NORMS.items():
        if family == "gemma" and ours.startswith("post"):
            continue
        hf = "post_attention_layernorm" if (family, ours) == ("gemma", "pre_mlp") else hf
        w = values[f"layers.1.norm.{ours}"]
        assert np.array_equal(packed["hf"][f"model.layers.1.{hf}.weight"], w)
        assert np.array_equal(packed["ckpt"][f"model.layers.1.{hf}.weight"], w)
        assert np.array_equal(packed["flax"][f"layer_1/{flax}/scale"], w)
        assert np.array_equal(packed["gguf"][f"blk.1.{gguf}.weight"], 1 + w)
        assert np.array_equal(packed["sbs"][f"{sbs}_1"], w)
    if family == "gemma3":
        for part, word in (("q", "query"), ("k", "key")):
            w = values[f"layers.1.attn.{part}_norm"]
            assert np.array_equal(packed["hf"][f"model.layers.1.self_attn.{part}_norm.weight"], w)
            assert np.array_equal(packed["ckpt"][f"model.layers.1.self_attn.{word}_norm.weight"], w)
            assert np.array_equal(packed["flax"][f"layer_1/attn/_{word}_norm/scale"], w)
            assert np.array_equal(packed["gguf"][f"blk.1.attn_{part}_norm.weight"], 1 + w)
            assert np.array_equal(packed["sbs"][f"{word}_norm_1"], w)


def test_merged_and_transposed_flax_by_hand():
    config = FAMILIES["gemma-as-many-key-heads"]
    values = values_of(config)
    tree = pack(values, config, format="flax")
    fused = np.stack([values[f"layers.0.attn.{x}"].reshape(4, 24, 72).transpose(0, 2, 1) for x in "qkv"])
    assert np.array_equal(tree["layer_0/attn/qkv_einsum/w"], fused)
    config = FAMILIES["gemma2-transposed"]
    values = values_of(config)
    gate = pack(values, config, format="flax")["layer_0/mlp/gating_einsum"]
    assert np.array_equal(gate, np.stack([values["layers.0.mlp.gate"], values["layers.0.mlp.up"]]))


def test_ckpt_sbs_gguf_and_npz_by_hand():
    config = FAMILIES["gemma2"]
    values = values_of(config)
    q, k, v = (values[f"layers.1.attn.{x}"] for x in "qkv")
    fused = pack(values, config, format="ckpt")["model.layers.1.self_attn.qkv_proj.weight"]
    assert np.array_equal(fused, np.concatenate([q, k, v]))
    heads = [*q.reshape(4, 24, 72), k[:24], v[:24], k[24:], v[24:]]  # keys and values alternate per head
    assert np.array_equal(pack(values, config, format="sbs")["qkv_ein_1"], np.stack(heads))
    gguf = pack(values, config, format="gguf")
    assert np.array_equal(gguf["blk.1.post_ffw_norm.weight"], 1 + values["layers.1.norm.post_mlp"])
    assert np.array_equal(gguf["output_norm.weight"], 1 + values["final_norm"])
    assert gguf["blk.1.attn_q.weight"] is q
    config = FAMILIES["paligemma2"]
    values = values_of(config)
    npz = pack(values, config, format="npz")
    keys = np.stack([values[f"layers.{i}.attn.k"].reshape(2, 24, 72).transpose(0, 2, 1) for i in range(2)])
    assert np.array_equal(npz["params/llm/layers/attn/kv_einsum/w"][:, 0], keys)
    query = values["vision.layers.1.attn.q.weight"].T.reshape(48, 4, 12)
    name = "params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"
    assert np.array_equal(npz[name][1], query)
    assert np.array_equal(npz["params/img/head/kernel"], values["projector.kernel"].T)
    assert np.array_equal(npz["params/img/embedding/kernel"], values["vision.patch.weight"].transpose(2, 3, 1, 0))


def test_interleaved_heads_of_gemma_cpp_when_all_are_alike():
    config = FAMILIES["gemma-as-many-key-heads"]
    values = values_of(config)
    q, k, v = (values[f"layers.0.attn.{x}"].reshape(4, 24, 72) for x in "qkv")
    assert np.array_equal(pack(values, config, format="sbs")["qkv_ein_0"], np.stack([q, k, v], 1).reshape(12, 24, 72))


def test_bfloat16_values():
    config = FAMILIES["gemma3"]
    values = values_of(config, ml_dtypes.bfloat16)
    back = unpack(pack(values, config, format="gguf"), config, format="gguf")
    for name, want in values.items():
        assert back[name].dtype == ml_dtypes.bfloat16
        if not name.endswith("norm") and ".norm." not in name:  # 1 + w rounds in bfloat16
            assert back[name].tobytes() == want.tobytes()


def test_fit_rows():
    table = np.ones((3, 2), np.float32)
    assert np.array_equal(fit_rows(table, 5), [[1, 1]] * 3 + [[0, 0]] * 2)
    assert fit_rows(table, 2).shape == (2, 2) and fit_rows(table, 3).base is table


def test_a_tied_copy_must_be_equal():
    config = FAMILIES["gemma3"]
    arrays = pack(values_of(config), config, format="hf")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    assert np.shares_memory(unpack(arrays, config, format="hf")["embed"], arrays["model.embed_tokens.weight"])
    arrays["lm_head.weight"][17, 3] += 1
    with pytest.raises(WeightsMismatch, match=r"lm_head.weight: expected the values of model.embed_tokens.weight"):
        unpack(arrays, config, format="hf")


def test_pack_is_strict():
    config = FAMILIES["gemma"]
    values = values_of(config)
    values["surprise"] = values.pop("final_norm")
    values["embed"] = values["embed"].T
    with pytest.raises(WeightsMismatch) as caught:
        pack(values, config, format="hf")
    error = caught.value
    assert (error.missing, error.unexpected) == (("final_norm",), ("surprise",))
    assert error.misshaped == ("embed: expected (320, 72), got (72, 320)",)
    with pytest.raises(WeightsMismatch, match=r"head .no name in flax."):
        pack(values_of(FAMILIES["gemma2-untied"]), FAMILIES["gemma2-untied"], format="flax")


def test_a_fused_array_has_one_dtype():
    config = FAMILIES["gemma"]
    values = values_of(config)
    values["layers.0.attn.v"] = values["layers.0.attn.v"].astype(np.float16)
    with pytest.raises(ShapeError, match=r"qkv_proj.weight: its parts are float32 and float16"):
        pack(values, config, format="ckpt")


def test_bound_places_are_where_the_values_are():
    """`bind` and `expected` agree for every family and format, in the order of the table."""
    for name, format in PAIRS:
        config = FAMILIES[name]
        found = bind(expected(config, format), config, format=format, path="x")
        assert list(found) == [t.name for t in tensors(config)]
        assert [places[0] for places in found.values()] == [t.slots[format] for t in tensors(config)]
