# SPDX-License-Identifier: Apache-2.0
"""`load_params`: the tree, its values and dtypes, from every kind of file, and what it refuses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma import testing, weights
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, UnsupportedError, WeightsMismatch
from gemma.gm import ckpts, nn
from gemma.gm.ckpts import _load

FAMILIES = ("gemma", "gemma2", "gemma3")


def flat(tree) -> dict[str, jax.Array]:
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def reference(config, seed=0) -> dict[str, np.ndarray]:
    """The flax tree as the weight table packs it, with the padded table of the JAX package."""
    packed = weights.pack(testing.random_tensors(config, seed), config, format="flax")
    table = packed["embedder/input_embedding"]
    rows = np.zeros((config.table_rows, table.shape[1]), table.dtype)
    rows[: len(table)] = table
    return packed | {"embedder/input_embedding": rows}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    config = testing.tiny_config(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    testing.write_tiny_safetensors(folder, config)
    return config, folder


def test_values_from_safetensors(saved):
    config, folder = saved
    got, expected = flat(ckpts.load_params(folder)), reference(config)
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].dtype == jnp.float32
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_the_tree_is_the_networks_own(saved):
    config, folder = saved
    model = nn.Transformer.from_config(config, dtype=jnp.float32)
    own = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32)))["params"]
    loaded = ckpts.load_params(folder)
    assert jax.tree.structure(own) == jax.tree.structure(loaded)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), own) == jax.tree.map(lambda x: (x.shape, x.dtype), loaded)


def test_every_head_is_a_key_head(tmp_path):
    config = testing.tiny_config("gemma", num_key_value_heads=4)  # q, k and v share one leaf
    testing.write_tiny_safetensors(tmp_path, config)
    got = flat(ckpts.load_params(tmp_path))
    assert got["layer_0/attn/qkv_einsum/w"].shape == (3, 4, 72, 24)
    for name, array in reference(config).items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_from_gguf(tmp_path):
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None, rope_scaling_factor=1.0)
    path = testing.write_tiny_gguf(tmp_path / "model.gguf", config)
    got = flat(ckpts.load_params(path))
    for name, array in reference(config).items():
        # a GGUF stores 1 + w for norms: removing the 1 again costs a rounding of 2**-24
        np.testing.assert_allclose(got[name], array, rtol=0, atol=2**-23, err_msg=name)


def test_packed_types_become_float32_unless_told(tmp_path):
    # rows of Q8_0 are blocks of 32
    config = testing.tiny_config(
        "gemma3",
        query_pre_attn_scalar=None,
        rope_scaling_factor=1.0,
        hidden_size=64,
        intermediate_size=96,
        head_dim=32,
    )
    path = testing.write_tiny_gguf(tmp_path / "model.gguf", config, types="Q8_0")
    assert {leaf.dtype for leaf in flat(ckpts.load_params(path)).values()} == {jnp.dtype("float32")}
    half = flat(ckpts.load_params(path, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in half.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("rows", [328, 256])
def test_the_rows_of_the_table(tmp_path, rows):
    """The JAX table of Gemma 2 is longer than Hugging Face's, that of Gemma 3 with images shorter."""
    config = testing.tiny_config("gemma2", flax_vocab_rows=rows)
    testing.write_tiny_safetensors(tmp_path, config)
    table = np.asarray(ckpts.load_params(tmp_path)["embedder"]["input_embedding"])
    assert table.shape == (rows, 72) and not table[320:].any()
    np.testing.assert_array_equal(table[:320], testing.random_tensors(config)["embed"][:rows])


def resave(folder, target, dtype):
    arrays = load_file(folder / "model.safetensors")
    target.mkdir()
    save_file({name: array.astype(dtype) for name, array in arrays.items()}, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_floats_keep_their_dtype(saved, tmp_path):
    config, folder = saved
    bf16 = resave(folder, tmp_path / "bf16", ml_dtypes.bfloat16)
    got, expected = flat(ckpts.load_params(bf16)), reference(config)
    for name, array in expected.items():
        assert got[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[name], array.astype(ml_dtypes.bfloat16), err_msg=name)
    fp16 = flat(ckpts.load_params(resave(folder, tmp_path / "fp16", np.float16)))
    assert {leaf.dtype for leaf in fp16.values()} == {jnp.dtype("float32")}  # Gemma overflows in float16


def test_params_decide_dtype_and_sharding(saved):
    _, folder = saved
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.device_put(x.astype(jnp.bfloat16), where), ckpts.load_params(folder))
    names = flat(like)
    got = flat(ckpts.load_params(folder, params=like))
    assert all(leaf.is_deleted() for leaf in names.values())  # donated
    for name, leaf in got.items():
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == where, name
    kept = ckpts.load_params(folder)
    ckpts.load_params(folder, params=kept, donate=False)
    assert not any(leaf.is_deleted() for leaf in flat(kept).values())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), kept)
    assert flat(ckpts.load_params(folder, params=shapes))["final_norm/scale"].dtype == jnp.bfloat16


def test_sharding(saved):
    _, folder = saved
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert {leaf.sharding for leaf in flat(ckpts.load_params(folder, sharding=where)).values()} == {where}


def test_the_host_buffer_becomes_the_array():
    buffer = _load.aligned_empty((3, 5), np.dtype(np.float32))
    buffer[...] = 1
    array = jax.device_put(buffer, may_alias=True)
    if jax.default_backend() == "cpu":
        assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_arguments_that_exclude_each_other(saved):
    _, folder = saved
    params = ckpts.load_params(folder)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="`sharding` and `params` are mutually exclusive"):
        ckpts.load_params(folder, params=params, sharding=where)
    with pytest.raises(ValueError, match="`dtype` and `params` are mutually exclusive"):
        ckpts.load_params(folder, params=params, dtype=jnp.bfloat16)
    for wrong in ({"transformer/embedder": {}}, {"layer_0": {}}, [1]):
        with pytest.raises(ValueError, match="must be a nested tree"):
            ckpts.load_params(folder, params=wrong)
    with pytest.raises(ValueError, match="pass one or the other"):
        ckpts.load_params(folder, params=params | {"vision_encoder": {}}, text_only=True)
    with pytest.raises(ValueError, match="has none"):
        ckpts.load_params(folder, params=params | {"vision_encoder": {"x": params["final_norm"]["scale"]}})
    assert not params["final_norm"]["scale"].is_deleted()  # what is refused is not donated


def test_params_of_another_model(saved):
    _, folder = saved
    params = ckpts.load_params(folder)
    del params["final_norm"]
    params["layer_9"] = {"x": jnp.zeros(1)}
    params["embedder"] = {"input_embedding": jnp.zeros((4, 4))}
    with pytest.raises(WeightsMismatch) as caught:
        ckpts.load_params(folder, params=params)
    assert caught.value.missing == ("layer_9/x",) and caught.value.unexpected == ("final_norm/scale",)
    assert "embedder/input_embedding: expected (4, 4)" in caught.value.misshaped[0]


def test_float16(tmp_path):
    testing.write_tiny_safetensors(tmp_path, testing.tiny_config("gemma3"))
    with pytest.raises(UnsupportedError, match=r"65504.*NaN; use bfloat16 or float32"):
        ckpts.load_params(tmp_path, dtype=jnp.float16)
    with pytest.raises(UnsupportedError, match="expected one of float32, bfloat16, float16, got int8"):
        ckpts.load_params(tmp_path, dtype=jnp.int8)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointNotFound):
        ckpts.load_params(tmp_path / "nothing")
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").write_text("{}")
    with pytest.raises(FormatError, match="tree_metadata: expected an object"):
        ckpts.load_params(tmp_path / "orbax")


def test_a_missing_tensor_is_named(saved, tmp_path):
    _, folder = saved
    arrays = load_file(folder / "model.safetensors")
    gone = next(name for name in arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    del arrays[gone]
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    with pytest.raises(WeightsMismatch) as caught:
        ckpts.load_params(tmp_path)
    assert any(gone in name for name in caught.value.missing)
    assert isinstance(caught.value, CheckpointError)
