# SPDX-License-Identifier: Apache-2.0
"""Every family written to safetensors and GGUF, in every dtype and mix, and read back: equal, or off by what was said."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from families import FAMILIES, WHOLE
from saving_models import MIXED, text_config, tiny_source

from gemma import weights
from gemma._quants_mixes import MIXES, plan
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.config import PRESETS, text_only
from gemma.errors import ConfigError, ShapeError
from gemma.quants import QuantType, quantize
from gemma.saving import ArrayReader, from_arrays, save
from gemma.testing import random_tensors, write_tiny_gguf

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
GGUF_FAMILIES = [name for name, formats in WHOLE.items() if "gguf" in formats and name != "embeddinggemma"]


def read_back(path, config=None, dtype=None) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {tensor.name: reader(dtype).copy() for tensor, reader in load_tensors(checkpoint, config)}


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


# --- safetensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors_hold_every_family(family, dtype, tmp_path):
    config = FAMILIES[family]
    if family == "embeddinggemma":  # config.json holds only windows that its class can compute
        config = dataclasses.replace(config, sliding_window=6)
    values = {name: x.astype(DTYPES[dtype]) for name, x in random_tensors(config).items()}
    report = save(tmp_path / "out", from_arrays(values, config), config, format="safetensors", max_shard_bytes=60_000)
    same(read_back(tmp_path / "out"), values)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = checkpoint.config()
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == weights.expected(config, "hf")
        assert [t.name for t in report.tensors] == list(weights.expected(config, "hf"))
    assert found == config
    names = {file.name for file in report.files}
    shards = sum(name.endswith(".safetensors") for name in names)
    assert {
        "config.json",
        "model.safetensors.index.json",
        f"model-00001-of-{shards:05d}.safetensors",
    } <= names
    pictures = {"preprocessor_config.json", "processor_config.json"} & names
    assert len(pictures) == (2 if "vision" in family or "paligemma" in family else 0)
    assert report.bytes == sum(file.stat().st_size for file in report.files)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_one_file_has_no_index(tmp_path):
    config = FAMILIES["gemma3"]
    report = save(tmp_path / "a/b", from_arrays(random_tensors(config), config), config, format="safetensors")
    assert {file.name for file in report.files} >= {"config.json", "model.safetensors"}
    assert not (tmp_path / "a/b/model.safetensors.index.json").exists() and report.types == {"F32": len(report.tensors)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_rounds_once_to_nearest_even(dtype, tmp_path):
    config = FAMILIES["gemma2"]
    values = random_tensors(config)
    for format, path in (("safetensors", tmp_path / "st"), ("gguf", tmp_path / "x.gguf")):
        save(path, from_arrays(values, config), config, format=format, dtype=DTYPES[dtype])
        found = read_back(path, config)
        for name, x in values.items():
            if format == "gguf" and x.ndim == 1:  # norms are 1 + w in float32
                assert np.array_equal(found[name], (x + np.float32(1)) - np.float32(1))
            else:
                assert np.array_equal(found[name], x.astype(DTYPES[dtype])), name


# --- GGUF


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_holds_every_text_family(family, tmp_path):
    config = FAMILIES[family]
    values = random_tensors(config)
    # what 1 + w holds, so that nothing is lost
    values = {name: (x + np.float32(1)) - np.float32(1) if x.ndim == 1 else x for name, x in values.items()}
    report = save(tmp_path / "x.gguf", from_arrays(values, config), config, format="gguf", tokenizer=tiny_source())
    same(read_back(tmp_path / "x.gguf"), values)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        found = checkpoint.config()
        assert found.layers == config.layers, "what a layer does"
        for field in ("vocab_size", "hidden_size", "rms_norm_eps", "tie_word_embeddings", "final_logit_softcapping"):
            assert getattr(found, field) == getattr(config, field)
        assert found.max_position_embeddings == config.max_position_embeddings
        source = checkpoint.tokenizer_source()
        assert source.pieces == tiny_source().pieces and source.special == tiny_source().special
        assert np.array_equal(source.scores, tiny_source().scores)
        assert np.array_equal(source.types, tiny_source().types) and source.flags == tiny_source().flags
    assert report.types == {t: n for t, n in report.types.items() if t == "F32"}


@pytest.mark.parametrize("preset", [name for name, c in PRESETS.items() if type(c).__name__ == "GemmaConfig"])
def test_the_metadata_of_every_preset_reads_as_the_preset(preset, tmp_path):
    """Header only: no tensor of a real size is made."""
    from gemma.formats import gguf_config, gguf_metadata
    from gemma.formats._source import Source
    from gemma.formats.gguf import Gguf
    from gemma.formats.gguf_write import TensorSpec, write_gguf

    config = PRESETS[preset]
    if not config.is_classic:
        with pytest.raises(ConfigError, match="Gemma 3n"):
            gguf_metadata.architecture_of(config)
        return
    if config.use_bidirectional_attention:
        with pytest.raises(ConfigError, match="bidirectional"):
            gguf_metadata.architecture_of(config)
        return
    config = dataclasses.replace(text_only(config), model_type=config.model_type)
    rows, path = config.vocab_size, tmp_path / "x.gguf"
    keys = gguf_metadata.config_metadata(config, rows=rows, name="x")
    assert not gguf_metadata.warnings(config), "llama.cpp runs every published model"
    with open(path, "wb") as file:  # a table of one column is enough to tell its rows
        table = TensorSpec("token_embd.weight", QuantType.BF16, (rows, 1))
        write_gguf(file, keys, [table], lambda spec: [np.zeros(spec.nbytes, np.uint8)])
    source = Source(path)
    found = gguf_config.read_gguf_config(Gguf(source))
    source.close()
    assert found.layers == config.layers and found.num_parameters == config.num_parameters
    assert found.max_position_embeddings == config.max_position_embeddings


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("name", MIXES)
def test_every_mix_is_off_by_exactly_the_quantization(name, family, tmp_path):
    config = text_config(family, MIXED, num_hidden_layers=3)
    values = random_tensors(config)
    report = save(tmp_path / "x.gguf", from_arrays(values, config), config, format="gguf", quantize=name)
    found, table = read_back(tmp_path / "x.gguf"), {t.name: t for t in weights.tensors(config)}
    types = plan(table.values(), name)
    said = {tensor.name: tensor for tensor in report.tensors}
    for canonical, x in values.items():
        type, line = types[canonical], said[table[canonical].slots["gguf"].name]
        assert line.type == type.name and line.shape == x.shape
        if x.ndim == 1:
            x = (x + np.float32(1)) - np.float32(1)
            assert line.max_error is None and np.array_equal(found[canonical], x)
            continue
        want = quantize(x, type).dequantize()
        assert np.array_equal(np.asarray(found[canonical], np.float32), want), canonical
        if not type.is_float:
            error = want.astype(np.float64) - x
            assert line.max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
            assert line.rmse == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4) and line.rmse > 0
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.metadata["general.file_type"] == MIXES[name].file_type


def test_an_importance_matrix_is_used_by_either_name(tmp_path):
    config = text_config("gemma3", num_hidden_layers=1)
    values, table = random_tensors(config), {t.name: t for t in weights.tensors(config)}
    name = "layers.0.mlp.up"
    importance = np.exp(np.random.default_rng(0).normal(0, 2, 256)).astype(np.float32)
    for key in (name, table[name].slots["gguf"].name):
        path = tmp_path / f"{key}.gguf"
        save(path, from_arrays(values, config), config, format="gguf", quantize="q4_k_m", imatrix={key: importance})
        found = read_back(path)
        want = quantize(values[name], QuantType.Q4_K, importance=importance).dequantize()
        assert np.array_equal(found[name], want)
        assert not np.array_equal(want, quantize(values[name], QuantType.Q4_K).dequantize())
        assert np.array_equal(
            found["layers.0.mlp.gate"], quantize(values["layers.0.mlp.gate"], QuantType.Q4_K).dequantize()
        )
    for imatrix, match in (({"blk.9.ffn_up.weight": importance}, "another model"), ({name: importance[1:]}, "255")):
        with pytest.raises(ShapeError, match=match):
            save(tmp_path / "no", from_arrays(values, config), config, format="gguf", quantize="q4_0", imatrix=imatrix)


def test_what_is_packed_keeps_its_bytes(tmp_path, monkeypatch):
    """GGUF to GGUF without a new mix changes nothing, and a tensor that has its type already is not packed twice."""
    monkeypatch.setattr("gemma._save_gguf._PIECE", 700)  # so that tensors are handed on in many pieces
    config = text_config("gemma3")
    write_tiny_gguf(tmp_path / "a.gguf", config, types="Q8_0")
    with open_checkpoint(tmp_path / "a.gguf") as source:
        for name, quantized in (("b", None), ("c", "q8_0")):
            report = save(
                tmp_path / f"{name}.gguf",
                load_tensors(source),
                config,
                format="gguf",
                tokenizer=source.tokenizer_source(),
                quantize=quantized,
            )
            assert all(tensor.max_error is None for tensor in report.tensors)
            with open_checkpoint(tmp_path / f"{name}.gguf") as copy:
                assert {n: i.dtype for n, i in copy.tensors.items()} == {n: i.dtype for n, i in source.tensors.items()}
                assert all(np.array_equal(copy.raw(n), source.raw(n)) for n in source.tensors)
                assert copy.metadata["general.file_type"] == MIXES["q8_0"].file_type
        save(tmp_path / "st", load_tensors(source), config, format="safetensors")
    with open_checkpoint(tmp_path / "st") as floats:
        assert {info.dtype for info in floats.tensors.values()} == {"F32"}
        report = save(tmp_path / "d.gguf", load_tensors(floats), config, format="gguf", quantize="q8_0")
    assert max(tensor.max_error or 0 for tensor in report.tensors) < 2e-3  # half a step of the largest block at most


def test_rows_without_a_piece_are_left_out(tmp_path):
    """Gemma 3's published table has 64 rows more than its vocabulary; llama.cpp wants as many rows as pieces."""
    config = text_config("gemma3", num_hidden_layers=1, vocab_size=384)
    values = random_tensors(config)
    for quantized in (None, "q8_0"):
        report = save(
            tmp_path / "x.gguf",
            from_arrays(values, config),
            config,
            format="gguf",
            tokenizer=tiny_source(320),
            quantize=quantized,
            replace=True,
        )
        assert report.notes == ("64 rows of the embedding without a piece are left out",)
        with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
            assert checkpoint.config().vocab_size == 320 == len(checkpoint.tokenizer_source().pieces)
            table = checkpoint.read("token_embd.weight", np.float32)
        want = values["embed"][:320] if quantized is None else quantize(values["embed"][:320], QuantType.Q8_0)
        assert np.array_equal(table, want if quantized is None else want.dequantize())


def test_what_llama_cpp_would_compute_differently_is_noted(tmp_path):
    odd = text_config("gemma2", query_pre_attn_scalar=18.0)
    report = save(tmp_path / "x.gguf", from_arrays(random_tensors(odd), odd), odd, format="gguf")
    assert len(report.notes) == 1 and "scales queries by 0.125" in report.notes[0] and "0.235702" in report.notes[0]
    untied = text_config("gemma2", tie_word_embeddings=False)
    report = save(tmp_path / "y.gguf", from_arrays(random_tensors(untied), untied), untied, format="gguf")
    assert len(report.notes) == 1 and "its own head" in report.notes[0]


def test_odd_layer_patterns_travel(tmp_path):
    for pattern in ("LLG", "GL", "LLGGL", "G", "L"):
        config = text_config("gemma3", num_hidden_layers=5, layer_pattern=pattern)
        save(
            tmp_path / "x.gguf",
            from_arrays(random_tensors(config), config),
            config,
            format="gguf",
            replace=True,
            metadata={"general.license": "gemma", "general.name": "odd"},
        )
        with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
            assert [s.attention for s in checkpoint.config().layers] == [s.attention for s in config.layers], pattern
            assert checkpoint.metadata["general.license"] == "gemma" and checkpoint.metadata["general.name"] == "odd"


# --- the engine


def test_progress_counts_the_bytes_of_the_tensors(tmp_path):
    config = text_config("gemma")
    for format in ("safetensors", "gguf"):
        seen = []
        report = save(
            tmp_path / format,
            from_arrays(random_tensors(config), config),
            config,
            format=format,
            progress=lambda *counts, seen=seen: seen.append(counts),
        )
        total = sum(tensor.nbytes for tensor in report.tensors)
        assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) == len(report.tensors) + 1
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_one_array_is_in_memory_at_a_time(tmp_path):
    """Readers are asked in turn, and each is let go before the next: `release` follows its own call."""
    config, log = FAMILIES["gemma3"], []

    class Reader(ArrayReader):
        def __init__(self, name, array):
            super().__init__(array)
            self.name = name

        def __call__(self, dtype=None):
            log.append(("read", self.name))
            return super().__call__(dtype)

        def release(self):
            log.append(("release", self.name))

    tensors = [(t, Reader(t.name, r._values)) for t, r in from_arrays(random_tensors(config), config)]
    for format in ("safetensors", "gguf"):
        log.clear()
        save(tmp_path / format, tensors, config, format=format)
        assert log == [(what, t.name) for t, _ in tensors for what in ("read", "release")]
