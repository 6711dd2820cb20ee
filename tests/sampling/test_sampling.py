# SPDX-License-Identifier: Apache-2.0
"""What the sampling parameters mean: boundaries, ties, seeds, errors, and the distribution that is drawn from."""

import pickle

import numpy as np
import pytest

from gemma.errors import SamplingError, ShapeError
from gemma.sampling import (
    SamplingParams,
    fresh_seed,
    logprobs,
    process_logits,
    sample,
    step_seed,
    top_logprobs,
    uniform,
)

GREEDY = SamplingParams(temperature=0)


def logits_of(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


def kept(logits, **flags):
    return np.flatnonzero(np.isfinite(process_logits(logits, SamplingParams(**flags)))).tolist()


def test_top_p_keeps_the_id_that_crosses():
    logits = np.log(np.array([8, 4, 2, 1, 1], np.float32) / 16)  # 0.5 0.25 0.125 0.0625 0.0625: exact in binary
    assert kept(logits, top_p=0.49) == [0]
    assert kept(logits, top_p=0.51) == [0, 1]
    assert kept(logits, top_p=0.74) == [0, 1]
    assert kept(logits, top_p=0.76) == [0, 1, 2]
    assert kept(logits, top_p=0.0) == [0]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3, 4]


def test_top_p_reached_exactly_stops_there():
    logits = np.zeros(8, np.float32)  # eight times 0.125, and sums of it, are exact
    assert kept(logits, top_p=0.25) == [0, 1]
    assert kept(logits, top_p=0.250001) == [0, 1, 2]


def test_ties():
    logits = np.array([1, 5, 5, 3, 5, 3], np.float32)
    assert kept(logits, top_k=2) == [1, 2, 4]  # equals of the k-th stay
    assert kept(logits, top_k=4) == [1, 2, 3, 4, 5]
    assert kept(logits, top_p=0.4) == [1, 2]  # 0.30 each: lower ids first
    assert kept(logits, min_p=1.0) == [1, 2, 4]
    assert sample(logits, GREEDY) == 1


def test_top_p_sees_the_renormalized_top_k():
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert kept(logits, top_p=0.5) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.5) == [0]  # of two, the first has 0.57


def test_greedy_ignores_truncation_but_not_penalty_and_bias():
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert sample(logits, SamplingParams(temperature=0, top_k=1, top_p=0.0)) == 0
    assert sample(logits, SamplingParams(temperature=0, repetition_penalty=2.0), [0]) == 1
    assert sample(logits, SamplingParams(temperature=0, logit_bias={0: -np.inf, 1: -np.inf})) == 2


def test_inputs_are_not_changed():
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    sample(logits, SamplingParams(top_k=1, logit_bias={0: -5.0}, repetition_penalty=2.0), [0, 1, 2])
    np.testing.assert_array_equal(logits, [3, 2, 1])


def test_draws_follow_the_distribution():
    """Pearson's statistic over 5,000 draws of one fixed stream, so the outcome never changes.

    7 degrees of freedom: 24.3 is exceeded with probability 0.001 by a right sampler. A sampler that ignored one of the
    parameters would reach hundreds.
    """
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.5, 12).astype(np.float32)
    params = SamplingParams(temperature=0.8, top_k=8)
    scores = process_logits(logits, params).astype(np.float64)
    expected = np.exp(scores - scores.max())
    expected /= expected.sum()
    n = 5000
    for source in ("generator", "state"):
        stream = np.random.default_rng(1)
        draws = [sample(logits, params, (), stream if source == "generator" else step_seed(1, i)) for i in range(n)]
        counts = np.bincount(draws, minlength=12)
        assert counts[expected == 0].sum() == 0
        seen = expected > 0
        statistic = ((counts[seen] - n * expected[seen]) ** 2 / (n * expected[seen])).sum()
        assert statistic < 24.3, source


def test_same_state_same_token_whatever_else_happens():
    logits = np.random.default_rng(2).normal(0, 2, 50).astype(np.float32)
    params = SamplingParams(temperature=1.3, top_p=0.95)
    alone = [sample(logits, params, (), step_seed(42, i)) for i in range(30)]
    np.random.seed(0)
    mixed = []
    for i in range(30):
        sample(logits, params, (), step_seed(7, i))  # a neighbour in the batch
        mixed.append(sample(logits, params, (), step_seed(42, i)))
    assert mixed == alone
    assert alone != [sample(logits, params, (), step_seed(43, i)) for i in range(30)]


def test_step_seeds_are_fixed_values():
    """SplitMix64 of 0 is a published value; the rest pins what recorded seeds mean."""
    assert step_seed(0, 0) == 0xA706DD2F4D197E6F
    assert uniform(0) == (0xE220A8397B1DCDAF >> 11) / 2**53
    assert len({step_seed(s, i) for s in range(50) for i in range(50)}) == 2500
    values = [uniform(step_seed(9, i)) for i in range(2000)]
    assert 0 <= min(values) < 0.01 and 0.99 < max(values) < 1


def test_inverse_distribution_function_ends():
    """u just below 1 must pick the last possible id, never a forbidden one past it."""

    class Almost:
        def random(self):
            return np.nextafter(1.0, 0.0)

    logits = logits_of(0.1, 0.2, 0.7, 0.0, 0.0)
    assert sample(logits, SamplingParams(), (), Almost()) == 2
    logits = logits_of(0.0, 0.0, 0.5, 0.5)

    class Zero:
        def random(self):
            return 0.0

    assert sample(logits, SamplingParams(), (), Zero()) == 2


def test_logprobs():
    logits = np.random.default_rng(0).normal(0, 5, 1000).astype(np.float32)
    logits[3] = -np.inf
    values = logprobs(logits)
    assert values.dtype == np.float32 and values[3] == -np.inf
    assert np.exp(values.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)  # 1000 roundings of 6e-8, relative
    np.testing.assert_allclose(
        np.diff(values[4:]), np.diff(logits[4:]), atol=2e-6
    )  # values up to 30: half a ulp, twice
    np.testing.assert_array_equal(logprobs(logits + 1000)[:3].round(3), values[:3].round(3))
    top = top_logprobs(np.array([1, 2, 2, 0], np.float32), 3)
    assert [token for token, _ in top] == [1, 2, 0]
    assert top[0][1] == top[1][1] > top[2][1]


BAD = [
    (dict(temperature=-1), "temperature: expected 0"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=1e308), "temperature"),
    (dict(temperature=1e-9), "temperature"),
    (dict(temperature="1"), "temperature"),
    (dict(temperature=None), "temperature"),
    (dict(top_k=0), "top_k: expected a whole number, 1 or more, or None, got 0"),
    (dict(top_k=-1), "top_k"),
    (dict(top_k=2.0), "top_k"),
    (dict(top_k=True), "top_k"),
    (dict(top_p=1.01), "top_p: expected a number in 0..1 or None, got 1.01"),
    (dict(top_p=-0.1), "top_p"),
    (dict(min_p=float("inf")), "min_p"),
    (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(repetition_penalty=None), "repetition_penalty"),
    (dict(seed=-1), "seed"),
    (dict(seed=2**64), "seed"),
    (dict(max_new_tokens=0), "max_new_tokens: expected a whole number, 1 or more, got 0"),
    (dict(max_new_tokens=None), "max_new_tokens"),
    (dict(logit_bias={-1: 1.0}), "logit_bias"),
    (dict(logit_bias={1: float("nan")}), r"logit_bias\[1\]"),
    (dict(logit_bias={1: float("inf")}), r"logit_bias\[1\]"),
    (dict(logit_bias=[1]), "logit_bias: expected a mapping"),
    (dict(stop="abc"), "stop: expected a list"),
    (dict(stop=[""]), "stop: expected strings of 1..1024"),
    (dict(stop=["x" * 1025]), "1025 characters"),
    (dict(stop=["x", 3]), "stop"),
    (dict(stop=[str(i) for i in range(65)]), "at most 64"),
]


@pytest.mark.parametrize(("flags", "text"), BAD, ids=str)
def test_out_of_range(flags, text):
    with pytest.raises(SamplingError, match=text):
        SamplingParams(**flags)


def test_bad_logits():
    with pytest.raises(ShapeError, match=r"\[V\]"):
        sample(np.zeros((2, 3), np.float32), GREEDY)
    with pytest.raises(SamplingError, match="nan at id 1"):
        sample(np.array([0, np.nan, 1], np.float32), GREEDY)
    with pytest.raises(SamplingError, match="inf at id 0"):
        sample(np.array([np.inf, 0], np.float32), SamplingParams())
    with pytest.raises(SamplingError, match="at least one finite"):
        sample(np.full(3, -np.inf, np.float32), SamplingParams())
    with pytest.raises(SamplingError, match="at least one finite"):
        sample(np.zeros(1, np.float32), SamplingParams(logit_bias={0: -np.inf}))
    with pytest.raises(SamplingError, match=r"logit_bias: expected token ids in 0..2, got 7"):
        sample(np.zeros(3, np.float32), SamplingParams(logit_bias={7: 1.0}))
    with pytest.raises(SamplingError, match="history"):
        sample(np.zeros(3, np.float32), SamplingParams(repetition_penalty=1.1), [3])


def test_params_are_data():
    params = SamplingParams(logit_bias={5: 1, 2: -1.5}, stop=["a", "a", "b"])
    assert params.stop == ("a", "b") and dict(params.logit_bias) == {2: -1.5, 5: 1.0}
    assert params == SamplingParams(logit_bias={2: -1.5, 5: 1.0}, stop=("a", "b"))
    assert len({params, SamplingParams(), SamplingParams()}) == 2
    assert pickle.loads(pickle.dumps(params)) == params
    assert 0 <= fresh_seed() < 2**32
