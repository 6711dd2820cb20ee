# SPDX-License-Identifier: Apache-2.0
"""The program on real files and the real backend: a tiny random model, and the sentence of the demo."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gemma.sampling import SamplingParams, sample, step_seed
from gemma.testing import tiny_config, write_tiny_gguf, write_tiny_safetensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """128 positions, window 5, 320 ids; two layers, so that little is compiled."""
    config = tiny_config("gemma3", query_pre_attn_scalar=None, num_hidden_layers=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("m") / "tiny.gguf", config)


def ids(cli, model, *flags):
    result = cli("generate", "hello", "--model", model, "--json", *flags)
    assert result.code == 0 and result.err == "", result
    data = json.loads(result.out)
    assert data["counts"] == {"prompt": 6, "generated": len(data["ids"])}
    return data["ids"]


HOT = ("-n", "24", "--temperature", "3", "--seed", "5")


def test_continuation_is_that_of_the_network_and_the_reference_sampler(cli, tiny):
    """One full pass without a cache gives the logits, numpy draws from them with the same seed.

    Both sides draw with the same 24 uniform numbers; rounding could only matter if one of them fell within 1e-6 of a
    boundary between two ids, and the seed is fixed.
    """
    import jax.numpy as jnp

    from gemma.gm.text._load import load_model

    got = ids(cli, tiny, *HOT)
    loaded = load_model(tiny)
    prompt = loaded.tokenizer.encode("hello", add_bos=True)
    tokens = jnp.asarray([prompt + got], jnp.int32)
    logits = np.array(loaded.model.apply({"params": loaded.params}, tokens).logits[0], np.float32)
    logits[:, 0] = -np.inf  # the padding is never generated
    params = SamplingParams(temperature=3.0)
    chosen = logits[len(prompt) - 1 : -1]
    assert got == [sample(row, params, (), step_seed(5, i)) for i, row in enumerate(chosen)]
    assert len(set(got)) > 12
    assert ids(cli, tiny, *HOT) == got != ids(cli, tiny, *HOT, "--seed", "6")


def test_a_dtype_that_would_overflow_is_refused(cli, tiny):
    refused = cli("generate", "hello", "--model", tiny, "--dtype", "float16")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "float16" in refused.err


def test_chat_of_two_turns(cli, tiny):
    flags = ("chat", "--model", tiny, "--as", "tuned", "--top-k", "320", "--top-p", "1", *HOT, "-n", "8")
    result = cli(*flags, stdin=b"Hi\nAgain\n")
    assert result.code == 0 and result.err == ""
    first = cli(*flags, stdin=b"Hi\n").out
    assert len(first) > 1 and result.out.startswith(first) and len(result.out) > len(first)


def test_context_of_the_model(cli, tiny):
    result = cli("generate", "x" * 200, "--model", tiny)
    assert result.code == 2 and "the context holds 128" in result.err and result.out == ""


def test_weights_without_a_tokenizer(cli, tmp_path):
    folder = write_tiny_safetensors(tmp_path / "m", tiny_config("gemma2"))
    result = cli("generate", "hello", "--model", folder)
    assert result.code == 2 and "no tokenizer came with these weights; put" in result.err


@pytest.mark.real
def test_the_sentence(cli):
    """The one that the README shows, from a process of its own."""
    line = ["generate", "The history of computing began", "--max-new-tokens", "14"]
    done = subprocess.run([sys.executable, "-m", "gemma.cli", *line], capture_output=True, timeout=300)
    sentence = "The history of computing began with the invention of the first computer in 1947.\n"
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, sentence, "")
