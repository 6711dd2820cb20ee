# SPDX-License-Identifier: Apache-2.0
"""Destinations are usually typed as names in the current folder."""

import pytest

from gemma.checkpoint import open_checkpoint
from gemma.compare import compare
from gemma.testing import tiny_config, write_tiny_safetensors

CONFIG = tiny_config("gemma", num_hidden_layers=2)


@pytest.mark.parametrize(("to", "name"), [("gguf", "out.gguf"), ("ckpt", "out"), ("ckpt", "new/out")])
def test_a_relative_destination(cli, tmp_path, monkeypatch, to, name):
    monkeypatch.chdir(tmp_path)
    write_tiny_safetensors(tmp_path / "source", CONFIG)
    result = cli("convert", "source", name, "--to", to, "--no-logits")
    assert result.code == 0, result.err
    with open_checkpoint(tmp_path / "source") as a, open_checkpoint(tmp_path / name) as b:
        assert max(t.max_abs for t in compare(a, b).tensors) <= 2**-23  # the 1 of a GGUF's norms
    assert not [p for p in tmp_path.rglob(".gemma-convert-*")]
