# SPDX-License-Identifier: Apache-2.0
"""Runs docs/lora.md from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/lora.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_every_block_runs(tmp_path, monkeypatch, quick_compiles):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    blocks = list(FENCE.finditer(text))
    assert len(blocks) == 7
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)  # errors name the line of the page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "my-adapter", "my-adapter.gguf"]
