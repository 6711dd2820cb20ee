# SPDX-License-Identifier: Apache-2.0
"""FakeRunner keeps the runner contract: same history, same answer; misuse raises where it is and changes nothing."""

import numpy as np
import pytest

from gemma.errors import ConfigError, ContextFull, GemmaError, PromptError
from gemma.sampling import SamplingParams, step_seed
from gemma.serving.runner import Runner, RunnerInfo, StepIn
from gemma.testing import ByteTokenizer, FakeRunner, tiny_config

IDS = [2, 40, 41, 42]


def decode(runner, slot, token, steps, params=None, seed=0):
    out = []
    for index in range(steps):
        [step] = runner.step([StepIn(slot, token, params, step_seed(seed, index))])
        token = step.token
        out.append(token)
    return out


def test_it_is_a_runner():
    runner = FakeRunner(slots=3, max_len=50)
    assert isinstance(runner, Runner)
    assert runner.info == RunnerInfo(tiny_config(vocab_size=266), 50, 3, "float32", "fake")


def test_logits_depend_on_the_history_alone():
    a, b = FakeRunner(), FakeRunner()
    a.prefill(0, IDS, 0)
    b.prefill(2, [9, 9], 0)
    b.prefill(3, IDS[:1], 0)  # in chunks, in another slot, beside a neighbour
    b.prefill(3, IDS[1:3], 1)
    b.step([StepIn(2, 8), StepIn(3, IDS[3])])
    np.testing.assert_array_equal(a.logits(0), b.logits(3))
    assert a.logits(0).dtype == np.float32 and a.logits(0).shape == (266,)
    assert not np.array_equal(a.logits(0), b.logits(2))
    other = FakeRunner(seed=1)
    other.prefill(0, IDS, 0)
    assert not np.array_equal(a.logits(0), other.logits(0))


def test_every_id_of_the_history_matters():
    seen = set()
    for place in range(len(IDS)):
        for value in (10, 11):
            runner = FakeRunner()
            runner.prefill(0, [*IDS[:place], value, *IDS[place + 1 :]], 0)
            seen.add(runner.logits(0).tobytes())
    assert len(seen) == 2 * len(IDS)


def test_step_is_greedy_on_its_own_logits_and_batches_do_not_mix():
    alone, batched = FakeRunner(), FakeRunner()
    alone.prefill(0, IDS, 0)
    expected = decode(alone, 0, 50, 6)
    for slot in range(3):
        batched.prefill(slot, IDS if slot == 1 else [slot + 5], 0)
    tokens, got = [60, 50, 61], []
    for _ in range(6):
        outs = batched.step([StepIn(slot, token) for slot, token in enumerate(tokens)])
        tokens = [o.token for o in outs]
        got.append(tokens[1])
    assert got == expected
    printable = {ByteTokenizer.FIRST_BYTE + b for b in range(32, 127)}
    assert set(expected) <= printable


def test_step_out():
    runner = FakeRunner(top=3)
    runner.prefill(0, IDS, 0)
    [out] = runner.step([StepIn(0, 50)])
    assert out.token == int(runner.logits(0).argmax()) == out.top[0][0]
    assert out.logprob == out.top[0][1] < 0 and len(out.top) == 3


def test_sampling_uses_params_history_and_rng():
    params = SamplingParams(temperature=5.0)

    def run(seed):
        runner = FakeRunner()
        runner.prefill(0, IDS, 0)
        return decode(runner, 0, 50, 8, params, seed)

    assert run(1) == run(1) != run(2)
    runner = FakeRunner()
    runner.prefill(0, IDS, 0)
    [free] = runner.step([StepIn(0, 50)])
    again = FakeRunner()
    again.prefill(0, IDS, 0)
    strong = SamplingParams(temperature=0, repetition_penalty=100.0)
    [punished] = again.step([StepIn(0, 50, strong, 0, history=[free.token])])
    assert punished.token != free.token


def test_copy_prefix_and_free():
    runner = FakeRunner()
    runner.prefill(0, IDS, 0)
    runner.copy_prefix(0, 1, 3)
    assert runner.history(1) == tuple(IDS[:3])
    runner.prefill(1, IDS[3:], 3)
    np.testing.assert_array_equal(runner.logits(0), runner.logits(1))
    runner.free(0)
    assert runner.history(0) == () and runner.history(1) == tuple(IDS)
    runner.prefill(0, [7], 0)


def test_images_change_the_answer_not_the_ids():
    first, second = FakeRunner(), FakeRunner()
    first.prefill(0, IDS, 0, images=np.zeros((1, 4)))
    second.prefill(0, IDS, 0, images=np.ones((1, 4)))
    assert first.history(0) == second.history(0) == tuple(IDS)
    assert not np.array_equal(first.logits(0), second.logits(0))


def test_scripted_reply():
    reply = [20, 21, 1]
    runner = FakeRunner(choose=lambda history: reply[len(history) - len(IDS) - 1])
    runner.prefill(0, IDS, 0)
    assert decode(runner, 0, 50, 3) == reply


MISUSE = [
    (lambda r: r.prefill(9, IDS, 0), GemmaError, "expected 0..3, got 9"),
    (lambda r: r.prefill(-1, IDS, 0), GemmaError, "got -1"),
    (lambda r: r.prefill(0, IDS, 3), GemmaError, "start must be the 4 tokens"),
    (lambda r: r.prefill(1, [], 0), PromptError, "at least one id"),
    (lambda r: r.prefill(1, [266], 0), PromptError, "0..265, got 266"),
    (lambda r: r.prefill(1, [5] * 9, 0), ContextFull, "9 tokens.*holds 8"),
    (lambda r: r.step([StepIn(0, 5), StepIn(0, 6)]), GemmaError, "each slot once"),
    (lambda r: r.step([StepIn(0, 5), StepIn(1, 6)]), GemmaError, "slot 1 is empty"),
    (lambda r: r.step([StepIn(0, -1)]), PromptError, "got -1"),
    (lambda r: r.logits(1), GemmaError, "empty"),
    (lambda r: r.copy_prefix(0, 1, 5), GemmaError, r"0\.\.4"),
    (lambda r: r.free(4), GemmaError, "slot"),
    (lambda r: r.open(0, 8, "float32"), GemmaError, "at least 1 slot"),
]


@pytest.mark.parametrize(("call", "error", "text"), MISUSE, ids=[text for _, _, text in MISUSE])
def test_misuse_raises_and_changes_nothing(call, error, text):
    runner = FakeRunner(slots=4, max_len=8)
    runner.prefill(0, IDS, 0)
    with pytest.raises(error, match=text):
        call(runner)
    assert [runner.history(slot) for slot in range(4)] == [tuple(IDS), (), (), ()]


def test_context_full_at_the_last_token():
    runner = FakeRunner(slots=1, max_len=6)
    runner.prefill(0, IDS, 0)
    decode(runner, 0, 50, 2)
    with pytest.raises(ContextFull, match="7 tokens"):
        runner.step([StepIn(0, 50)])
    runner.open(2, 10, "bfloat16")
    assert runner.history(0) == () and runner.info.slots == 2 and runner.cache_dtype == "bfloat16"


def test_calls_are_recorded():
    runner = FakeRunner()
    runner.prefill(1, IDS, 0)
    runner.step([StepIn(1, 5)])
    assert runner.calls == ["prefill 1 4@0", "step 1"]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_tiny_configs_have_every_trait_of_their_family(family):
    config = tiny_config(family)
    width = config.num_attention_heads * config.head_dim
    assert width != config.hidden_size and round(config.hidden_size**0.5) ** 2 != config.hidden_size
    kinds = {s.attention for s in config.layers}
    assert kinds == ({"global"} if family == "gemma" else {"local", "global"})
    assert tiny_config(family, num_hidden_layers=2).num_hidden_layers == 2


def test_tiny_config_errors():
    with pytest.raises(ConfigError, match="gemma, gemma2, gemma3"):
        tiny_config("llama")
    with pytest.raises(ConfigError, match="unknown field"):
        tiny_config("gemma3", hidden=3)
