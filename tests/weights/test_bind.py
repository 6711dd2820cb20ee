# SPDX-License-Identifier: Apache-2.0
"""Binding is strict: all that is missing, unexpected or misshaped in one error; short allow-lists."""

from __future__ import annotations

import dataclasses
import re

import pytest
from families import FAMILIES

from gemma.config import PRESETS, text_only
from gemma.errors import ConfigError, WeightsMismatch
from gemma.weights import bind, expected, tensors

GEMMA3 = FAMILIES["gemma3"]


def names_of(config, format="hf", **extra):
    return expected(config, format) | extra


def refused(names, config, format="hf", **options) -> WeightsMismatch:
    with pytest.raises(WeightsMismatch) as caught:
        bind(names, config, format=format, path="some/file", **options)
    assert str(caught.value).startswith("some/file: its tensors do not fit the configuration.")
    return caught.value


def test_everything_wrong_is_listed_at_once():
    names = names_of(GEMMA3)
    del names["model.layers.0.mlp.up_proj.weight"], names["model.norm.weight"]
    names |= {"model.layers.1.self_attn.k_proj.weight": (47, 72), "model.layers.2.self_attn.q_norm.weight": (1, 24)}
    names |= {"surprise": (1,), "model.layers.3.mlp.up_proj.weight": (100, 72), "vision_tower.x": (2,)}
    error = refused(names, GEMMA3)
    assert error.missing == ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    assert error.unexpected == ("surprise", "model.layers.3.mlp.up_proj.weight", "vision_tower.x")
    assert error.misshaped == (
        "model.layers.1.self_attn.k_proj.weight: expected (48, 72), got (47, 72)",
        "model.layers.2.self_attn.q_norm.weight: expected (24,), got (1, 24)",
    )
    for line in (*error.missing, *error.unexpected, *error.misshaped):
        assert line in str(error)


@pytest.mark.parametrize(
    "name, format", [("gemma", "flax"), ("gemma", "ckpt"), ("paligemma", "npz"), ("gemma", "gguf")]
)
def test_each_name_is_needed_and_each_shape_checked(name, format):
    config = FAMILIES[name]
    for array, shape in expected(config, format).items():
        names = expected(config, format)
        del names[array]
        error = refused(names, config, format)
        assert error.missing == (array,) and not error.unexpected and not error.misshaped  # a fused array once
        error = refused(expected(config, format) | {array: (*shape, 1)}, config, format)
        assert error.misshaped == (f"{array}: expected {shape}, got {(*shape, 1)}",) and not error.missing


def test_unknown_format():
    with pytest.raises(ConfigError, match="format: expected one of hf, flax"):
        bind({}, GEMMA3, format="onnx", path="x")


def test_an_empty_file_misses_everything():
    error = refused({}, GEMMA3)
    assert error.missing == tuple(t.slots["hf"].name for t in tensors(GEMMA3)) and not error.hint


# ---- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["model.", "", "language_model.model.", "model.language_model.", "language_model."])
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "embeddinggemma"])
def test_text_prefixes(root, name):
    config = FAMILIES[name]
    home = "" if name == "embeddinggemma" else "model."
    names = {root + tail.removeprefix(home): shape for tail, shape in expected(config, "hf").items()}
    found = bind(names, config, format="hf", path="x")
    assert {places[0].name for places in found.values()} == set(names)


@pytest.mark.parametrize("text", ["model.language_model.", "language_model.model.", "language_model."])
@pytest.mark.parametrize("tower", ["model.vision_tower.", "vision_tower.vision_model.", "vision_tower."])
@pytest.mark.parametrize("projector", ["model.multi_modal_projector.", "multi_modal_projector."])
@pytest.mark.parametrize("name", ["gemma3-vision", "paligemma"])
def test_multimodal_prefixes(text, tower, projector, name):
    roots = {"model.language_model.": text, "model.vision_tower.": tower, "model.multi_modal_projector.": projector}
    config, names = FAMILIES[name], {}
    for tail, shape in expected(config, "hf").items():
        root = next(root for root in roots if tail.startswith(root))
        names[roots[root] + tail.removeprefix(root)] = shape
    assert {places[0].name for places in bind(names, config, format="hf", path="x").values()} == set(names)


def test_two_prefixes_at_once_are_not_merged():
    names = names_of(GEMMA3)
    moved = "model.layers.1.mlp.up_proj.weight"
    names["language_model." + moved] = names.pop(moved)
    error = refused(names, GEMMA3)
    assert error.missing == (moved,) and error.unexpected == ("language_model." + moved,)
    twice = names_of(GEMMA3) | {"embed_tokens.weight": (320, 72)}
    assert refused(twice, GEMMA3).unexpected == ("embed_tokens.weight",)


def test_a_missing_embedding_is_missing_under_the_prefix_of_the_rest():
    names = {"language_model." + name: shape for name, shape in expected(GEMMA3, "hf").items()}
    del names["language_model.model.embed_tokens.weight"]
    assert refused(names, GEMMA3).missing == ("language_model.model.embed_tokens.weight",)


def test_npz_without_params():
    config = FAMILIES["paligemma"]
    names = {name.removeprefix("params/"): shape for name, shape in expected(config, "npz").items()}
    assert len(bind(names, config, format="npz", path="x")) == len(tensors(config))


# ---- vocabulary rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, format, rows",
    [
        ("gemma2_2b", "flax", 256_000),
        ("gemma2_2b", "hf", 256_128),
        ("gemma3_4b", "hf", 262_144),
        ("gemma3_4b", "flax", 262_208),
        ("gemma3_4b", "ckpt", 262_208),
        ("paligemma_3b_224", "npz", 257_216),
        ("paligemma2_3b_224", "hf", 257_152),
        ("t5gemma_2b_2b", "hf", 256_128),
    ],
)
def test_published_row_counts_are_allowed_and_told(preset, format, rows):
    config = PRESETS[preset]
    names = expected(config, format)
    tables = [t for t in tensors(config) if t.axes[0] == "V"]
    for tensor in tables:
        slot = tensor.slots[format]
        names[slot.name] = (rows, slot.shape[1])
    found = bind(names, config, format=format, path="x")
    for tensor in tables:
        assert found[tensor.name][0].shape[0] == rows
    for wrong in (rows + 1, 1, 300_000):
        bad = names | {tables[0].slots[format].name: (wrong, tables[0].shape[1])}
        assert len(refused(bad, config, format).misshaped) == 1


def test_one_row_more_or_a_narrower_table_is_misshaped():
    for shape in ((321, 72), (319, 72), (320, 71), (320,), (72, 320)):
        error = refused(names_of(GEMMA3) | {"model.embed_tokens.weight": shape}, GEMMA3)
        assert error.misshaped == (f"model.embed_tokens.weight: expected (320, 72), got {shape}",)


# ---- what may stand there besides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, format, copy, tied",
    [
        ("gemma3", "hf", "lm_head.weight", "embed"),
        ("gemma3-vision", "hf", "language_model.lm_head.weight", "embed"),
        ("gemma3", "gguf", "output.weight", "embed"),
        ("t5gemma", "hf", "lm_head.out_proj.weight", "decoder.embed"),
        ("paligemma", "hf", "lm_head.weight", "embed"),
    ],
)
def test_a_tied_head_is_told_as_a_copy(name, format, copy, tied):
    config = FAMILIES[name]
    names = expected(config, format)
    slot = {t.name: t.slots[format] for t in tensors(config)}[tied] if name != "gemma3-vision" else None
    shape = (320, 72) if slot is None else slot.shape
    found = bind(names | {copy: shape}, config, format=format, path="x")
    first, second = found[tied]
    assert (second.name, second.copy, first.copy) == (copy, True, False)
    assert all(len(places) == 1 for other, places in found.items() if other != tied)
    assert refused(names | {copy: (321, 72)}, config, format).misshaped == (
        f"{copy}: expected {shape} (a copy of {first.name}), got (321, 72)",
    )


def test_an_untied_head_is_a_tensor_and_its_absence_an_error():
    config = FAMILIES["gemma2-untied"]
    for format, name in (("hf", "lm_head.weight"), ("gguf", "output.weight")):
        names = expected(config, format)
        found = bind(names, config, format=format, path="x")
        assert found["head"][0].name == name and len(found["embed"]) == 1
        del names[name]
        assert refused(names, config, format).missing == (name,)
    for format in ("flax", "ckpt"):
        tied = expected(dataclasses.replace(config, tie_word_embeddings=True), format)
        error = refused(tied, config, format)
        assert error.missing == (f"head (has no name in the format {format})",)


@pytest.mark.parametrize(
    "format, name",
    [
        ("hf", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("hf", "model.rotary_emb_local.inv_freq"),
        ("hf", "vision_tower.vision_model.embeddings.position_ids"),
        ("gguf", "rope_freqs.weight"),
        ("ckpt", "freqs_cis"),
        ("ckpt", "local_freqs_cis"),
        ("ckpt", "global_freqs_cis"),
        ("ckpt", "siglip_vision_model.position_ids"),
    ],
)
def test_tables_without_weights_are_passed_over(format, name):
    bind(names_of(GEMMA3, format) | {name: (64,)}, GEMMA3, format=format, path="x")
    for other in {"hf", "gguf", "ckpt", "flax"} - {format}:
        assert refused(names_of(GEMMA3, other) | {name: (64,)}, GEMMA3, other).unexpected == (name,)


@pytest.mark.parametrize(
    "format, name",
    [
        ("hf", "model.layers.0.self_attn.rotary_emb.inv_freq2"),
        ("hf", "model.layers.0.mlp.inv_freq"),
        ("hf", "model.position_ids"),
        ("hf", "lm_head.bias"),
        ("gguf", "rope_freqs.bias"),
        ("gguf", "rope_factors_long.weight"),
        ("ckpt", "xfreqs_cis"),
        ("ckpt", "model.freqs_cis"),
        ("flax", "lm_head"),
    ],
)
def test_lookalikes_are_not(format, name):
    assert refused(names_of(GEMMA3, format) | {name: (64,)}, GEMMA3, format).unexpected == (name,)


# ---- text only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "flax", "ckpt", "gguf"])
def test_text_only(format):
    config = FAMILIES["gemma3-vision"]
    names = expected(config, format)
    for its in (config, text_only(config)):
        found = bind(names, its, format=format, path="x", text_only=True)
        assert list(found) == [t.name for t in tensors(text_only(config))]
        assert refused(names | {"surprise": (1,)}, its, format, text_only=True).unexpected == ("surprise",)
    text = [name for name in names if not re.search("vision|mm_|multi_modal", name)]
    names.pop(text[-1])
    assert refused(names, config, format, text_only=True).missing == (text[-1],)


def test_a_text_format_says_how_to_read_it():
    error = refused(expected(FAMILIES["gemma3-vision"], "gguf"), FAMILIES["gemma3-vision"], "gguf")
    assert "vision.pos (has no name in the format gguf)" in error.missing
    assert error.hint == "a file of the format gguf holds the text model only: pass text_only=True to read just that"


# ---- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "flax", "gguf", "ckpt"])
@pytest.mark.parametrize(
    "file, config, hint",
    [
        ("gemma2", "gemma", "look like Gemma 2, but the configuration is of Gemma 1"),
        ("gemma", "gemma2", "look like Gemma 1, but the configuration is of Gemma 2"),
        ("gemma3", "gemma2", "look like Gemma 3, but the configuration is of Gemma 2"),
        ("gemma2", "gemma3", "look like Gemma 2, but the configuration is of Gemma 3"),
    ],
)
def test_hints_name_the_generation(format, file, config, hint):
    assert hint in refused(expected(FAMILIES[file], format), FAMILIES[config], format).hint


def test_other_hints():
    deeper = dataclasses.replace(GEMMA3, num_hidden_layers=5)
    assert refused(names_of(deeper), GEMMA3).hint == "hint: the file has 5 layers, the configuration 3"
    assert "T5Gemma" in refused(names_of(FAMILIES["t5gemma"]), FAMILIES["gemma2"]).hint
    whole = FAMILIES["gemma3-vision"]
    assert "pass text_only=True" in refused(names_of(whole), text_only(whole)).hint
    nano = names_of(GEMMA3) | {"model.layers.0.altup.correction_coefs": (4, 4)}
    assert "Gemma 3n or 4" in refused(nano, GEMMA3).hint
    assert refused(names_of(GEMMA3) | {"surprise": (1,)}, GEMMA3).hint == ""


def test_a_model_of_another_size_is_all_misshaped():
    wide = dataclasses.replace(GEMMA3, hidden_size=80)
    error = refused(names_of(wide), GEMMA3)
    assert not error.missing and not error.unexpected
    assert len(error.misshaped) == sum("D" in t.axes for t in tensors(GEMMA3))
