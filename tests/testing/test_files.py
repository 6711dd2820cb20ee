# SPDX-License-Identifier: Apache-2.0
"""The small checkpoint writers, read back by libraries that are not ours: PyPI's gguf and safetensors."""

import json

import numpy as np
import pytest

from gemma.errors import ConfigError
from gemma.testing import random_tensors, tiny_config, write_gguf, write_tiny_gguf, write_tiny_safetensors


def for_gguf(family, **changes):
    """A configuration that a GGUF can express."""
    return tiny_config(family, query_pre_attn_scalar=None, **changes)


def read(path):
    from gguf import GGUFReader

    return GGUFReader(path)


def test_metadata_types(tmp_path):
    metadata = {
        "s": "ü🙂",
        "i": 7,
        "f": 0.5,
        "b": True,
        "ints": [1, -2, 3],
        "floats": [0.5, 1.5],
        "texts": ["a", "", "é"],
    }
    reader = read(write_gguf(tmp_path / "m.gguf", metadata, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    assert {key: reader.fields[key].contents() for key in metadata} == metadata
    [tensor] = reader.tensors
    assert tensor.name == "x" and tensor.shape.tolist() == [3, 2]
    np.testing.assert_array_equal(tensor.data, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_tensor_types(tmp_path, kind):
    from gguf import quants

    values = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    values[2] = 0  # a block without a scale
    odd = np.ones((3, 5), np.float32)  # leaves the next tensor unaligned but for the padding
    path = write_gguf(tmp_path / "m.gguf", {}, {"odd": odd, "x": values}, {"x": kind})
    odd_read, tensor = read(path).tensors
    np.testing.assert_array_equal(odd_read.data, odd)
    assert tensor.tensor_type.name == kind
    if kind == "Q8_0":
        np.testing.assert_array_equal(tensor.data, quants.quantize(values, tensor.tensor_type))
    else:
        np.testing.assert_array_equal(tensor.data, values.astype(tensor.data.dtype))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_tiny_gguf(tmp_path, family):
    config = for_gguf(family)
    reader = read(write_tiny_gguf(tmp_path / "m.gguf", config, seed=3))
    tensors = {t.name: t for t in reader.tensors}
    assert reader.fields["general.architecture"].contents() == family
    assert reader.fields[f"{family}.embedding_length"].contents() == config.hidden_size
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == config.vocab_size
    assert sum(int(t.n_elements) for t in reader.tensors) == config.num_parameters
    ours = random_tensors(config, 3)
    np.testing.assert_array_equal(tensors["token_embd.weight"].data, ours["embed"])
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"].data, ours["layers.1.attn.q"])
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, ours["final_norm"] + np.float32(1))
    assert ("blk.0.attn_q_norm.weight" in tensors) == (family == "gemma3")
    assert ("blk.0.post_attention_norm.weight" in tensors) == (family != "gemma")


def test_tiny_gguf_types_and_metadata(tmp_path):
    config = for_gguf("gemma3", hidden_size=64, intermediate_size=96, head_dim=24)
    path = write_tiny_gguf(
        tmp_path / "m.gguf", config, types="Q8_0", pieces=[], metadata={"general.name": None, "x": 1}
    )
    reader = read(path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert {kinds["token_embd.weight"], kinds["blk.0.ffn_down.weight"], kinds["output_norm.weight"]} == {"Q8_0", "F32"}
    assert kinds["output_norm.weight"] == "F32"
    assert "general.name" not in reader.fields and "tokenizer.ggml.tokens" not in reader.fields and "x" in reader.fields


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_tiny_safetensors_loads_in_transformers_with_every_name(tmp_path, family):
    import transformers

    config = tiny_config(family)
    folder = write_tiny_safetensors(tmp_path / "m", config, seed=5)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="float32")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = random_tensors(config, 5)
    np.testing.assert_array_equal(model.model.layers[1].self_attn.q_proj.weight.detach(), ours["layers.1.attn.q"])
    np.testing.assert_array_equal(model.model.norm.weight.detach(), ours["final_norm"])
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters


def test_shards(tmp_path):
    from safetensors.numpy import load_file

    config = tiny_config("gemma2")
    one = load_file(write_tiny_safetensors(tmp_path / "one", config) / "model.safetensors")
    folder = write_tiny_safetensors(tmp_path / "three", config, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 3
    parts = {name: array for file in files for name, array in load_file(folder / file).items()}
    assert set(parts) == set(one) == set(index["weight_map"])
    for name in one:
        np.testing.assert_array_equal(parts[name], one[name])


def test_random_tensors():
    config = tiny_config("gemma3")
    first, again, other = random_tensors(config), random_tensors(config), random_tensors(config, 1)
    assert sum(a.size for a in first.values()) == config.num_parameters
    for name, array in first.items():
        assert array.dtype == np.float32 and array.std() > 0.02, name  # norms too
        np.testing.assert_array_equal(array, again[name])
        assert not np.array_equal(array, other[name])
    assert len({a.tobytes()[:64] for a in first.values()}) == len(first)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"query_pre_attn_scalar: a GGUF can only mean 24, got 18"):
        write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma3"))
    with pytest.raises(ConfigError, match="multiple of 32"):
        write_gguf(tmp_path / "m.gguf", {}, {"x": np.ones((2, 72), np.float32)}, "Q8_0")
    with pytest.raises(ConfigError, match="one of F32, F16, Q8_0, got 'Q4_K'"):
        write_gguf(tmp_path / "m.gguf", {}, {"x": np.ones((2, 256), np.float32)}, "Q4_K")
    with pytest.raises(ConfigError, match="expected bool, int, float, str"):
        write_gguf(tmp_path / "m.gguf", {"k": b"x"}, {})
