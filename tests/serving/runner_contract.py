# SPDX-License-Identifier: Apache-2.0
"""The runner contract as a suite of tests, run on every runner: `serving/runner.py` says what, this says how to check.

A test file subclasses `RunnerContract` and makes the runner; pytest collects the subclass:

    class TestMyRunner(RunnerContract):
        tolerance = 2e-5                 # largest difference of logits between two ways to the same history

        @pytest.fixture(scope="class")
        @classmethod
        def made(cls):
            return MyRunner(...)         # one runner for the whole class; every test opens it anew

The runner's vocabulary must hold ids 1..265 and its context 24 tokens; windows, if any, should be shorter than 12.
Logits of id 0, the padding, may be -inf. Tokens are compared with `gemma.sampling` on the runner's own logits.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gemma.errors import ContextFull, GemmaError, PromptError
from gemma.sampling import SamplingParams, logprobs, sample, step_seed
from gemma.serving.runner import Runner, RunnerInfo, StepIn

SLOTS, MAX_LEN = 4, 24
LONG = [2, *range(40, 53)]  # 14 ids
PROMPTS = [LONG, [2, 99], [2, 7, 7, 7, 7, 8], [2, *range(150, 161)]]
GREEDY = SamplingParams(temperature=0)
WAYS = [  # per row of a batch: every step of sampling that there is
    None,
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.5, min_p=0.02, repetition_penalty=1.3),
    SamplingParams(temperature=0, repetition_penalty=5.0, logit_bias={44: 2.0, 45: -np.inf}),
]


def decode(runner: Runner, slot: int, token: int, steps: int, params=None, seed: int = 0, history=()) -> list[int]:
    """Feeds `token`, then each token that comes back: the tokens that came back."""
    made: list[int] = []
    for index in range(steps):
        step = StepIn(slot, token, params, step_seed(seed, index), (*history, *made))
        token = runner.step([step])[0].token
        made.append(token)
    return made


class RunnerContract:
    """What every runner promises."""

    tolerance = 0.0
    cache_dtype = "float32"

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls) -> Runner:
        raise NotImplementedError("a subclass makes the runner")

    @pytest.fixture
    def runner(self, made) -> Runner:
        made.open(SLOTS, MAX_LEN, self.cache_dtype)
        return made

    def same(self, left: np.ndarray, right: np.ndarray) -> None:
        np.testing.assert_allclose(left, right, rtol=0, atol=self.tolerance)

    def after(self, runner: Runner, ids: list[int], slot: int = 3) -> np.ndarray:
        """Logits after `ids`, read in one go into a slot that is emptied before and after."""
        runner.free(slot)
        runner.prefill(slot, ids, 0)
        logits = runner.logits(slot)
        runner.free(slot)
        return logits

    # ---- what it is

    def test_it_is_a_runner(self, runner):
        assert isinstance(runner, Runner)
        info = runner.info
        assert isinstance(info, RunnerInfo) and (info.slots, info.max_len) == (SLOTS, MAX_LEN)
        assert info.dtype and info.device

    def test_logits_are_float32_numpy(self, runner):
        runner.prefill(0, LONG, 0)
        logits = runner.logits(0)
        assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
        assert logits.shape == (runner.info.config.vocab_size,)
        assert np.isfinite(logits[1:]).all()
        before = logits.copy()
        logits[:] = 0  # the caller's own: writing into it changes nothing
        np.testing.assert_array_equal(runner.logits(0), before)

    # ---- one sequence

    def test_every_id_of_the_history_matters(self, runner):
        base = self.after(runner, LONG)
        for place in (len(LONG) - 1, len(LONG) - 3, 1):
            changed = [*LONG[:place], 9, *LONG[place + 1 :]]
            assert np.abs(self.after(runner, changed)[1:] - base[1:]).max() > 10 * self.tolerance

    @pytest.mark.parametrize("cuts", [(5,), (1, 2, 13), (7, 8)])
    def test_chunks_equal_one_prefill(self, runner, cuts):
        starts = [0, *cuts, len(LONG)]
        for start, stop in itertools.pairwise(starts):
            runner.prefill(0, LONG[start:stop], start)
        self.same(runner.logits(0), self.after(runner, LONG))

    def test_a_step_caches_its_token(self, runner):
        runner.prefill(0, LONG, 0)
        for token in (50, 60, 61):
            runner.step([StepIn(0, token)])
        self.same(runner.logits(0), self.after(runner, [*LONG, 50, 60, 61]))
        runner.prefill(0, [70, 71], len(LONG) + 3)  # and reading goes on after it
        self.same(runner.logits(0), self.after(runner, [*LONG, 50, 60, 61, 70, 71]))

    def test_step_out(self, runner):
        runner.prefill(0, LONG, 0)
        [out] = runner.step([StepIn(0, 50)])
        values = logprobs(runner.logits(0))
        assert out.token == int(values.argmax()) and isinstance(out.token, int)
        assert out.logprob == pytest.approx(float(values[out.token]), abs=1e-5) and isinstance(out.logprob, float)
        if out.top:
            assert out.top[0][0] == out.token and out.top[0][1] == pytest.approx(out.logprob, abs=1e-5)
            order = np.argsort(-values, kind="stable")[: len(out.top)]
            np.testing.assert_allclose([p for _, p in out.top], values[order], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("params", WAYS, ids=["greedy", "top", "penalty", "bias"])
    def test_sampling_follows_the_numpy_sampler(self, runner, params):
        runner.prefill(0, LONG, 0)
        history, token = [*LONG, 50], 50
        for index in range(6):
            [out] = runner.step([StepIn(0, token, params, step_seed(5, index), tuple(history))])
            logits = runner.logits(0)
            assert out.token == sample(logits, params or GREEDY, history, step_seed(5, index))
            assert out.logprob == pytest.approx(float(logprobs(logits)[out.token]), abs=1e-5)  # before penalties
            token = out.token
            history.append(token)

    def test_history_is_what_penalties_look_at(self, runner):
        strong = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(1, 266), 30.0), repetition_penalty=100.0)
        runner.prefill(0, LONG, 0)
        runner.prefill(1, LONG, 0)
        free, held = runner.step([StepIn(0, 50), StepIn(1, 50)])
        first = runner.logits(0)
        [again] = runner.step([StepIn(0, 51, GREEDY, 0, history=())])
        assert again.token == sample(runner.logits(0), GREEDY)
        [punished] = runner.step([StepIn(1, 51, strong, 0, history=(again.token,))])
        assert punished.token == sample(runner.logits(1), strong, (again.token,))
        assert free.token == held.token == sample(first, GREEDY)

    def test_seeds_differ_and_repeat(self, runner):
        hot = SamplingParams(temperature=5.0)
        texts = []
        for seed in (1, 2, 1):
            runner.free(0)
            runner.prefill(0, LONG, 0)
            texts.append(decode(runner, 0, 50, 6, hot, seed))
        assert texts[0] == texts[2] != texts[1]

    # ---- many sequences

    def test_a_batch_equals_each_alone(self, runner):
        alone = []
        for b, prompt in enumerate(PROMPTS):
            runner.prefill(b, prompt, 0)
            alone.append(decode(runner, b, 50 + b, 5, WAYS[b], seed=b, history=prompt))
            runner.free(b)
        for b, prompt in enumerate(PROMPTS):
            runner.prefill(b, prompt, 0)
        rows = [3, 1, 0, 2]  # the order is the caller's, and kept
        tokens = {b: 50 + b for b in rows}
        made: dict[int, list[int]] = {b: [] for b in rows}
        for index in range(5):
            batch = [StepIn(b, tokens[b], WAYS[b], step_seed(b, index), (*PROMPTS[b], *made[b])) for b in rows]
            for b, out in zip(rows, runner.step(batch)):
                tokens[b] = out.token
                made[b].append(out.token)
        assert [made[b] for b in range(4)] == alone
        for b, prompt in enumerate(PROMPTS[:3]):
            self.same(runner.logits(b), self.after(runner, [*prompt, 50 + b, *alone[b][:-1]]))

    def test_rows_come_and_go(self, runner):
        runner.prefill(0, LONG, 0)
        first = decode(runner, 0, 50, 2)
        runner.prefill(1, PROMPTS[1], 0)  # a neighbour is read in between
        both = [first[-1], 60]
        outs = runner.step([StepIn(0, both[0]), StepIn(1, both[1])])
        runner.free(1)
        rest = decode(runner, 0, outs[0].token, 2)
        self.same(runner.logits(0), self.after(runner, [*LONG, 50, *first, outs[0].token, rest[0]]))

    def test_an_unnamed_slot_does_not_move(self, runner):
        for slot in (0, 1):
            runner.prefill(slot, PROMPTS[slot], 0)
        before = runner.logits(1)
        decode(runner, 0, 50, 3)
        np.testing.assert_array_equal(runner.logits(1), before)
        runner.prefill(1, [77], len(PROMPTS[1]))
        self.same(runner.logits(1), self.after(runner, [*PROMPTS[1], 77]))

    # ---- slots

    @pytest.mark.parametrize("n", [1, 6, len(LONG) - 1, len(LONG)])
    def test_copy_prefix(self, runner, n):
        runner.prefill(0, LONG, 0)
        runner.prefill(1, PROMPTS[3], 0)  # what the target held is gone afterwards
        runner.copy_prefix(0, 1, n)
        self.same(runner.logits(1), self.after(runner, LONG[:n]))
        runner.prefill(1, [88, 89], n)
        self.same(runner.logits(1), self.after(runner, [*LONG[:n], 88, 89]))
        self.same(runner.logits(0), self.after(runner, LONG))
        runner.step([StepIn(0, 50), StepIn(1, 51)])
        self.same(runner.logits(1), self.after(runner, [*LONG[:n], 88, 89, 51]))

    def test_copy_prefix_onto_itself_shortens(self, runner):
        runner.prefill(0, LONG, 0)
        decode(runner, 0, 50, 4)
        runner.copy_prefix(0, 0, 5)
        [out] = runner.step([StepIn(0, 90)])
        self.same(runner.logits(0), self.after(runner, [*LONG[:5], 90]))
        assert out.token == int(runner.logits(0).argmax())
        runner.copy_prefix(0, 0, 0)
        runner.prefill(0, [2, 5], 0)
        self.same(runner.logits(0), self.after(runner, [2, 5]))

    def test_a_freed_slot_forgets(self, runner):
        runner.prefill(0, [2, *range(200, 218)], 0)
        runner.free(0)
        with pytest.raises(GemmaError, match="slot 0"):
            runner.logits(0)
        runner.prefill(0, LONG[:3], 0)
        self.same(runner.logits(0), self.after(runner, LONG[:3]))
        runner.free(0)
        runner.free(0)  # freeing twice is no fault

    def test_open_empties_every_slot(self, runner):
        runner.prefill(0, LONG, 0)
        runner.open(SLOTS, MAX_LEN, self.cache_dtype)
        for slot in range(SLOTS):
            with pytest.raises(GemmaError):
                runner.logits(slot)
        runner.prefill(0, LONG, 0)

    # ---- misuse: raises where it is, and changes nothing

    MISUSE = (
        (lambda r: r.prefill(9, LONG, 0), GemmaError, "got 9"),
        (lambda r: r.prefill(-1, LONG, 0), GemmaError, "got -1"),
        (lambda r: r.prefill(0, LONG, 3), GemmaError, "14 tokens"),
        (lambda r: r.prefill(1, [5], 1), GemmaError, "0 tokens"),
        (lambda r: r.prefill(1, [], 0), PromptError, "at least one id"),
        (lambda r: r.prefill(1, [2, -1], 0), PromptError, "got -1"),
        (lambda r: r.prefill(1, [2, 10**6], 0), PromptError, "got 1000000"),
        (lambda r: r.prefill(1, [5] * (MAX_LEN + 1), 0), ContextFull, f"{MAX_LEN + 1} tokens.*holds {MAX_LEN}"),
        (lambda r: r.step([StepIn(0, 5), StepIn(0, 6)]), GemmaError, "each slot once"),
        (lambda r: r.step([StepIn(0, 5), StepIn(1, 6)]), GemmaError, "slot 1 is empty"),
        (lambda r: r.step([StepIn(0, -1)]), PromptError, "got -1"),
        (lambda r: r.logits(1), GemmaError, "slot 1 is empty"),
        (lambda r: r.copy_prefix(0, 1, 15), GemmaError, r"0\.\.14"),
        (lambda r: r.copy_prefix(0, 1, -1), GemmaError, "got -1"),
        (lambda r: r.copy_prefix(0, 7, 1), GemmaError, "got 7"),
        (lambda r: r.free(4), GemmaError, "got 4"),
        (lambda r: r.open(0, 8, "float32"), GemmaError, "at least 1 slot"),
        (lambda r: r.open(2, 0, "float32"), GemmaError, "1 token"),
    )

    def test_misuse_raises_and_changes_nothing(self, runner):
        runner.prefill(0, LONG, 0)
        before = runner.logits(0)
        for call, error, text in self.MISUSE:
            with pytest.raises(error, match=text):
                call(runner)
            np.testing.assert_array_equal(runner.logits(0), before)
        assert (runner.info.slots, runner.info.max_len) == (SLOTS, MAX_LEN)
        runner.prefill(1, LONG, 0)  # slot 1 is still empty
        runner.step([StepIn(0, 50)])
        self.same(runner.logits(0), self.after(runner, [*LONG, 50]))

    def test_a_full_slot(self, runner):
        runner.prefill(0, [2, *range(60, 60 + MAX_LEN - 2)], 0)
        runner.prefill(1, LONG, 0)
        runner.step([StepIn(0, 50)])  # the last free place
        full = runner.logits(0)
        for call in (
            lambda: runner.step([StepIn(1, 50), StepIn(0, 51)]),
            lambda: runner.prefill(0, [51], MAX_LEN),
        ):
            with pytest.raises(ContextFull) as caught:
                call()
            assert (caught.value.used, caught.value.limit) == (MAX_LEN + 1, MAX_LEN)
        np.testing.assert_array_equal(runner.logits(0), full)
        self.same(runner.logits(1), self.after(runner, LONG))  # its neighbour did not move either
