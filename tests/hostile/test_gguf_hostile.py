# SPDX-License-Identifier: Apache-2.0
"""Hostile GGUF files: truncated, lying, overlapping, mistyped. Each ends in one error, early and cheaply.

A fault patches one field of a valid file; the error must name the file and, where bytes are broken, point at a byte
of the header near the fault. The valid files themselves are read first, so that a refusal means the fault was seen.
"""

from __future__ import annotations

import os
import struct

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
from gemma.tokenizer import Tokenizer

HUGE = [2**63, 2**64 - 1, 2**63 - 1, 2**32, 2**40]


@pytest.fixture(scope="module")
def tiny() -> h.Blob:
    return h.tiny_gguf()


@pytest.fixture(scope="module")
def small() -> h.Blob:
    return h.small_gguf()


@pytest.fixture
def put(tmp_path):
    def write(data, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(bytes(data.data if isinstance(data, h.Blob) else data))
        return path

    return write


# --- the valid files


def test_the_valid_file_reads_to_the_end(put, tiny):
    path = put(tiny)
    with bounded():
        drive(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gguf"
        assert len(checkpoint.tensors) == len(h.gguf_tensors(8))
        for spec in h.gguf_tensors(len(h.vocabulary()[0])):
            info = checkpoint.tensors[spec.name]
            assert info.shape == tuple(reversed(spec.dims)) and info.dtype == spec.type
            assert info.nbytes == len(spec.data) and bytes(checkpoint.raw(spec.name)) == spec.data
        config = checkpoint.config()
        s = h.SIZES
        assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, s["width"], s["mlp"])
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, s["head_dim"])
        assert config.sliding_window == s["window"] and config.rope_theta == 1e6
        assert config.use_qk_norm and config.use_post_norms


def test_norms_lose_the_one_that_the_file_adds(put, tiny):
    path = put(tiny)
    with open_checkpoint(path) as checkpoint:
        stored = checkpoint.read("output_norm.weight")
        loaded = {t.name: read() for t, read in load_tensors(checkpoint)}
        assert np.array_equal(np.asarray(loaded["final_norm"], np.float32), stored - np.float32(1))
        stored = checkpoint.read("blk.1.attn_q_norm.weight")
        assert np.array_equal(np.asarray(loaded["layers.1.attn.q_norm"], np.float32), stored - np.float32(1))


def test_small_file_opens_and_lists_its_metadata(put, small):
    with open_checkpoint(put(small)) as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "b.weight", "c.weight"}
        assert list(checkpoint.metadata["x.list"]) == [1.0, 2.0, 3.0]
        assert list(checkpoint.metadata["x.names"]) == ["a", "bc", ""]
        assert checkpoint.metadata["x.small"] == -1 and checkpoint.metadata["x.double"] == 0.5
        assert checkpoint.tokenizer_source() is None


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_other_alignments_are_read(put, alignment):
    keys = h.replaced(h.gguf_keys(), "general.alignment", h.U32, alignment)
    specs = h.gguf_tensors(40)
    with open_checkpoint(put(h.gguf_bytes(keys, specs, alignment=alignment))) as checkpoint:
        for spec in specs:
            assert bytes(checkpoint.raw(spec.name)) == spec.data


# --- A1: truncation


def test_truncated_at_every_byte(put, small):
    """Every length from 0 to the last byte of the last tensor, in falling order so that the file is written once."""
    path = put(small)
    last = small.ends[-1]
    for length in range(last - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(GemmaError) as caught:
            open_checkpoint(path)
        error = caught.value
        assert isinstance(error, FormatError), (length, error)
        assert path.name in str(error)
        if length >= 8:
            assert error.offset is not None and 0 <= error.offset <= last, (length, error)


def test_truncated_vocabulary_header(put, tiny):
    path = put(tiny)
    lengths = sorted({*range(24, tiny.data_start, 61), *(at for at, _ in list(tiny.marks.values())[::9])}, reverse=True)
    for length in lengths:
        os.truncate(path, length)
        with pytest.raises(FormatError):
            open_checkpoint(path)


def test_truncated_at_every_tensor_boundary(put, tiny):
    path = put(tiny)
    cuts = {tiny.data_start, *tiny.ends[:-1]} | {end - 1 for end in tiny.ends} | {end + 1 for end in tiny.ends[:-1]}
    for length in sorted(cuts, reverse=True):
        os.truncate(path, length)
        refused(path, FormatError)


def test_size_changes_after_opening_do_not_crash_the_reader(put, tiny):
    """A file that shrinks between the listing and the reading: an error, not a bus error."""
    path = put(tiny)
    with open_checkpoint(path, mmap=False) as checkpoint:
        os.truncate(path, tiny.data_start + 8)
        with pytest.raises(GemmaError):
            checkpoint.read("output_norm.weight")


# --- not a regular GGUF at all


@pytest.mark.parametrize(
    "data",
    [b"", b"G", b"GGU", b"GGUF", b"FUGG" + bytes(60), b"GGML" + bytes(60), b"GGJT" + bytes(60), bytes(64),
     b"\x7fELF" + bytes(60), b"PK\x03\x04" + bytes(60), b"<!DOCTYPE html><html></html>", b"version https://git-lfs\n"],
    ids=["empty", "1", "3", "4", "reversed", "ggml", "ggjt", "zeros", "elf", "zip", "html", "lfs"],
)  # fmt: skip
def test_wrong_magic(put, data):
    refused(put(data), CheckpointError)


@pytest.mark.parametrize("version", [0, 1, 4, 99, 2**31, 3 << 24], ids=["0", "1", "4", "99", "2^31", "big-endian"])
def test_other_versions(put, small, version):
    refused(put(small.patch("version", version)), (FormatError, UnsupportedError), match="version|endian")


def test_big_endian_file(put):
    head = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    refused(put(head + bytes(64)), (FormatError, UnsupportedError), match="endian")


def test_nothing_there(tmp_path):
    error = refused(tmp_path / "absent.gguf", CheckpointNotFound)
    assert isinstance(error, FileNotFoundError)


def test_empty_folder(tmp_path):
    refused(tmp_path, CheckpointNotFound)


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    refused(tmp_path / "model.gguf", CheckpointError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf", CheckpointError)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_a_device_is_not_read():
    refused("/dev/zero", CheckpointError)


def test_a_dangling_link(tmp_path):
    (tmp_path / "model.gguf").symlink_to(tmp_path / "gone.gguf")
    refused(tmp_path / "model.gguf", CheckpointNotFound)


# --- A2: counts and lengths that lie

COUNTS = ["n_tensors", "n_kv", "general.architecture.key.len", "general.architecture.len", "x.list.count"]
COUNTS += ["x.names.count", "x.names[1].len", "x.double.key.len", "a.weight.name.len", "c.weight.name.len"]


@pytest.mark.parametrize("value", HUGE, ids=["2^63", "2^64-1", "2^63-1", "2^32", "2^40"])
@pytest.mark.parametrize("mark", COUNTS)
def test_counts_that_lie(put, small, mark, value):
    error = refused(put(small.patch(mark, value)), FormatError)
    assert error.offset is not None and error.offset <= small.header_end


@pytest.mark.parametrize("mark", COUNTS)
def test_counts_one_too_many(put, small, mark):
    at, width = small.marks[mark]
    value = int.from_bytes(small.data[at : at + width], "little") + 1
    assert survives(put(small.patch(mark, value)), open_checkpoint) is not None


def test_a_count_that_the_file_could_hold_byte_for_byte(put):
    """n_kv and n_tensors are compared with the smallest entry's size, not with one byte each."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 2**20, 2**20)
    refused(put(head + bytes(2**20)), FormatError)


def test_a_large_array_of_bytes_costs_no_python_objects(tmp_path):
    """30 million bytes of array in a sparse file: whatever the verdict, no list of 30 million integers."""
    count = 30_000_000
    keys = [("general.architecture", h.STR, "gemma3"), ("x.bytes", h.ARR, (h.U8, []))]
    blob = h.gguf_bytes(keys, []).patch("x.bytes.count", count)
    path = tmp_path / "sparse.gguf"
    path.write_bytes(bytes(blob.data[: blob.marks["x.bytes.items"][0]]))
    os.truncate(path, blob.marks["x.bytes.items"][0] + count + 64)
    with bounded():
        survives(path, open_checkpoint)


def test_a_large_array_of_empty_strings(tmp_path):
    """16 MB of zeros are 2 million empty strings."""
    count = 2_000_000
    keys = [("general.architecture", h.STR, "gemma3"), ("x.names", h.ARR, (h.STR, []))]
    blob = h.gguf_bytes(keys, []).patch("x.names.count", count)
    path = tmp_path / "sparse.gguf"
    start = blob.at("x.names.count") + 8
    path.write_bytes(bytes(blob.data[:start]))
    os.truncate(path, start + 8 * count + 64)
    with bounded():
        survives(path, open_checkpoint)


@pytest.mark.parametrize("depth", [2, 10, 100_000])
def test_nested_arrays(put, depth):
    """An array in an array is legal, though no Gemma file has one; a deep one must not exhaust the stack."""
    keys = [("general.architecture", h.STR, "gemma3"), ("x.deep", h.ARR, (h.U8, []))]
    blob = h.gguf_bytes(keys, [])
    start = blob.at("x.deep.inner")
    nest = struct.pack("<IQ", h.ARR, 1) * (depth - 1) + struct.pack("<IQ", h.U8, 1) + b"\0" * 64
    path = put(bytes(blob.data[:start]) + nest)
    if depth < 100:
        survives(path, open_checkpoint)
    else:
        refused(path, (FormatError, UnsupportedError))


def test_a_wide_array_of_empty_arrays(put):
    keys = [("general.architecture", h.STR, "gemma3"), ("x.wide", h.ARR, (h.U8, []))]
    blob = h.gguf_bytes(keys, [])
    start = blob.at("x.wide.inner")
    body = struct.pack("<IQ", h.ARR, 100_000) + struct.pack("<IQ", h.U8, 0) * 100_000 + b"\0" * 64
    with bounded():
        survives(put(bytes(blob.data[:start]) + body), open_checkpoint)


@pytest.mark.parametrize("kind", [13, 14, 255, 256, 2**31, 2**32 - 1])
@pytest.mark.parametrize("mark", ["x.flag.type", "x.list.inner"])
def test_unknown_metadata_types(put, small, mark, kind):
    error = refused(put(small.patch(mark, kind)), FormatError)
    assert error.offset is not None


def test_key_that_is_not_utf8(put, small):
    at, _ = small.marks["x.flag.key.bytes"]
    data = bytearray(small.data)
    data[at : at + 2] = b"\xff\xfe"
    assert survives(put(data), open_checkpoint) is not None


# --- A3 and A4: shapes and types


@pytest.mark.parametrize("value", HUGE[:3], ids=["2^63", "2^64-1", "2^63-1"])
@pytest.mark.parametrize("mark", ["a.weight.dim0", "a.weight.dim1", "b.weight.dim0", "c.weight.dim1"])
def test_dimensions_that_lie(put, small, mark, value):
    refused(put(small.patch(mark, value)), FormatError, match="weight")


WRAPS = [(32, 2**59 + 2), (2**32, 2**32), (2**33, 2**31), (2**63, 2), (2**62, 4), (2**31, 2**33 + 2)]


@pytest.mark.parametrize("dims", WRAPS, ids=str)
@pytest.mark.parametrize("name", ["a.weight", "c.weight"])
def test_products_that_wrap(put, small, dims, name):
    """In 64-bit arithmetic these products are tiny; the first is exactly the size the file holds."""
    refused(put(small.patch(f"{name}.dim0", dims[0]).patch(f"{name}.dim1", dims[1])), FormatError, match="weight")


def test_a_product_that_wraps_in_bytes_but_not_in_elements(put, small):
    """2^62 + 8 float32 elements are 32 bytes modulo 2^64."""
    refused(put(small.patch("b.weight.dim0", 2**62 + 8)), FormatError)


@pytest.mark.parametrize("count", [5, 6, 255, 2**31, 2**32 - 1])
def test_too_many_dimensions(put, small, count):
    error = refused(put(small.patch("a.weight.n_dims", count)), FormatError)
    assert error.offset is not None


def test_five_honest_dimensions(put):
    spec = h.TensorSpec("deep.weight", (4, 1, 1, 1, 1), "F32", bytes(16))
    refused(put(h.gguf_bytes(h.gguf_keys(), [spec])), FormatError, match="dim")


@pytest.mark.parametrize("mark", ["a.weight.dim0", "a.weight.dim1", "b.weight.dim0"])
def test_zero_dimension(put, small, mark):
    refused(put(small.patch(mark, 0)), FormatError, match="weight")


@pytest.mark.parametrize("kind", [256, 2**32 - 1, 2**31, 1000, 4, 5])
def test_unknown_tensor_types(put, small, kind):
    refused(put(small.patch("a.weight.ggml", kind)), (FormatError, UnsupportedError), match="type")


@pytest.mark.parametrize("name", h.IQ_TYPES)
def test_iq_types_are_refused_by_name(put, small, name):
    error = refused(put(small.patch("a.weight.ggml", h.IQ_TYPES[name])), UnsupportedError, match=name)
    assert isinstance(error, NotImplementedError) and "a.weight" in str(error)


def test_every_type_id_ends_well(put, small):
    for kind in range(64):
        survives(put(small.patch("c.weight.ggml", kind)), open_checkpoint)


@pytest.mark.parametrize(("kind", "columns"), [("Q8_0", 33), ("Q8_0", 31), ("Q4_0", 16), ("Q4_K", 128), ("Q6_K", 300)])
def test_rows_that_are_no_multiple_of_the_block(put, kind, columns):
    spec = h.TensorSpec("odd.weight", (columns, 256), kind, bytes(256 * columns * 4))
    refused(put(h.gguf_bytes(h.gguf_keys(), [spec])), FormatError, match="odd.weight")


# --- A5: alignment and duplicates


@pytest.mark.parametrize("value", [0, 13, 3, 2**31, 2**32 - 1])
def test_bad_alignment_values(put, value):
    keys = h.replaced(h.gguf_keys(), "general.alignment", h.U32, value)
    refused(put(h.gguf_bytes(keys, h.gguf_tensors(40))), FormatError, match="alignment")


@pytest.mark.parametrize(
    ("kind", "value"), [(h.I32, 32), (h.U64, 32), (h.F32, 32.0), (h.STR, "32"), (h.ARR, (h.U32, [32])), (h.BOOL, 1)]
)
def test_bad_alignment_types(put, kind, value):
    keys = h.replaced(h.gguf_keys(), "general.alignment", kind, value)
    refused(put(h.gguf_bytes(keys, h.gguf_tensors(40))), FormatError, match="alignment")


@pytest.mark.parametrize("name", ["general.alignment", "general.architecture", "gemma3.block_count"])
def test_duplicate_keys(put, name):
    keys = h.gguf_keys()
    keys.append(next(entry for entry in keys if entry[0] == name))
    error = refused(put(h.gguf_bytes(keys, h.gguf_tensors(40))), FormatError, match="twice|duplicate|again|second")
    assert name in str(error)


def test_duplicate_tensor_names(put):
    specs = h.gguf_tensors(40)
    specs.append(specs[3])
    error = refused(put(h.gguf_bytes(h.gguf_keys(), specs)), FormatError, match="twice|duplicate|again|second")
    assert specs[3].name in str(error)


# --- A6: offsets


@pytest.mark.parametrize(
    "value", [2**63, 2**64 - 1, 2**64 - 32, 2**64 - 64, 2**40, 2**20, 1, 31, 33],
    ids=["2^63", "2^64-1", "2^64-32", "2^64-64", "2^40", "2^20", "1", "31", "33"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.weight"])
def test_offsets_that_lie(put, small, name, value):
    error = refused(put(small.patch(f"{name}.offset", value)), FormatError, match=name)
    assert error.offset is not None


@pytest.mark.parametrize(
    ("name", "like"), [("b.weight", "a.weight"), ("c.weight", "a.weight"), ("c.weight", "b.weight")]
)
def test_overlapping_tensors(put, small, name, like):
    at, width = small.marks[f"{like}.offset"]
    value = int.from_bytes(small.data[at : at + width], "little")
    refused(put(small.patch(f"{name}.offset", value)), FormatError, match="overlap")


def test_partly_overlapping_tensors(put, small):
    """a.weight is 68 bytes from 0; an aligned 64 lies inside it."""
    refused(put(small.patch("b.weight.offset", 64)), FormatError, match="overlap")


def test_a_tensor_that_ends_one_byte_after_the_file(put):
    spec = h.TensorSpec("a.weight", (32,), "F32", bytes(128))
    blob = h.gguf_bytes(h.gguf_keys(), [spec])
    refused(put(bytes(blob.data[:-1])), FormatError, match=r"a\.weight")


# --- A7: metadata of the wrong type, and vocabularies that lie


def broken_vocabulary(change):
    pieces, scores, types = h.vocabulary()
    keys = h.gguf_keys(pieces, scores, types)
    return h.gguf_bytes(change(keys, list(pieces), list(scores), list(types)), h.gguf_tensors(len(pieces)))


T = "tokenizer.ggml."
VOCABULARY_FAULTS = {
    "scores are bytes": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.U8, [0] * len(p))),
    "scores are integers": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.I32, [0] * len(p))),
    "scores are doubles": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F64, s)),
    "scores are strings": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.STR, p)),
    "scores are one number": lambda k, p, s, t: h.replaced(k, T + "scores", h.F32, 0.0),
    "scores too short": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F32, s[:-1])),
    "scores too long": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F32, [*s, 0.0])),
    "scores empty": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F32, [])),
    "scores missing": lambda k, p, s, t: h.replaced(k, T + "scores"),
    "scores are NaN": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F32, [*s[:-1], float("nan")])),
    "scores are infinite": lambda k, p, s, t: h.replaced(k, T + "scores", h.ARR, (h.F32, [*s[:-1], float("inf")])),
    "types are floats": lambda k, p, s, t: h.replaced(k, T + "token_type", h.ARR, (h.F32, [1.0] * len(p))),
    "types are bytes": lambda k, p, s, t: h.replaced(k, T + "token_type", h.ARR, (h.U8, t)),
    "types too short": lambda k, p, s, t: h.replaced(k, T + "token_type", h.ARR, (h.I32, t[:5])),
    "types missing": lambda k, p, s, t: h.replaced(k, T + "token_type"),
    "a type is 99": lambda k, p, s, t: h.replaced(k, T + "token_type", h.ARR, (h.I32, [*t[:-1], 99])),
    "a type is -1": lambda k, p, s, t: h.replaced(k, T + "token_type", h.ARR, (h.I32, [*t[:-1], -1])),
    "tokens are integers": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.U32, list(range(len(p))))),
    "tokens are a string": lambda k, p, s, t: h.replaced(k, T + "tokens", h.STR, "abc"),
    "tokens empty": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.STR, [])),
    "a token is not UTF-8": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.STR, [*p[:-1], b"\xff\xfe"])),
    "a token is empty": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.STR, [*p[:-1], ""])),
    "a token twice": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.STR, [*p[:-1], p[-2]])),
    "a control token twice": lambda k, p, s, t: h.replaced(k, T + "tokens", h.ARR, (h.STR, [*p[:-1], "<bos>"])),
    "a byte token <0x-1>": lambda k, p, s, t: h.replaced(
        k, T + "tokens", h.ARR, (h.STR, [x if x != "<0x41>" else "<0x-1>" for x in p])
    ),
    "a byte token <0x100>": lambda k, p, s, t: h.replaced(
        k, T + "tokens", h.ARR, (h.STR, [x if x != "<0x41>" else "<0x100>" for x in p])
    ),
    "a byte token <0xZZ>": lambda k, p, s, t: h.replaced(
        k, T + "tokens", h.ARR, (h.STR, [x if x != "<0x41>" else "<0xZZ>" for x in p])
    ),
    "a byte missing": lambda k, p, s, t: h.replaced(
        k, T + "token_type", h.ARR, (h.I32, [y if x != "<0x41>" else h.NORMAL for x, y in zip(p, t)])
    ),
    "bos beyond the vocabulary": lambda k, p, s, t: h.replaced(k, T + "bos_token_id", h.U32, len(p)),
    "bos is 2^32-1": lambda k, p, s, t: h.replaced(k, T + "bos_token_id", h.U32, 2**32 - 1),
    "eos is negative": lambda k, p, s, t: h.replaced(k, T + "eos_token_id", h.I32, -1),
    "eos is a string": lambda k, p, s, t: h.replaced(k, T + "eos_token_id", h.STR, "<eos>"),
    "eos is an array": lambda k, p, s, t: h.replaced(k, T + "eos_token_id", h.ARR, (h.U32, [1])),
    "padding is a float": lambda k, p, s, t: h.replaced(k, T + "padding_token_id", h.F32, 0.0),
    "another tokenizer": lambda k, p, s, t: h.replaced(k, T + "model", h.STR, "gpt2"),
    "tokenizer model is a number": lambda k, p, s, t: h.replaced(k, T + "model", h.U32, 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", VOCABULARY_FAULTS)
def test_vocabularies_that_lie(put, fault):
    def use(path):
        with open_checkpoint(path) as checkpoint:
            return Tokenizer.from_source(checkpoint.tokenizer_source())

    refused(put(broken_vocabulary(VOCABULARY_FAULTS[fault])), GemmaError, act=use)
    refused(put(broken_vocabulary(VOCABULARY_FAULTS[fault])), GemmaError, act=Tokenizer.from_file)


def test_vocabulary_and_embedding_disagree(put):
    pieces, scores, types = h.vocabulary()
    keys = h.gguf_keys(pieces, scores, types)
    path = put(h.gguf_bytes(keys, h.gguf_tensors(len(pieces) - 1)))
    error = refused(path, WeightsMismatch, act=drive)
    assert any("embd" in line or "embed" in line for line in error.misshaped), error


A = "gemma3."
CONFIG_FAULTS = {
    "10^9 layers": (A + "block_count", h.U32, 10**9),
    "no layers": (A + "block_count", h.U32, 0),
    "layers are a float": (A + "block_count", h.F32, 2.0),
    "layers are a string": (A + "block_count", h.STR, "2"),
    "layers are missing": (A + "block_count", None, None),
    "negative layers": (A + "block_count", h.I32, -2),
    "no heads": (A + "attention.head_count", h.U32, 0),
    "negative heads": (A + "attention.head_count", h.I32, -2),
    "2^32-1 heads": (A + "attention.head_count", h.U32, 2**32 - 1),
    "heads no multiple of kv heads": (A + "attention.head_count_kv", h.U32, 3),
    "no kv heads": (A + "attention.head_count_kv", h.U32, 0),
    "no width": (A + "embedding_length", h.U32, 0),
    "huge width": (A + "embedding_length", h.U64, 2**63),
    "no MLP": (A + "feed_forward_length", h.U32, 0),
    "no head size": (A + "attention.key_length", h.U32, 0),
    "odd head size": (A + "attention.key_length", h.U32, 15),
    "key and value sizes differ": (A + "attention.value_length", h.U32, 8),
    "NaN epsilon": (A + "attention.layer_norm_rms_epsilon", h.F32, float("nan")),
    "negative epsilon": (A + "attention.layer_norm_rms_epsilon", h.F32, -1e-6),
    "NaN RoPE base": (A + "rope.freq_base", h.F32, float("nan")),
    "infinite RoPE base": (A + "rope.freq_base", h.F32, float("inf")),
    "zero RoPE base": (A + "rope.freq_base", h.F32, 0.0),
    "RoPE base is a string": (A + "rope.freq_base", h.STR, "1e6"),
    "no window": (A + "attention.sliding_window", h.U32, 0),
    "no context": (A + "context_length", h.U32, 0),
    "another architecture": ("general.architecture", h.STR, "llama"),
    "architecture is a number": ("general.architecture", h.U32, 3),
    "architecture is missing": ("general.architecture", None, None),
    "architecture is empty": ("general.architecture", h.STR, ""),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_configurations_that_lie(put, fault):
    def use(path):
        with open_checkpoint(path) as checkpoint:
            checkpoint.config()

    keys = h.replaced(h.gguf_keys(), *CONFIG_FAULTS[fault])
    error = refused(put(h.gguf_bytes(keys, h.gguf_tensors(40))), GemmaError, act=use)
    assert not isinstance(error, WeightsMismatch)


@pytest.mark.parametrize("layers", [200, 4096])
def test_more_layers_than_the_file_holds(put, layers):
    """In range, and still a lie: 4,096 layers would be 53,000 missing names. The work and the message stay small."""
    keys = h.replaced(h.gguf_keys(), A + "block_count", h.U32, layers)
    error = refused(put(h.gguf_bytes(keys, h.gguf_tensors(40))), GemmaError, act=drive, longest=200_000)
    assert isinstance(error, (WeightsMismatch, FormatError, ConfigError))


def test_tensors_that_do_not_belong(put):
    specs = [t for t in h.gguf_tensors(40) if t.name != "blk.1.ffn_up.weight"]
    specs.append(h.TensorSpec("blk.9.attn_q.weight", (32, 32), "F32", bytes(4096)))
    specs[0] = h.TensorSpec(specs[0].name, (64, 40), "Q8_0", h.pack_random(np.random.default_rng(0), "Q8_0", (64, 40)))
    error = refused(put(h.gguf_bytes(h.gguf_keys(), specs)), WeightsMismatch, act=drive)
    assert any("ffn_up" in n or "mlp.up" in n for n in error.missing)
    assert any("blk.9.attn_q.weight" in n for n in error.unexpected)
    assert any("embd" in n or "embed" in n for n in error.misshaped)
