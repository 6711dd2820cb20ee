# SPDX-License-Identifier: Apache-2.0
"""The presets against the published numbers, typed a second time, and the derived per-layer spec."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from gemma.config import ALIASES, PRESETS, GemmaConfig, preset, preset_name, text_only
from gemma.errors import ConfigError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# Parameters of the published Hugging Face checkpoints, a tied head counted once.
PUBLISHED = {
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
    "embeddinggemma_300m": 302_863_104,
    "gemma3n_e2b": 4_435_182_688,
    "gemma3n_e4b": 6_835_235_568,
    "gemma4_e2b": 4_628_569_344 + 35,  # one scale for each layer, which transformers keeps as a buffer
    "gemma4_e4b": 7_463_013_376 + 42,
    "gemma4_31b": 30_697_345_280 + 60,
    "gemma4_26b_a4b": 25_233_141_760 + 30,
    "paligemma_3b_224": 2_923_466_480,
    "paligemma_3b_448": 2_924_351_216,
    "paligemma_3b_896": 2_927_890_160,
    "paligemma2_3b_224": 3_032_242_416,
    "paligemma2_10b_224": 9_662_638_832,
    "paligemma2_28b_224": 27_650_487_024,
    "t5gemma_s_s": 312_517_632,
    "t5gemma_b_b": 591_490_560,
    "t5gemma_l_l": 1_241_761_792,
    "t5gemma_ml_ml": 2_200_345_344,
    "t5gemma_xl_xl": 3_766_980_608,
    "t5gemma_2b_2b": 5_596_853_760,
    "t5gemma_9b_2b": 12_292_375_296,
    "t5gemma_9b_9b": 20_333_401_088,
    "t5gemma2_270m_270m": 786_029_296,
    "t5gemma2_1b_1b": 2_115_977_456,
    "t5gemma2_4b_4b": 7_508_928_880,
}
# name: (layers, local layers, window, local base, global base, global scale, query scale, attention cap)
LAYERS = {
    "gemma_2b": (18, 0, None, None, 1e4, 1.0, 256**-0.5, None),
    "gemma_7b": (28, 0, None, None, 1e4, 1.0, 256**-0.5, None),
    "gemma2_2b": (26, 13, 4096, 1e4, 1e4, 1.0, 256**-0.5, 50.0),
    "gemma2_9b": (42, 21, 4096, 1e4, 1e4, 1.0, 256**-0.5, 50.0),
    "gemma2_27b": (46, 23, 4096, 1e4, 1e4, 1.0, 144**-0.5, 50.0),
    "gemma3_270m": (18, 15, 512, 1e4, 1e6, 1.0, 256**-0.5, None),
    "gemma3_1b": (26, 22, 512, 1e4, 1e6, 1.0, 256**-0.5, None),
    "gemma3_4b": (34, 29, 1024, 1e4, 1e6, 8.0, 256**-0.5, None),
    "gemma3_12b": (48, 40, 1024, 1e4, 1e6, 8.0, 256**-0.5, None),
    "gemma3_27b": (62, 52, 1024, 1e4, 1e6, 8.0, 168**-0.5, None),
    "embeddinggemma_300m": (24, 20, 512, 1e4, 1e6, 1.0, 256**-0.5, None),
}


def test_every_total_is_checked():
    sizes = {re.sub("_(448|896)$", "_224", name) for name in PRESETS}
    assert sizes == {re.sub("_(448|896)$", "_224", name) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_by_formula(name):
    assert PRESETS[name].num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_spec(name):
    layers, local, window, local_base, global_base, scale, query_scale, cap = LAYERS[name]
    specs = PRESETS[name].layers
    assert [s.index for s in specs] == list(range(layers)) == [s.kv_source for s in specs]
    locals_ = [s for s in specs if s.attention == "local"]
    globals_ = [s for s in specs if s.attention == "global"]
    assert (len(locals_), len(globals_)) == (local, layers - local)
    assert {(s.window, s.rope_base, s.rope_scale) for s in locals_} == ({(window, local_base, 1.0)} if local else set())
    assert {(s.window, s.rope_base, s.rope_scale) for s in globals_} == {(None, global_base, scale)}
    assert {s.query_scale for s in specs} == {query_scale} and {s.attn_softcap for s in specs} == {cap}
    assert {s.qk_norm for s in specs} == {name.startswith(("gemma3", "embedding"))}


@pytest.mark.parametrize("name, first_global, last", [("gemma2_2b", 1, "global"), ("gemma3_1b", 5, "local")])
def test_where_the_global_layers_are(name, first_global, last):
    """Gemma 2 begins with a local layer; the last two layers of Gemma 3 1B are local."""
    kinds = [s.attention for s in PRESETS[name].layers]
    assert kinds.index("global") == first_global and kinds[-1] == last


def test_cache_bytes_are_those_of_the_ring():
    config = PRESETS["gemma3_270m"]
    for length in (1, 511, 512, 513, 32_768):
        expected = sum(min(length, 512 if s.attention == "local" else length) for s in config.layers) * 2 * 256 * 2
        assert config.cache_bytes(length) == expected


@pytest.mark.parametrize(
    "spelled, name",
    [
        ("Gemma-3-1B", "gemma3_1b"),
        ("gemma-2-9b", "gemma2_9b"),
        ("codegemma_7b", "gemma_7b"),
        (" gemma_2b ", "gemma_2b"),
    ],
)
def test_spellings(spelled, name):
    assert preset_name(spelled) == name and preset(spelled) is PRESETS[name]


def test_aliases_lead_somewhere():
    assert set(ALIASES.values()) <= set(PRESETS) and not set(ALIASES) & set(PRESETS)


def test_unknown_name_says_what_is_near():
    with pytest.raises(ConfigError, match="unknown model size 'gemma3_2b': did you mean gemma"):
        preset("gemma3_2b")


def test_unknown_field_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="unknown field hiden_size; the fields are: vocab_size, hidden_size"):
        GemmaConfig.from_dict(dict(hiden_size=8))


def test_text_only_drops_just_the_tower():
    config = PRESETS["gemma3_4b"]
    text = text_only(config)
    tower = config.vision.num_parameters + 1152 + 1152 * 2560
    assert text.vision is None and text.layers == config.layers
    assert config.num_parameters - text.num_parameters == tower == 416_866_032 + 2_950_272


def test_configuration_loads_no_framework():
    code = "import gemma.config, gemma.hf_config, gemma.weights._table, sys, json; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"jax", "torch", "flax", "transformers", "tensorflow"} & set(loaded)


def test_generated_pages_are_current(capsys):
    spec = importlib.util.spec_from_file_location("gen_docs", REPOSITORY / "scripts/gen_docs.py")
    gen_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gen_docs)
    stale = gen_docs.main(["--check"])
    assert not stale, f"run `python scripts/gen_docs.py`:\n{capsys.readouterr().out}"
