# SPDX-License-Identifier: Apache-2.0
"""T5Gemma in PyTorch against Hugging Face's and against ours in JAX: logits, loss, cache, generating, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from t5gemma_harness import CONFIGS, TOLERANCE, gap, ids, pair, write_hf

from gemma import testing
from gemma._torch.cache import WindowedKVCache
from gemma.config import T5GemmaConfig
from gemma.errors import CheckpointError, ConfigError, PromptError, ShapeError, UnsupportedError, WeightsMismatch
from gemma.modeling_gemma import KVCache
from gemma.research.t5gemma.modeling_t5gemma import T5GemmaForConditionalGeneration
from gemma.seq2seq import shift_right

NAMES = ("t5gemma", "t5gemma_unbalanced")
ENDS = dict(end_ids=(), temperature=0)


@pytest.fixture(scope="module")
def models():
    found = {}
    for name in NAMES:
        model = T5GemmaForConditionalGeneration(CONFIGS[name]).eval()
        model.load_state_dict(pair(name).hf.state_dict())  # the names are the same; the tied head comes twice
        found[name] = model
    return found


def batch():
    target, tokens = ids((3, 9), seed=2), ids((3, 13), seed=1, lengths=(13, 6, 4))
    target[:, 0] = 2
    return torch.as_tensor(target).long(), torch.as_tensor(tokens).long()


@pytest.mark.supports("T5Gemma", "PyTorch", "run")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_cached_and_alone(models, name):
    target, tokens = batch()
    model = models[name]
    full = model(input_ids=tokens, decoder_input_ids=target)["logits"]
    assert gap(full.numpy(), pair(name).expected(target, tokens)) < TOLERANCE
    memory = model.encode(tokens)
    for cache in (KVCache(), WindowedKVCache(CONFIGS[name].decoder.layers, 3, 9)):
        steps = [
            model(memory=memory, decoder_input_ids=target[:, t : t + 1], kv_cache=cache)["logits"] for t in range(9)
        ]
        assert gap(torch.cat(steps, 1).numpy(), full.numpy()) < TOLERANCE
    alone = model(input_ids=tokens[1:2, :6], decoder_input_ids=target[1:2])["logits"]
    assert gap(alone.numpy(), full[1:2].numpy()) < TOLERANCE


def test_the_window_of_the_official_code(models):
    target, tokens = batch()
    official = T5GemmaForConditionalGeneration(CONFIGS["t5gemma"], window="deepmind").eval()
    official.load_state_dict(models["t5gemma"].state_dict())
    with torch.no_grad():
        wide, narrow = (m(input_ids=tokens, decoder_input_ids=target)["logits"] for m in (models["t5gemma"], official))
    assert gap(wide[0].numpy(), narrow[0].numpy()) > 1e-3 and gap(wide[2].numpy(), narrow[2].numpy()) < 1e-6


@pytest.mark.supports("T5Gemma", "PyTorch", "train")
def test_loss_and_gradients_are_those_of_hugging_face(models):
    target, tokens = batch()
    labels = torch.cat([target[:, 1:], torch.ones_like(target[:, :1])], 1)
    labels[1, 5:] = -100
    model, hf = models["t5gemma"], pair("t5gemma").hf
    ours = model(input_ids=tokens, labels=labels)["loss"]
    theirs = hf(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    ours.backward()
    theirs.backward()
    grads = dict(hf.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, atol=2e-6, rtol=1e-3)
    hf.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    shifted = torch.as_tensor(shift_right(labels.numpy())).long()
    again = model(input_ids=tokens, decoder_input_ids=shifted, labels=labels)["loss"]
    assert again.item() == pytest.approx(ours.item(), abs=1e-6)
    with pytest.raises(PromptError, match="shifted against the decoder's input once"):
        model(input_ids=tokens, decoder_input_ids=labels.clamp(min=0), labels=labels)


@pytest.mark.parametrize("name", NAMES)
def test_generating(models, name):
    """Greedy tokens are Hugging Face's; a row's do not depend on its neighbours; streaming gives the same."""
    _, tokens = batch()
    model = models[name]
    steps = []
    ours = model.generate(tokens, max_new_tokens=8, streamer=steps.append, **ENDS)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, suppress_tokens=[0], decoder_start_token_id=2)
    theirs = pair(name).hf.generate(tokens, attention_mask=(tokens != 0).long(), bos_token_id=2, **options)
    np.testing.assert_array_equal(ours, theirs[:, 1:])
    np.testing.assert_array_equal(torch.stack(steps, 1), ours)
    np.testing.assert_array_equal(model.generate(tokens[1:2, :6], max_new_tokens=8, **ENDS), ours[1:2])


def test_checkpoints(models, tmp_path):
    """What transformers saves is loaded strictly; another architecture is refused by name."""
    target, tokens = batch()
    folder = write_hf(pair("t5gemma"), tmp_path / "hf")
    model = T5GemmaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        logits = [m(input_ids=tokens, decoder_input_ids=target)["logits"] for m in (model, models["t5gemma"])]
    assert torch.equal(*logits)
    testing.write_tiny_safetensors(tmp_path / "gemma2", testing.tiny_config("gemma2"))
    with pytest.raises(UnsupportedError, match="holds a Gemma model; expected a T5Gemma"):
        T5GemmaForConditionalGeneration.from_pretrained(tmp_path / "gemma2")
    (folder / "config.json").write_text((tmp_path / "gemma2/config.json").read_text())
    with pytest.raises(WeightsMismatch, match="look like T5Gemma, but the configuration is of Gemma 2"):
        from gemma.modeling_gemma import GemmaForCausalLM

        GemmaForCausalLM.from_pretrained(folder)
    state = models["t5gemma"].state_dict() | {"lm_head.out_proj.weight": torch.zeros(320, 72)}
    with pytest.raises(CheckpointError, match="differs from model.decoder.embed_tokens"):
        model.load_state_dict(state)


def test_bad_input(models):
    target, tokens = batch()
    model = models["t5gemma"]
    with pytest.raises(PromptError, match="row 1 is empty"):
        model(input_ids=tokens * torch.tensor([[1], [0], [1]]), decoder_input_ids=target)
    with pytest.raises(ShapeError, match="expected 3 rows of decoder_input_ids, got 2"):
        model(input_ids=tokens, decoder_input_ids=target[:2])
    with pytest.raises(ShapeError, match="got neither"):
        model(decoder_input_ids=target)
    with pytest.raises(PromptError, match=r"expected ids in 0\.\.319, got 320"):
        model(input_ids=torch.tensor([[320]]), decoder_input_ids=target[:1])
    with pytest.raises(ShapeError, match=r"labels: expected the shape .* got \(3, 8\)"):
        model(input_ids=tokens, decoder_input_ids=target, labels=target[:, 1:])
    with pytest.raises(ConfigError, match="T5Gemma 2 runs in JAX only"):
        T5GemmaForConditionalGeneration(CONFIGS["t5gemma2"])
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        bidirectional = testing.tiny_config("gemma2", use_bidirectional_attention=True)
        T5GemmaConfig(bidirectional, testing.tiny_config("gemma2"))
