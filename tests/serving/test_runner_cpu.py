# SPDX-License-Identifier: Apache-2.0
"""The CPU runner on a double of the native model: the contract, the fast picks, guesses, and what it refuses."""

import numpy as np
import pytest
from native_double import DoubleModel
from runner_contract import LONG, RunnerContract

from gemma import fit
from gemma.errors import ConfigError, ContextFull, GemmaError, PromptError, SamplingError
from gemma.sampling import SamplingParams, logprobs, sample, step_seed, top_logprobs
from gemma.serving import _pick
from gemma.serving._runner_cpu import CpuRunner
from gemma.serving.runner import StepIn

GREEDY = SamplingParams(temperature=0)


class TestCpuRunnerOverADouble(RunnerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        return CpuRunner(DoubleModel())


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(*values):
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=maybe(0, 0.3, 0.7, 1.0, 1.0, 1.7),
        top_k=maybe(None, None, 1, 3, 20, 64, 5000),
        top_p=maybe(None, 0.0, 0.3, 0.9, 0.95, 1.0),
        min_p=maybe(None, None, 0.0, 0.02, 0.3, 1.0),
        repetition_penalty=maybe(1.0, 1.0, 1.3),
        logit_bias=maybe({}, {}, {5: 3.0, 7: -np.inf}),
    )


@pytest.mark.parametrize("size", [12, 300, 3000])
def test_the_quick_pick_is_the_numpy_sampler_s(size):
    """On smooth logits, on logits full of equals, and on flat ones; the candidates must notice when they do not do."""
    rng = np.random.default_rng(size)
    for round in range(150):
        logits = rng.standard_normal(size).astype(np.float32) * np.float32(rng.choice([0.01, 1.0, 6.0]))
        if round % 3 == 0:
            logits = np.round(logits)
        logits[0] = -np.inf
        params, history = random_params(rng), rng.integers(1, size, 5).tolist()
        for draw in range(3):
            step = StepIn(0, 1, params, step_seed(round, draw), history)
            out = _pick.pick(logits, step, DoubleModel.top_k, 3)
            assert out.token == sample(logits, params, history, step.rng), params
            assert out.logprob == pytest.approx(float(logprobs(logits)[out.token]), abs=1e-5)
            want = top_logprobs(logits, 3)
            assert [i for i, _ in out.top] == [i for i, _ in want]
            np.testing.assert_allclose([p for _, p in out.top], [p for _, p in want], atol=1e-5)


def test_candidates_are_enough_for_common_settings(monkeypatch):
    """Otherwise a token costs a sort of the vocabulary."""
    monkeypatch.setattr(_pick, "sample", lambda *_: pytest.fail("the whole vocabulary was sorted"))
    logits = np.random.default_rng(0).standard_normal(50_000).astype(np.float32) * 4
    ways = (
        dict(temperature=0),
        dict(top_k=64, top_p=0.95),
        dict(temperature=0.7, top_p=0.9),
        dict(min_p=0.05),
        dict(top_k=40, min_p=0.1, repetition_penalty=1.2),
    )
    for params in ways:
        _pick.pick(logits, StepIn(0, 1, SamplingParams(**params), 7, [3, 4]), DoubleModel.top_k, 5)


def test_no_pairs_asked_for():
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert _pick.pick(logits, StepIn(0, 1), DoubleModel.top_k, 0).top == ()


def test_logits_that_are_not_finite():
    model = DoubleModel()
    runner = CpuRunner(model, slots=2, max_len=20)
    model.poison.add(66)
    runner.prefill(0, [2, 5], 0)
    with pytest.raises(SamplingError, match="not finite"):
        runner.step([StepIn(0, 66)])
    everything = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(320), -np.inf))
    runner.prefill(1, [2, 5], 0)
    with pytest.raises(SamplingError, match="-inf for every token"):
        runner.step([StepIn(1, 6, everything)])


def test_blocked_ids_are_never_picked():
    free, bound = CpuRunner(DoubleModel()), None
    free.prefill(0, LONG, 0)
    likeliest = [i for i, _ in top_logprobs(free.logits(0), 5)]
    bound = CpuRunner(DoubleModel(), blocked=likeliest[:4])
    bound.prefill(0, LONG, 0)
    assert bound.pick(StepIn(0, -1)).token == likeliest[4]
    assert (bound.logits(0)[[0, *likeliest[:4]]] == -np.inf).all()


def test_what_is_refused():
    runner = CpuRunner(DoubleModel())
    limit = runner.info.config.max_position_embeddings
    with pytest.raises(ContextFull, match=str(limit)):
        runner.open(1, limit + 1, "float32")
    with pytest.raises(ConfigError, match="float32, bfloat16, int8.*got 'float64'"):
        runner.open(1, 8, "float64")
    with pytest.raises(PromptError, match="padding"):
        runner.prefill(0, [2, 0], 0)
    with pytest.raises(PromptError, match="text only"):
        runner.prefill(0, [2], 0, images=np.zeros((1, 2, 2, 3)))
    for call in (
        lambda: runner.verify(StepIn(0, 5), [6], [1, 2]),
        lambda: runner.pick(StepIn(0, -1)),
        lambda: runner.prefill(0, [2], 0) or runner.verify(StepIn(0, 5), [], [1]),
        lambda: runner.verify(StepIn(0, 5), [6, 7], [1]),
    ):
        with pytest.raises(GemmaError):
            call()
    runner.open(1, 8, "int8")
    runner.open(1, 8, "bf16")


def test_a_cache_beyond_memory_is_refused_before_it_is_made(monkeypatch):
    runner = CpuRunner(DoubleModel(), slots=1, max_len=8)
    monkeypatch.setattr(fit, "machine_memory", lambda: fit.Memory(10**6, 10**5))
    before = runner.info
    with pytest.raises(ConfigError, match=r"3 slots of 128 tokens in float32 need .* and 100 kB of memory are free"):
        runner.open(3, 128, "float32")
    assert runner.info == before


def alone(ids, params, steps, seed):
    runner, made = CpuRunner(DoubleModel(period=2)), []
    runner.prefill(0, ids, 0)
    made.append(runner.pick(StepIn(0, -1, params, step_seed(seed, 0), ids)))
    for index in range(1, steps):
        history = [*ids, *(out.token for out in made)]
        made += runner.step([StepIn(0, made[-1].token, params, step_seed(seed, index), history)])
    return made


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=4), SamplingParams(repetition_penalty=1.4, top_p=0.8)])
def test_a_guess_changes_nothing(params):
    """Whatever is guessed, right, wrong or half right, the tokens and their log-probabilities are those of steps."""
    rng = np.random.default_rng(3)
    ids, steps = [2, 9, 30], 24
    want = alone(ids, params, steps, seed=8)
    runner = CpuRunner(DoubleModel(period=2))
    runner.prefill(0, ids, 0)
    made, accepted = [runner.pick(StepIn(0, -1, params, step_seed(8, 0), ids))], 0
    while len(made) < steps:
        size = int(rng.integers(1, 6))
        guess = [out.token for out in want[len(made) : len(made) + size]]
        guess = guess[: int(rng.integers(0, size + 1))] + rng.integers(1, 300, 2).tolist()
        history = [*ids, *(out.token for out in made)]
        rngs = [step_seed(8, len(made) + n) for n in range(len(guess) + 1)]
        outs = runner.verify(StepIn(0, made[-1].token, params, 0, history), guess, rngs)
        accepted += len(outs) - 1
        made += outs
    assert accepted > 5
    assert made[:steps] == want
    held = [*ids, *(out.token for out in made[:-1])]
    again = CpuRunner(DoubleModel(period=2))
    again.prefill(0, held, 0)
    np.testing.assert_array_equal(runner.logits(0), again.logits(0))


def test_guesses_keep_the_distribution():
    """4 ids, 3,000 sequences of two tokens, guessed ahead: the pairs that come have the probabilities of sampling."""
    model = DoubleModel(vocab_size=5, spread=1.0)
    runner, params, count = CpuRunner(model), SamplingParams(), 3000
    pairs = np.zeros((5, 5))
    for seed in range(count):
        runner.free(0)
        runner.prefill(0, [2], 0)
        outs = runner.verify(StepIn(0, 3, params, 0, ()), [1], [step_seed(seed, 0), step_seed(seed, 1)])
        if len(outs) == 1:
            outs += runner.step([StepIn(0, outs[0].token, params, step_seed(seed, 1))])
        pairs[outs[0].token, outs[1].token] += 1
    expected = np.zeros((5, 5))
    for first in range(1, 5):
        rows = []
        for history in ([2, 3], [2, 3, first]):
            row = model._row(history).astype(np.float64)
            row[0] = -np.inf
            rows.append(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        expected[first] = rows[0][first] * rows[1]
    assert pairs[0].sum() == pairs[:, 0].sum() == 0
    cells = expected > 0
    chi2 = ((pairs[cells] - count * expected[cells]) ** 2 / (count * expected[cells])).sum()
    assert chi2 < 44.3  # 16 cells, 15 degrees of freedom: exceeded with probability 1e-4, and the seeds are fixed
