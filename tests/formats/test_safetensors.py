# SPDX-License-Identifier: Apache-2.0
"""The safetensors reader and writer against the `safetensors` package, and rule by rule."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as reference

from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointNotFound, FormatError, ShapeError, UnsupportedError
from gemma.formats import safetensors as st

ARRAYS = {
    "bytes": np.arange(7, dtype=np.uint8),
    "double": np.arange(6, dtype=np.float64).reshape(2, 3),
    "half": np.arange(5, dtype=np.float16),
    "single": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "brain": np.arange(3).astype(ml_dtypes.bfloat16),
    "long": np.arange(2, dtype=np.int64),
    "int": np.arange(3, dtype=np.int32),
    "short": np.arange(3, dtype=np.int16),
    "tiny": np.arange(3, dtype=np.int8),
    "truth": np.array([True, False]),
    "scalar": np.array(3.5, np.float32),
    "nothing": np.zeros((0, 4), np.float32),
    "漢字 key": np.ones(1, np.float32),
}


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("mmap", [True, False])
def test_what_we_write_the_reference_reads(tmp_path, mmap):
    path = tmp_path / "model.safetensors"
    st.write_safetensors(path, ARRAYS, {"format": "np", "é": "ü"})
    theirs = reference.load_file(path)
    assert set(theirs) == set(ARRAYS)
    with open_checkpoint(path, mmap=mmap) as checkpoint:
        assert checkpoint.metadata == {"format": "np", "é": "ü"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(theirs[name], array)
            got = checkpoint.read(name)
            assert got.dtype == array.dtype and got.shape == array.shape
            assert checkpoint.tensors[name].offset % array.dtype.itemsize == 0, "tensors are aligned to their items"
            np.testing.assert_array_equal(got, array)


def test_what_the_reference_writes_we_read(tmp_path):
    path = tmp_path / "theirs.bin"
    reference.save_file(ARRAYS, path, metadata={"a": "b"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"a": "b"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_float8(tmp_path):
    arrays = {"e4": np.arange(4).astype(ml_dtypes.float8_e4m3fn), "e5": np.arange(4).astype(ml_dtypes.float8_e5m2)}
    st.write_safetensors(tmp_path / "f8.safetensors", arrays)
    with open_checkpoint(tmp_path / "f8.safetensors") as checkpoint:
        assert {i.dtype for i in checkpoint.tensors.values()} == {"F8_E4M3", "F8_E5M2"}
        for name in arrays:
            np.testing.assert_array_equal(checkpoint.read(name, np.float32), np.arange(4, dtype=np.float32))


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    st.write_safetensors(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()

    def fail(fd):
        raise OSError("no space")

    monkeypatch.setattr(st.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        st.write_safetensors(path, {"x": np.zeros(3, np.float32)})
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]
    st.write_safetensors(path, {"x": np.zeros(3, np.float32)})
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["model.safetensors"]


def test_the_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    st.write_safetensors(tmp_path / "x", {"x": np.ones(1, np.float32)})
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"x": np.ones(1, np.complex64)}, None),
        ({"": np.ones(1, np.float32)}, None),
        ({"__metadata__": np.ones(1, np.float32)}, None),
        ({"x\n": np.ones(1, np.float32)}, None),
        ({"x": np.ones(1, np.float32)}, {"a": 1}),
        ({"x": np.ones((1,) * 9, np.float32)}, None),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, metadata):
    with pytest.raises(ShapeError, match=r"expected|at most"):
        st.write_safetensors(tmp_path / "x", tensors, metadata)
    assert not os.listdir(tmp_path)


EMPTY = json.dumps(entry(0, 0)).encode()
HEADERS = {
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "leave a hole"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "leave a hole"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap"),
    "trailing bytes": ({"a": entry(0, 4)}, 9, "5 bytes after the last tensor"),
    "past the end": ({"a": entry(0, 4)}, 3, "are not a span of the 3 bytes"),
    "reversed": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, 4, "are not a span"),
    "negative": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, 4, "must be a list of whole numbers"),
    "shape too large": ({"a": entry(0, 4, [5])}, 4, "is 5 bytes, its span 4"),
    "shape wraps": ({"a": entry(0, 4, [2**62, 8], "F32")}, 4, "its span 4"),
    "boolean size": ({"a": entry(0, 1, [True])}, 1, "whole numbers"),
    "float size": ({"a": entry(0, 1, [1.0])}, 1, "whole numbers"),
    "unknown dtype": ({"a": entry(0, 4, None, "F7")}, 4, "unknown dtype 'F7'"),
    "dtype is a list": ({"a": entry(0, 4, None, ["U8"])}, 4, "unknown dtype"),
    "missing field": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "expected exactly dtype, shape and data_offsets"),
    "extra field": ({"a": entry(0, 1) | {"x": 1}}, 1, "expected exactly"),
    "tensor is a list": ({"a": [0, 1]}, 1, "expected an object"),
    "metadata is not text": ({"__metadata__": {"a": 1}}, 0, "maps strings to strings"),
    "metadata is a list": ({"__metadata__": []}, 0, "an object"),
    "empty name": ({"": entry(0, 1)}, 1, "printable tensor name"),
    "nine axes": ({"a": entry(0, 1, [1] * 9)}, 1, "at most 8 dimensions"),
    "same name": (b'{"a":' + EMPTY + b',"a":' + EMPTY + b"}", 0, "duplicate tensor name 'a'"),
    "same field": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "expected exactly"),
    "same metadata key": (b'{"__metadata__":{"a":"b","a":"c"}}', 0, "duplicate key 'a'"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "duplicate key"),
    "text after the header": (b"{} x", 0, "unexpected text"),
    "comma at the end": (b'{"__metadata__":{},}', 0, "a key"),
    "no colon": (b'{"a" {}}', 0, "expected one of :"),
    "ends early": (b'{"a":', 0, "expected an object"),
    "single quotes": (b"{'a':{}}", 0, 'expected one of "'),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "expected an object"),
    "deep inside": (b'{"a":{"dtype":' + b"[" * 4000 + b"}}", 0, "not JSON"),
    "not UTF-8": (b'{"\xff":{}}', 0, "not UTF-8"),
    "lone surrogate": (b'{"\\ud800":{}}', 0, "not a JSON string"),
    "a list": (b"[1, 2]", 0, 'must begin with "{"'),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_refused_with_byte_and_rule(tmp_path, fault):
    header, size, rule = HEADERS[fault]
    path = raw_file(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(FormatError, match=rule) as caught:
        open_checkpoint(path)
    assert caught.value.offset is not None and 0 <= caught.value.offset <= path.stat().st_size


def test_the_byte_is_the_right_one(tmp_path):
    path = raw_file(tmp_path / "m.safetensors", b'{"\xc3\xa9": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, 7}')
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    assert path.read_bytes()[caught.value.offset : caught.value.offset + 1] == b"7"


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001, 1000])
def test_header_lengths_that_lie(tmp_path, length):
    with pytest.raises(FormatError, match=f"header length {length}"):
        open_checkpoint(raw_file(tmp_path / "model.safetensors", b"{}", bytes(20), length))


def test_known_dtypes_that_are_not_read(tmp_path):
    with pytest.raises(UnsupportedError, match="tensor a has dtype U32"):
        open_checkpoint(raw_file(tmp_path / "x.safetensors", {"a": entry(0, 4, [1], "U32")}, bytes(4)))


def test_spaces_around_the_header_and_an_empty_one(tmp_path):
    with open_checkpoint(raw_file(tmp_path / "a", b"{ }      \n")) as checkpoint:
        assert not checkpoint.tensors
    spaced = (
        b'{ "a" : { "dtype" : "U8" , "shape" : [ 1 ] , "data_offsets" : [ 0 , 1 ] } , "__metadata__" : { "k" : "v" } }'
    )
    with open_checkpoint(raw_file(tmp_path / "b", spaced, b"\5")) as checkpoint:
        assert checkpoint.read("a").tolist() == [5] and checkpoint.metadata == {"k": "v"}


def test_a_truth_value_of_two(tmp_path):
    path = raw_file(tmp_path / "a", {"a": entry(0, 2, None, "BOOL")}, b"\1\2")
    with open_checkpoint(path) as checkpoint, pytest.raises(FormatError, match="BOOL"):
        checkpoint.read("a")


# --- shards


@pytest.fixture
def shards(tmp_path):
    st.write_safetensors(tmp_path / "s-1.safetensors", {"a": np.ones(2, np.float32), "b": np.zeros(1, np.float32)})
    st.write_safetensors(tmp_path / "s-2.safetensors", {"c": np.full(3, 7, np.int32)})

    def index(weight_map, text=None):
        path = tmp_path / st.INDEX_NAME
        path.write_text(
            json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}) if text is None else text
        )
        return path

    return index


GOOD = {"a": "s-1.safetensors", "b": "s-1.safetensors", "c": "s-2.safetensors"}


def test_shards_are_one_checkpoint(shards, tmp_path):
    for path in (shards(GOOD), tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(GOOD)
            assert checkpoint.read("c").tolist() == [7, 7, 7]
            assert checkpoint.tensors["c"].file.name == "s-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "rule"),
    [
        (GOOD | {"d": "s-2.safetensors"}, "places 'd' here"),
        ({"a": "s-1.safetensors", "c": "s-2.safetensors"}, "holds 'b' .* does not list it"),
        (GOOD | {"b": "s-2.safetensors"}, "places 'b' here|places it in s-2"),
        (GOOD | {"c": "../s-2.safetensors"}, "plain file name"),
        (GOOD | {"c": "/etc/passwd"}, "plain file name"),
        (GOOD | {"c": "x/s-2.safetensors"}, "plain file name"),
        (GOOD | {"c": ".."}, "plain file name"),
        (GOOD | {"c": 7}, "plain file name"),
        ({}, "non-empty"),
        ([], "non-empty"),
    ],
)
def test_indexes_that_lie(shards, weight_map, rule):
    with pytest.raises(FormatError, match=rule):
        open_checkpoint(shards(weight_map))


def test_a_missing_shard(shards):
    with pytest.raises(CheckpointNotFound, match=r"s-9\.safetensors"):
        open_checkpoint(shards(GOOD | {"c": "s-9.safetensors"}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map":' + "[" * 10**5, "[" * 10**6, "[[]," * 500],
    ids=["empty", "open", "list", "duplicate", "deep", "deeper", "wide"],
)  # fmt: skip
def test_indexes_that_are_no_index(shards, text):
    with pytest.raises(FormatError):
        open_checkpoint(shards(None, text))
