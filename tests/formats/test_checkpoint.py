# SPDX-License-Identifier: Apache-2.0
"""The interface over all formats: opening by content, lazy reading, conversion, packed tensors, binding, values."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
from test_gguf import build, tensor
from test_gguf_config import TINY, keys_of, pair

from gemma import weights
from gemma._load_tensors import count_nonfinite
from gemma.checkpoint import NonFiniteWarning, load_tensors, open_checkpoint
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, UnsupportedError, WeightsMismatch
from gemma.formats.safetensors import write_safetensors
from gemma.quants import QuantType, quantize

BF16 = ml_dtypes.bfloat16


def gguf_model(path, config, arch="gemma3", kinds=None, change=None):
    """A GGUF of a configuration with random values; returns {canonical name: stored float32}."""
    rng, data, entries, stored = np.random.default_rng(0), b"", [], {}
    arrays = {}
    for t in weights.tensors(config):
        arrays[t.slots["gguf"].name] = stored[t.name] = rng.standard_normal(t.shape).astype(np.float32)
    if change:
        change(arrays)
    for name, array in arrays.items():
        type = (kinds or {}).get(name, QuantType.F32)
        packed = quantize(array, type) if np.isfinite(array).all() else None
        raw = array.tobytes() if packed is None else packed.data.tobytes()
        data += bytes(-len(data) % 32)
        entries.append(tensor(name, array.shape[::-1], type.ggml_id, len(data)))
        data += raw
    pairs = [pair(key, kind, value) for key, (kind, value) in keys_of(config, arch).items()]
    path.write_bytes(build(pairs, entries, data))
    return stored


@pytest.fixture
def config(tmp_path):
    """What the file of TINY says it is."""
    with open_checkpoint(_write(tmp_path / "probe.gguf")) as checkpoint:
        return checkpoint.config()


def _write(path):
    pairs = [pair(key, kind, value) for key, (kind, value) in keys_of(TINY, "gemma3").items()]
    path.write_bytes(build(pairs, [tensor("token_embd.weight", (32, 64), 0, 0)], bytes(64 * 32 * 4)))
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_reading_and_converting(tmp_path, mmap):
    x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    packed = quantize(x, QuantType.Q8_0)
    data = x.tobytes() + packed.data.tobytes() + x.astype(BF16).tobytes()
    entries = [tensor("f", (64, 40), 0, 0), tensor("q", (64, 40), 8, x.nbytes)]
    entries += [tensor("b", (64, 40), 30, x.nbytes + packed.nbytes)]
    (tmp_path / "named.bin").write_bytes(build([], entries, data))
    with open_checkpoint(tmp_path / "named.bin", mmap=mmap) as checkpoint:
        assert checkpoint.format == "gguf"
        info = checkpoint.tensors["q"]
        assert (info.dtype, info.shape, info.nbytes, info.file) == ("Q8_0", (40, 64), packed.nbytes, checkpoint.path)
        np.testing.assert_array_equal(checkpoint.read("f"), x)
        np.testing.assert_array_equal(checkpoint.read("q"), packed.dequantize())
        assert checkpoint.read("b").dtype == BF16
        for name, source in (("f", x), ("q", packed.dequantize()), ("b", x.astype(BF16).astype(np.float32))):
            for dtype in (np.float32, np.float16, BF16):
                got = checkpoint.read(name, dtype)
                assert got.dtype == dtype
                np.testing.assert_array_equal(got.astype(np.float32), source.astype(dtype).astype(np.float32))
            out = np.empty((40, 64), np.float32)
            assert checkpoint.read(name, out=out) is out
            np.testing.assert_array_equal(out, source)
        np.testing.assert_array_equal(checkpoint.raw("q"), packed.data.reshape(-1))
        again = checkpoint.packed("q")
        assert again.type is QuantType.Q8_0 and again.shape == (40, 64)
        np.testing.assert_array_equal(again.dequantize(), packed.dequantize())
        checkpoint.release("q")
        np.testing.assert_array_equal(checkpoint.packed("b").dequantize(), checkpoint.read("b", np.float32))
        with pytest.raises(CheckpointError, match="no tensor 'ff'; did you mean f"):
            checkpoint.read("ff")
        with pytest.raises(UnsupportedError, match="q is Q8_0 and cannot be read as int32"):
            checkpoint.read("q", np.int32)
        with pytest.raises(CheckpointError, match="`out` of shape"):
            checkpoint.read("q", out=np.empty((64, 40), np.float32))


def test_native_types_of_safetensors(tmp_path):
    arrays = {"d": np.arange(6.0).reshape(2, 3), "i": np.arange(4, dtype=np.int8), "s": np.array(2.0, np.float32)}
    write_safetensors(tmp_path / "x", arrays)
    with open_checkpoint(tmp_path / "x") as checkpoint:
        assert checkpoint.read("d", np.float32).dtype == np.float32
        assert checkpoint.read("i").dtype == np.int8 and checkpoint.read("s").shape == ()
        np.testing.assert_array_equal(checkpoint.read("s", np.float16), np.float16(2))
        with pytest.raises(UnsupportedError, match="i is I8"):
            checkpoint.read("i", np.float32)
        for name in ("d", "s"):
            with pytest.raises(UnsupportedError, match="no packed form"):
                checkpoint.packed(name)
        with pytest.raises(CheckpointNotFound, match=r"config\.json"):
            checkpoint.config()
        assert checkpoint.tokenizer_source() is None
        (tmp_path / "tokenizer.json").write_text("{}")
        assert checkpoint.tokenizer_source().kind == "tokenizer.json"
        (tmp_path / "tokenizer.model").write_bytes(b"")
        assert checkpoint.tokenizer_source().path == tmp_path / "tokenizer.model"


def test_dequantizing_needs_little_more_than_the_result(tmp_path):
    """Bytes that numpy and Python allocate at the peak, against the size of the array that is returned."""
    rows, columns = 4096, 512
    data = bytes(rows * QuantType.Q4_K.row_bytes(columns))
    (tmp_path / "x").write_bytes(build([], [tensor("q", (columns, rows), 12, 0)], data))
    with open_checkpoint(tmp_path / "x") as checkpoint:
        for dtype in (np.float32, BF16):
            checkpoint.read("q", dtype)  # imports and caches
            tracemalloc.start()
            size = checkpoint.read("q", dtype).nbytes
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # a chunk of 2**17 values takes under 2 MiB in all its forms; the real model is 100 times this one
            assert peak <= size + 2.5 * 2**20, (dtype, peak, size)


OTHER = {
    b"PK\x03\x04" + bytes(30): (FormatError, "not a readable zip archive"),
    b"SBS\n" + bytes(30): (FormatError, "blobs"),
    b"\x80\x02}q\x00." + bytes(30): (UnsupportedError, "pickle"),
    b"tjgg" + bytes(30): (UnsupportedError, "GGJT"),
    b"": (FormatError, "expected a GGUF, safetensors, PyTorch, .npz or .sbs file"),
    b"hello world, this is text": (FormatError, "expected a GGUF, safetensors, PyTorch, .npz or .sbs file"),
    bytes(100): (FormatError, "expected a GGUF, safetensors, PyTorch, .npz or .sbs file"),
}


@pytest.mark.parametrize("data", OTHER, ids=lambda d: repr(d[:6]))
def test_other_files_are_named(tmp_path, data):
    (tmp_path / "model.ckpt").write_bytes(data)
    error, rule = OTHER[data]
    with pytest.raises(error, match=rule):
        open_checkpoint(tmp_path / "model.ckpt")


def test_folders(tmp_path):
    with pytest.raises(CheckpointNotFound, match="in this folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFound, match="no such file"):
        open_checkpoint(tmp_path / "absent")
    write_safetensors(tmp_path / "one.safetensors", {"x": np.ones(1, np.float32)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["x"] and checkpoint.format == "hf"
    write_safetensors(tmp_path / "two.safetensors", {"y": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"several checkpoints.*one\.safetensors, two\.safetensors"):
        open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"z": np.ones(1, np.float32)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["z"]


# --- canonical tensors


def test_canonical_tensors(tmp_path, config):
    mixed = {"token_embd.weight": QuantType.Q8_0, "blk.1.ffn_up.weight": QuantType.Q4_0}
    stored = gguf_model(tmp_path / "m.gguf", config, kinds=mixed)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        seen = {}
        for t, read in load_tensors(checkpoint):
            array = seen[t.name] = read()
            assert array.shape == t.shape and array.dtype == np.float32
            if t.name.startswith("final_norm") or ".norm." in t.name or t.name.endswith("_norm"):
                np.testing.assert_array_equal(array, stored[t.name] - np.float32(1))
                np.testing.assert_array_equal(read(BF16), (stored[t.name] - np.float32(1)).astype(BF16))
            elif read.dtype == "F32":
                np.testing.assert_array_equal(array, stored[t.name])
                assert np.shares_memory(array, checkpoint.raw(read.slot.name)), "a view where nothing changes"
            else:
                np.testing.assert_array_equal(array, read.packed().dequantize())
        assert list(seen) == [t.name for t in weights.tensors(config)]


def test_binding_happens_at_the_call(tmp_path, config):
    def change(arrays):
        arrays["blk.0.extra.weight"] = np.ones((2, 32), np.float32)
        arrays["blk.3.ffn_up.weight"] = arrays["blk.3.ffn_up.weight"][:-1].copy()
        del arrays["blk.5.attn_norm.weight"], arrays["output_norm.weight"]

    gguf_model(tmp_path / "m.gguf", config, change=change)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint, pytest.raises(WeightsMismatch) as caught:
        load_tensors(checkpoint)
    error = caught.value
    assert len(error.missing) == 2 and len(error.unexpected) == 1 and len(error.misshaped) == 1, error


def test_more_layers_than_tensors(tmp_path, config):
    gguf_model(tmp_path / "m.gguf", config)
    many = dataclasses.replace(config, num_hidden_layers=4096)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint, pytest.raises(WeightsMismatch, match="of 4096 layers"):
        load_tensors(checkpoint, many)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers(tmp_path, config, value):
    def change(arrays):
        arrays["blk.2.ffn_up.weight"][:2, 5] = value
        arrays["blk.4.ffn_up.weight"][0, 0] = value

    gguf_model(tmp_path / "m.gguf", config, change=change)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _, read in load_tensors(checkpoint):
                read()
        assert [w.category for w in caught] == [NonFiniteWarning]
        assert "blk.2.ffn_up.weight holds 2 NaN or infinite values of 2048" in str(caught[0].message)
        with pytest.raises(CheckpointError, match="holds 2 NaN or infinite"):
            for _, read in load_tensors(checkpoint, strict_values=True):
                read()


def test_float16_that_overflows_is_reported(tmp_path, config):
    def change(arrays):
        arrays["blk.2.ffn_up.weight"][0, 0] = 1e6

    gguf_model(tmp_path / "m.gguf", config, change=change)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        readers = {t.name: read for t, read in load_tensors(checkpoint)}
        assert np.isfinite(readers["layers.2.mlp.up"](BF16).astype(np.float32)).all()
        with pytest.warns(NonFiniteWarning, match=r"holds 1 .*as float16"):
            readers["layers.2.mlp.up"](np.float16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
def test_counting_values(dtype):
    x = np.zeros((700, 900), dtype)
    assert count_nonfinite(x) == 0
    x[0, 0], x[699, 899], x[300, 1], x[300, 2] = np.nan, np.inf, -np.inf, 1e30 if dtype != np.float16 else 6e4
    assert count_nonfinite(x) == 3 and count_nonfinite(x.T) == 3 and count_nonfinite(x[:1, :1]) == 1


def test_counting_large_values_whose_sum_overflows():
    assert count_nonfinite(np.full(1000, 3e38, np.float32)) == 0
    assert count_nonfinite(np.arange(5)) == 0


def hf_model(folder, config, head):
    arrays = {t.slots["hf"].name: np.random.default_rng(1).standard_normal(t.shape).astype(np.float32)
              for t in weights.tensors(config)}  # fmt: skip
    embedding = next(t.slots["hf"].name for t in weights.tensors(config) if t.name == "embed")
    if head is not None:
        arrays["lm_head.weight"] = head(arrays[embedding])
    write_safetensors(folder / "model.safetensors", arrays)
    return folder


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path, config):
    for head in (None, lambda e: e.copy(), lambda e: e.astype(np.float64)):
        with open_checkpoint(hf_model(tmp_path, config, head)) as checkpoint:
            assert {t.name: read() for t, read in load_tensors(checkpoint, config)}["embed"].shape == (64, 32)
    for head in (lambda e: e + 1, lambda e: (e + 1).astype(BF16)):
        with open_checkpoint(hf_model(tmp_path, config, head)) as checkpoint:
            readers = {t.name: read for t, read in load_tensors(checkpoint, config)}
            with pytest.raises(WeightsMismatch, match=r"lm_head\.weight differs") as caught:
                readers["embed"]()
            assert caught.value.unexpected == ("lm_head.weight",)


def test_opening_imports_no_framework():
    code = "import sys, gemma.checkpoint, gemma.quants; assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
