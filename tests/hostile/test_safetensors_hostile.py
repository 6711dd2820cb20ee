# SPDX-License-Identifier: Apache-2.0
"""Hostile safetensors files, shard maps and configurations in a Hugging Face folder, and weights that are not numbers.

The safetensors rules are: a little-endian u64 header length, a JSON object of at most 100 MB that starts with "{", one
entry per tensor, and tensor bytes that tile the rest of the file without hole, overlap or remainder.
"""

from __future__ import annotations

import json
import os
import struct
import warnings

import hostile_files as h
import numpy as np
import pytest
from guard import bounded, drive, refused, survives

from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    FormatError,
    GemmaError,
    UnsupportedError,
    WeightsMismatch,
)

ROWS = 40
F4 = np.arange(4, dtype="<f4").tobytes()


@pytest.fixture
def put(tmp_path):
    def write(data: bytes, name="model.safetensors"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def entry(dtype="F32", shape=(4,), offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def file_of(header, body: bytes = F4, **options) -> bytes:
    return h.raw_safetensors(header if isinstance(header, bytes) else json.dumps(header).encode(), body, **options)


# --- the valid files


@pytest.mark.parametrize("shards", [1, 3])
def test_the_valid_folder_reads_to_the_end(tmp_path, shards):
    folder = h.write_hf(tmp_path / "model", rows=ROWS, shards=shards)
    with bounded():
        drive(folder)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "hf"
        wanted = h.hf_tensors(ROWS)
        assert set(checkpoint.tensors) == set(wanted)
        for name, (dtype, shape, data) in wanted.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, len(data))
            assert bytes(checkpoint.raw(name)) == data
            assert checkpoint.read(name).tobytes() == data


def test_one_file_and_the_valid_pieces(put):
    path = put(h.safetensors_bytes({"a": ("F32", (2, 2), F4), "b": ("BF16", (3,), bytes(6))}, {"k": "v"}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["a"].shape == (2, 2) and checkpoint.tensors["b"].dtype == "BF16"
        assert np.array_equal(checkpoint.read("a").ravel(), np.arange(4))


def test_empty_tensors_and_scalars_are_legal(put):
    header = {"a": entry(shape=(0, 3), offsets=(0, 0)), "b": entry(shape=(), offsets=(0, 4))}
    with open_checkpoint(put(file_of(header, F4[:4]))) as checkpoint:
        assert checkpoint.read("a").shape == (0, 3) and checkpoint.read("b").shape == ()


def test_links_as_the_hub_cache_makes_them(tmp_path):
    """snapshots/<revision>/x -> ../../blobs/<hash>: links that a person's tools made are followed."""
    real = h.write_hf(tmp_path / "blobs", rows=ROWS)
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(os.path.relpath(real / file, folder))
    drive(folder)


# --- A9: the header


HEADERS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "length only": struct.pack("<Q", 2),
    "length 0": struct.pack("<Q", 0) + bytes(64),
    "length 1": struct.pack("<Q", 1) + b"{" + bytes(64),
    "length beyond the file": struct.pack("<Q", 10**6) + b'{"a":1}',
    "length one too many": file_of(b"{}", b"", length=3),
    "length 2^63": struct.pack("<Q", 2**63) + b"{}" + bytes(64),
    "length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}" + bytes(64),
    "not an object: list": file_of(b"[]      ", b""),
    "not an object: string": file_of(b'"x"     ', b""),
    "leading space": file_of(b'  {"__metadata__":{}}', b""),
    "byte order mark": file_of(b'\xef\xbb\xbf{"a":1}', b""),
    "invalid UTF-8": file_of(b'{"\xff\xfe":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "overlong UTF-8": file_of(b'{"\xc0\xaf":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "not JSON": file_of(b"{not json at all}"),
    "unclosed": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'),
    "trailing garbage": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}} x'),
    "trailing zeros": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}\0\0\0'),
    "two objects": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}{}'),
    "NaN literal": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "Infinity literal": file_of(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,Infinity]}}'),
    "duplicate tensor": file_of(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "duplicate field": file_of(b'{"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}'),
    "duplicate metadata": file_of(
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "deep lists": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep and unclosed": file_of(b"{" + b'"a":[' * 100_000),
    "huge integer": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "huge exponent": file_of(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,16]}}'),
    "entry is a number": file_of({"a": 1}),
    "entry is null": file_of({"a": None}),
    "entry is a list": file_of({"a": [1, 2]}),
    "dtype missing": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "shape missing": file_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "offsets missing": file_of({"a": {"dtype": "F32", "shape": [4]}}),
    "unknown field": file_of({"a": entry(strides=[1])}),
    "dtype is a number": file_of({"a": entry(dtype=3)}),
    "dtype is a list": file_of({"a": entry(dtype=["F32"])}),
    "shape is a number": file_of({"a": entry() | {"shape": 4}}),
    "shape is a string": file_of({"a": entry() | {"shape": "4"}}),
    "shape is an object": file_of({"a": entry() | {"shape": {"0": 4}}}),
    "shape holds a string": file_of({"a": entry(shape=["4"])}),
    "shape holds a float": file_of({"a": entry(shape=[4.0])}),
    "shape holds a boolean": file_of({"a": entry(shape=[4, True])}),
    "shape holds null": file_of({"a": entry(shape=[4, None])}),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_break_the_rules(put, fault):
    refused(put(HEADERS[fault]), FormatError)


def test_header_of_more_than_100_megabytes(tmp_path):
    """A sparse file, so the length fits; the cap is on the header itself and nothing of it may be read first."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 200_000_000)
    refused(path, FormatError, match="100")


def test_large_header_of_spaces_is_bounded(tmp_path):
    """20 MB of legal padding cost no more than a bounded multiple of themselves."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(h.raw_safetensors(b"{}" + b" " * (20 << 20)))
    with bounded(128 << 20):
        survives(path, open_checkpoint)


def test_truncated_at_every_byte(put):
    data = h.safetensors_bytes({"a": ("F32", (4,), F4), "b": ("U8", (3,), b"abc")}, {"format": "pt"})
    path = put(data)
    for length in range(len(data) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(FormatError) as caught:
            open_checkpoint(path)
        assert path.name in str(caught.value)


# --- A10: offsets, shapes and types


LAYOUTS = {
    "overlap": file_of({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "same bytes": file_of({"a": entry(), "b": entry()}, F4),
    "hole at the start": file_of({"a": entry(offsets=(4, 20))}, bytes(20)),
    "hole between": file_of({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)),
    "bytes after the last tensor": file_of({"a": entry()}, F4 + b"x"),
    "no tensors but bytes": file_of({}, F4),
    "beyond the file": file_of({"a": entry()}, F4[:-1]),
    "far beyond the file": file_of({"a": entry(shape=[2**40], offsets=(0, 2**42))}),
    "reversed": file_of({"a": entry(offsets=(16, 0))}),
    "negative start": file_of({"a": entry(offsets=(-16, 0))}),
    "negative end": file_of({"a": entry(offsets=(0, -16))}),
    "one offset": file_of({"a": entry(offsets=(0,))}),
    "three offsets": file_of({"a": entry(offsets=(0, 16, 16))}),
    "float offsets": file_of({"a": entry(offsets=(0.0, 16.0))}),
    "string offsets": file_of({"a": entry(offsets=("0", "16"))}),
    "boolean offset": file_of({"a": entry(dtype="U8", shape=(1,), offsets=(False, True))}, b"x"),
    "2^63": file_of({"a": entry(offsets=(0, 2**63))}),
    "2^64": file_of({"a": entry(offsets=(2**64, 2**64 + 16))}),
    "shape too small": file_of({"a": entry(shape=(3,))}),
    "shape too large": file_of({"a": entry(shape=(5,))}),
    "product wraps": file_of({"a": entry(shape=(2**32, 2**32))}),
    "product wraps to the span": file_of({"a": entry(shape=(4, 2**62 + 1))}),
    "bytes wrap": file_of({"a": entry(shape=(2**62 + 4,))}),
    "negative dimension": file_of({"a": entry(shape=(-4,))}),
    "two negative dimensions": file_of({"a": entry(shape=(-2, -2))}),
    "zero dimension with bytes": file_of({"a": entry(shape=(0, 4))}),
    "unknown dtype": file_of({"a": entry(dtype="F33")}),
    "lower-case dtype": file_of({"a": entry(dtype="f32")}),
    "empty dtype": file_of({"a": entry(dtype="")}),
    "metadata is a list": file_of({"__metadata__": ["x"], "a": entry()}),
    "metadata is a string": file_of({"__metadata__": "x", "a": entry()}),
    "metadata value is a number": file_of({"__metadata__": {"k": 1}, "a": entry()}),
    "metadata value is an object": file_of({"__metadata__": {"k": {}}, "a": entry()}),
    "metadata value is null": file_of({"__metadata__": {"k": None}, "a": entry()}),
}


@pytest.mark.parametrize("fault", LAYOUTS)
def test_layouts_that_break_the_rules(put, fault):
    refused(put(LAYOUTS[fault]), (FormatError, UnsupportedError) if "dtype" in fault else FormatError)


def test_a_shape_of_200_000_dimensions(put):
    header = {"a": entry(shape=[1] * 200_000 + [4])}
    with bounded():
        survives(put(file_of(header)), open_checkpoint)


def test_types_that_are_legal_but_not_ours(put):
    """Listed or refused by name, never read as something else."""
    for dtype, size in (("F8_E4M3", 1), ("F8_E5M2", 1), ("C64", 8), ("U16", 2), ("U64", 8), ("BOOL", 1)):
        header = {"a": entry(dtype=dtype, shape=(16 // size,))}
        error = survives(put(file_of(header)), open_checkpoint)
        assert error is None or (isinstance(error, CheckpointError) and dtype in str(error)), (dtype, error)


# --- A12: the shard map


def sharded(tmp_path, change):
    folder = h.write_hf(tmp_path / "model", rows=ROWS, shards=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    replaced = change(folder, content)
    index.write_text(replaced if isinstance(replaced, str) else json.dumps(content))
    return folder


def _edit(**changes):
    return lambda folder, content: content["weight_map"].update(changes)


FIRST = "model-00001-of-00003.safetensors"
ESCAPES = ["../../x", "../model/" + FIRST, "/etc/passwd", "sub/" + FIRST, "..", ".", "", "a\\..\\b", "x\0y", "~/x"]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_shard_names_that_leave_the_folder(tmp_path, name):
    (tmp_path / "x").write_bytes(h.safetensors_bytes({"model.norm.weight": ("F32", (4,), F4)}))
    folder = sharded(tmp_path, lambda f, c: c["weight_map"].update({"model.norm.weight": name}))
    refused(folder, CheckpointError, names="index.json")


def test_an_absolute_shard_name_inside_the_folder(tmp_path):
    folder = sharded(tmp_path, lambda f, c: c["weight_map"].update({"model.norm.weight": str(f / FIRST)}))
    refused(folder, CheckpointError, names="index.json")


def test_missing_shard(tmp_path):
    folder = sharded(tmp_path, lambda f, c: (f / FIRST).unlink())
    refused(folder, CheckpointError, names=FIRST)


def test_truncated_shard(tmp_path):
    folder = sharded(tmp_path, lambda f, c: os.truncate(f / FIRST, (f / FIRST).stat().st_size - 1))
    refused(folder, FormatError, names=FIRST)


def test_tensor_that_no_shard_holds(tmp_path):
    folder = sharded(tmp_path, lambda f, c: c["weight_map"].update({"model.extra.weight": FIRST}))
    refused(folder, CheckpointError, names="model.extra.weight")


def test_tensor_in_the_wrong_shard(tmp_path):
    def swap(folder, content):
        where = content["weight_map"]
        names = sorted(where)
        where[names[0]], where[names[1]] = where[names[1]], where[names[0]]

    refused(sharded(tmp_path, swap), CheckpointError, names="weight")


def test_shard_tensor_that_the_map_does_not_list(tmp_path):
    folder = sharded(tmp_path, lambda f, c: c["weight_map"].pop("model.norm.weight") and None)
    refused(folder, CheckpointError, names="model.norm.weight")


def test_tensor_in_two_shards(tmp_path):
    def copy(folder, content):
        name = "model.norm.weight"
        other = next(f for f in sorted(set(content["weight_map"].values())) if f != content["weight_map"][name])
        held = {n: v for n, v in h.hf_tensors(ROWS).items() if content["weight_map"][n] == other or n == name}
        (folder / other).write_bytes(h.safetensors_bytes(held))

    refused(sharded(tmp_path, copy), CheckpointError, names="model.norm.weight")


INDEXES = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "no map": "{}",
    "map is a list": '{"weight_map": []}',
    "map is empty": '{"weight_map": {}}',
    "file is a number": '{"weight_map": {"a": 1}}',
    "file is null": '{"weight_map": {"a": null}}',
    "file is a list": '{"weight_map": {"a": ["x"]}}',
    "duplicate tensor": '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "deep": '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("fault", INDEXES)
def test_shard_maps_that_break_the_rules(tmp_path, fault):
    refused(sharded(tmp_path, lambda f, c: INDEXES[fault] or " "), CheckpointError, names="index.json")


def test_shard_map_in_invalid_utf8(tmp_path):
    folder = sharded(tmp_path, lambda f, c: None)
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "x"}}')
    refused(folder, CheckpointError, names="index.json")


def test_a_pipe_as_a_shard_does_not_block(tmp_path):
    def pipe(folder, content):
        (folder / FIRST).unlink()
        os.mkfifo(folder / FIRST)

    refused(sharded(tmp_path, pipe), CheckpointError, names=FIRST)


# --- A16: config.json


def config_of(tmp_path, config, **options):
    return h.write_hf(tmp_path / "model", rows=ROWS, config=config, **options)


def configure(folder):
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.config()


CONFIGS = {
    "10^9 layers": dict(num_hidden_layers=10**9),
    "no layers": dict(num_hidden_layers=0),
    "negative layers": dict(num_hidden_layers=-1),
    "layers are a string": dict(num_hidden_layers="2"),
    "layers are a float": dict(num_hidden_layers=2.5),
    "layers are a boolean": dict(num_hidden_layers=True),
    "layers are a list": dict(num_hidden_layers=[2]),
    "negative heads": dict(num_attention_heads=-2),
    "no heads": dict(num_attention_heads=0),
    "10^9 heads": dict(num_attention_heads=10**9),
    "heads no multiple": dict(num_attention_heads=3, num_key_value_heads=2),
    "odd head size": dict(head_dim=15),
    "negative width": dict(hidden_size=-32),
    "10^18 width": dict(hidden_size=10**18),
    "negative vocabulary": dict(vocab_size=-1),
    "10^12 vocabulary": dict(vocab_size=10**12),
    "zero window": dict(sliding_window=0),
    "negative window": dict(sliding_window=-8),
    "no positions": dict(max_position_embeddings=0),
    "negative epsilon": dict(rms_norm_eps=-1.0),
    "epsilon is a string": dict(rms_norm_eps="1e-6"),
    "NaN RoPE base": dict(rope_theta=float("nan")),
    "infinite RoPE base": dict(rope_theta=float("inf")),
    "negative RoPE base": dict(rope_theta=-1e4),
    "RoPE base is a string": dict(rope_theta="1e6"),
    "NaN local RoPE base": dict(rope_local_base_freq=float("nan")),
    "unknown RoPE scaling": dict(rope_scaling=dict(rope_type="yarn", factor=8.0)),
    "NaN RoPE factor": dict(rope_scaling=dict(rope_type="linear", factor=float("nan"))),
    "RoPE scaling is a string": dict(rope_scaling="linear"),
    "another activation": dict(hidden_activation="relu"),
    "attention bias": dict(attention_bias=True),
    "zero query scalar": dict(query_pre_attn_scalar=0),
    "NaN soft-cap": dict(final_logit_softcapping=float("nan")),
    "another model type": dict(model_type="llama"),
    "model type is a number": dict(model_type=3),
    "no model type": dict(model_type=None, architectures=None),
    "negative special id": dict(bos_token_id=-1),
    "special id is a string": dict(eos_token_id="<eos>"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_configurations_that_lie(tmp_path, fault):
    error = refused(config_of(tmp_path, h.hf_config(ROWS, **CONFIGS[fault])), GemmaError, act=configure, names="")
    assert isinstance(error, (ConfigError, FormatError, UnsupportedError))
    field = next(iter(CONFIGS[fault]))
    assert any(part in str(error) for part in [field, *CONFIGS[fault], "rope", "model_type"]), error


def test_null_is_as_good_as_absent(tmp_path):
    """A null size is the family's default, which then does not fit the tensors: never a silent guess that loads."""
    refused(config_of(tmp_path, h.hf_config(ROWS, num_hidden_layers=None)), WeightsMismatch, act=drive, longest=50_000)


def test_an_unknown_flag_is_refused_by_name(tmp_path):
    error = refused(config_of(tmp_path, h.hf_config(ROWS, use_time_machine=True)), ConfigError, act=configure, names="")
    assert "use_time_machine" in str(error)


def test_auto_map_is_ignored(tmp_path):
    """Code named by a checkpoint is never imported: the file would leave a trace if it were."""
    trace = tmp_path / "ran"
    config = h.hf_config(ROWS, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    folder = config_of(tmp_path, config)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    assert configure(folder).num_hidden_layers == h.SIZES["layers"]
    drive(folder)
    assert not trace.exists()


def test_vocabulary_and_embedding_disagree(tmp_path):
    folder = config_of(tmp_path, h.hf_config(ROWS + 1))
    error = refused(folder, WeightsMismatch, act=drive)
    assert len(error.misshaped) == 1 and "embed" in error.misshaped[0]
    assert str(ROWS) in error.misshaped[0] and str(ROWS + 1) in error.misshaped[0]


def test_every_mismatch_is_listed_at_once(tmp_path):
    tensors = h.hf_tensors(ROWS)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = ("F32", (4,), F4)
    tensors["surprise"] = ("F32", (4,), F4)
    tensors["model.norm.weight"] = ("F32", (4,), F4)
    error = refused(config_of(tmp_path, None, tensors=tensors), WeightsMismatch, act=drive)
    assert len(error.missing) == 2 and len(error.unexpected) == 2 and len(error.misshaped) == 1, error
    for name in ("surprise", "model.layers.2.mlp.up_proj.weight"):
        assert any(name in line for line in error.unexpected)


RAW_CONFIGS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "invalid UTF-8": b'{"model_type": "\xff"}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "duplicate field": b'{"model_type": "gemma3_text", "model_type": "gemma"}',
    "20 MB": b'{"model_type": "' + b"x" * (20 << 20) + b'"}',
}


@pytest.mark.parametrize("fault", RAW_CONFIGS)
def test_config_files_that_are_not_configurations(tmp_path, fault):
    folder = config_of(tmp_path, None)
    (folder / "config.json").write_bytes(RAW_CONFIGS[fault])
    refused(folder, GemmaError, act=configure, names="config.json")


def test_config_missing(tmp_path):
    folder = config_of(tmp_path, None)
    (folder / "config.json").unlink()
    refused(folder, (CheckpointNotFound, ConfigError), act=configure, names="config.json")


# --- A18: weights that are not numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_reported(tmp_path, value):
    """Loading goes on with one warning that counts them; strict loading refuses and names the tensor."""
    tensors = h.hf_tensors(ROWS)
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    array = np.frombuffer(data, "<f4").copy()
    array[[3, 70, 71]] = value
    tensors[name] = (dtype, shape, array.tobytes())
    folder = config_of(tmp_path, None, tensors=tensors)
    with open_checkpoint(folder) as checkpoint, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = {t.name: read() for t, read in load_tensors(checkpoint)}
    assert np.count_nonzero(~np.isfinite(loaded["layers.1.mlp.up"])) == 3
    messages = [str(w.message) for w in caught]
    assert any("up" in m and "3" in m for m in messages), messages
    with open_checkpoint(folder) as checkpoint, pytest.raises(GemmaError, match="up"):
        for _, read in load_tensors(checkpoint, strict_values=True):
            read()


def test_finite_weights_warn_of_nothing(tmp_path):
    with open_checkpoint(h.write_hf(tmp_path / "model", rows=ROWS)) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, read in load_tensors(checkpoint):
            read()
