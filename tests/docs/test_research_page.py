# SPDX-License-Identifier: Apache-2.0
"""Every block of docs/research.md runs, in order, and prints what the page says it does."""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path

import jax

PAGE = Path(__file__).parents[2] / "docs" / "research.md"


def test_the_page_runs(capsys, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    module = types.ModuleType("research_page")  # classes of the page ask for the names of their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), vars(module))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "['local', 'global', 'local', 'global']"
    assert said[1].startswith("[0, 1, 0, 1] ") and float(said[1].split()[-1]) == 0.5
    assert "kv_einsum" in said[2].split("]")[0] and "kv_einsum" not in said[2].split("]")[1]
    assert len(ast.literal_eval(said[3])) == 12
    assert said[4:7] == ["True", "True True", "True"]
    shapes = ast.literal_eval(said[7])
    assert set(shapes) == {f"layer_{i}/attn/attention_weights" for i in range(4)} and set(shapes.values()) == {
        (1, 4, 4, 4)
    }
