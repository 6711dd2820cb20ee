# SPDX-License-Identifier: Apache-2.0
"""`gemma convert` on tiny models: every format from every other, its options, its report, and what it refuses.

What comes out is read back and compared here, tensor by tensor, without the command's own comparison. That the command
notices damage is test_convert_damage.py; `gemma inspect --diff` is test_inspect_diff.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.config import PaliGemmaConfig, SiglipVisionConfig
from gemma.errors import GemmaError
from gemma.gm._proof import open_any
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors, tiny_config, write_tiny_gguf

BF16 = np.dtype(ml_dtypes.bfloat16)
TOWER = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
TEXT = tiny_config(
    "gemma3", query_pre_attn_scalar=None, num_hidden_layers=2, layer_pattern="LG", rope_scaling_factor=1.0
)
_SIDE = dataclasses.replace(
    tiny_config("gemma", num_hidden_layers=2), layer_pattern="G", sliding_window=None, flax_vocab_rows=None
)
PALI = PaliGemmaConfig(TOWER, _SIDE, 310, 320, projection_dim=72, hidden_size=72)
VISION = tiny_config("gemma3", num_hidden_layers=2, vision=TOWER, model_type="gemma3", mm_tokens_per_image=4)
VISION = dataclasses.replace(VISION, query_pre_attn_scalar=None, rope_scaling_factor=1.0)
FORMATS = ("safetensors", "gguf", "orbax", "ckpt", "sbs")


def values_of(config, seed=0) -> dict[str, np.ndarray]:
    """Numbers that bfloat16 holds, so that 1 + w and every float type are exact."""
    return {name: (np.round(a * 64) / 64).astype(np.float32) for name, a in random_tensors(config, seed).items()}


def written(path: Path, config, format: str, tokenizer=None, values=None, **options) -> Path:
    tensors = from_arrays(values_of(config) if values is None else values, config)
    if format == "orbax":
        from gemma.gm.ckpts._save import save_tensors

        save_tensors(path, tensors, config, tokenizer=tokenizer, **options)
    else:
        save(path, tensors, config, format=format, tokenizer=tokenizer, **options)
    return path


def read(path, config=None, **options) -> dict[str, np.ndarray]:
    with open_any(Path(path)) as opened:
        return {tensor.name: np.array(reader(np.float32)) for tensor, reader in load_tensors(opened, config, **options)}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def files_under(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny networks are compiled, not run for long."""
    old = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", old)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """320 pieces, as a GGUF holds them."""
    path = write_tiny_gguf(tmp_path_factory.mktemp("t") / "t.gguf", TEXT)
    with open_checkpoint(path) as opened:
        yield opened.tokenizer_source()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer):
    """The same text model in every format that holds it."""
    folder = tmp_path_factory.mktemp("sources")
    return {format: written(folder / format, TEXT, format, tokenizer) for format in FORMATS}


# ---- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_from_each_format_into_each(source, to, sources, cli, tmp_path):
    done = cli("convert", sources[source], tmp_path / "out", "--to", to, "--no-logits")
    assert done.code == 0 and done.err == "", done
    assert equal(read(tmp_path / "out", TEXT), values_of(TEXT))
    assert files_under(tmp_path) == {"out"} | {f"out/{name}" for name in files_under(tmp_path / "out")}
    with open_any(tmp_path / "out") as opened:
        said = opened.config()
        assert (said.num_hidden_layers, said.layers, said.rope_theta) == (2, TEXT.layers, TEXT.rope_theta)
        if source != "sbs" and to not in ("sbs",):
            assert opened.tokenizer_source() is not None, "the tokenizer travels with the weights"


@pytest.mark.parametrize("to", ["safetensors", "npz"])
@pytest.mark.parametrize("source", ["safetensors", "npz"])
def test_a_paligemma(source, to, cli, tmp_path):
    written(tmp_path / "in", PALI, source)
    done = cli("convert", tmp_path / "in", tmp_path / "out", "--to", to)
    assert done.code == 0, done.err
    assert equal(read(tmp_path / "out"), values_of(PALI))
    assert "no JAX network for a PaliGemma model; all values were" in done.out


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked", "kauldron"])
def test_layouts_of_orbax(layout, cli, sources, tmp_path):
    done = cli("convert", sources["gguf"], tmp_path / "o", "--to", "orbax", "--layout", layout, "--no-logits")
    assert done.code == 0, done.err
    assert equal(read(tmp_path / "o", TEXT), values_of(TEXT))
    done = cli("convert", tmp_path / "o", tmp_path / "back", "--to", "safetensors", "--no-logits")
    assert done.code == 0, done.err
    assert equal(read(tmp_path / "back"), values_of(TEXT))


def test_a_model_with_images(cli, tmp_path):
    """Whole where the format has a place for the tower; the decoder alone elsewhere, when it is asked for."""
    source = written(tmp_path / "in", VISION, "safetensors")
    for to in ("orbax", "ckpt"):
        done = cli("convert", source, tmp_path / to, "--to", to, "--no-logits")
        assert done.code == 0, done.err
        assert equal(read(tmp_path / to), values_of(VISION))
    whole = cli("convert", source, tmp_path / "x.gguf", "--to", "gguf", "--no-logits")
    assert whole.code == 2 and not (tmp_path / "x.gguf").exists()
    done = cli("convert", source, tmp_path / "x.gguf", "--to", "gguf", "--text-only", "--no-logits")
    assert done.code == 0, done.err
    found = read(tmp_path / "x.gguf")
    expected = {name: a for name, a in values_of(VISION).items() if not name.startswith(("vision", "mm"))}
    assert equal(found, expected)


def test_rows_of_the_embedding_without_a_piece(cli, tokenizer, tmp_path):
    """Published models with images have some; a GGUF has as many rows as pieces, and the report says so."""
    config = dataclasses.replace(TEXT, vocab_size=330)
    source = written(tmp_path / "in", config, "safetensors")
    piece_file = written(tmp_path / "t.gguf", TEXT, "gguf", tokenizer)
    with open_checkpoint(piece_file) as opened:
        assert len(opened.tokenizer_source().pieces) == 320
    from gemma._tokenizer_write import write_hf_files

    write_hf_files(tokenizer, source, 320)
    for options in ((), ("--quantize", "q8_0")):
        done = cli("convert", source, tmp_path / "x.gguf", "--to", "gguf", "--no-logits", "--force", *options)
        assert done.code == 0, done.err
        assert "10 rows of the embedding" in done.out
        with open_checkpoint(tmp_path / "x.gguf") as opened:
            assert opened.info("token_embd.weight").shape == (320, 72)


# ---- types --------------------------------------------------------------------------------------------------------------


WIDE = tiny_config(
    "gemma3", query_pre_attn_scalar=None, num_hidden_layers=2, hidden_size=256, intermediate_size=512,
    num_attention_heads=4, head_dim=64, rope_scaling_factor=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    return written(
        tmp_path_factory.mktemp("w") / "wide", WIDE, "safetensors", tokenizer, values=random_tensors(WIDE, 3)
    )


@pytest.mark.parametrize(
    ("to", "mix"),
    [("gguf", "q8_0"), ("gguf", "q4_k_m"), ("gguf", "q4_0"), ("gguf", "q6_k"), ("ckpt", "int8"), ("sbs", "sfp8")],
)
def test_quantizing(to, mix, wide, cli, tmp_path):
    """The error of each tensor that is reported is the one that is found here."""
    done = cli("convert", wide, tmp_path / "out", "--to", to, "--quantize", mix, "--json", "--no-logits")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    found, original = read(tmp_path / "out", WIDE), random_tensors(WIDE, 3)
    assert {t["name"] for t in data["tensors"]} == original.keys()
    for t in data["tensors"]:
        delta = np.abs(found[t["name"]].astype(np.float64) - original[t["name"]])
        assert t["max_abs"] == pytest.approx(delta.max(), rel=1e-6, abs=1e-12), t["name"]
        assert t["rmse"] == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-6, abs=1e-12), t["name"]
        assert (t["max_abs"] > 1e-6) == (original[t["name"]].ndim > 1)  # 1 + w rounds a norm's last bit
    assert sum(data["types"].values()) > 10 and data["logits"] is None


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(to, dtype, wide, cli, tmp_path):
    done = cli("convert", wide, tmp_path / "out", "--to", to, "--dtype", dtype, "--no-logits")
    if (to, dtype) == ("sbs", "float16"):
        assert done.code == 2 and "float16" in done.err and not (tmp_path / "out").exists()
        return
    assert done.code == 0, done.err
    kind = BF16 if dtype == "bfloat16" else np.dtype(np.float16)
    found = read(tmp_path / "out", WIDE)
    for name, array in random_tensors(WIDE, 3).items():
        exact = to == "gguf" and array.ndim == 1  # norms of a GGUF are float32 1 + w
        wanted = (array + np.float32(1)) - np.float32(1) if exact else array.astype(kind).astype(np.float32)
        assert np.array_equal(found[name], wanted), name


@pytest.mark.parametrize("kind", ["npz", "gguf"])
def test_an_importance_matrix(kind, wide, cli, tmp_path):
    """What it says counts: other bytes than without it, a smaller error where it is large."""
    from gemma.testing import write_gguf

    names = {"blk.0.ffn_down.weight": 512, "blk.1.attn_q.weight": 256}
    means = {name: np.where(np.arange(n) < 32, 1e4, 1e-3).astype(np.float32) for name, n in names.items()}
    file = tmp_path / f"im.{kind}"
    if kind == "npz":
        np.savez(file, **means)
    else:  # llama.cpp's: sums of squares, and how many were added
        arrays = {f"{name}.in_sum2": (m * 7)[None] for name, m in means.items()}
        arrays |= {f"{name}.counts": np.array([[7.0]], np.float32) for name in names}
        write_gguf(file, {"general.type": "imatrix"}, arrays)
    common = ("convert", wide, "--to", "gguf", "--quantize", "q4_0", "--no-logits")
    assert cli(*common, tmp_path / "plain.gguf").code == 0
    done = cli(*common, tmp_path / "aided.gguf", "--imatrix", file)
    assert done.code == 0, done.err
    original = random_tensors(WIDE, 3)
    plain, aided = read(tmp_path / "plain.gguf"), read(tmp_path / "aided.gguf")
    for name in ("layers.0.mlp.down", "layers.1.attn.q"):
        errors = [np.square(a[name] - original[name])[:, :32].sum() for a in (plain, aided)]
        assert errors[1] < errors[0], name
    assert np.array_equal(plain["layers.0.attn.k"], aided["layers.0.attn.k"])


def test_an_importance_matrix_of_another_model(wide, cli, tmp_path):
    for arrays in ({"blk.9.ffn_down.weight": np.ones(512, "f4")}, {"blk.0.ffn_down.weight": np.ones(7, "f4")}):
        np.savez(tmp_path / "im.npz", **arrays)
        arguments = (wide, tmp_path / "x.gguf", "--to", "gguf", "-q", "q4_0", "--imatrix", tmp_path / "im.npz")
        done = cli("convert", *arguments)
        assert done.code == 2 and "imatrix" in done.err and files_under(tmp_path) == {"im.npz"}


@pytest.mark.parametrize("counts", [0.0, float("nan"), None])
def test_an_importance_matrix_that_counts_nothing(counts, wide, cli, tmp_path):
    """A damaged one is refused: no division by zero into the weights."""
    from gemma.testing import write_gguf

    arrays = {"blk.0.ffn_down.weight.in_sum2": np.full((1, 512), np.inf if counts == 0.0 else 1.0, np.float32)}
    if counts is not None:
        arrays["blk.0.ffn_down.weight.counts"] = np.array([[counts]], np.float32)
    write_gguf(tmp_path / "im.gguf", {"general.type": "imatrix"}, arrays)
    arguments = (wide, tmp_path / "x.gguf", "--to", "gguf", "-q", "q4_0", "--imatrix", tmp_path / "im.gguf")
    done = cli("convert", *arguments)
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "x.gguf").exists()


# ---- logits and the report ----------------------------------------------------------------------------------------------


def test_the_report_of_an_exact_conversion(sources, cli, tmp_path):
    done = cli("convert", sources["safetensors"], tmp_path / "x.gguf", "--to", "gguf")
    assert done.code == 0 and done.err == ""
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    count = len(values_of(TEXT))
    assert ["values", str(count), "of", str(count), "tensors"] in [line[:5] for line in lines]
    assert any(line[:4] == ["logits", "equal,", "bit", "for"] for line in lines), done.out
    assert str(tmp_path / "x.gguf") in done.out and "largest changes" not in done.out and len(lines) < 15


def test_the_report_of_a_quantization(wide, cli, tmp_path):
    done = cli("convert", wide, tmp_path / "x.gguf", "--to", "gguf", "-q", "q4_k_m", "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    logits = data["logits"]
    assert logits["tokens"] > 5 and 0 < logits["max_abs"] < 10 and 0 <= logits["kl"] < 1


def test_the_page_of_a_quantization(wide, cli, tmp_path, monkeypatch):
    """Both models are asked; here by a double, whose second answer differs at one place."""
    from gemma.gm import _prompt_logits

    answers = [np.zeros((7, 320), np.float32), np.zeros((7, 320), np.float32)]
    answers[0][:, 5], answers[1][:, 5], answers[1][6, 9] = 1.0, 1.0, 1.25
    given = iter(answers)
    monkeypatch.setattr(_prompt_logits, "prompt_logits", lambda path, config, ids: next(given))
    page = cli("convert", wide, tmp_path / "x.gguf", "--to", "gguf", "-q", "q4_k_m").out
    assert "largest changes" in page and len(page.splitlines()) < 25
    assert "at most 1.25 apart on" in page and "same arg-max at 6 of" in page


def test_orbax_logits_in_and_out(sources, cli, tmp_path):
    """From a source that only JAX reads, to a file that it does not."""
    done = cli("convert", sources["orbax"], tmp_path / "out", "--to", "ckpt")
    assert done.code == 0, done.err
    assert "equal, bit for bit" in done.out


def test_a_model_without_tokenizer_is_asked_made_up_ids(cli, tmp_path):
    source = written(tmp_path / "in", TEXT, "safetensors")
    done = cli("convert", source, tmp_path / "out", "--to", "safetensors", "--dtype", "float32")
    assert done.code == 0 and "equal, bit for bit, on 12 tokens" in done.out


# ---- what lies beside ---------------------------------------------------------------------------------------------------


def test_a_configuration_and_a_tokenizer_from_elsewhere(cli, tokenizer, tmp_path):
    folder = written(tmp_path / "in", TEXT, "ckpt", tokenizer)
    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            os.rename(folder / name, tmp_path / name)
    alone = cli("convert", folder, tmp_path / "x.gguf", "--to", "gguf", "--no-logits")
    assert alone.code == 2 and "config.json" in alone.err and not (tmp_path / "x.gguf").exists()
    [file] = [tmp_path / name for name in ("tokenizer.model", "tokenizer.json") if (tmp_path / name).exists()][:1]
    done = cli(
        "convert", folder, tmp_path / "x.gguf", "--to", "gguf",
        "--config", tmp_path / "config.json", "--tokenizer", file, "--no-logits",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert equal(read(tmp_path / "x.gguf"), values_of(TEXT))
    with open_checkpoint(tmp_path / "x.gguf") as opened:
        assert len(opened.tokenizer_source().pieces) == 320


def test_a_configuration_of_another_model_is_refused(sources, cli, tmp_path):
    from gemma.hf_config import write_config

    other = write_config(dataclasses.replace(TEXT, num_hidden_layers=3))
    (tmp_path / "config.json").write_text(json.dumps(other))
    done = cli("convert", sources["ckpt"], tmp_path / "out", "--to", "gguf", "--config", tmp_path / "config.json")
    assert done.code == 2 and "model.layers.2" in done.err and files_under(tmp_path) == {"config.json"}


# ---- refusing -----------------------------------------------------------------------------------------------------------


def test_an_existing_destination(sources, cli, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"precious")
    done = cli("convert", sources["ckpt"], tmp_path / "x.gguf", "--to", "gguf", "--no-logits")
    assert done.code == 2 and "already exists" in done.err and (tmp_path / "x.gguf").read_bytes() == b"precious"
    done = cli("convert", sources["ckpt"], tmp_path / "x.gguf", "--to", "gguf", "--no-logits", "--force")
    assert done.code == 0, done.err
    assert equal(read(tmp_path / "x.gguf"), values_of(TEXT)) and files_under(tmp_path) == {"x.gguf"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("precious")
    done = cli("convert", sources["ckpt"], tmp_path / "folder", "--to", "safetensors", "--no-logits")
    assert done.code == 2 and (tmp_path / "folder/mine").exists()
    done = cli("convert", sources["ckpt"], tmp_path / "folder", "--to", "gguf", "--no-logits", "--force")
    assert done.code == 2 and (tmp_path / "folder/mine").exists(), "a file never replaces a folder"


def test_source_and_destination_are_the_same(sources, cli, tmp_path):
    """Under any name; and a folder that holds the source is not replaced by its conversion."""
    model = written(tmp_path / "m.gguf", TEXT, "gguf")
    before = model.read_bytes()
    (tmp_path / "link.gguf").symlink_to(model)
    for destination in (model, tmp_path / "link.gguf", tmp_path / "x/../m.gguf"):
        done = cli("convert", model, destination, "--to", "gguf", "-q", "q8_0", "--no-logits", "--force")
        assert done.code == 2, destination
        assert model.read_bytes() == before
    folder = written(tmp_path / "folder", TEXT, "ckpt")
    kept = files_under(folder)
    for source in (folder, folder / "model.ckpt"):
        for to in ("safetensors", "ckpt", "orbax"):
            done = cli("convert", source, folder, "--to", to, "--no-logits", "--force")
            assert done.code == 2 and "source" in done.err, (source, to, done)
            assert files_under(folder) == kept and equal(read(folder), values_of(TEXT))
    done = cli("convert", folder, tmp_path, "--to", "ckpt", "--no-logits", "--force")
    assert done.code == 2 and folder.is_dir()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--to", "onnx"), "safetensors, gguf, ckpt, npz, sbs, orbax"),
        ((), "--to"),
        (("--to", "gguf", "-q", "q9_x"), "q4_k_m"),
        (("--to", "safetensors", "-q", "q8_0"), "quantize"),
        (("--to", "ckpt", "-q", "q8_0"), "int8"),
        (("--to", "sbs", "-q", "int8"), "sfp8"),
        (("--to", "npz"), "npz"),
        (("--to", "orbax", "-q", "q8_0"), "Orbax"),
        (("--to", "orbax", "--layout", "round"), "nested"),
        (("--to", "gguf", "--layout", "flat"), "layout"),
        (("--to", "gguf", "--dtype", "int8"), "float32"),
        (("--to", "orbax", "--dtype", "int8"), "float32"),
        (("--to", "orbax", "--dtype", "nonsense"), "float32"),
        (("--to", "gguf", "--dtype", "float16", "-q", "q8_0"), "quantize or dtype"),
        (("--to", "gguf", "--imatrix", "nowhere.npz"), "imatrix|nowhere"),
        (("--to", "gguf", "-q", "q4_0", "--imatrix", "nowhere.npz"), "nowhere.npz"),
        (("--to", "gguf", "--config", "nowhere.json"), "nowhere.json"),
        (("--to", "gguf", "--tokenizer", "nowhere.model"), "nowhere.model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_asked(arguments, text, sources, cli, tmp_path):
    import re

    done = cli("convert", sources["safetensors"], tmp_path / "out", *arguments, "--no-logits")
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
    assert re.search(text, done.err), done.err
    assert files_under(tmp_path) == set()


def test_places_that_cannot_be_written(sources, cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    done = cli("convert", sources["ckpt"], tmp_path / "file/out", "--to", "safetensors", "--no-logits")
    assert done.code == 2 and "file is not a folder" in done.err
    done = cli("convert", sources["ckpt"], tmp_path / "a\nb", "--to", "safetensors", "--no-logits")
    assert done.code == 2 and done.err.count("\n") == 1
    closed = tmp_path / "closed"
    closed.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: Path(path) != closed and real(path, *a, **k))
    done = cli("convert", sources["ckpt"], closed / "out", "--to", "safetensors", "--no-logits")
    assert done.code == 2 and "cannot be written" in done.err and files_under(tmp_path) == {"file", "closed"}


def test_a_full_disk(sources, cli, tmp_path, monkeypatch):
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    for to in ("gguf", "ckpt", "safetensors", "sbs"):
        done = cli("convert", sources["ckpt"], tmp_path / "out", "--to", to, "--no-logits")
        assert done.code == 2 and "space" in done.err and files_under(tmp_path) == set()


@pytest.mark.parametrize("kind", ["nothing", "text", "pickle", "empty folder", "half a file"])
def test_sources_that_are_none(kind, cli, sources, tmp_path):
    source = tmp_path / "source"
    if kind == "text":
        source.write_text("hello")
    elif kind == "pickle":
        source.write_bytes(b"\x80\x04cos\nsystem\n.")
    elif kind == "empty folder":
        source.mkdir()
    elif kind == "half a file":
        data = sources["gguf"].read_bytes()
        source.write_bytes(data[: len(data) // 2])
    before = files_under(tmp_path)
    done = cli("convert", source, tmp_path / "out", "--to", "ckpt")
    assert done.code == 2 and done.err.count("\n") == 1 and str(source) in done.err
    assert files_under(tmp_path) == before


def test_weights_that_are_no_numbers(cli, tmp_path):
    """Not carried over in silence."""
    values = values_of(TEXT)
    values["layers.1.mlp.up"][3, 5] = np.nan
    source = written(tmp_path / "in", TEXT, "safetensors", values=values, allow_nonfinite=True)
    with pytest.warns(UserWarning, match="NaN"):
        done = cli("convert", source, tmp_path / "out", "--to", "ckpt", "--no-logits")
    assert done.code == 2 and "layers.1.mlp.up" in done.err and not (tmp_path / "out").exists()


def test_values_too_large_for_the_type(cli, tmp_path):
    values = values_of(TEXT)
    values["layers.0.mlp.down"][0, 0] = 1e6
    source = written(tmp_path / "in", TEXT, "safetensors", values=values)
    with pytest.warns(UserWarning, match="infinite"):
        done = cli("convert", source, tmp_path / "out", "--to", "safetensors", "--dtype", "float16", "--no-logits")
    assert done.code == 2 and "layers.0.mlp.down" in done.err and not (tmp_path / "out").exists()


def test_without_mapping(sources, cli, tmp_path, monkeypatch):
    """--no-mmap: nothing is mapped, so a file that shrinks is an error and not a signal."""
    import mmap

    def refuse(*args, **kwargs):
        raise AssertionError("a file was mapped")

    monkeypatch.setattr(mmap, "mmap", refuse)
    source = written(tmp_path / "in", TEXT, "safetensors")
    done = cli("convert", source, tmp_path / "out", "--to", "ckpt", "--no-logits", "--no-mmap")
    assert done.code == 0, done.err


def test_an_interruption_leaves_nothing(sources, cli, tmp_path, monkeypatch):
    from gemma.cli import _convert

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_convert, "prove", stop)
    done = cli("convert", sources["gguf"], tmp_path / "out", "--to", "ckpt", "--no-logits")
    assert done.code == 130 and files_under(tmp_path) == set()


def test_convert_is_in_the_help(cli):
    assert "convert" in cli("--help").out
    text = cli("convert", "--help").out
    for word in ("--to", "--quantize", "--imatrix", "--text-only", "--force", "--no-logits", "gguf", "orbax", "sfp8"):
        assert word in text
    assert issubclass(GemmaError, Exception)
