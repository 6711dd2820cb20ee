# SPDX-License-Identifier: Apache-2.0
"""Runs docs/pytorch.md from top to bottom, small random models standing in the places that the page names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gemma import testing
from gemma.saving import from_arrays, save

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/pytorch.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models/gemma.gguf, models/paligemma and photo.jpg; the working directory."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/torch_vision"))
    import vision_helpers as helpers

    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    models.mkdir()
    small = dict(query_pre_attn_scalar=None, num_hidden_layers=2)
    testing.write_tiny_gguf(models / "gemma.gguf", testing.tiny_config("gemma3", **small))
    config = helpers.config()
    tensors = from_arrays(testing.random_tensors(config), config)
    save(models / "paligemma", tensors, config, format="safetensors", dtype=np.float32)
    helpers.tokenizer_json(models / "paligemma/tokenizer.json", helpers.pieces())
    Image.fromarray(helpers.picture(90, 120)).save(tmp_path / "photo.jpg")
    torch.manual_seed(0)
    return tmp_path


def test_every_block_runs(place, capsys):
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    blocks = list(FENCE.finditer(text))
    assert len(blocks) >= 10
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)  # errors name the line of the page
    assert (place / "boxes.png").is_file() and names["cache"].num_items() > 3
    assert torch.isfinite(names["loss"]) and names["logprobs"].shape[1] >= 1
    assert capsys.readouterr().out.splitlines()[-1] == str(names["config"].num_parameters)


def test_the_page_names_files_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:gemma|siglip|paligemma)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((\w+\.md)\)", text):
        assert (PAGE.parent / name).is_file(), name
