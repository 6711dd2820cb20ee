# SPDX-License-Identifier: Apache-2.0
"""The real 270M through the engine on native code: the known sentence, and nothing around it changes a token."""

import pytest

from gemma import hub
from gemma.kernels import _native
from gemma.sampling import SamplingParams
from gemma.serving._runner_cpu import load_runner
from gemma.serving.engine import Engine
from gemma.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(_native.library() is None, reason=f"native library: {_native.why_missing()}"),
]
PROMPT = [2, 818, 4083, 529, 20124, 6074]  # The history of computing began
OTHER = [2, *range(5000, 5040)]


def test_the_sentence_in_any_company():
    """Alone; with guesses; in a batch, read in small chunks, beside a neighbour; and from what another left behind."""
    runner = load_runner("demo", threads=1)
    params = SamplingParams(temperature=0, max_new_tokens=24)
    engine = Engine(runner, slots=1, max_len=96)
    alone = engine.submit(PROMPT, params)
    engine.run()
    text = Tokenizer.from_file(hub.resolve("demo")).decode(alone.ids[:14])
    assert text == " with the invention of the first computer in 1947."
    guessing = Engine(runner, slots=1, max_len=96, speculate=6)
    guessed = guessing.submit([*PROMPT, *alone.ids[:8]], SamplingParams(temperature=0, max_new_tokens=16))
    guessing.run()
    assert guessed.ids == alone.ids[8:]
    crowded = Engine(runner, slots=3, max_len=96, chunk=4, interleave=3)
    neighbour = crowded.submit(OTHER, params)
    inside = crowded.submit(PROMPT, params)
    crowded.run()
    again = crowded.submit([*PROMPT, *alone.ids[:12]], SamplingParams(temperature=0, max_new_tokens=12))
    crowded.run()
    assert inside.ids == alone.ids and again.ids == alone.ids[12:] and again.reused == 18
    assert len(neighbour.ids) == 24
