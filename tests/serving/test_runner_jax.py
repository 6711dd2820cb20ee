# SPDX-License-Identifier: Apache-2.0
"""The JAX runner keeps the contract, with rings shorter than the prompts, and says what it cannot do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner_contract import LONG, PROMPTS, SLOTS, RunnerContract, decode

from gemma import testing
from gemma.errors import ContextFull, GemmaError, PromptError, SamplingError, ShapeError
from gemma.gm import nn
from gemma.serving._runner_jax import JaxRunner
from gemma.serving.runner import StepIn


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def tiny():
    config = testing.tiny_config("gemma3", num_hidden_layers=2, layer_pattern="LG")
    model = nn.Transformer.from_config(config, dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)
    params["embedder"]["input_embedding"] *= 0.1  # a tied head would otherwise repeat the last token
    return model, params


@pytest.fixture(scope="module")
def jax_runner(tiny):
    return JaxRunner(*tiny, slots=SLOTS, max_len=24, buckets=(4, 16))


class TestJaxRunner(RunnerContract):
    tolerance = 2e-5  # float32 logits of size 10: a batch and a chunk sum in another order

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, jax_runner):
        return jax_runner


def test_logits_are_those_of_the_network(tiny, jax_runner):
    model, params = tiny
    jax_runner.open(SLOTS, 24, "float32")
    jax_runner.prefill(2, LONG, 0)
    expected = model.apply({"params": params}, jnp.array([LONG])).logits[0, -1]
    np.testing.assert_allclose(jax_runner.logits(2)[1:], expected[1:], atol=2e-5)
    assert jax_runner.logits(2)[0] == -np.inf


def test_another_batch_of_the_same_width_compiles_nothing(jax_runner):
    jax_runner.open(SLOTS, 24, "float32")
    for slot, prompt in enumerate(PROMPTS):
        jax_runner.prefill(slot, prompt, 0)
    jax_runner.step([StepIn(slot, 50) for slot in range(3)])
    jax_runner.step([StepIn(0, 50)])
    work = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: work.append(name) if name.startswith("/jax/core/compile") else None
    )
    jax_runner.free(1)
    jax_runner.prefill(1, LONG[:3], 0)
    jax_runner.prefill(1, LONG[3:9], 3)
    jax_runner.step([StepIn(3, 51), StepIn(1, 52), StepIn(0, 53)])
    jax_runner.step([StepIn(2, 51)])
    assert not work


def test_the_cache_may_have_a_smaller_dtype(tiny, jax_runner):
    jax_runner.open(2, 24, "bfloat16")
    jax_runner.prefill(0, LONG, 0)
    assert len(decode(jax_runner, 0, 50, 3)) == 3
    expected = tiny[0].apply({"params": tiny[1]}, jnp.array([[*LONG]])).logits[0, -1]
    # keys and values rounded to 8 bits, two layers
    np.testing.assert_allclose(jax_runner.logits(0)[1:].std(), np.asarray(expected)[1:].std(), rtol=0.5)


def test_what_it_refuses(tiny, jax_runner):
    jax_runner.open(SLOTS, 24, "float32")
    with pytest.raises(PromptError, match="id 0 is padding"):
        jax_runner.prefill(0, [2, 0, 5], 0)
    with pytest.raises(ContextFull, match="129 tokens, but the context holds 128"):
        jax_runner.open(1, 129, "float32")
    with pytest.raises(PromptError, match="no vision encoder"):
        jax_runner.prefill(0, [2, 5], 0, images=np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ShapeError, match="layers"):
        JaxRunner(tiny[0], {k: v for k, v in tiny[1].items() if k != "layer_1"})
    assert jax_runner.step([]) == []


def test_nan_weights_are_reported(tiny):
    model, params = tiny
    broken = params | {"final_norm": {"scale": jnp.full_like(params["final_norm"]["scale"], jnp.nan)}}
    runner = JaxRunner(model, broken, slots=SLOTS, max_len=24, buckets=(4, 16))
    runner.prefill(0, LONG, 0)
    with pytest.raises(SamplingError, match="slot 0: the logits are not finite"):
        runner.step([StepIn(0, 50)])


def test_a_failed_call_leaves_no_half_written_slot(jax_runner, monkeypatch):
    from gemma.serving import _runner_jax

    jax_runner.open(SLOTS, 24, "float32")
    jax_runner.prefill(0, LONG, 0)
    original = _runner_jax._advance

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_runner_jax, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jax_runner.step([StepIn(0, 50)])
    with pytest.raises(GemmaError, match="slot 0 is empty"):
        jax_runner.logits(0)
    jax_runner.prefill(0, LONG, 0)
