# SPDX-License-Identifier: Apache-2.0
"""examples/tools.py runs: scripted, and with a tiny random model."""

import runpy
from pathlib import Path

import jax
import pytest

from gemma import testing

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples/tools.py"), run_name="example")


def test_scripted(capsys):
    EXAMPLE["main"]([])
    said = capsys.readouterr().out
    for line in (
        "tools: [Tool result: 110]",
        "tools: [Tool error: calculator: a number on the way has more than 3900 digits, which is too large]",
        "tools: [Tool result: shopping.txt]",
        "tools: [Tool error: fileexplorer: path: '..' is not allowed: '../secret.txt']",
        "tools: [Tool error: Unknown (or unregistered) tool: 'datetime'.",
        "tools: [Tool result: 1 tool can be called now:",
        "tools: [Tool result: Sunday]",
    ):
        assert line in said, line
    assert "double quotes" in said and said.endswith("model: It is Sunday, and 25 times 4 plus 10 is 110.\n")


def test_with_a_tiny_model(tmp_path, capsys):
    config = testing.tiny_config(
        "gemma3", num_hidden_layers=2, layer_pattern="LG", max_position_embeddings=8192, query_pre_attn_scalar=None
    )
    path = tmp_path / "tiny.gguf"
    testing.write_tiny_gguf(path, config)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        EXAMPLE["main"](["--model", str(path), "--max-new-tokens", "3"])
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert capsys.readouterr().out


@pytest.mark.real
@pytest.mark.slow
def test_with_the_real_model(capsys):
    EXAMPLE["main"](["--model", "demo", "--max-new-tokens", "16"])
    assert capsys.readouterr().out.strip()
