# SPDX-License-Identifier: Apache-2.0
"""The reference sampler against Hugging Face's logits processors, one by one and in order, with ties and -inf."""

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as processors

from gemma.sampling import SamplingParams, process_logits

V = 200
KINDS = ("plain", "ties", "forbidden", "flat", "peaked")


def random_logits(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, V).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)  # about a dozen distinct values: every boundary falls among equals
    if kind == "forbidden":
        logits[rng.random(V) < 0.7] = -np.inf
    if kind == "flat":
        logits[:] = 1.0
    if kind == "peaked":
        logits[rng.integers(V)] = 40.0
    return logits


def reference(logits, history, **flags):
    """Hugging Face's result, with its processors in the order that `generate` builds."""
    chain = []
    if "repetition_penalty" in flags:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(flags["repetition_penalty"]))
    if "temperature" in flags:
        chain.append(processors.TemperatureLogitsWarper(flags["temperature"]))
    if "top_k" in flags:
        chain.append(processors.TopKLogitsWarper(flags["top_k"]))
    if "top_p" in flags:
        chain.append(processors.TopPLogitsWarper(flags["top_p"]))
    if "min_p" in flags:
        chain.append(processors.MinPLogitsWarper(flags["min_p"]))
    ids, scores = torch.tensor([list(history)]), torch.from_numpy(logits.copy())[None]
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0].numpy()


CASES = [
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7),
    dict(temperature=0.31),
    dict(temperature=2.5),
    dict(top_k=1),
    dict(top_k=17),
    dict(top_k=V),
    dict(top_k=V + 5),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(repetition_penalty=1.2, temperature=0.7, top_k=40, min_p=0.02),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", CASES, ids=str)
def test_equal_to_hugging_face(kind, flags):
    for seed in range(5):
        logits = random_logits(kind, seed)
        history = np.random.default_rng(seed + 100).integers(0, V, 30).tolist()
        expected = reference(logits, history, **flags)
        got = process_logits(logits, SamplingParams(**flags), history)
        assert got.dtype == np.float32
        # one multiplication or division in float32 each: the same operations give the same bits
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equal_up_to_which_of_equals_stay(kind, top_p):
    """Hugging Face sorts without a rule for equals, so the kept values are compared, not the ids."""
    for seed in range(5):
        logits = random_logits(kind, seed)
        expected = reference(logits, [], top_p=top_p)
        got = process_logits(logits, SamplingParams(top_p=top_p))
        kept = np.sort(got[np.isfinite(got)])
        theirs = np.sort(expected[np.isfinite(expected)])
        if top_p == 1.0:  # theirs sums in float32 and may drop tails of less than 1e-6; ours is off
            np.testing.assert_array_equal(got, logits)
            continue
        if kind == "flat":  # p * V is a whole number for most p: the float32 sum decides one id either way
            assert abs(len(kept) - len(theirs)) <= 1
            continue
        np.testing.assert_array_equal(kept, theirs)


def test_whole_chain_with_top_p():
    flags = dict(repetition_penalty=1.1, temperature=0.8, top_k=50, top_p=0.9, min_p=0.03)
    for seed in range(20):
        logits = random_logits("plain", seed)
        history = list(range(seed, seed + 20))
        expected = reference(logits, history, **flags)
        np.testing.assert_array_equal(process_logits(logits, SamplingParams(**flags), history), expected)


def test_logit_bias_is_added_after_the_penalty():
    logits = random_logits("plain", 3)
    params = SamplingParams(repetition_penalty=1.5, logit_bias={4: 2.0, 9: -np.inf}, temperature=0.5)
    got = process_logits(logits, params, [4, 9])
    penalized = reference(logits, [4, 9], repetition_penalty=1.5)
    penalized[4] += np.float32(2.0)
    penalized[9] = -np.inf
    np.testing.assert_array_equal(got, penalized / np.float32(0.5))
