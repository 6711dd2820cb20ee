# SPDX-License-Identifier: Apache-2.0
"""Runs docs/t5gemma.md from top to bottom, small random models standing in the places that the page names."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma import testing
from gemma._tokenizer_write import write_hf_files
from gemma.checkpoint import TokenizerSource
from gemma.cli.__main__ import run
from gemma.config import SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/t5gemma.md"
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models/{t5gemma,t5gemma2,gemma2}; the working directory."""
    monkeypatch.chdir(tmp_path)
    side = testing.tiny_config("gemma2", num_hidden_layers=1)
    other = dataclasses.replace(side, use_qk_norm=True, attn_logit_softcapping=None, final_logit_softcapping=None)
    other = dataclasses.replace(other, rope_local_base_freq=1e4)
    images = dict(boi_token_index=7, eoi_token_index=8, image_token_index=9, mm_tokens_per_image=4)
    seeing = dataclasses.replace(other, vision=SiglipVisionConfig(16, 24, 1, 2, 3, 56, 14), **images)
    pieces = testing.tiny_pieces(320)
    source = TokenizerSource(
        "gguf",
        pieces=[piece for piece, _, _ in pieces],
        scores=np.array([score for _, score, _ in pieces], np.float32),
        types=np.array([kind for _, _, kind in pieces], np.int32),
        special=dict(bos=2, eos=1, unk=3, pad=0),
    )
    models = {"t5gemma": T5GemmaConfig(side, side), "t5gemma2": T5Gemma2Config(seeing, other), "gemma2": side}
    for name, config in models.items():
        write_hf_files(source, testing.write_tiny_safetensors(tmp_path / "models" / name, config), 320)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield tmp_path
    jax.config.update("jax_disable_most_optimizations", before)


def test_every_block_runs(place, capsys):
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    blocks = list(FENCE.finditer(text))
    assert len(blocks) >= 12
    for block in blocks:
        if block[1] == "bash":
            assert run(shlex.split(block[2])[1:]) == 0
            continue
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[2], str(PAGE), "exec"), names)  # errors name the line of the page
    assert len(names["texts"]) == 2 and names["ids"].shape[0] == 2 and len(names["caption"]) == 1
    assert np.isfinite(names["loss"].item()) and names["again"].config == names["config"]
    out = capsys.readouterr().out
    assert "Summarize: the cat sat on the mat.\n" in out  # the answer begins a line of its own
    assert out.splitlines()[-1] == "t5gemma-2b-2b-prefixlm-it 5596853760"


def test_the_page_names_files_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"`(gemma/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name
