# SPDX-License-Identifier: Apache-2.0
"""The real models, each made once: tests/conftest.py keeps this folder in one worker."""

from __future__ import annotations

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
