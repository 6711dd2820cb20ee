# SPDX-License-Identifier: Apache-2.0
"""`TorchRunner` keeps the runner contract, for each family, in float32 and with a bfloat16 cache."""

import numpy as np
import pytest
import torch
from runner_contract import LONG, RunnerContract

from gemma.errors import ConfigError, ContextFull, PromptError
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.serving._runner_torch import TorchRunner
from gemma.testing import random_tensors, tiny_config


def tiny(family: str) -> GemmaForCausalLM:
    from gemma.weights import tensors

    config = tiny_config(family, num_hidden_layers=3)
    model = GemmaForCausalLM(config).eval()
    values = random_tensors(config)
    model.load_state_dict({t.slots["hf"].name: torch.from_numpy(values[t.name]) for t in tensors(config)})
    return model


class TestTorchRunner(RunnerContract):
    # One thread, float32: rows computed together and alone differ by additions in another order, 1e-6 to 4e-6.
    tolerance = 2e-5

    @pytest.fixture(scope="class", params=["gemma2", "gemma3"])
    @classmethod
    def made(cls, request):
        return TorchRunner(tiny(request.param))


@pytest.fixture(scope="module")
def runner():
    return TorchRunner(tiny("gemma"), max_len=24)


def test_what_it_refuses(runner):
    with pytest.raises(PromptError, match="text only"):
        runner.prefill(0, LONG, 0, images=[1])
    with pytest.raises(ConfigError, match="cache_dtype"):
        runner.open(1, 8, "int4")
    with pytest.raises(ContextFull):
        runner.open(1, 129, "float32")
    assert runner.step([]) == []


def test_a_bfloat16_cache_rounds_chunk_and_step_alike(runner):
    """Keys are rounded before the first look at them: a prompt read at once or token by token is the same prompt."""
    runner.open(1, 24, "float32")
    runner.prefill(0, LONG, 0)
    exact = runner.logits(0)
    runner.open(2, 24, "bfloat16")
    runner.prefill(0, LONG, 0)
    for i, token in enumerate(LONG):
        runner.prefill(1, [token], i)
    rounding = np.abs(runner.logits(0) - exact).mean()
    assert rounding > 1e-5
    assert np.abs(runner.logits(0) - runner.logits(1)).mean() < 0.2 * rounding  # a value may round the other way
