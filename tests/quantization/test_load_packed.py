# SPDX-License-Identifier: Apache-2.0
"""`load_params(quantize=...)`: sizes, the real model, arguments, shardings, images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_models import IDS, load, tiny

from gemma import config as configs
from gemma import hub, peft, testing, weights
from gemma.errors import CheckpointError, ConfigError
from gemma.gm import nn
from gemma.gm.ckpts import load_params
from gemma.gm.nn._packed import PackedArray, PackedParts
from gemma.quants import QuantType


@pytest.mark.parametrize("preset", ["gemma_2b", "gemma2_9b", "gemma3_270m", "gemma3_1b", "gemma3_12b"])
def test_int4_is_at_most_0_30_of_bfloat16_with_the_embedding(preset):
    config = configs.text_only(configs.PRESETS[preset])
    packed = floats = 0
    for tensor in weights.tensors(config):
        floats += 2 * tensor.size
        rows = tensor.size // tensor.shape[-1]
        matrix = weights.is_matrix(tensor)
        packed += rows * (QuantType.INT4.row_bytes(tensor.shape[-1]) + 4) if matrix else 4 * tensor.size
    assert packed <= 0.30 * floats


def test_the_real_file_runs_from_its_own_bytes():
    path = hub.demo_path()
    params = load_params(path, quantize="keep")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held < 0.47 * 2 * 268_098_176  # Q8_0 embedding; nothing was decoded
    kv = params["layer_0"]["attn"]["kv_einsum"]["w"]
    assert isinstance(kv, PackedParts) and [part.type.name for part in kv.parts] == ["Q5_0", "Q8_0"]
    net = nn.Transformer.from_config(configs.text_only(configs.PRESETS["gemma3_270m"]), dtype=jnp.float32)
    ids = jnp.array([[2, 818, 4083, 529, 20124, 6074]])
    last = jax.jit(lambda p: net.apply({"params": p}, ids, return_last_only=True).logits)(params)
    assert int(last.argmax()) == 607  # " with"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("gemma3", tmp_path_factory.mktemp("packed"))


def test_bytes_of_a_tiny_model_and_dtype(model):
    _, folder, net = model
    params = load(folder, quantize="int4")
    table = params["embedder"]["input_embedding"]
    assert isinstance(table, PackedArray) and table.nbytes == 320 * (32 + 4) and table.dtype == jnp.float32
    half = load(folder, quantize="int4", dtype="bfloat16")
    assert half["embedder"]["input_embedding"].dtype == jnp.bfloat16
    assert jax.eval_shape(lambda p: net.apply({"params": p}, IDS).logits, half).dtype == jnp.bfloat16


def test_importance_changes_the_bytes_and_arguments_are_checked(model):
    config, folder, _ = model
    ones = {
        name: np.ones(t.shape[-1], np.float32)
        for t in weights.tensors(config)
        if len(t.shape) == 2
        for name in [t.name]
    }
    ones["layers.0.mlp.gate"][:8] = 1e4
    plain, weighted = (load(folder, quantize="q4_0_pure", importance=i) for i in (None, ones))
    gates = [p["layer_0"]["mlp"]["gating_einsum"] for p in (plain, weighted)]
    assert not np.array_equal(gates[0].data, gates[1].data)
    exact = np.asarray(load(folder)["layer_0"]["mlp"]["gating_einsum"])[0, :, :8]
    errors = [np.square(np.asarray(g.dequantize())[0, :, :8] - exact).mean() for g in gates]
    assert errors[1] < errors[0]
    with pytest.raises(CheckpointError, match="`importance` is used while quantizing"):
        load(folder, importance=ones)
    with pytest.raises(ConfigError, match="did you mean q4_k_"):
        load(folder, quantize="q4_k_n")
    with pytest.raises(ConfigError, match="plain floats; pass dtype"):
        load(folder, quantize="bf16")
    with pytest.raises(CheckpointError, match="pass one or the other"):
        load(folder, quantize="int8", params=load(folder))


def test_nan_is_refused_with_the_tensors_name(tmp_path):
    config = testing.tiny_config("gemma3", hidden_size=64, num_hidden_layers=1, layer_pattern="G")
    tensors = testing.random_tensors(config)
    tensors["layers.0.mlp.up"][1, 1] = np.nan
    testing.write_tiny_safetensors(tmp_path, config, tensors=tensors)
    for how in ("int8", "sfp8"):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.(up|gate): .*repair the weights"), pytest.warns():
            load(tmp_path, quantize=how)


def test_shardings_of_the_float_leaves_are_followed(model):
    from gemma.gm.ckpts._load_packed import packed_sharding

    _, folder, net = model
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    spec = jax.sharding.PartitionSpec
    params = load(folder, quantize="int8", sharding=jax.sharding.NamedSharding(mesh, spec()))
    assert params["layer_0"]["mlp"]["linear"].data.sharding.mesh == mesh
    from gemma.gm import sharding as strategies

    spread = load(
        folder, quantize="int8", sharding=strategies.TensorSharding(net.config, strategies.make_mesh(tensor=-1))
    )
    assert spread["layer_0"]["attn"]["q_einsum"]["w"].data.sharding.mesh.shape["tensor"] == 1
    leaf = params["layer_0"]["mlp"]["gating_einsum"]
    cut = packed_sharding(leaf, jax.sharding.NamedSharding(mesh, spec(None, "tensor", None)))
    assert cut.data.spec == spec(None, None)  # the axis of gate and up stands before it
    table = params["embedder"]["input_embedding"]
    cut = packed_sharding(table, jax.sharding.NamedSharding(mesh, spec("tensor", None)))
    assert cut.data.spec == spec("tensor", None) and cut.scale.spec == spec("tensor")
    down = packed_sharding(params["layer_0"]["mlp"]["linear"], jax.sharding.NamedSharding(mesh, spec("tensor", None)))
    assert down.data.spec == spec(None, "tensor")


def test_a_model_with_images_keeps_its_tower_and_runs_quantized(tmp_path):
    from gemma.config import SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=56, patch_size=14
    )
    sizes = dict(hidden_size=64, num_hidden_layers=1, layer_pattern="G", head_dim=32, intermediate_size=96)
    config = dataclasses.replace(
        testing.tiny_config("gemma3", **sizes), vision=vision, mm_tokens_per_image=4, boi_token_index=300
    )
    config = dataclasses.replace(config, eoi_token_index=301, image_token_index=302, model_type="gemma3")
    testing.write_tiny_safetensors(tmp_path, config)
    net = nn.Transformer.from_config(config, dtype=jnp.float32)
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 56, 56, 3), np.uint8)
    run = jax.jit(lambda p: net.apply({"params": p}, jnp.array([[2, 5, 300, 7]]), images=image).logits)
    floats = load(tmp_path)
    exact = np.asarray(run(floats))
    packed = load(tmp_path, quantize="int8")
    assert isinstance(packed["layer_0"]["mlp"]["linear"], PackedArray)
    assert isinstance(packed["vision_encoder"]["siglip_encoder"]["embedding"]["kernel"], jax.Array)
    ints = nn.IntWrapper(model=net, dtype=jnp.int8).seen(peft.quantize(floats, method="int8"))
    for params in (packed, ints):
        ours = np.asarray(run(params))
        assert 0 < np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
