# SPDX-License-Identifier: Apache-2.0
"""`gemma generate --backend torch` and `gemma chat --backend torch` on a tiny random model."""

from __future__ import annotations

import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import torch
from torch_harness import logits

from gemma.cli import _backend
from gemma.cli.__main__ import run
from gemma.errors import DependencyError
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.sampling import SamplingParams, sample, step_seed
from gemma.testing import tiny_config, write_tiny_gguf, write_tiny_safetensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = tiny_config("gemma3", query_pre_attn_scalar=None, num_hidden_layers=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("m") / "tiny.gguf", config)


HOT = ["-n", "16", "--temperature", "3", "--seed", "5"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate(tiny, dtype, capsys):
    assert run(["generate", "hello", "-m", str(tiny), "--backend", "torch", "--json", "--dtype", dtype, *HOT]) == 0
    found = json.loads(capsys.readouterr().out)
    if dtype == "bfloat16":
        assert len(found["ids"]) == 16
        return
    rows = logits(GemmaForCausalLM.from_pretrained(tiny), [found["prompt_ids"] + found["ids"]])[0]
    rows[:, 0] = -np.inf  # the padding is never generated
    start, params = len(found["prompt_ids"]) - 1, SamplingParams(temperature=3.0)
    assert found["ids"] == [sample(row, params, (), step_seed(5, i)) for i, row in enumerate(rows[start:-1])]


def test_chat(tiny, capsys, monkeypatch):

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nAgain\n"), encoding="utf-8"))
    flags = ["--as", "tuned", "--top-k", "320", "--top-p", "1", *HOT, "-n", "8"]
    assert run(["chat", "-m", str(tiny), "--backend", "torch", *flags]) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) >= 2 and out.err == ""


def test_without_torch(tiny, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    with pytest.raises(DependencyError, match=r'pip install "gemmakit\[torch\]"'):
        _backend.open_model(str(tiny), backend="torch")


def test_refusals(tiny, tmp_path, capsys):
    assert run(["generate", "hello", "-m", str(tiny), "--backend", "torch", "--dtype", "float16"]) == 2
    assert "float16 cannot run Gemma 3" in capsys.readouterr().err
    folder = write_tiny_safetensors(tmp_path / "m", tiny_config("gemma2"))
    assert run(["generate", "hello", "-m", str(folder), "--backend", "torch"]) == 2
    assert "no tokenizer came with these weights" in capsys.readouterr().err


def test_rows_that_stand_for_no_token_are_never_generated(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma", num_hidden_layers=1))
    opened = _backend.open_model(str(path), backend="torch")
    rows = opened.config.vocab_size
    assert opened.tokenizer.vocab_size <= rows
    opened.model.begin(64)
    flat = SamplingParams(temperature=1e4, seed=1, max_new_tokens=60)
    assert all(0 < token < opened.tokenizer.vocab_size for token in opened.model.tokens([2, 9], flat, ()))
    assert torch.get_default_dtype() == torch.float32
