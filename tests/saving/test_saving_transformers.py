# SPDX-License-Identifier: Apache-2.0
"""transformers loads what we wrote: every name, nothing more, and the logits are those of the original bit for bit.

The original is a tiny random model of each class; its state dict goes through the weight table into canonical tensors,
these are saved, and `from_pretrained` reads the folder. That our own networks give the same logits is tests/parity.
"""

from __future__ import annotations

import json

import hf_tiny_oracles as oracles
import numpy as np
import pytest
import torch

from gemma import weights
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.hf_config import read_config
from gemma.saving import from_arrays, save

NAMES = ["gemma1", "gemma2", "gemma3_text", "embeddinggemma", "gemma3", "paligemma1", "paligemma2", "t5gemma"]
NAMES += ["t5gemma_unbalanced", "siglip"]


def original(name):
    """(the model, its configuration as ours, canonical name to array)."""
    model, _ = oracles.make(name)
    config = read_config(model.config.to_dict())
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    ignored = ("position_ids", "inv_freq", "embed_scale", "normalizer")
    state = {key: value for key, value in state.items() if not key.endswith(ignored)}
    return model, config, weights.unpack(state, config, format="hf")


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_loads_strictly_and_gives_the_same_logits(name, tmp_path):
    model, config, values = original(name)
    save(tmp_path / "out", from_arrays(values, config), config, format="safetensors", max_shard_bytes=300_000)
    loaded, info = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert {key: list(info[key]) for key in info if info[key]} == {}, "missing, unexpected or mis-shaped names"
    inputs = oracles.inputs(name)
    assert np.array_equal(output(loaded.eval(), inputs), output(model, inputs))
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.config() == config
        found = {tensor.name: reader() for tensor, reader in load_tensors(checkpoint)}
        assert all(np.array_equal(found[name], value) for name, value in values.items())


def test_the_stored_dtype_is_the_loaded_one(tmp_path):
    model, config, values = original("gemma2")
    save(tmp_path / "out", from_arrays(values, config), config, format="safetensors", dtype="bfloat16")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(torch.bfloat16)), key
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Gemma2ForCausalLM"]
