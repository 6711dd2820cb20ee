# SPDX-License-Identifier: Apache-2.0
"""What `save` refuses, in words, leaving nothing half-written: bad values, models, arguments, destinations and disks."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from families import FAMILIES, TOWER
from saving_models import WIDE, text_config, tiny_source

from gemma import _atomic, saving
from gemma._disk import Disk
from gemma.errors import (
    CheckpointError,
    ConfigError,
    GemmaError,
    SaveError,
    ShapeError,
    TokenizerError,
    WeightsMismatch,
)
from gemma.saving import ArrayReader, from_arrays, save
from gemma.testing import random_tensors

CONFIG = text_config("gemma3", num_hidden_layers=1)
VALUES = random_tensors(CONFIG)
FORMATS = [("safetensors", "st"), ("gguf", "x.gguf")]


def attempt(path, format="gguf", values=None, config=CONFIG, **options):
    return save(path, from_arrays(VALUES if values is None else values, config), config, format=format, **options)


def refused(tmp_path, error, match, name="out", **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        attempt(tmp_path / name, **options)
    assert isinstance(caught.value, GemmaError)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def broken(name: str, value: float, dtype=np.float32):
    values = {key: array.astype(dtype) for key, array in VALUES.items()}
    values[name] = values[name].copy()
    values[name].reshape(-1)[7] = value
    return values


# --- values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [dict(format="safetensors"), dict(format="gguf"), dict(dtype="bfloat16"), dict(quantize="q4_k_m"),
     dict(quantize="q8_0")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["layers.0.mlp.up", "layers.0.norm.pre_mlp"])
def test_weights_that_are_no_numbers(tmp_path, name, options, bad):
    refused(tmp_path, CheckpointError, rf"{name}: holds 1 NaN or infinite values", values=broken(name, bad), **options)


def test_broken_weights_can_be_stored_when_asked(tmp_path):
    for format, path in FORMATS:
        attempt(tmp_path / path, format, broken("layers.0.mlp.up", np.nan), allow_nonfinite=True)
    refused(
        tmp_path,
        CheckpointError,
        "layers.0.mlp.up: cannot be packed as Q8_0",
        values=broken("layers.0.mlp.up", np.nan),
        quantize="q8_0",
        allow_nonfinite=True,
    )


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_values_that_a_half_cannot_hold(tmp_path, format):
    for dtype in (np.float32, ml_dtypes.bfloat16):
        values = broken("layers.0.mlp.up", 1e6, dtype)
        match = "layers.0.mlp.up: 1 values are too large for float16; save it as bfloat16"
        refused(tmp_path, CheckpointError, match, values=values, format=format, dtype="float16")


def test_scales_that_a_half_cannot_hold(tmp_path):
    match = "layers.0.mlp.up: cannot be packed as Q4_K: values from row 0 on are too large for float16"
    refused(tmp_path, CheckpointError, match, values=broken("layers.0.mlp.up", 1e9), quantize="q4_k_m")


def test_a_matrix_of_zeros_is_stored(tmp_path):
    values = VALUES | {name: np.zeros_like(array) for name, array in VALUES.items()}
    for quantize in ("q4_k_m", "q6_k", "q4_0", "q2_k"):
        report = attempt(tmp_path / quantize, values=values, quantize=quantize)
        assert max(tensor.max_error or 0 for tensor in report.tensors) == 0


# --- tensors


def test_missing_repeated_foreign_and_misshaped_tensors_are_all_listed(tmp_path):
    pairs = from_arrays(VALUES, CONFIG)
    other = dataclasses.replace(pairs[3][0], name="layers.9.attn.q")
    wrong = dataclasses.replace(pairs[2][0], shape=(3, 3))
    tensors = [pairs[0], pairs[0], (wrong, pairs[2][1]), (other, pairs[3][1]), *pairs[5:]]
    with pytest.raises(WeightsMismatch) as caught:
        save(tmp_path / "x", tensors, CONFIG, format="gguf")
    assert caught.value.missing == (pairs[1][0].name, pairs[3][0].name, pairs[4][0].name)
    assert caught.value.unexpected == ("layers.9.attn.q", "embed")
    assert caught.value.misshaped == (f"{wrong.name}: expected {pairs[2][0].shape}, got (3, 3)",)


def test_a_reader_that_gives_another_shape(tmp_path):
    tensors = [(t, ArrayReader(r().T if t.name.endswith("mlp.up") else r())) for t, r in from_arrays(VALUES, CONFIG)]
    for format, path in FORMATS:
        with pytest.raises(ShapeError, match=r"layers.0.mlp.up: expected shape \(512, 256\), got \(256, 512\)"):
            save(tmp_path / path, tensors, CONFIG, format=format)
    assert not list(tmp_path.iterdir())


def test_a_reader_takes_floats_only():
    with pytest.raises(ShapeError, match="got int8"):
        ArrayReader(np.zeros(3, np.int8))
    with pytest.raises(WeightsMismatch, match="embed"):
        from_arrays({}, CONFIG)


# --- models that GGUF does not hold


@pytest.mark.parametrize("family", ["paligemma", "t5gemma", "siglip"])
def test_models_without_a_place_in_a_gguf(tmp_path, family):
    config = FAMILIES[family]
    refused(
        tmp_path,
        ConfigError,
        "gguf has no place for a .* formats that hold one: safetensors",
        values=random_tensors(config),
        config=config,
    )


def test_images_and_bidirectional_attention(tmp_path):
    config = text_config("gemma3", num_hidden_layers=1, vision=TOWER, model_type="gemma3")
    refused(tmp_path, WeightsMismatch, "gemma.config.text_only", values=random_tensors(config), config=config)
    config = text_config("gemma3", num_hidden_layers=1, use_bidirectional_attention=True)
    refused(tmp_path, ConfigError, "bidirectional", values=random_tensors(config), config=config)


# --- arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(format="pickle"), "format: expected one of safetensors, gguf.*got 'pickle'"),
        (dict(quantize="q4_k_x"), "quantize: expected one of f32.*got 'q4_k_x'; did you mean"),
        (dict(format="safetensors", quantize="q4_k_m"), "safetensors hold floats, int8 or int4"),
        (dict(quantize="q8_0", dtype="float16"), "expected quantize or dtype, got both"),
        (dict(dtype="int8"), "dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        (dict(dtype=object()), "dtype: expected one of"),
        (dict(metadata={"gemma3.block_count": 3}), "follows from the model"),
        (dict(metadata={"tokenizer.ggml.model": "gpt2"}), "follows from the model"),
    ],
)
def test_arguments(tmp_path, options, match):
    refused(tmp_path, ConfigError, match, **options)


def test_the_tokenizer_of_another_model(tmp_path):
    small = text_config("gemma3", WIDE | dict(vocab_size=300), num_hidden_layers=1)
    for format, path in FORMATS:
        refused(
            tmp_path,
            TokenizerError,
            "at most 300 pieces, the rows of the embedding table, got 320",
            name=path,
            values=random_tensors(small),
            config=small,
            format=format,
            tokenizer=tiny_source(),
        )


# --- destinations and disks


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_an_existing_destination_is_kept_unless_replaced(tmp_path, format, name):
    attempt(tmp_path / name, format)
    refused(tmp_path, SaveError, "already exists", name=name, format=format)
    changed = VALUES | {"final_norm": VALUES["final_norm"] + np.float32(1)}
    refused(tmp_path, CheckpointError, "NaN", name=name, format=format, replace=True, values=broken("embed", np.nan))
    before = snapshot(tmp_path)
    attempt(tmp_path / name, format, changed, replace=True)
    assert snapshot(tmp_path) != before


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_where_a_file_should_be_and_the_other_way_round(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for replace in (False, True):
        refused(tmp_path, SaveError, "folder", name="folder", format="gguf", replace=replace)
        refused(tmp_path, SaveError, "file", name="file", format="safetensors", replace=replace)
    refused(tmp_path, SaveError, "is not a folder", name="file/x", format="gguf")
    refused(tmp_path, SaveError, "printable", name="a\nb", format="gguf")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_a_disk_without_room_is_refused_at_once(tmp_path, monkeypatch, format, name):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    refused(
        tmp_path, SaveError, "no space left on the disk: .* bytes are needed, 1000 are free", name=name, format=format
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_while_a_gguf_is_written(tmp_path, monkeypatch, code):
    attempt(tmp_path / "x.gguf", quantize="q8_0")
    before = snapshot(tmp_path)

    class Failing(Disk):
        def write(self, fd, data):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_atomic, "disk", Failing())
    refused(tmp_path, SaveError, "x.gguf", name="x.gguf", replace=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_while_a_folder_is_written(tmp_path, monkeypatch, code):
    attempt(tmp_path / "st", "safetensors")
    before = snapshot(tmp_path)

    def failing(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("gemma.formats.safetensors.stream_safetensors", failing)
    refused(tmp_path, SaveError, "st", name="st", format="safetensors", replace=True)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for format, name in FORMATS:
        refused(tmp_path, SaveError, "cannot be written", name=f"locked/{name}", format=format)


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    attempt(tmp_path / "x.gguf")
    before = snapshot(tmp_path)

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "x.gguf", quantize="q4_0", replace=True, progress=stop)
    assert snapshot(tmp_path) == before


def test_every_registered_format_names_a_module():
    for kind in saving.FORMATS.values():
        assert kind.column in ("hf", "flax", "gguf", "ckpt", "npz", "sbs") and kind.module.startswith("gemma.")
