# SPDX-License-Identifier: Apache-2.0
"""transformers loads what we wrote: every name, nothing more, and the logits are those of the original bit for bit.

The original is a tiny random model of each class; its state dict goes through the weight table into canonical tensors,
these are saved, and `from_pretrained` reads the folder. That our own networks give the same logits is tests/parity.
"""

from __future__ import annotations

import dataclasses
import json

import hf_tiny_oracles as oracles
import numpy as np
import pytest
import torch
from saving_models import tiny_source

from gemma import weights
from gemma._tokenizer_write import write_hf_files
from gemma.checkpoint import TokenizerSource, load_tensors, open_checkpoint
from gemma.config import GemmaConfig, text_only
from gemma.hf_config import read_config
from gemma.image import normalize, resize
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors

IMAGE_FIELDS = ("mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")
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


@pytest.mark.parametrize("name", ["gemma3", "paligemma1"])
def test_the_image_processor_is_that_of_the_model(name, tmp_path):
    """A quantizer that drops these files leaves a folder that transformers cannot feed with pictures."""
    from transformers import AutoImageProcessor

    _, config, values = original(name)
    save(tmp_path / "out", from_arrays(values, config), config, format="safetensors")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    tower = config.vision_config if name == "paligemma1" else config.vision
    ramp = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    pixels = processor(ramp, return_tensors="np")["pixel_values"]
    method = "bicubic" if name == "paligemma1" else "bilinear"
    ours = normalize(resize(ramp, tower.image_size, tower.image_size, method=method)).transpose(2, 0, 1)
    assert np.abs(pixels.reshape(ours.shape) - ours).max() < 1e-6


def test_files_about_images_and_generation_come_along(tmp_path):
    _, config, values = original("gemma3")
    source = tmp_path / "source"
    source.mkdir()
    write_hf_files(tiny_source(), source, 320)
    own = {"preprocessor_config.json": b'{"mine": 1}', "generation_config.json": b'{"eos_token_id": [1, 106]}'}
    for file, data in own.items():
        (source / file).write_bytes(data)
    tokenizer = TokenizerSource("sentencepiece", source / "tokenizer.model")
    wide = dataclasses.replace(config, vocab_size=320)
    values = random_tensors(wide)
    save(tmp_path / "out", from_arrays(values, wide), wide, format="safetensors", tokenizer=tokenizer)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in own} == own
    assert json.loads((tmp_path / "out/processor_config.json").read_text())["processor_class"] == "Gemma3Processor"
    turns = dataclasses.replace(wide, eos_token_id=(1, 106, 7))  # what learnt to end turns says so in both files
    save(tmp_path / "turns", from_arrays(values, turns), turns, format="safetensors", tokenizer=tokenizer)
    assert json.loads((tmp_path / "turns/generation_config.json").read_text()) == {"eos_token_id": [1, 106, 7]}
    blank = GemmaConfig(8, 8, 8, 1, 1, 1, 8)  # a text model has none of the numbers about images
    text = dataclasses.replace(text_only(wide), **{field: getattr(blank, field) for field in IMAGE_FIELDS})
    tensors = from_arrays({t.name: values[t.name] for t in weights.tensors(text)}, text)
    save(tmp_path / "text", tensors, text, format="safetensors", tokenizer=tokenizer)
    names = {file.name for file in (tmp_path / "text").iterdir()}
    assert "generation_config.json" in names and not any("processor" in name for name in names)
