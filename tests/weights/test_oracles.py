# SPDX-License-Identifier: Apache-2.0
"""Names and shapes against real networks: the state of every tiny Hugging Face model, in memory and as it saves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_tiny_oracles import BUILD, make
from safetensors import safe_open

from gemma.hf_config import read_config
from gemma.weights import bind, expected, pack, unpack

ORACLES = ("gemma1", "gemma2", "gemma3_text", "gemma3", "paligemma1", "paligemma2", "t5gemma", "t5gemma_unbalanced")
ORACLES += ("gemma3n_text", "gemma4_e", "gemma4_dense", "gemma4_moe")
ORACLES += ("embeddinggemma", "siglip", "t5gemma2")
TIED = {"lm_head.weight", "lm_head.out_proj.weight"}
SHARED = {f"model.decoder.embed_tokens.{name}" for name in ("weight", "eoi_embedding")}  # of a T5Gemma 2


def state_of(name, **changes):
    model, config = make(name, **changes)
    return model, {k: v.numpy() for k, v in model.state_dict().items()}, read_config(config.to_dict())


@pytest.mark.parametrize("name", [*ORACLES, "siglip-head"])
def test_state_dict(name):
    changes = dict(vision_use_head=True) if name == "siglip-head" else {}
    _, state, config = state_of(name.removesuffix("-head"), **changes)
    shapes = {key: value.shape for key, value in state.items()}
    copies = TIED | (SHARED if name == "t5gemma2" else set())
    assert expected(config, "hf") == {key: shape for key, shape in shapes.items() if key not in copies}
    found = bind(shapes, config, format="hf", path=name)
    assert {slot.name for places in found.values() for slot in places} == set(shapes)
    unpack(state, config, format="hf")  # the head is a copy and is found equal


@pytest.mark.parametrize("name", ORACLES)
def test_saved_folder(name, tmp_path):
    """`save_pretrained` may write other prefixes than the network has."""
    model, state, config = state_of(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert read_config(tmp_path) == config
    ours, theirs = unpack(saved, config, format="hf"), unpack(state, config, format="hf")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["gemma3", "t5gemma_unbalanced", "paligemma2"])
def test_what_we_pack_loads_into_the_network(name):
    """Through another format and back to Hugging Face's names: transformers takes it, strictly."""
    model, state, config = state_of(name)
    other = "npz" if name == "paligemma2" else "flax"
    values = unpack(pack(unpack(state, config, format="hf"), config, format=other), config, format=other)
    packed = pack(values, config, format="hf")
    assert all(np.array_equal(packed[key], state[key]) for key in packed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    arrays = {key: torch.from_numpy(value.copy()) for key, value in packed.items()}
    report = model.load_state_dict(arrays, strict=False)  # strict but for the tied head, which is no tensor of ours
    assert set(report.missing_keys) <= TIED and not report.unexpected_keys
    assert all(np.array_equal(value.numpy(), packed.get(key, value)) for key, value in model.state_dict().items())


def test_untied_head():
    _, state, config = state_of("gemma2", tie_word_embeddings=False)
    assert not config.tie_word_embeddings
    assert expected(config, "hf") == {key: value.shape for key, value in state.items()}


def test_all_oracles_of_the_table_are_looked_at():
    later = {
        "vaultgemma",
        "gemma4",
        "recurrentgemma",
    }
    assert set(BUILD) - later == set(ORACLES)
