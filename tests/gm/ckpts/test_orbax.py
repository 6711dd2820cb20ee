# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints in the four layouts: written and read back byte for byte, official trees, and what does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax_trees import BF16, LITERAL_CONFIG, OFFICIAL, TINY, flat, flat_tree, literal, nested, same

from gemma import checkpoint as files
from gemma import testing, weights
from gemma._atomic import verify_manifest
from gemma._orbax_folder import is_orbax
from gemma.config import PRESETS, T5GemmaConfig, text_only
from gemma.errors import CheckpointError, CheckpointNotFound, ConfigError, SaveError, UnsupportedError, WeightsMismatch
from gemma.gm import ckpts
from gemma.gm.ckpts import _compat, _detect, _orbax

FIXTURES = Path(__file__).parents[2] / "fixtures" / "orbax"
LAYOUTS = tuple(ckpts.Layout)


def host(tree):
    return {name: np.asarray(leaf) for name, leaf in flat(tree).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_every_preset_in_every_layout(tmp_path, name, layout):
    config = TINY[name]
    tree = flat_tree(config)
    if layout == "stacked" and isinstance(config, T5GemmaConfig):
        with pytest.raises(CheckpointError, match="layout 'stacked' is that of a decoder"):
            ckpts.save_params(nested(tree), tmp_path / "x", layout=layout, config=config)
        return
    ckpts.save_params(nested(tree), tmp_path / "x", layout=layout, config=config)
    same(ckpts.load_params(tmp_path / "x"), tree)
    with ckpts.open_checkpoint(tmp_path / "x") as opened:
        assert opened.layout == layout and opened.config() == config
        assert {n: i.shape for n, i in opened.tensors.items()} == weights.expected(config, "flax")
    verify_manifest(tmp_path / "x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orbax_reads_what_is_written(tmp_path, layout):
    ckpts.save_params(nested(literal()), tmp_path / "x", layout=layout, config=LITERAL_CONFIG, step=7)
    item = tmp_path / "x" / "default" if layout == "kauldron" else tmp_path / "x"
    got, expected = ocp.StandardCheckpointer().restore(item), OFFICIAL[layout]()
    if layout == "kauldron":
        assert got.pop("step") == 7 and got.pop("collections") == {} and got.pop("opt_state") == {}
        expected = {"params": expected["params"]}
    same(got, flat(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_trees_are_read(tmp_path, layout):
    """Written by Orbax, as the official package and its trainer do."""
    path = tmp_path / "x"
    if layout == "kauldron":
        manager = ocp.CheckpointManager(tmp_path)
        manager.save(7, args=ocp.args.StandardSave(OFFICIAL[layout]()))
        manager.wait_until_finished()
        path = tmp_path / "7"
    else:
        saver = ocp.StandardCheckpointer()
        saver.save(path, OFFICIAL[layout]())
        saver.wait_until_finished()
    same(ckpts.load_params(path), literal())
    small = {n: a for n, a in literal().items() if not n.startswith(("vision_", "embedder/mm_"))}
    same(ckpts.load_params(path, text_only=True), small)
    with ckpts.open_checkpoint(path) as opened:
        assert opened.layout == layout and opened.format == "flax"
        with pytest.raises(ConfigError, match="sizes are those of no preset: pass config="):
            opened.config()
    with ckpts.open_checkpoint(path, config=LITERAL_CONFIG) as opened:
        got = {t.name: reader(np.float32) for t, reader in files.load_tensors(opened)}
    expected = weights.unpack(literal(), LITERAL_CONFIG, format="flax")
    assert all(np.array_equal(got[n], a.astype(np.float32)) for n, a in expected.items()) and set(got) == set(expected)


@pytest.mark.parametrize("file", sorted(FIXTURES.glob("*.zip")), ids=lambda p: p.stem)
def test_checkpoints_of_earlier_versions(tmp_path, file):
    """Kept in the repository: what Orbax and this package wrote must stay readable."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    same(ckpts.load_params(tmp_path), literal())


def test_the_fixtures_are_there():
    assert len(list(FIXTURES.glob("*.zip"))) == 8  # four layouts, each by Orbax and by this package


def test_without_metadata(tmp_path):
    """What Orbax wrote before it had `_METADATA`."""
    for layout in ("nested", "flat", "stacked"):
        ckpts.save_params(nested(literal()), tmp_path / layout, layout=layout, config=LITERAL_CONFIG)
        for name in ("_METADATA", "_CHECKPOINT_METADATA", "gemma_config.json", "gemma_manifest.json"):
            (tmp_path / layout / name).unlink()
        same(ckpts.load_params(tmp_path / layout), literal())


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(False, False), (True, True), (False, True)])
def test_other_stores(tmp_path, ocdbt, zarr3):
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3))
    saver.save(tmp_path / "x", OFFICIAL["flat"]())
    same(ckpts.load_params(tmp_path / "x"), literal())


# ---- which model it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if n in TINY])
def test_presets_are_found_by_their_shapes(name):
    config = PRESETS[name]
    assert _detect.detect(weights.expected(config, "flax")) == _detect.Detected(config, "preset")
    if getattr(config, "vision", None) is not None:
        shapes = weights.expected(text_only(config), "flax")
        assert _detect.detect(shapes) == _detect.Detected(text_only(config), "preset")


@pytest.mark.parametrize("name", TINY)
def test_other_sizes_are_read_off_the_shapes(name):
    shapes = weights.expected(TINY[name], "flax")
    found = _detect.detect(shapes)
    assert found.source == "shapes" and weights.expected(found.config, "flax") == shapes


def test_the_configuration_that_counts(tmp_path):
    tree = nested(flat_tree(TINY["gemma3_1b"]))
    ckpts.save_params(tree, tmp_path / "bare")
    ckpts.save_params(tree, tmp_path / "kept", config=TINY["gemma3_1b"])
    other = testing.tiny_config("gemma3")
    for folder, given, expected in (("bare", None, None), ("kept", None, TINY["gemma3_1b"]), ("kept", other, other)):
        with ckpts.open_checkpoint(tmp_path / folder, config=given) as opened:
            if expected is None:
                with pytest.raises(ConfigError):
                    opened.config()
            else:
                assert opened.config() == expected
    with pytest.raises(WeightsMismatch):
        ckpts.load_params(tmp_path / "kept", config=other)
    with pytest.raises(WeightsMismatch):
        ckpts.save_params(tree, tmp_path / "wrong", config=other)
    assert not (tmp_path / "wrong").exists()


def test_a_model_that_is_not_in_the_table(tmp_path):
    """Gemma 3n, and trees of the user's own, come as they were saved."""
    own = {"a": {"b": np.arange(6, dtype=np.int32).reshape(2, 3)}, "c": np.ones((), np.float32)}
    ckpts.save_params(own, tmp_path / "own")
    same(ckpts.load_params(tmp_path / "own"), flat(own))
    other = {
        "embedder": {"input_embedding": np.ones((4, 2), BF16)},
        "altup_projection_0": {"altup_projection_0": np.ones((2, 2), BF16)},
    }
    ckpts.save_params(other, tmp_path / "3n", layout="flat")
    same(ckpts.load_params(tmp_path / "3n"), flat(other))


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_every_difference_is_listed(tmp_path, kept):
    config = TINY["gemma3_4b"]
    tree = flat_tree(config)
    gone = ["layer_1/attn/q_einsum/w", "layer_12/mlp/linear", "vision_encoder/siglip_encoder/pos_embedding"]
    for name in gone:
        del tree[name]
    tree["layer_2/mlp/gating_einsum"] = np.ones((2, 10, 14), BF16)
    tree["final_norm/scale"] = np.ones((11,), BF16)
    tree["layer_3/attn/extra/w"] = np.ones((1,), BF16)
    ckpts.save_params(nested(tree), tmp_path / "x")
    with pytest.raises(WeightsMismatch) as caught:
        ckpts.load_params(tmp_path / "x", config=config if kept else None)
    assert set(caught.value.missing) == set(gone) and caught.value.unexpected == ("layer_3/attn/extra/w",)
    assert sorted(line.split(":")[0] for line in caught.value.misshaped) == [
        "final_norm/scale",
        "layer_2/mlp/gating_einsum",
    ]
    assert "expected (10,), got (11,)" in str(caught.value)


def test_a_preset_with_a_hole():
    shapes = weights.expected(PRESETS["gemma2_2b"], "flax")
    del shapes["layer_7/attn/kv_einsum/w"]
    with pytest.raises(WeightsMismatch) as caught:
        _detect.check(shapes, _detect.detect(shapes), Path("x"), text_only=False)
    assert caught.value.missing == ("layer_7/attn/kv_einsum/w",) and not caught.value.misshaped


def test_too_little_is_left(tmp_path):
    for number, names in enumerate((["final_norm/scale"], ["layer_0/attn/q_einsum/w"], ["embedder/input_embedding"])):
        ckpts.save_params(nested({n: a for n, a in literal().items() if n in names}), tmp_path / str(number))
        with pytest.raises(WeightsMismatch):
            ckpts.load_params(tmp_path / str(number))


def test_one_leaf_twice():
    with pytest.raises(CheckpointError, match="are both the leaf final_norm/scale"):
        arrays = {("transformer/final_norm", "scale"): (8,), ("transformer", "final_norm", "scale"): (8,)}
        _compat.nested_places(arrays, ckpts.Layout.FLAT, "x")
    wrapped = {"layer_0/attn/q_einsum/w": (1,), "layer_0/attn/q_einsum/_IntEinsum_0/kernel": (1,)}
    with pytest.raises(CheckpointError, match="both the weight layer_0/attn/q_einsum/w"):
        _detect.plain_shapes(wrapped, "x")


def test_layers_that_cannot_be_stacked(tmp_path):
    tree = nested(literal())
    with pytest.raises(CheckpointError, match="leave a gap"):
        _compat.stack(["layer_0/x/w", "layer_4/x/w"], 2)
    tree["layer_1"]["final"] = tree["layer_1"].pop("post_ffw_norm")
    with pytest.raises(WeightsMismatch):
        ckpts.save_params(tree, tmp_path / "x", layout="stacked", config=LITERAL_CONFIG)
    with pytest.raises(CheckpointError, match="expected one of nested, flat, stacked, kauldron, got 'square'"):
        ckpts.save_params(tree, tmp_path / "x", layout="square")
    assert not list(tmp_path.iterdir())


def test_uneven_slices():
    """34 layers of six kinds: four kinds have six layers, two have five."""
    names = [f"layer_{i}/attn/q_einsum/w" for i in range(34)]
    arrays = _compat.stack(names, 6)
    assert [len(rows) for rows in arrays.values()] == [6, 6, 6, 6, 5, 5]
    shapes = {keys: (len(rows), 2) for keys, rows in arrays.items()}
    places = _compat.nested_places(shapes, ckpts.Layout.STACKED, "x")
    assert {name: arrays[place.keys][place.index] for name, place in places.items()} == dict(zip(names, names))


def test_saving_refuses_what_is_no_tree(tmp_path):
    deleted = jnp.ones(3)
    deleted.delete()
    for wrong, says in (
        ({}, "expected a nested dictionary"),
        ([1], "expected a nested dictionary"),
        ({"a": {"b": 1.5}}, "a/b: expected an array, got float"),
        ({"a": "text"}, "a: expected an array, got str"),
        ({"a": deleted}, "was freed"),
        ({"a": {"": np.ones(1)}}, "without empty parts"),
        ({"a": {"..": np.ones(1)}}, "without empty parts"),
    ):
        with pytest.raises(CheckpointError, match=says):
            ckpts.save_params(wrong, tmp_path / "x")
    (tmp_path / "y").mkdir()
    with pytest.raises(ValueError, match=r"Destination .*y already exists"):
        ckpts.save_params({"a": np.ones(1)}, tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_saving_over_a_checkpoint(tmp_path):
    one, two = flat_tree(TINY["gemma_2b"], seed=1), flat_tree(TINY["gemma_2b"], seed=2)
    ckpts.save_params(nested(one), tmp_path / "x")
    with ckpts.open_checkpoint(tmp_path / "x") as opened:
        with pytest.raises(SaveError):
            ckpts.save_params(nested(two), tmp_path / "x")
        ckpts.save_params(nested(two), tmp_path / "x", replace=True, wait_until_finished=True)
        with pytest.raises(CheckpointError, match="was replaced by another checkpoint while it was read"):
            opened.read("final_norm/scale")
    same(ckpts.load_params(tmp_path / "x"), two)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "x"
    ckpts.save_params(nested(literal()), path, layout="stacked", config=LITERAL_CONFIG)
    return path


def test_as_a_checkpoint(saved):
    with ckpts.open_checkpoint(str(saved)) as opened:
        info = opened.info("layer_1/mlp/linear")
        assert info.shape == (12, 8) and info.dtype == "BF16" and info.nbytes == 192
        array = literal()["layer_1/mlp/linear"]
        assert np.array_equal(opened.read("layer_1/mlp/linear"), array)
        assert opened.read("layer_1/mlp/linear", np.float32).dtype == np.float32
        out = np.empty((12, 8), np.float16)
        assert opened.read("layer_1/mlp/linear", out=out) is out and np.array_equal(out, array.astype(np.float16))
        assert np.array_equal(opened.read_rows("layer_1/mlp/linear", 3, 5), array[3:5].astype(np.float32))
        assert opened.raw("layer_1/mlp/linear").tobytes() == array.tobytes()
        opened.release("layer_1/mlp/linear")
        for call, error in (
            (lambda: opened.read("layer_9/x"), CheckpointError),
            (lambda: opened.packed("layer_1/mlp/linear"), UnsupportedError),
            (lambda: opened.read("layer_1/mlp/linear", np.int8), UnsupportedError),
            (lambda: opened.read("layer_1/mlp/linear", out=np.empty((8, 12), np.float32)), CheckpointError),
            (lambda: opened.read_rows("layer_1/mlp/linear", 3, 50), CheckpointError),
        ):
            with pytest.raises(error):
                call()


def test_leaves_of_many_chunks(tmp_path, monkeypatch):
    """Large leaves are cut into chunks and written in several commits; parts of them are read alone."""
    from gemma.gm.ckpts import _orbax_write

    monkeypatch.setattr(_orbax_write, "_CHUNK", 64)
    monkeypatch.setattr(_orbax_write, "_BATCH", 200)
    rng = np.random.default_rng(0)
    tree = {
        "a": rng.standard_normal((37, 5)).astype(np.float32),
        "b": rng.standard_normal((3, 7, 11)),
        "c": np.float32(3),
    }
    tree = {name: np.asarray(array, np.float32) for name, array in tree.items()}
    ckpts.save_params(tree, tmp_path / "x")
    same(ckpts.load_params(tmp_path / "x"), tree)
    same(ocp.StandardCheckpointer().restore(tmp_path / "x"), tree)
    with ckpts.open_checkpoint(tmp_path / "x") as opened:
        assert np.array_equal(opened.read_rows("a", 4, 30), tree["a"][4:30])
        part = opened.read_part("b", (slice(1, 3), slice(2, 6)), np.empty((2, 4, 11), np.float32))
        assert np.array_equal(part, tree["b"][1:3, 2:6])


def test_dtypes(saved, tmp_path):
    got = host(ckpts.load_params(saved, dtype=jnp.float32))
    assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}
    half = {n: a.astype(BF16) for n, a in literal().items()}
    ckpts.save_params(nested(half), tmp_path / "x")
    got = host(ckpts.load_params(tmp_path / "x", config=LITERAL_CONFIG))
    wide = {n for n, a in got.items() if a.dtype == np.float32}
    assert wide == {"embedder/mm_soft_embedding_norm/scale", "embedder/mm_input_projection/w"}
    with pytest.raises(UnsupportedError, match="65504"):
        ckpts.load_params(saved, dtype=jnp.float16)


def test_params_decide(saved):
    like = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), nested(literal()))
    leaves = jax.tree.leaves(like)
    got = ckpts.load_params(saved, params=like)
    assert all(leaf.is_deleted() for leaf in leaves)
    same(got, {n: a.astype(np.float32) for n, a in literal().items()})
    text = {k: v for k, v in nested(literal()).items() if k != "vision_encoder"}
    text["embedder"] = {"input_embedding": text["embedder"]["input_embedding"]}
    same(ckpts.load_params(saved, params=text), flat(text))  # without a tower, none is read
    text["embedder"] = {"input_embedding": np.ones((3, 3))}
    text["layer_7"] = {"x": np.ones(1)}
    with pytest.raises(WeightsMismatch) as caught:
        ckpts.load_params(saved, params=text)
    assert caught.value.missing == ("layer_7/x",) and "expected (3, 3)" in caught.value.misshaped[0]


def test_stubs_of_empty_branches_do_not_matter(saved):
    like = nested(literal())
    like["layer_0"]["attn"]["q_einsum"]["_LoRAEinsum_0"] = {}
    same(ckpts.load_params(saved, params=like), literal())


def test_a_tree_of_shardings(saved):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tops = {name.split("/")[0] for name in literal()}
    got = ckpts.load_params(saved, sharding=dict.fromkeys(tops, where))
    assert {leaf.sharding for leaf in jax.tree.leaves(got)} == {where}
    with pytest.raises(CheckpointError, match="`sharding` has no entry for"):
        ckpts.load_params(saved, sharding={"embedder": where})


def test_names_for_quantization_aware_training(saved):
    got = flat(ckpts.load_params(saved, quantize=True))
    assert "layer_0/attn/q_einsum/_SimulateQuantizedEinsum_0/kernel" in got
    assert "layer_1/mlp/_SimulateQuantizedEinsum_gating_einsum/kernel" in got
    assert "layer_1/mlp/_SimulateQuantizedEinsum_linear/kernel" in got
    assert "layer_0/attn/_query_norm/scale" in got and len(got) == len(literal())
    plain = {_detect.plain_name(name): np.asarray(leaf) for name, leaf in got.items()}
    assert set(plain) == set(literal()) and all(np.array_equal(plain[n], a) for n, a in literal().items())
    renamed = {name: literal()[_detect.plain_name(name)] for name in got}
    same(ckpts.load_params(saved, params=nested(got), quantize=True), renamed)
    same(ckpts.load_params(saved, params=nested(literal()), quantize=True), literal())  # the wrapper's tree is plain


def test_adapters_and_integers_come_as_saved(tmp_path):
    tree = literal()
    tree["layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a"] = np.ones((8, 2), BF16)
    tree["layer_0/attn/q_einsum/_LoRAEinsum_0/lora/b"] = np.ones((2, 4, 6), BF16)
    kernel = tree.pop("layer_1/attn/q_einsum/w")
    tree["layer_1/attn/q_einsum/_IntEinsum_0/kernel"] = (kernel.astype(np.float32) * 10).astype(np.int8)
    tree["layer_1/attn/q_einsum/_IntEinsum_0/scale"] = np.ones((4, 1, 6), np.float32)
    tree["layer_0/mlp/_IntEinsum_linear/kernel"] = np.asarray(jnp.asarray(tree.pop("layer_0/mlp/linear"), jnp.int4))
    tree["layer_0/mlp/_IntEinsum_linear/scale"] = np.ones((1, 8), np.float32)
    ckpts.save_params(nested(tree), tmp_path / "x", config=LITERAL_CONFIG)
    same(ckpts.load_params(tmp_path / "x"), tree)
    with pytest.raises(UnsupportedError, match="cannot be read as float32"):
        like = nested(tree)
        like["layer_1"]["attn"]["q_einsum"]["_IntEinsum_0"]["kernel"] = np.ones((4, 8, 6), np.float32)
        ckpts.load_params(tmp_path / "x", params=like)
    del tree["layer_1/attn/q_einsum/_IntEinsum_0/kernel"]
    ckpts.save_params(nested(tree), tmp_path / "y")
    with pytest.raises(WeightsMismatch) as caught:
        ckpts.load_params(tmp_path / "y", config=LITERAL_CONFIG)
    assert caught.value.missing == ("layer_1/attn/q_einsum/w",)


def test_saving_tensor_by_tensor(tmp_path):
    config = TINY["gemma3_4b"]
    assert config.table_rows < config.vocab_size  # a table that loses its padding on the way to JAX
    testing.write_tiny_safetensors(tmp_path / "hf", config)
    with files.open_checkpoint(tmp_path / "hf") as source:
        report = ckpts.save_tensors(tmp_path / "x", files.load_tensors(source), config, layout="flat")
    expected = flat_tree(config, np.float32)
    same(ckpts.load_params(tmp_path / "x"), expected)
    same(ckpts.load_params(tmp_path / "hf"), expected)
    assert {t.name for t in report.tensors} == set(expected) and report.bytes > 0
    with files.open_checkpoint(tmp_path / "hf") as source:
        ckpts.save_tensors(tmp_path / "y", files.load_tensors(source), config, layout="stacked", dtype="bfloat16")
        with pytest.raises(SaveError):
            ckpts.save_tensors(tmp_path / "y", files.load_tensors(source), config)
        less = list(files.load_tensors(source))[:-1]
        with pytest.raises(WeightsMismatch):
            ckpts.save_tensors(tmp_path / "z", less, config)
    got = host(ckpts.load_params(tmp_path / "y"))
    assert got["layer_3/mlp/linear"].dtype == BF16 and not (tmp_path / "z").exists()


def test_the_padded_table_of_a_hugging_face_folder(tmp_path):
    config = TINY["gemma2_2b"]
    assert config.table_rows > config.vocab_size
    testing.write_tiny_safetensors(tmp_path, config)
    table = np.asarray(ckpts.load_params(tmp_path)["embedder"]["input_embedding"])
    assert table.shape[0] == config.table_rows and not table[config.vocab_size :].any()


def test_release():
    tree = {"a": jnp.ones((4, 4), jnp.float32), "b": {"c": jnp.ones(8, jnp.bfloat16), "d": np.ones(3)}}
    assert ckpts.release(tree) == 64 + 16 and tree["a"].is_deleted() and tree["b"]["c"].is_deleted()
    assert ckpts.release(tree) == 0


def test_what_is_an_orbax_folder(saved, tmp_path):
    assert is_orbax(saved) and not is_orbax(tmp_path) and not is_orbax(tmp_path / "nothing")
    testing.write_tiny_safetensors(tmp_path / "hf", testing.tiny_config("gemma"))
    assert not is_orbax(tmp_path / "hf")
    with ckpts.open_checkpoint(tmp_path / "hf") as opened:
        assert opened.format == "hf"
    with pytest.raises(ValueError, match="No item metadata found in"):
        _orbax.OrbaxCheckpoint(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint").write_bytes(b"\x80")
    with pytest.raises(CheckpointNotFound, match="expected an Orbax folder with _METADATA"):
        ckpts.load_params(tmp_path / "old")


def test_paths_of_published_parameters():
    assert str(ckpts.CheckpointPath.GEMMA3_4B_IT) == "gs://gemma-data/checkpoints/gemma3-4b-it"
    assert ckpts.CheckpointPath.GEMMA3N_E2B_PT == "gs://gemma-data/checkpoints/gemma3n-e2b-pt"
    assert len(ckpts.CheckpointPath) == 28 and isinstance(ckpts.CheckpointPath.GEMMA2_2B_PT, str)


def test_a_published_name_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CHECKPOINT_DIR", str(tmp_path))
    ckpts.save_params(nested(literal()), tmp_path / "gemma3-4b-it", config=LITERAL_CONFIG)
    same(ckpts.load_params(ckpts.CheckpointPath.GEMMA3_4B_IT), literal())
    with pytest.raises(OSError, match="HF_HUB_OFFLINE forbids connections"):
        ckpts.load_params(ckpts.CheckpointPath.GEMMA3_4B_PT)


SPREAD = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec as P
from gemma.gm import ckpts
mesh = jax.make_mesh((4,), ("x",))
reads = {}
part = ckpts.OrbaxCheckpoint.read_part
def counted(self, name, index, out):
    reads.setdefault(name, []).append(out.shape)
    return part(self, name, index, out)
ckpts.OrbaxCheckpoint.read_part = counted
alone, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
where = {"embedder": {"input_embedding": spread}, "layer_0": alone, "layer_1": alone, "final_norm": alone}
got = ckpts.load_params(sys.argv[1], sharding=where, text_only=True)
table = got["embedder"]["input_embedding"]
assert {s.data.shape for s in table.addressable_shards} == {(6, 8)} and len(table.addressable_shards) == 4
assert reads["embedder/input_embedding"] == [(6, 8)] * 4 and reads["final_norm/scale"] == [(8,)], reads
expected = ckpts.load_params(sys.argv[1], text_only=True)
ckpts.save_params(got, sys.argv[1] + "-again")
again = ckpts.load_params(sys.argv[1] + "-again", params=got)
assert again["embedder"]["input_embedding"].sharding == spread
for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
    assert np.array_equal(np.asarray(a), np.asarray(b))
"""


def test_each_device_reads_its_part(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "x")
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run_script(SPREAD, tmp_path / "x", environment)


PEAK = """
import resource, sys, threading, numpy as np, jax
from gemma.gm import ckpts
jax.numpy.ones(1).block_until_ready()
ckpts.load_params(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
got = ckpts.load_params(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(got))
print(size, peak() - before)
"""


def test_peak_memory(tmp_path):
    """Loading needs the parameters and the few leaves that are being unpacked, not the tree twice."""
    block = np.random.default_rng(0).standard_normal((1024, 64), np.float32)
    tree = {f"a{i}": np.tile(block, (2, 16)) for i in range(8)}  # 8 leaves of 8 MB
    ckpts.save_params(tree, tmp_path / "x")
    ckpts.save_params({"a": np.ones(1)}, tmp_path / "small")
    size, grown = map(int, run_script(PEAK, tmp_path / "x", {}, str(tmp_path / "small")).split())
    assert size == 8 * 2048 * 1024 * 4 and grown < 1.1 * size + 4 * size / 8, (size, grown)


def run_script(code, path, environment, *more):
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), *more],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
