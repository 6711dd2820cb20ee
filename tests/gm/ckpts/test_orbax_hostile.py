# SPDX-License-Identifier: Apache-2.0
"""Orbax folders that lie or are damaged: every one is a named error, nothing is written, nothing large is allocated."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from orbax_trees import LITERAL_CONFIG, flat, literal, nested, same

from gemma._orbax_folder import read_sidecar, write_sidecar
from gemma.config import PRESETS
from gemma.errors import CheckpointError, FormatError, GemmaError, UnsupportedError
from gemma.gm import ckpts
from gemma.gm.ckpts import _orbax_checks


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "x"
    ckpts.save_params(nested(literal()), path, layout="flat", config=LITERAL_CONFIG)
    return path


@pytest.fixture
def folder(original, tmp_path):
    """A copy whose manifest does not stand in the way of the damage."""
    copy = tmp_path / "in" / "x"
    shutil.copytree(original, copy)
    (copy / "gemma_manifest.json").unlink()
    return copy


def metadata(folder, **changes):
    path = folder / "_METADATA"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))
    return values


def entry(*keys, kind="jax.Array"):
    return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": {"value_type": kind}}


def listing(folder):
    return {(p, p.lstat().st_size, p.lstat().st_mtime_ns) for p in Path(folder).rglob("*")}


def refused(folder, match=None):
    before = listing(folder.parents[1])
    with pytest.raises(GemmaError, match=match) as caught:
        ckpts.load_params(folder)
    assert listing(folder.parents[1]) == before, "reading changed something"
    return caught.value


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "", "a//b", "x" * 3000, "new\nline"]
)
def test_names_that_lead_out(folder, name):
    for keys in ((name,), ("transformer", name), (name, "w")):
        metadata(folder, tree_metadata={"x": entry(*keys)}, use_ocdbt=False)
        refused(folder, "not the name of a leaf")


METADATA = {
    "not json": "{",
    "a list": "[]",
    "deep": "[" * 100000,
    "deep objects": '{"tree_metadata":' * 5000,
    "twice": '{"tree_metadata": {}, "tree_metadata": {}}',
    "no tree": "{}",
    "an empty tree": '{"tree_metadata": {}}',
    "a tree of numbers": '{"tree_metadata": {"x": 3}}',
    "keys without names": '{"tree_metadata": {"x": {"key_metadata": [{}], "value_metadata": {"value_type": "a"}}}}',
    "numbers as names": '{"tree_metadata": {"x": {"key_metadata": [{"key": 3}], "value_metadata": {"value_type": "a"}}}}',
    "no keys": '{"tree_metadata": {"x": {"key_metadata": [], "value_metadata": {"value_type": "a"}}}}',
    "not utf-8": b"\xff\xfe",
    "a huge number": '{"tree_metadata": ' + "9" * 100000 + "}",
}


@pytest.mark.parametrize("case", METADATA)
def test_broken_metadata(folder, case):
    text = METADATA[case]
    (folder / "_METADATA").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert isinstance(refused(folder), FormatError)


def test_metadata_of_any_size(folder):
    (folder / "_METADATA").write_bytes(b" " * (_orbax_checks.METADATA_LIMIT + 1))
    refused(folder, "expected at most")


def test_leaves_that_are_not_stored(folder):
    tree = metadata(folder)["tree_metadata"]
    metadata(
        folder,
        tree_metadata=tree | {"x": entry("transformer/layer_5/mlp/linear", "w"), "y": entry("transformer/a", "b")},
    )
    error = refused(folder, "names arrays that are not stored")
    assert "transformer/layer_5/mlp/linear/w" in str(error) and "transformer/a/b" in str(error)


def test_a_leaf_that_nobody_names_is_not_read(folder):
    tree = metadata(folder)["tree_metadata"]
    del tree["('transformer/final_norm', 'scale')"]
    metadata(folder, tree_metadata=tree)
    refused(folder, r"missing \(1\):\n  final_norm/scale")


def put(folder, key, **metadata):
    spec = dict(
        driver="zarr", kvstore=dict(driver="ocdbt", base=f"file://{folder}/", path=key + "/"), metadata=metadata
    )
    ts.open(spec, create=True, delete_existing=True).result()


def test_shapes_that_promise_terabytes(folder):
    put(
        folder, "transformer/embedder.input_embedding", shape=[1 << 30, 1 << 20], dtype="<f4", chunks=[1 << 10, 1 << 10]
    )
    refused(folder, "parts of arrays are missing")
    metadata(folder, store_array_data_equal_to_fill_value=False)  # then absent chunks are zeros, but not that many
    refused(folder, r"claims arrays of \d+ bytes, but its files have")


def test_chunks_that_are_lost(folder):
    store = ts.KvStore.open(dict(driver="ocdbt", base=f"file://{folder}/")).result()
    store.delete_range(
        ts.KvStore.KeyRange("transformer/layer_0/mlp/linear.w/0", "transformer/layer_0/mlp/linear.w/1")
    ).result()
    refused(folder, r"layer_0/mlp/linear/w: 1 chunks, 0 stored")


def test_a_dtype_that_no_parameter_has(folder):
    put(folder, "transformer/final_norm.scale", shape=[8], dtype="<c8", chunks=[8])
    metadata(folder, store_array_data_equal_to_fill_value=False)
    assert isinstance(refused(folder, "has dtype complex64"), UnsupportedError)


def test_stacks_of_a_billion_layers(folder):
    key = "transformer/stacked_layers/attention_type_0/mlp/linear"
    put(folder, f"{key}.w", shape=[1 << 30, 1], dtype="<f4", chunks=[1, 1])
    metadata(folder, tree_metadata={"x": entry(key, "w")}, store_array_data_equal_to_fill_value=False)
    refused(folder, "expected at most 4096 layers")


def test_files_that_are_missing_or_short(original, tmp_path):
    """With its manifest, a folder of ours is known to be short before anything is read."""
    for number, name in enumerate(json.loads((original / "gemma_manifest.json").read_text())["files"]):
        for way in ("missing", "short"):
            copy = tmp_path / f"{number}-{way}" / "x"
            shutil.copytree(original, copy)
            if way == "missing":
                (copy / name).unlink()
            else:
                os.truncate(copy / name, (copy / name).stat().st_size // 2)
            with pytest.raises(CheckpointError):
                ckpts.load_params(copy)


def test_flipped_bytes(folder):
    """Without the manifest: an error, or exactly the right values where the byte does not matter; never a crash."""
    rng, wrong = random.Random(0), 0
    data = [p for p in folder.rglob("*") if p.is_file() and p.name != "gemma_config.json"]
    for _ in range(60):
        path = rng.choice(data)
        content = path.read_bytes()
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        try:
            same(ckpts.load_params(folder), literal())
        except GemmaError:
            wrong += 1
        except AssertionError:
            assert path.name != "manifest.ocdbt", "the index has a checksum"
            wrong += 1  # plain values of a small array changed: what the manifest's SHA-256 is for
        path.write_bytes(content)
    assert wrong > 30
    same(ckpts.load_params(folder), literal())


def test_a_store_of_plain_folders_without_the_leaf(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    tree = {"tree_metadata": {"x": entry("a", "b")}, "use_ocdbt": False}
    (tmp_path / "in" / "x" / "_METADATA").write_text(json.dumps(tree))
    refused(tmp_path / "in" / "x", "not stored")


def test_a_folder_whose_store_is_gone(folder):
    (folder / "manifest.ocdbt").unlink()
    refused(folder, "manifest.ocdbt, which is missing")
    (folder / "_METADATA").unlink()
    refused(folder, "expected an Orbax folder")


# ---- the configuration beside it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_are_kept_exactly(tmp_path, name):
    write_sidecar(tmp_path, PRESETS[name])
    assert read_sidecar(tmp_path) == PRESETS[name]


_HEAD = '{"format": "gemma-config", "version": 1, "class": "GemmaConfig", "fields": '
SIDECARS = {
    "not json": "{",
    "another format": '{"format": "x", "version": 1, "class": "GemmaConfig", "fields": {}}',
    "another version": '{"format": "gemma-config", "version": 2, "class": "GemmaConfig", "fields": {}}',
    "a class of python": '{"format": "gemma-config", "version": 1, "class": "os.system", "fields": {}}',
    "no fields": _HEAD + "3}",
    "an unknown field": _HEAD + '{"x": 1}}',
    "a billion layers": _HEAD + '{"num_hidden_layers": 1000000000}}',
    "text for a number": _HEAD + '{"hidden_size": "8"}}',
    "a list for a pattern": _HEAD + '{"layer_pattern": [["L"]]}}',
}


@pytest.mark.parametrize("case", SIDECARS)
def test_broken_configurations(folder, case):
    (folder / "gemma_config.json").write_text(SIDECARS[case])
    assert isinstance(refused(folder), FormatError)


def test_reading_a_healthy_folder_writes_nothing(original):
    before = listing(original.parent)
    got = flat(ckpts.load_params(original))
    assert listing(original.parent) == before and len(got) == len(literal())
    assert np.asarray(got["final_norm/scale"]).shape == (8,)
