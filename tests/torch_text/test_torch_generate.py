# SPDX-License-Identifier: Apache-2.0
"""Sampling against the numpy sampler; generating in batches, with padding, seeds, ends, stops, streaming, compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_harness import ragged
from torch_harness import logits, model

from gemma._torch import sampling
from gemma._torch.generate import stream
from gemma.errors import ContextFull, PromptError, SamplingError, ShapeError
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.sampling import SamplingParams, process_logits, sample, step_seed, uniform
from gemma.testing import ByteTokenizer, tiny_config

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
WAYS = [
    dict(temperature=0),
    dict(temperature=0, repetition_penalty=2.0, logit_bias={7: 3.0, 9: -np.inf}),
    dict(temperature=2.0),
    dict(top_k=5),
    dict(top_p=0.9),
    dict(top_p=0.3, temperature=0.7),
    dict(top_p=0.0),
    dict(min_p=0.1),
    dict(top_k=300, top_p=0.8, min_p=0.02, repetition_penalty=1.3, temperature=1.7),
]


@pytest.mark.parametrize("size", [320, 6000])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way))
def test_sampling_is_the_numpy_samplers(way, ties, size, monkeypatch):
    """The same survivors and the same draw, also with ties and where the likeliest few do not reach p."""
    monkeypatch.setattr(sampling, "_LIKELIEST", 64)
    params, history = SamplingParams(**way), [3, 7, 7, 200]
    for i in range(8):
        values = (np.random.default_rng(i).standard_normal(size) * (0.3 + i)).astype(np.float32)
        values = np.round(values, 0 if ties else 9)
        state = step_seed(11, i)
        got = sampling.pick(torch.from_numpy(values), params, history, uniform(state))
        assert got == sample(values, params, history, state)
        if not params.greedy:
            scores = sampling.adjusted(torch.from_numpy(values), params, history)
            kept = set(sampling.survivors(scores, params)[0].tolist())
            assert kept == set(np.flatnonzero(np.isfinite(process_logits(values, params, history))))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
    values = torch.zeros(320)
    values[5] = bad
    with pytest.raises(SamplingError, match="finite"):
        sampling.pick(values, GREEDY)
    with pytest.raises(SamplingError, match="finite"):
        sampling.greedy(values[None], GREEDY)
    with pytest.raises(SamplingError, match="every token"):
        sampling.pick(torch.zeros(3), SamplingParams(logit_bias=dict.fromkeys(range(3), -np.inf)))
    with pytest.raises(SamplingError, match="logit_bias"):
        sampling.pick(torch.zeros(3), SamplingParams(logit_bias={3: 1.0}))


# ---- generating -----------------------------------------------------------------------------------------------------


def naive(name: str, prompt, params: SamplingParams, end_ids=(1,)) -> list[int]:
    """One full pass for every token, the numpy sampler, nothing cached."""
    ids = [int(i) for i in prompt]
    for index in range(params.max_new_tokens):
        values = logits(model(name), [ids])[0, -1]
        values[0] = -np.inf  # the padding
        ids.append(sample(values, params, ids, step_seed(params.seed or 0, index)))
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


HOT = SamplingParams(temperature=3.0, top_p=0.98, repetition_penalty=1.2, seed=4, max_new_tokens=8)


@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_batches_of_padded_prompts(name, left, params):
    """Five lengths around the window, in chunks of 6: each row is what it is alone, without any cache."""
    tokens, prompts = ragged(left=left)
    ids = torch.as_tensor(tokens, dtype=torch.long)
    out = model(name).generate(ids, attention_mask=ids != 0, params=params, end_ids=(), prefill_chunk=6)
    assert torch.equal(out[:, : ids.shape[1]], ids) and out.shape[1] == ids.shape[1] + 8
    for row, prompt in zip(out[:, ids.shape[1] :].tolist(), prompts):
        assert row == naive(name, prompt, params, ())


def test_rows_end_on_their_own():
    tokens, prompts = ragged()
    ids = torch.as_tensor(tokens, dtype=torch.long)
    free = model("gemma3").generate(ids, attention_mask=ids != 0, params=HOT, end_ids=())[:, ids.shape[1] :]
    end = int(free[1, 3])
    seen = []
    out = model("gemma3").generate(
        ids, attention_mask=ids != 0, params=HOT, end_ids={end}, streamer=lambda new: seen.append(new.clone())
    )[:, ids.shape[1] :]
    for row, whole in zip(out.tolist(), free.tolist()):
        length = whole.index(end) + 1 if end in whole else 8
        assert row == (whole[:length] + [0] * 8)[: out.shape[1]]
    assert torch.equal(torch.stack(seen, 1), out)
    alone = model("gemma3").generate(torch.as_tensor(prompts[1][None]), params=HOT, end_ids={end})
    assert alone[0, len(prompts[1]) :].tolist() == free[1].tolist()[: free[1].tolist().index(end) + 1]


def test_end_ids_of_the_configuration():
    ids = torch.tensor([[2, 5, 6]])
    biased = SamplingParams(temperature=0, max_new_tokens=5, logit_bias={1: 100.0})
    assert model("gemma3").generate(ids, params=biased)[0].tolist() == [2, 5, 6, 1]


def test_stop_strings():
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode("ab", add_bos=True)])
    letters = {tokenizer.FIRST_BYTE + ord(c): 50.0 for c in "xyz"}  # only these three have a chance
    params = SamplingParams(temperature=5.0, seed=1, max_new_tokens=30, logit_bias=letters)
    free = model("gemma1").generate(prompt, params=params, tokenizer=tokenizer)[0, 3:]
    text = tokenizer.decode(free.tolist())
    stop = text[4:7]
    stopped = SamplingParams(temperature=5.0, seed=1, max_new_tokens=30, logit_bias=letters, stop=(stop,))
    out = model("gemma1").generate(prompt, params=stopped, tokenizer=tokenizer)[0, 3:]
    assert tokenizer.decode(out.tolist()) == text[: text.index(stop) + 3]
    with pytest.raises(SamplingError, match="tokenizer"):
        model("gemma1").generate(prompt, params=stopped)


def test_seeds():
    ids = torch.tensor([[2, 5, 6], [2, 5, 6]])
    hot = [SamplingParams(temperature=5.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    first, again, other = (model("gemma1").generate(ids, params=params) for params in hot)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0], first[1])  # a seed is a sequence's own
    unseeded = SamplingParams(temperature=5.0, max_new_tokens=12)
    assert not torch.equal(*(model("gemma1").generate(ids, params=unseeded) for _ in range(2)))


def test_blocked_ids_are_never_picked():
    ids, network = torch.tensor([[2, 5, 6]]), model("gemma1")
    free = set(network.generate(ids, params=GREEDY, end_ids=())[0, 3:].tolist())
    held = set(network.generate(ids, params=GREEDY, end_ids=(), blocked_ids=list(free))[0, 3:].tolist())
    assert not free & held
    pad = SamplingParams(temperature=0, max_new_tokens=4, logit_bias={0: 100.0})
    assert 0 not in network.generate(ids, params=pad, end_ids=())[0]


def test_a_stream_can_be_left():
    tokens = stream(model("gemma3"), torch.tensor([[2, 5, 6]]), params=GREEDY, end_ids=())
    assert next(tokens).shape == (1,)
    assert not torch.is_inference_mode_enabled()  # the mode of the generator is not the caller's
    tokens.close()


def test_sampling_fields_by_name():
    ids = torch.tensor([[2, 5, 6]])
    expected = model("gemma3").generate(ids, params=SamplingParams(temperature=0, max_new_tokens=3), end_ids=())
    assert torch.equal(model("gemma3").generate(ids, max_new_tokens=3, temperature=0, end_ids=()), expected)
    assert torch.equal(model("gemma3").generate(ids, params=GREEDY, max_new_tokens=3, end_ids=()), expected)


WRONG = {
    "holds 128": (ContextFull, torch.ones(1, 121, dtype=torch.long), {}),
    "prompt 1 is empty": (
        PromptError,
        torch.tensor([[5, 6], [0, 0]]),
        dict(attention_mask=torch.tensor([[1, 1], [0, 0]])),
    ),
    "attention_mask: expected the shape": (ShapeError, torch.tensor([[5, 6]]), dict(attention_mask=torch.ones(1, 3))),
    "input_ids: expected integers": (ShapeError, torch.tensor([5, 6]), {}),
    "blocked_ids": (SamplingError, torch.tensor([[5, 6]]), dict(blocked_ids=[320])),
    "no such option: temprature": (SamplingError, torch.tensor([[5, 6]]), dict(temprature=1.0)),
    "input_ids: expected a torch.Tensor, got list": (ShapeError, [[5, 6]], {}),
    "attention_mask: expected a torch.Tensor, got ndarray": (
        ShapeError,
        torch.tensor([[5, 6]]),
        dict(attention_mask=np.ones((1, 2))),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    error, ids, call = WRONG[message]
    with pytest.raises(error, match=message):
        model("gemma3").generate(ids, params=GREEDY, **call)


def compiled(network: GemmaForCausalLM, **call):
    """The tokens of compiled decoding, and what the compiler counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = network.generate(**call, compile=True)
    return out, torch._dynamo.utils.counters


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_decoding_is_one_graph(name, monkeypatch):
    """Captured once, without a break, for a batch that goes past the window; the tokens are the eager ones."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager", **options))
    tokens, _ = ragged((4, 9))
    ids = torch.as_tensor(tokens, dtype=torch.long)
    params = SamplingParams(temperature=0, max_new_tokens=6)
    call = dict(input_ids=ids, attention_mask=ids != 0, params=params, end_ids=())
    # A local and a global layer: tracing takes a second for each layer.
    network = GemmaForCausalLM(tiny_config(name, num_hidden_layers=2, layer_pattern="LG")).eval()
    out, counters = compiled(network, **call)
    assert torch.equal(out, network.generate(**call))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters


@pytest.mark.slow
def test_compiled_decoding():
    """Through the C++ compiler: a minute."""
    call = dict(input_ids=torch.tensor([[2, 5, 6]]), params=SamplingParams(temperature=0, max_new_tokens=6), end_ids=())
    assert torch.equal(compiled(model("gemma1"), **call)[0], model("gemma1").generate(**call))
