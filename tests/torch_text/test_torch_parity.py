# SPDX-License-Identifier: Apache-2.0
"""Whole models: our PyTorch logits against tiny random Hugging Face models, and against our JAX network.

Every parameter is random, every sequence longer than the window, and every way to run a model (alone, padded anywhere,
cached in chunks, in either cache) must give what the oracle gives for the whole sequence alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_tiny_oracles import make
from parity_harness import BASES, TOLERANCE, VARIANTS, gap, pair, ragged
from torch_harness import cache, fed, logits, model

from gemma._torch.load import without_values
from gemma.config import PRESETS, GemmaConfig, text_only
from gemma.errors import UnsupportedError
from gemma.hf_config import read_config
from gemma.modeling_gemma import GemmaForCausalLM, GemmaModel
from gemma.weights import tensors

RUNS = [pytest.param(name, marks=pytest.mark.supports(VARIANTS[name].family, "PyTorch", "run")) for name in VARIANTS]
KINDS = pytest.mark.parametrize("kind", ["growing", "windowed"])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", RUNS)
def test_full_forward_batched_with_padding(name, left):
    its = pair(name)
    tokens, prompts = ragged(left=left)
    ours = logits(model(name), tokens, attention_mask=torch.as_tensor(tokens != 0))
    assert np.isfinite(ours).all()  # rows of padding included
    for row, mask, prompt in zip(ours, tokens != 0, prompts):
        assert gap(row[mask], its.expected(prompt)) < TOLERANCE


@pytest.mark.parametrize("name", BASES)
def test_batched_equals_alone(name):
    """To additions in another order: matrices of several rows are multiplied in other blocks."""
    tokens, prompts = ragged(left=True)
    together = logits(model(name), tokens, attention_mask=torch.as_tensor(tokens != 0))
    for row, prompt in zip(together, prompts):
        assert gap(row[-len(prompt) :], logits(model(name), prompt[None])[0]) < 5e-6


def allowance(its, row) -> float:
    return max(TOLERANCE, 3 * its.cached_spread(row.tolist(), 24))


@KINDS
@pytest.mark.parametrize("cuts", [(12, 24, 25, 26, 27), (3, 5, 7, 8, 9, 20), range(1, 28)], ids=["12", "odd", "one"])
@pytest.mark.parametrize("name", BASES)
def test_chunked_prefill_and_cached_decode(name, cuts, kind):
    its = pair(name)
    tokens = np.random.default_rng(5).integers(3, 290, (3, 28))
    held = cache(kind, its.config, 3)
    ours = fed(model(name), tokens, cuts, held)
    expected = np.stack([its.expected(row) for row in tokens])
    assert gap(ours, expected) < allowance(its, tokens[0])
    assert held.num_items() == 28


@KINDS
@pytest.mark.parametrize("cuts", [(13, 26, 27, 28, 29), (1, 2, 3, 20, 21, 38, 39)], ids=["long", "short"])
@pytest.mark.parametrize("name", BASES)
def test_cached_with_padding_anywhere(name, cuts, kind):
    """28 tokens of each row at random places among 40: chunks and single steps hold padding in some rows."""
    its, rng = pair(name), np.random.default_rng(7)
    rows = rng.integers(3, 290, (3, 28))
    tokens = np.zeros((3, 40), int)
    for b, row in enumerate(rows):
        tokens[b, np.sort(rng.choice(40, 28, replace=False))] = row
    ours = fed(model(name), tokens, cuts, cache(kind, its.config, 3), mask=tokens != 0)
    assert np.isfinite(ours).all()
    for got, mask, row in zip(ours, tokens != 0, rows):
        assert gap(got[mask], its.expected(row)) < allowance(its, rows[0])


@pytest.mark.parametrize("name", BASES)
def test_jax_and_pytorch_are_the_same_network(name):
    tokens, prompts = ragged()
    jax_logits = pair(name).logits(tokens)
    ours = logits(model(name), tokens, attention_mask=torch.as_tensor(tokens != 0))
    for mine, theirs, prompt in zip(ours, jax_logits, prompts):
        assert gap(mine[: len(prompt)], theirs[: len(prompt)]) < TOLERANCE


def test_a_bidirectional_network():
    """EmbeddingGemma's decoder: no causal mask, |d| < window // 2 + 1 on local layers."""
    hf, _ = make("embeddinggemma")
    config = read_config(hf.config.to_dict() | {"architectures": ["Gemma3TextModel"]})
    assert config.use_bidirectional_attention
    ours = GemmaModel(config).eval()
    ours.load_state_dict(hf.state_dict())
    tokens, prompts = ragged()
    mask = torch.as_tensor(tokens != 0)
    with torch.no_grad():
        got = ours(torch.as_tensor(tokens, dtype=torch.long), mask)["last_hidden_state"]
        for row, prompt in zip(got, prompts):
            expected = hf(input_ids=torch.as_tensor(prompt[None])).last_hidden_state[0]
            assert gap(row[: len(prompt)].numpy(), expected.numpy()) < TOLERANCE


def test_bfloat16_is_near_float32():
    """Beside Hugging Face's own bfloat16: both are compared with float32, ours may not be worse by more than a fifth."""
    its = pair("gemma3")
    prompt = ragged()[1][-1]
    ours = GemmaForCausalLM(its.config).eval()
    ours.load_state_dict(its.hf.state_dict())
    theirs, _ = make(its.variant.oracle, **its.variant.kwargs)
    theirs.bfloat16()
    with torch.no_grad():
        their_gap = np.abs(
            theirs(input_ids=torch.as_tensor(prompt[None])).logits[0].float().numpy() - its.expected(prompt)
        )
    our_gap = np.abs(logits(ours.bfloat16(), prompt[None])[0] - its.expected(prompt))
    assert 0 < our_gap.mean() < 1.2 * their_gap.mean()


# ---- counts and configurations, nothing is computed -----------------------------------------------------------------

TEXT_PRESETS = [name for name, config in PRESETS.items() if isinstance(config, GemmaConfig) and config.is_classic]


@pytest.mark.parametrize("name", TEXT_PRESETS)
def test_parameter_count_and_names(name):
    """The module's leg of the count: formula = table = parameters on the meta device, name by name and shape by shape."""
    config = text_only(PRESETS[name])
    with without_values():
        network = (GemmaModel if config.use_bidirectional_attention else GemmaForCausalLM)(config)
    own = {key: tuple(parameter.shape) for key, parameter in network.named_parameters()}
    assert own == {tensor.slots["hf"].name: tensor.shape for tensor in tensors(config)}
    assert set(own) == set(network.state_dict())  # no buffer, nothing twice
    assert sum(parameter.numel() for parameter in network.parameters()) == config.num_parameters


@pytest.mark.parametrize("name", ["gemma3n_e2b", "gemma4_31b"])
def test_newer_generations_are_refused(name):
    with pytest.raises(UnsupportedError, match="Gemma 3n and 4 run in JAX"), without_values():
        GemmaForCausalLM(PRESETS[name])


def test_an_untied_head():
    config = GemmaConfig.from_dict(dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=-1 + 1,
                                        tie_word_embeddings=False))  # fmt: skip
    network = GemmaForCausalLM(config)
    assert network.head_weight is network.lm_head.weight is not network.get_input_embeddings().weight
    before = logits(network, [[3, 4]])
    with torch.no_grad():
        network.lm_head.weight += 1.0
    assert gap(logits(network, [[3, 4]]), before) > 1e-3
    assert sum(parameter.numel() for parameter in network.parameters()) == config.num_parameters
