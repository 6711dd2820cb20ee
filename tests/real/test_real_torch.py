# SPDX-License-Identifier: Apache-2.0
"""The real Gemma 3 270M in PyTorch: logits against Hugging Face's in float32, tokens against llama.cpp's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from real_harness import CONTINUATION, PROMPT, PROMPT_IDS, TEXT

from gemma._torch.cache import WindowedKVCache
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.sampling import SamplingParams
from gemma.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.real,
    pytest.mark.supports("Gemma 3 270M, real weights", "PyTorch", "run"),
]
KEPT = 64  # logits are compared at the last positions, which stand past the window of 512


@pytest.fixture(scope="module")
def network(demo):
    return GemmaForCausalLM.from_pretrained(demo)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.from_source(checkpoint.tokenizer_source())


@torch.no_grad()
def last_logits(model, ids, **call) -> np.ndarray:
    out = model(input_ids=torch.tensor([list(ids)]), logits_to_keep=KEPT, **call)
    return (out["logits"] if isinstance(out, dict) and "logits" in out else out.logits)[0].numpy()


def test_logits_equal_hugging_face(network, hf_text, tokenizer):
    """627 tokens, at once and cached in chunks; the allowance is thrice what Hugging Face differs from itself."""
    ids = tokenizer.encode(TEXT.read_text().rstrip("\n"), add_bos=True)
    assert ids == hf_text.ids and len(ids) > 512 + KEPT
    theirs, spread = hf_text.logits[-KEPT:], float(hf_text.spread[-KEPT:].max())
    assert 0 < spread < 1e-3
    allowed = max(2e-4, 3 * spread)
    assert np.abs(last_logits(network, ids) - theirs).max() < allowed
    cache = WindowedKVCache(network.config.layers, 1, len(ids))
    for start in range(0, len(ids) - KEPT, 250):
        last_logits(network, ids[start : min(start + 250, len(ids) - KEPT)], kv_cache=cache)
    assert np.abs(last_logits(network, ids[-KEPT:], kv_cache=cache) - theirs).max() < allowed


def test_the_greedy_continuation(network, tokenizer):
    """Beside another prompt of another length: the sentence is the same."""
    other = tokenizer.encode("La Révolution française a commencé en", add_bos=True)
    width = max(len(other), len(PROMPT_IDS))
    rows = [[0] * (width - len(ids)) + list(ids) for ids in (PROMPT_IDS, other)]
    ids = torch.tensor(rows)
    out = network.generate(
        ids, attention_mask=ids != 0, params=SamplingParams(temperature=0, max_new_tokens=14), tokenizer=tokenizer
    )
    assert tokenizer.decode(out[0, width:].tolist()).startswith(CONTINUATION)


STEPS = 48  # and these prompts: as in test_real_270m.py, so that llama.cpp runs once for both
PROMPTS = (PROMPT, "The capital of France is", "def fibonacci(n):\n")


def test_tokens_equal_llama_cpp(network, tokenizer, llama_greedy):
    """Teacher-forced on llama.cpp's greedy text, as in test_real_270m.py."""
    mine, theirs, chosen = [], [], []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_bos=True)
        text, rows = llama_greedy(ids, STEPS)
        with torch.no_grad():
            out = network(input_ids=torch.tensor([text[:-1]]), logits_to_keep=STEPS)
        mine.append(out["logits"][0].numpy())
        theirs.append(rows)
        chosen += text[len(ids) :]
    mine, theirs, chosen = np.concatenate(mine), np.concatenate(theirs), np.array(chosen)
    allowed = 2 * float(np.quantile(np.abs(mine[:, ::16] - theirs[:, ::16]), 0.99))
    assert allowed < 3.0
    best, second = np.sort(np.partition(mine, -2, axis=-1)[:, -2:], axis=-1).T[::-1]
    equal = mine.argmax(-1) == chosen
    assert ((best - second)[~equal] < allowed).all()
    assert (best - mine[np.arange(len(mine)), chosen] < allowed).all()
    assert equal.mean() >= 0.97
