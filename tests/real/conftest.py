# SPDX-License-Identifier: Apache-2.0
"""The real models, each made once: tests/conftest.py keeps this folder in one worker."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest


@pytest.fixture(scope="session")
def demo():
    """The file of the real Gemma 3 270M; an error, never a skip, where the extra `demo` is not installed."""
    from gemma import hub

    return hub.demo_path()


@pytest.fixture(scope="session")
def checkpoint(demo):
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(demo) as opened:
        yield opened


@pytest.fixture(scope="session")
def ours():
    """Our JAX model in float32: .model, .params, .tokenizer, .config."""
    from gemma.gm.text._load import load_model

    return load_model("demo", dtype="float32")


@pytest.fixture(scope="session")
def hf(checkpoint):
    """Hugging Face's model in float32, eager attention."""
    import real_harness

    return real_harness.hf_model(checkpoint)


@pytest.fixture(scope="session")
def llama(demo):
    import real_harness

    model = real_harness.LlamaCpp(demo)
    yield model
    model.close()


class TextLogits(NamedTuple):
    """Hugging Face on the public-domain text of 627 tokens, longer than the window of 512."""

    ids: list[int]
    logits: np.ndarray  # float32 [T, V], eager attention
    spread: np.ndarray  # [T]: how far the logits of its other attention (sdpa) lie from these, at most


@pytest.fixture(scope="session")
def hf_text(hf, checkpoint):
    """Both frameworks are compared with it, so it is computed once."""
    import real_harness

    from gemma.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_source(checkpoint.tokenizer_source())
    ids = tokenizer.encode(real_harness.TEXT.read_text().rstrip("\n"), add_bos=True)
    assert ids[0] == 2 and 600 < len(ids) < 700
    logits = real_harness.hf_logits(hf, ids)
    hf.set_attn_implementation("sdpa")
    try:
        other = real_harness.hf_logits(hf, ids)
    finally:
        hf.set_attn_implementation("eager")
    spread = np.array([np.abs(a - b).max() for a, b in zip(logits, other)])
    assert 0 < spread.max() < 1e-3, "the two attentions of Hugging Face are the same one, or broken"
    return TextLogits(ids, logits, spread)


@pytest.fixture(scope="session")
def llama_greedy(llama):
    """`llama_greedy(ids, steps)`: what llama.cpp says and its logits, each prompt once for both frameworks."""
    once = functools.cache(llama.greedy)
    return lambda ids, steps: once(tuple(ids), steps)
