# SPDX-License-Identifier: Apache-2.0
"""`.npz` archives: what numpy writes is read as numpy reads it; big_vision's names and axes; what we write, numpy loads.

`foreign_layouts.big_vision` makes the layout a second time, from its description. Hostile archives are
tests/hostile/test_archives_hostile.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
import zipfile

import foreign_layouts as layouts
import ml_dtypes
import numpy as np
import pytest

from gemma import weights
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.config import PaliGemmaConfig, SiglipVisionConfig
from gemma.errors import CheckpointError, FormatError, UnsupportedError, WeightsMismatch
from gemma.hf_config import write_config
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors, tiny_config

BF16 = np.dtype(ml_dtypes.bfloat16)
TOWER = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)


def paligemma(family: str, **changes) -> PaliGemmaConfig:
    text = tiny_config(family, num_hidden_layers=2, **changes)
    text = dataclasses.replace(text, layer_pattern="G", sliding_window=None)
    return PaliGemmaConfig(TOWER, text, 310, text.vocab_size, projection_dim=72, hidden_size=72)


CONFIGS = {"PaliGemma 1": paligemma("gemma"), "PaliGemma 2": paligemma("gemma2")}


def hf_state(config):
    return weights.pack(random_tensors(config), config, format="hf")


def arrays_of(config) -> dict[str, np.ndarray]:
    text = config.text_config
    return layouts.big_vision(hf_state(config), text.num_attention_heads, text.num_key_value_heads, 4)


def check_like_numpy(path, mmap=True):
    with np.load(path) as oracle, open_checkpoint(path, mmap=mmap) as opened:
        assert opened.format == "npz" and set(opened.tensors) == set(oracle.files)
        for name in oracle.files:
            expected, found = oracle[name], opened.read(name)
            if expected.dtype == np.dtype("V2"):
                expected = expected.view(BF16)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            assert found.tobytes() == expected.tobytes(), name
            assert opened.info(name).nbytes == expected.nbytes


rng = np.random.default_rng(0)
FILES = {
    "floats": dict(a=rng.standard_normal((3, 4)).astype("f4"), b=rng.standard_normal(7).astype("f2")),
    "bfloat16": dict(a=rng.standard_normal((3, 4)).astype(BF16), b=np.array([np.nan, np.inf, -0.0]).astype(BF16)),
    "integers": {f"i{n}": np.arange(5, dtype=f"i{n}") for n in (1, 2, 4, 8)} | {"u": np.arange(5, dtype="u1")},
    "others": dict(d=np.arange(3.0), on=np.array([True, False]), scalar=np.array(2.5, "f4")),
    "names with slashes": {"params/llm/layers/mlp/linear": np.ones((2, 3), "f4"), "params/img/b": np.ones(3, "f4")},
    "not contiguous": dict(a=np.arange(24, dtype="f4").reshape(2, 3, 4)[:, ::2, 1:]),
    "a column in Fortran order": dict(a=np.asfortranarray(np.arange(5, dtype="f4"))),
    "many": {f"layer_{n}": np.full((2, 2), n, "f4") for n in range(500)},
}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "copy"])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
@pytest.mark.parametrize("name", FILES)
def test_reads_what_numpy_writes(name, write, mmap, tmp_path):
    write(tmp_path / "file.npz", **FILES[name])
    check_like_numpy(tmp_path / "file.npz", mmap)


def test_the_other_header_versions(tmp_path):
    """Version 2 has a longer length field, version 3 is UTF-8; numpy pads and orders headers alike."""
    array = np.arange(6, dtype="f4").reshape(2, 3)
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        for version in ((1, 0), (2, 0), (3, 0)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=version)
            archive.writestr(f"v{version[0]}.npy", buffer.getvalue())
    check_like_numpy(tmp_path / "file.npz")


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.target}",)


def test_python_objects_are_refused_and_never_unpickled(tmp_path):
    harmful = np.array([Bomb(tmp_path / "ran"), None], dtype=object)
    np.savez(tmp_path / "file.npz", fine=np.ones(3, "f4"), objects=harmful)
    with pytest.raises(UnsupportedError, match=r"file\.npz: objects holds object"):
        open_checkpoint(tmp_path / "file.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.asfortranarray(np.ones((3, 4), "f4")), "order='C'"),
        (np.ones(3, ">f4"), ">f4"),
        (np.ones(3, "c16"), "complex128"),
        (np.array(["a", "bc"]), "<U2"),
        (np.ones(3, [("x", "f4"), ("y", "i4")]), "header"),
        (np.array(["2020-01-01"], "M8[D]"), "header"),
        (np.zeros((0, 3), "f4"), "no values"),
    ],
    ids=["fortran", "big-endian", "complex", "text", "record", "date", "empty"],
)
def test_what_is_not_read_is_named(array, text, tmp_path):
    np.savez(tmp_path / "file.npz", fine=np.ones(3, "f4"), odd=array)
    with pytest.raises(CheckpointError, match=r"file\.npz.*odd") as caught:
        open_checkpoint(tmp_path / "file.npz")
    assert text in str(caught.value)


def test_an_archive_without_arrays(tmp_path):
    np.savez(tmp_path / "none.npz")
    with pytest.raises(CheckpointError, match=r"none\.npz"):
        open_checkpoint(tmp_path / "none.npz")
    with zipfile.ZipFile(tmp_path / "mixed.npz", "w") as archive:
        archive.writestr("a.npy", b"")
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match=r"mixed\.npz"):
        open_checkpoint(tmp_path / "mixed.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_a_flipped_bit_is_found_as_numpy_finds_it(write, tmp_path):
    arrays = dict(a=rng.standard_normal(1000).astype("f4"), b=rng.standard_normal(1000).astype("f4"))
    write(tmp_path / "file.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "file.npz") as archive:
        at = archive.getinfo("b.npy").header_offset
    data = bytearray((tmp_path / "file.npz").read_bytes())
    data[at + 1500] ^= 16
    (tmp_path / "file.npz").write_bytes(data)
    with pytest.raises(Exception), np.load(tmp_path / "file.npz") as oracle:  # noqa: B017 (BadZipFile or zlib.error)
        oracle["b"]
    with open_checkpoint(tmp_path / "file.npz") as opened:
        assert np.array_equal(opened.read("a"), arrays["a"])
        with pytest.raises(FormatError, match=r"file\.npz"):
            opened.read("b")


def test_opening_costs_headers_only(tmp_path):
    """Compressed arrays too: 32 MB each, of which opening needs some hundred bytes."""
    np.savez_compressed(tmp_path / "file.npz", a=np.zeros(8_000_000, "f4"), b=np.ones(3, "f4"))
    np.savez(tmp_path / "plain.npz", a=np.zeros(8_000_000, "f4"), b=np.ones(3, "f4"))
    for name in ("file.npz", "plain.npz"):
        tracemalloc.start()
        try:
            with open_checkpoint(tmp_path / name, mmap=False) as opened:
                assert opened.read("b").sum() == 3.0
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()


def test_a_compressed_array_leaves_memory_when_released(tmp_path):
    np.savez_compressed(tmp_path / "file.npz", **{f"a{n}": np.full(1_000_000, n, "f4") for n in range(6)})
    with open_checkpoint(tmp_path / "file.npz") as opened:
        tracemalloc.start()
        try:
            for name in opened.tensors:
                assert opened.read(name, np.float32)[0] == float(name[1:])
                opened.release(name)
            assert tracemalloc.get_traced_memory()[1] < 13_000_000  # one array inflated and one copy, not six
        finally:
            tracemalloc.stop()


# ---- big_vision's layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_layout_of_big_vision(family, prefix, tmp_path):
    config = CONFIGS[family]
    arrays = {name.replace("params/", prefix, 1): value.astype(BF16) for name, value in arrays_of(config).items()}
    np.savez(tmp_path / "model.npz", **arrays)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    expected = {n: a.astype(BF16).astype(np.float32) for n, a in random_tensors(config).items()}
    with open_checkpoint(tmp_path / "model.npz") as opened:
        assert opened.config() == config
        found = {tensor.name: reader(np.float32) for tensor, reader in load_tensors(opened)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_names_of_another_model_are_listed(tmp_path):
    config = CONFIGS["PaliGemma 2"]
    arrays = arrays_of(config)
    arrays["params/llm/surprise"] = np.ones(3, "f4")
    del arrays["params/llm/final_norm/scale"]
    arrays["params/img/head/bias"] = np.ones(5, "f4")
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(WeightsMismatch) as caught, open_checkpoint(tmp_path / "model.npz") as opened:
        load_tensors(opened, config)
    for name in ("surprise", "final_norm/scale", "img/head/bias"):
        assert name in str(caught.value)


def test_another_number_of_layers_in_the_stack_is_refused(tmp_path):
    config = CONFIGS["PaliGemma 1"]
    arrays = arrays_of(config)
    name = "params/llm/layers/mlp/linear"
    arrays[name] = np.concatenate([arrays[name], arrays[name][:1]])
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(WeightsMismatch, match="mlp/linear"), open_checkpoint(tmp_path / "model.npz") as opened:
        load_tensors(opened, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_numpy_loads_what_we_write(family, dtype, tmp_path):
    """Every array under big_vision's name with its axes, bfloat16 as two raw bytes, and no pickle in it."""
    config = CONFIGS[family]
    save(tmp_path / "out", from_arrays(random_tensors(config), config), config, format="npz", dtype=dtype)
    [file] = (tmp_path / "out").glob("*.npz")
    expected = arrays_of(config)
    with np.load(file, allow_pickle=False) as loaded:
        assert sorted(loaded.files) == sorted(expected)
        for name, array in expected.items():
            found = loaded[name]
            if dtype == "bfloat16":
                assert found.dtype == np.dtype("V2"), name
                found = found.view(BF16)
            assert np.array_equal(found, array.astype(found.dtype)) and found.dtype.name == dtype, name
    with open_checkpoint(tmp_path / "out") as opened:
        assert opened.config() == config
