"""Every family in every format: written, read back to the byte, loaded into the networks, and carried round all formats.

The cells of docs/formats.md are the results of these tests (and of those elsewhere that are marked `converts`).
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from gemma import weights
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5GemmaConfig
from gemma.errors import ConfigError, WeightsMismatch
from gemma.gm._proof import open_any
from gemma.gm.ckpts import load_params
from gemma.gm.ckpts._save import save_tensors
from gemma.saving import FORMATS, from_arrays, save
from gemma.testing import random_tensors, tiny_config

# Sizes that differ from one another, so that no transposition passes unseen; fewer layers than the pattern has letters
# would leave one kind of attention out.
TOWER = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
_TEXT1 = tiny_config("gemma", num_hidden_layers=2, flax_vocab_rows=384)
_TEXT2 = tiny_config("gemma2", num_hidden_layers=2, flax_vocab_rows=384, query_pre_attn_scalar=24.0)
_SIDE = dict(num_hidden_layers=2, model_type="t5_gemma_module")


def _paligemma(text: GemmaConfig) -> PaliGemmaConfig:
    text = dataclasses.replace(text, layer_pattern="G", sliding_window=None, flax_vocab_rows=None)
    width = text.hidden_size
    return PaliGemmaConfig(TOWER, text, 310, text.vocab_size, projection_dim=width, hidden_size=width)


MODELS = {
    "Gemma 1": _TEXT1,
    "Gemma 2": _TEXT2,
    "Gemma 3 text": tiny_config("gemma3", query_pre_attn_scalar=24.0),
    "Gemma 3 vision": tiny_config(
        "gemma3", num_hidden_layers=6, vision=TOWER, model_type="gemma3", mm_tokens_per_image=4
    ),
    "PaliGemma 1": _paligemma(_TEXT1),
    "PaliGemma 2": _paligemma(_TEXT2),
    "T5Gemma": T5GemmaConfig(tiny_config("gemma2", **_SIDE), tiny_config("gemma2", **_SIDE)),
}
HOLDS = {
    "Gemma 1": ("safetensors", "GGUF", "Orbax", ".ckpt", ".sbs"),
    "Gemma 2": ("safetensors", "GGUF", "Orbax", ".ckpt", ".sbs"),
    "Gemma 3 text": ("safetensors", "GGUF", "Orbax", ".ckpt", ".sbs"),
    "Gemma 3 vision": ("safetensors", "Orbax", ".ckpt"),
    "PaliGemma 1": ("safetensors", ".npz"),
    "PaliGemma 2": ("safetensors", ".npz"),
    "T5Gemma": ("safetensors", "Orbax"),
}
LAYOUTS = ("nested", "flat", "stacked", "kauldron")


@functools.cache
def values_of(family: str) -> dict[str, np.ndarray]:
    """Random values that every float format can hold: bfloat16 numbers, in float32; 1 + a norm is exact as well."""
    arrays = dict(random_tensors(MODELS[family]))
    return {name: (np.round(a * 64) / 64).astype(np.float32) for name, a in arrays.items()}


def write(path, family: str, format: str, *, layout: str = "nested", tensors=None):
    config = MODELS[family]
    tensors = from_arrays(values_of(family), config) if tensors is None else tensors
    if format == "Orbax":
        return save_tensors(path, tensors, config, layout=layout)
    return save(path, tensors, config, format=format.lower().removeprefix("."))


def check(path, family: str) -> None:
    """Everything in the checkpoint is what was written, under canonical names."""
    from gemma.checkpoint import load_tensors

    expected = values_of(family)
    with open_any(path) as opened:
        read = {tensor.name: reader(np.float32) for tensor, reader in load_tensors(opened, MODELS[family])}
        assert read.keys() == expected.keys()
        for name, array in read.items():
            assert array.shape == expected[name].shape and np.array_equal(array, expected[name]), name


def cells(verb: str, families=MODELS, formats=None):
    for family in families:
        for format in HOLDS[family]:
            if formats is None or format in formats:
                yield pytest.param(
                    family, format, marks=pytest.mark.converts(family, format, verb), id=f"{family}-{format}"
                )


@pytest.mark.parametrize(("family", "format"), list(cells("round trip")))
def test_written_and_read_back(family, format, tmp_path):
    report = write(tmp_path / "model", family, format)
    assert report.bytes > 0 and all(file.exists() for file in report.files)
    check(tmp_path / "model", family)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3 vision"])
def test_orbax_layouts(family, layout, tmp_path):
    write(tmp_path / "model", family, "Orbax", layout=layout)
    check(tmp_path / "model", family)


JAX = ("Gemma 1", "Gemma 2", "Gemma 3 text", "Gemma 3 vision")


@pytest.mark.parametrize(("family", "format"), list(cells("JAX", JAX)))
def test_into_the_jax_networks(family, format, tmp_path):
    config = MODELS[family]
    write(tmp_path / "model", family, format)
    tree = load_params(tmp_path / "model", config=config)
    expected = weights.pack(values_of(family), config, format="flax")
    leaves = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert leaves.keys() == expected.keys()
    for name, array in expected.items():
        leaf = np.asarray(leaves[name], np.float32)
        assert np.array_equal(leaf[: len(array)], array) and not leaf[len(array) :].any(), name


@pytest.mark.parametrize("family", MODELS)
def test_from_each_format_into_each(family, tmp_path):
    """One walk over all ordered pairs of formats; at its end, and after every step, nothing has changed."""
    from gemma.checkpoint import load_tensors

    formats = HOLDS[family]
    write(tmp_path / "0", family, formats[0])
    walk = [formats[0]]
    left = set(itertools.permutations(formats, 2))
    while left:  # the next pair from here, or from anywhere if there is none
        step = next((pair for pair in sorted(left) if pair[0] == walk[-1]), None) or (walk[-1], sorted(left)[0][0])
        walk.append(step[1])
        left.discard(step)
    for n, format in enumerate(walk[1:], 1):
        with open_any(tmp_path / str(n - 1)) as source:
            write(tmp_path / str(n), family, format, tensors=load_tensors(source, MODELS[family]))
        check(tmp_path / str(n), family)


@pytest.mark.parametrize("family", MODELS)
def test_a_format_without_a_place_for_the_model_says_so(family, tmp_path):
    names = {"safetensors": "safetensors", "gguf": "GGUF", "ckpt": ".ckpt", "npz": ".npz", "sbs": ".sbs"}
    for format in FORMATS:
        if names[format] not in HOLDS[family]:
            with pytest.raises((ConfigError, WeightsMismatch)):
                save(tmp_path / format, from_arrays(values_of(family), MODELS[family]), MODELS[family], format=format)
            assert not (tmp_path / format).exists()
