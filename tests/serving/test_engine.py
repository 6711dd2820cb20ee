# SPDX-License-Identifier: Apache-2.0
"""The engine on runners without a model: whatever happens around a request, its tokens are those it has alone."""

import itertools
import random

import pytest
from native_double import DoubleModel

from gemma.errors import ContextFull, GemmaError, PromptError, QueueFull, SamplingError
from gemma.sampling import SamplingParams, sample, step_seed
from gemma.serving._runner_cpu import CpuRunner
from gemma.serving.engine import Engine, State
from gemma.testing import ByteTokenizer, FakeRunner

MAX_LEN = 40
HOT = SamplingParams(temperature=1.0, top_k=12, seed=4, max_new_tokens=9)


def alone(runner, prompt, params, end_ids=()):
    """(ids, reason) by the contract alone: one slot, one prefill, steps; no engine."""
    from gemma.serving.runner import StepIn

    runner.free(0)
    runner.prefill(0, prompt, 0)
    ids = [sample(runner.logits(0), params, prompt, step_seed(params.seed, 0))]
    while True:
        if ids[-1] in end_ids:
            return ids, "stop"
        if len(ids) >= params.max_new_tokens:
            return ids, "length"
        if len(prompt) + len(ids) > MAX_LEN:
            return ids, "context"
        history = (*prompt, *ids)
        [out] = runner.step([StepIn(0, ids[-1], params, step_seed(params.seed, len(ids)), history)])
        ids.append(out.token)


def random_request(rng: random.Random, heads):
    """(prompt, params, end ids); many prompts begin alike."""
    head = rng.choice(heads)[: rng.randint(1, 24)]
    prompt = [2, *head, *(rng.randint(1, 200) for _ in range(rng.randint(0, 12)))][:MAX_LEN]
    params = rng.choice(
        [
            dict(temperature=0),
            dict(temperature=1.3, top_k=30),
            dict(temperature=0.8, top_p=0.9, repetition_penalty=1.2),
            dict(temperature=0, repetition_penalty=3.0),
        ]
    )
    end_ids = rng.sample(range(1, 266), 12) if rng.random() < 0.5 else ()
    return prompt, SamplingParams(**params, seed=rng.randint(0, 99), max_new_tokens=rng.randint(1, 14)), end_ids


def check_books(engine):
    """Every slot has one owner at most, and holds what the bookkeeping says."""
    running = engine._scheduler.running
    owners = [engine._slots.owner(n) for n in range(len(engine._slots))]
    assert sorted(r.number for r in running) == sorted(o.number for o in owners if o is not None)
    assert engine._slots.free + len(running) == len(owners)
    for request in running:
        assert owners[request.slot] is request
        held = list(engine._slots.ids(request.slot))
        assert held == request.history[: len(held)]
    if isinstance(engine.runner, FakeRunner):
        for n in range(len(owners)):
            if owners[n] is not None or engine._slots.ids(n):
                assert list(engine.runner.history(n)) == list(engine._slots.ids(n))


def fake(slots):
    return FakeRunner(slots=slots, max_len=MAX_LEN)


def native(slots):
    return CpuRunner(DoubleModel(period=2, spread=4.0), slots=slots, max_len=MAX_LEN)


def looping(slots):
    return CpuRunner(DoubleModel(period=1, few=4, spread=9.0), slots=slots, max_len=MAX_LEN)


@pytest.mark.parametrize(
    ("make", "speculate", "schedules"), [(fake, 0, 60), (native, 0, 25), (looping, 5, 40)], ids=["fake", "cpu", "guess"]
)
def test_any_schedule_gives_each_request_what_it_has_alone(make, speculate, schedules):
    """Random arrivals, lengths, slots, chunks, common beginnings, cancellations; logits hash the whole history."""
    single, reused, guessed = make(1), 0, 0
    for seed in range(schedules):
        rng = random.Random(seed)
        heads = [[rng.randint(1, 200) for _ in range(24)] for _ in range(2)]
        engine = Engine(
            make(rng.randint(1, 4)), chunk=rng.randint(1, 20), interleave=rng.randint(1, 9), speculate=speculate
        )
        wanted = [random_request(rng, heads) for _ in range(rng.randint(1, 9))]
        requests, cancelled, order = [], set(), []
        while len(requests) < len(wanted) or not engine.idle:
            if len(requests) < len(wanted) and rng.random() < 0.4:
                requests.append(engine.submit(*wanted[len(requests)]))
            if requests and rng.random() < 0.04:
                victim = rng.choice(requests)
                if not victim.done:
                    cancelled.add(victim.number)
                    engine.cancel(victim)
            engine.step()
            check_books(engine)
            begun = [r.number for r in requests if r.state is not State.WAITING and r.number not in cancelled]
            order += [number for number in begun if number not in order]
        assert engine._slots.free == len(engine._slots)
        assert order == sorted(order)  # first come, first served
        for request, (prompt, params, end_ids) in zip(requests, wanted):
            ids, reason = alone(single, prompt, params, end_ids)
            if request.number in cancelled:
                assert request.ids == ids[: len(request.ids)] and request.finish_reason == "cancelled"
            else:
                assert (request.ids, request.finish_reason) == (ids, reason)
        reused += engine.stats.reused
        guessed += engine.stats.accepted
        assert engine.stats.generated == sum(len(r.ids) for r in requests)
    assert reused > 50  # the schedules did what they are for
    assert (guessed > 20) == (speculate > 0)


def test_a_neighbour_s_content_does_not_matter():
    """The same schedule twice, with another neighbour: nothing of it is seen."""
    texts = []
    for other in ([2, 50, 51, 52], [2, 90, 91, 92]):
        engine = Engine(fake(2), chunk=2)
        mine = engine.submit([2, 7, 8, 9], HOT)
        engine.submit(other, HOT)
        engine.run()
        texts.append(mine.ids)
    assert texts[0] == texts[1]


def test_prompts_are_cut_and_interleaved():
    runner = fake(2)
    engine = Engine(runner, chunk=16, interleave=4)
    first = engine.submit([2, *range(20, 39)], SamplingParams(temperature=0, max_new_tokens=20))
    engine.step()
    engine.step()
    assert [c for c in runner.calls if c.startswith("prefill")] == ["prefill 0 16@0", "prefill 0 4@16"]
    assert first.state is State.DECODE and len(first.ids) == 1
    second = engine.submit([2, *range(60, 75)], SamplingParams(temperature=0, max_new_tokens=2))
    runner.calls.clear()
    for _ in range(4):
        engine.step()
    assert runner.calls == [c for n in range(4) for c in (f"prefill 1 4@{4 * n}", "step 0")]
    assert len(first.ids) == 5 and len(second.ids) == 1
    engine.step()
    assert runner.calls[-1] == "step 0 1" and second.finish_reason == "length"


def test_the_oldest_prompt_is_read_first_and_nobody_starves():
    """A long prompt behind a stream of short ones: it has its slot in its turn, and moves in every turn."""
    engine = Engine(fake(2), chunk=8, interleave=2)
    params = SamplingParams(temperature=0, max_new_tokens=3)
    engine.submit([2, 3], params)
    long = engine.submit([2, *range(30, 60)], params)
    turns = 0
    while not long.done:
        if engine.waiting < 3:
            engine.submit([2, turns % 200 + 1], params)
        engine.step()
        turns += 1
    assert turns <= 1 + 31 // 2 + 4


def test_events_and_text():
    engine = Engine(fake(1), ByteTokenizer())
    told = []
    request = engine.submit([2, 5], HOT, on_event=told.append)
    events = list(engine.stream(request))
    assert events == told and [e.token for e in events] == request.ids
    assert "".join(e.text for e in events) == request.text == ByteTokenizer().decode(request.ids)
    assert [e.finish_reason for e in events] == [None] * 8 + ["length"]
    assert all(e.logprob <= 0 and e.top[0][1] >= e.logprob for e in events)
    assert request.submitted <= request.started <= request.ended


def reply(text, end=1):
    """A runner that says `text`, then `end`, after any prompt that ends with id 5."""
    ids = [*ByteTokenizer().encode(text), end]

    def choose(history):
        at = len(history) - 1 - history[::-1].index(5)
        return ids[min(len(history) - 1 - at, len(ids) - 1)]

    return FakeRunner(slots=2, max_len=MAX_LEN, choose=choose)


@pytest.mark.parametrize(
    ("stop", "text", "by"),
    [
        ((), "one, two, 🙂", 1),
        (("wo",), "one, t", "wo"),
        (("🙂x", "🙂"), "one, two, ", "🙂"),
        ((", two!",), "one, two, 🙂", 1),
    ],
)
def test_stop_strings_and_end_tokens(stop, text, by):
    engine = Engine(reply("one, two, 🙂"), ByteTokenizer())
    request = engine.submit([2, 5], SamplingParams(temperature=0, stop=stop, max_new_tokens=30), end_ids={1})
    seen = "".join(e.text for e in engine.stream(request))
    assert (seen, request.text, request.stopped_by, request.finish_reason) == (text, text, by, "stop")
    assert all(not seen[:n].endswith(s) for s in stop for n in range(len(seen)))


def test_what_is_held_back_comes_at_the_end():
    engine = Engine(reply("abc <"), ByteTokenizer())
    params = SamplingParams(temperature=0, stop=("<end>",), max_new_tokens=5)
    assert "".join(e.text for e in engine.stream(engine.submit([2, 5], params))) == "abc <"


def test_a_full_context():
    engine = Engine(FakeRunner(slots=1, max_len=8))
    request = engine.submit([2, 3, 4, 5, 6], SamplingParams(temperature=0, max_new_tokens=100))
    engine.run()
    assert request.finish_reason == "context" and len(request.ids) == 4  # the last one needs no place
    with pytest.raises(ContextFull):
        engine.submit([2] * 9)
    whole = engine.submit([2, *range(3, 10)], SamplingParams(temperature=0, max_new_tokens=100))
    engine.run()
    assert whole.finish_reason == "context" and len(whole.ids) == 1


# ---- used again


def test_a_conversation_reads_only_what_is_new():
    runner = fake(2)
    engine = Engine(runner)
    first = engine.submit([2, *range(40, 52)], SamplingParams(temperature=0, max_new_tokens=5))
    engine.run()
    runner.calls.clear()
    second = engine.submit([*first.history, 90, 91], SamplingParams(temperature=0, max_new_tokens=1))
    engine.run()
    assert second.reused == 13 + 4 and runner.calls == ["prefill 0 3@17"]


def test_a_running_sequence_is_copied_from():
    engine = Engine(fake(3))
    prompt = [2, *range(40, 60)]
    first = engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=12))
    for _ in range(3):
        engine.step()
    second = engine.submit([*prompt, 99], SamplingParams(temperature=0, max_new_tokens=3))
    same = engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=12))
    engine.run()
    assert (second.reused, same.reused) == (21, 21)
    assert same.ids == first.ids


def test_a_long_memory_is_not_given_up_for_a_short_beginning():
    runner = fake(2)
    engine = Engine(runner)
    long = engine.submit([2, *range(40, 70)], SamplingParams(temperature=0, max_new_tokens=1))
    engine.run()
    engine.submit([2, *range(40, 50)], SamplingParams(temperature=0, max_new_tokens=1))
    engine.run()
    again = engine.submit([*long.prompt, 99], SamplingParams(temperature=0, max_new_tokens=1))
    engine.run()
    assert again.reused == 31


def test_what_a_ring_has_lost_is_not_counted_on():
    runner = native(1)
    engine = Engine(runner)
    engine.submit([2, *range(40, 60)], SamplingParams(temperature=0, max_new_tokens=3))
    engine.run()
    request = engine.submit([2, *range(40, 50), 99], SamplingParams(temperature=0, max_new_tokens=3))
    engine.run()
    assert request.reused == 0
    assert request.ids == alone(native(1), list(request.prompt), request.params)[0]


def test_a_copy_that_fails_only_costs_time(monkeypatch):
    runner = fake(1)
    engine = Engine(runner)
    engine.submit([2, *range(40, 60)], HOT)
    engine.run()
    monkeypatch.setattr(runner, "copy_prefix", lambda *_: (_ for _ in ()).throw(MemoryError))
    request = engine.submit([2, *range(40, 60), 9], HOT)
    engine.run()
    assert request.reused == 0 and request.ids == alone(fake(1), [2, *range(40, 60), 9], HOT)[0]


# ---- ends before their time


def test_cancel_at_every_point():
    for turns, slots in itertools.product(range(5), (1, 2)):
        engine = Engine(fake(slots), chunk=3)
        told = []
        first = engine.submit([2, *range(40, 50)], HOT)
        victim = engine.submit([2, *range(60, 70)], HOT, on_event=told.append)
        for _ in range(turns):
            engine.step()
        engine.cancel(victim)
        assert victim.done and victim.slot is None and victim.finish_reason == "cancelled"
        engine.cancel(victim)
        engine.run()
        assert told[-1].finish_reason == "cancelled" and sum(e.finish_reason is not None for e in told) == 1
        assert first.ids == alone(fake(1), list(first.prompt), HOT)[0]
        assert engine._slots.free == slots


def test_leaving_a_stream_cancels():
    engine = Engine(fake(1))
    request = engine.submit([2, 3], HOT)
    stream = engine.stream(request)
    next(stream)
    stream.close()
    assert request.finish_reason == "cancelled" and engine.running == 0


def test_two_streams_side_by_side():
    engine = Engine(fake(2))
    pair = [engine.submit([2, 30 + n], HOT) for n in range(2)]
    seen = [[], []]
    for events in itertools.zip_longest(*map(engine.stream, pair)):
        for n, event in enumerate(events):
            seen[n].append(event.token)
    assert seen == [pair[0].ids, pair[1].ids]


def test_one_bad_row_ends_one_request():
    """NaN after one sequence's token: it ends with the error, and its neighbours do not notice."""
    model = DoubleModel()
    want = [alone(CpuRunner(DoubleModel(), slots=1, max_len=MAX_LEN), [2, 60 + n], HOT)[0] for n in range(3)]
    model.poison.add(want[1][3])
    assert not set(want[0] + want[2]) & model.poison
    engine = Engine(CpuRunner(model, slots=3, max_len=MAX_LEN))
    requests = [engine.submit([2, 60 + n], HOT) for n in range(3)]
    engine.run()
    assert [r.finish_reason for r in requests] == ["length", "error", "length"]
    assert isinstance(requests[1].error, SamplingError) and requests[1].ids == want[1][:4]
    assert requests[0].ids == want[0] and requests[2].ids == want[2]
    assert engine.submit([2, 5], HOT) and engine.run() is None  # and it goes on


def test_a_prompt_that_fails():
    model = DoubleModel()
    model.poison.add(77)
    engine = Engine(CpuRunner(model, slots=2, max_len=MAX_LEN), chunk=4)
    bad, padded, good = (engine.submit(p, HOT) for p in ([2, 4, 77], [2, 0, 4], [2, 5]))
    engine.run()
    assert bad.finish_reason == padded.finish_reason == "error" and good.finish_reason == "length"
    assert isinstance(padded.error, PromptError) and "padding" in str(padded.error)


def test_an_error_of_a_callback_is_the_caller_s():
    engine = Engine(fake(2))

    def angry(event):
        raise ValueError("mine")

    bad, good = engine.submit([2, 3], HOT, on_event=angry), engine.submit([2, 4], HOT)
    with pytest.raises(ValueError, match="mine"):
        engine.run()
    assert bad.finish_reason == "cancelled"
    with pytest.raises(ValueError, match="mine"):  # the news of its end
        engine.run()
    engine.run()
    assert good.ids == alone(fake(1), [2, 4], HOT)[0]


def test_callbacks_may_submit_and_cancel():
    engine = Engine(fake(1))
    made = []

    def more(event):
        if event.finish_reason is not None and len(made) < 3:
            made.append(engine.submit([2, 50 + len(made)], HOT, on_event=more))

    engine.submit([2, 3], HOT, on_event=more)
    engine.run()
    assert len(made) == 3 and all(r.finish_reason == "length" for r in made)


# ---- what is refused


def test_misuse():
    engine = Engine(fake(1), queue=1)
    for call, error, text in (
        (lambda: engine.submit([]), PromptError, "at least one id"),
        (lambda: engine.submit([2, 10**6]), PromptError, "got 1000000"),
        (lambda: engine.submit([2], SamplingParams(stop=("x",))), SamplingError, "without a tokenizer"),
        (lambda: Engine(fake(1), speculate=3), GemmaError, "FakeRunner cannot check guesses"),
        (lambda: Engine(native(1), speculate=-1), GemmaError, "got -1"),
        (lambda: Engine(fake(1), chunk=0), GemmaError, "at least 1 token"),
    ):
        with pytest.raises(error, match=text):
            call()
    engine.submit([2, 3])
    with pytest.raises(QueueFull, match="1 requests wait.*and 1 may"):
        engine.submit([2, 3])
    engine.step()
    engine.submit([2, 3])
    engine.run()


def test_seeds():
    engine = Engine(fake(2))
    free = [engine.submit([2, 3], SamplingParams(temperature=50.0, max_new_tokens=20)) for _ in range(2)]
    engine.run()
    assert free[0].ids != free[1].ids and free[0].params.seed is not None
    again = engine.submit([2, 3], free[0].params)
    engine.run()
    assert again.ids == free[0].ids


def test_default_is_greedy():
    engine, runner = Engine(fake(1)), fake(1)
    event = next(engine.stream(engine.submit([2, 3])))
    runner.prefill(0, [2, 3], 0)
    assert event.token == int(runner.logits(0).argmax())
