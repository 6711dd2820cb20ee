# SPDX-License-Identifier: Apache-2.0
"""Files written by the reference packages (`gguf`, `safetensors`, `transformers`) are read as they were meant."""

from __future__ import annotations

import json

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.weights import tensors as weight_table

QUANTS = ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """One tensor of each type that the reference writer can quantize, odd sizes between to exercise the padding."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_uint32("x.u32", 2**32 - 1)
    writer.add_int32("x.i32", -(2**31))
    writer.add_uint64("x.u64", 2**64 - 1)
    writer.add_int64("x.i64", -(2**63))
    writer.add_int8("x.i8", -128)
    writer.add_uint16("x.u16", 65535)
    writer.add_float32("x.f32", 0.1)
    writer.add_float64("x.f64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "naïve 漢字\n")
    writer.add_array("x.strings", ["", "a", "漢字"])
    writer.add_array("x.floats", [0.5, -1.5])
    writer.add_array("x.bools", [True, False])
    arrays = {
        "plain.f32": rng.standard_normal((3, 5)).astype(np.float32),
        "plain.f16": rng.standard_normal((7, 3)).astype(np.float16),
        "cube.f32": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "vector.f32": rng.standard_normal(11).astype(np.float32),
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    bf16 = rng.standard_normal((4, 9)).astype(ml_dtypes.bfloat16)
    writer.add_tensor("plain.bf16", bf16.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    arrays["plain.bf16"] = bf16
    for name in QUANTS:
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf.quants.quantize(rng.standard_normal((6, 96)).astype(np.float32), kind)
        writer.add_tensor(f"packed.{name}", packed, raw_dtype=kind)
        arrays[f"packed.{name}"] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, arrays


@pytest.mark.parametrize("mmap", [True, False])
def test_gguf_of_the_reference_writer(gguf_file, mmap):
    path, arrays = gguf_file
    with open_checkpoint(path, mmap=mmap) as checkpoint:
        assert checkpoint.format == "gguf" and list(checkpoint.tensors) == list(arrays)
        for name, want in arrays.items():
            got = checkpoint.read(name)
            assert got.shape == want.shape and got.dtype == want.dtype, name
            assert got.tobytes() == want.tobytes(), name
            assert checkpoint.tensors[name].shape == want.shape
            assert np.array_equal(checkpoint.read(name, dtype=np.float32), want.astype(np.float32)), name
        for name in QUANTS:
            packed = checkpoint.packed(f"packed.{name}")
            assert packed.type.name == name and packed.shape == (6, 96)
            assert np.array_equal(packed.dequantize(), arrays[f"packed.{name}"])


def test_gguf_metadata_of_the_reference_writer(gguf_file):
    with open_checkpoint(gguf_file[0]) as checkpoint:
        m = checkpoint.metadata
        assert (m["x.u32"], m["x.i32"]) == (2**32 - 1, -(2**31))
        assert (m["x.u64"], m["x.i64"], m["x.i8"], m["x.u16"]) == (2**64 - 1, -(2**63), -128, 65535)
        assert m["x.f32"] == float(np.float32(0.1)) and m["x.f64"] == 0.1 and m["x.bool"] is True
        assert m["x.string"] == "naïve 漢字\n" and list(m["x.strings"]) == ["", "a", "漢字"]
        assert list(m["x.floats"]) == [0.5, -1.5] and list(m["x.bools"]) == [True, False]


def test_reading_the_same_tensor_twice_and_out_of_order(gguf_file):
    path, arrays = gguf_file
    with open_checkpoint(path) as checkpoint:
        for name in [*reversed(arrays), *arrays]:
            assert checkpoint.read(name).tobytes() == arrays[name].tobytes()


def test_arrays_outlive_the_checkpoint(gguf_file):
    """What was read stays readable after the file is closed."""
    path, arrays = gguf_file
    with open_checkpoint(path) as checkpoint:
        kept = {name: checkpoint.read(name) for name in arrays}
    for name, array in kept.items():
        assert array.tobytes() == arrays[name].tobytes()


def test_safetensors_of_the_reference_writer(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    arrays = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b.weight": rng.standard_normal((5,)).astype(np.float16),
        "c": rng.standard_normal((2, 2, 2)).astype(ml_dtypes.bfloat16),
        "d": rng.integers(-9, 9, (4,)).astype(np.int8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
        "漢字": np.ones((1,), np.float32),
    }
    path = tmp_path / "anything.bin"  # by content, not by suffix
    save_file(arrays, path, {"format": "np", "note": "ü"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "hf" and set(checkpoint.tensors) == set(arrays)
        for name, want in arrays.items():
            got = checkpoint.read(name)
            assert (got.shape, got.dtype) == (want.shape, want.dtype) and got.tobytes() == want.tobytes(), name
        assert checkpoint.metadata["note"] == "ü"


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_a_folder_of_transformers(tmp_path, shard_size):
    """`save_pretrained` of a tiny Gemma 3, in one file and in shards: config and every tensor."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=64, query_pre_attn_scalar=16,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    if shard_size == "60KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    with open_checkpoint(tmp_path) as checkpoint:
        ours = checkpoint.config()
        assert ours.layer_pattern * 2 != "G" and [s.attention for s in ours.layers] == ["local"] * 5 + [
            "global",
            "local",
        ]
        assert (ours.hidden_size, ours.head_dim, ours.num_key_value_heads, ours.sliding_window) == (32, 16, 2, 8)
        for name in checkpoint.tensors:
            assert np.array_equal(checkpoint.read(name), state[name]), name
        loaded = {t.name: (t, read()) for t, read in load_tensors(checkpoint)}
        assert set(loaded) == {t.name for t in weight_table(ours)}
        assert sum(a.size for _, a in loaded.values()) == ours.num_parameters
        for t, array in loaded.values():
            assert array.shape == t.shape
        assert np.array_equal(loaded["layers.3.attn.q"][1], state["model.layers.3.self_attn.q_proj.weight"])
        assert np.array_equal(
            loaded["layers.3.norm.post_mlp"][1], state["model.layers.3.post_feedforward_layernorm.weight"]
        )
        assert np.array_equal(loaded["final_norm"][1], state["model.norm.weight"])
