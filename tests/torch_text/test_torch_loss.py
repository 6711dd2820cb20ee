# SPDX-License-Identifier: Apache-2.0
"""The chunked loss: the value and every gradient of the naive one, and no more memory than a chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_harness import BASES, pair

from gemma._torch import loss as losses
from gemma.modeling_gemma import GemmaForCausalLM

IDS = torch.as_tensor(np.random.default_rng(2).integers(3, 290, (3, 17)))
LABELS = IDS.masked_fill(torch.arange(17) < 4, -100)


def fresh(name: str) -> GemmaForCausalLM:
    network = GemmaForCausalLM(pair(name).config)
    network.load_state_dict(pair(name).hf.state_dict())
    return network


def naive(network, ids, labels):
    logits = network(input_ids=ids)["logits"].float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", BASES)
def test_value_and_gradients(name, rows, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 320 * rows)
    network = fresh(name)
    out = network(input_ids=IDS, labels=LABELS)
    assert out["logits"] is None and out["loss"].dtype == torch.float32
    (out["loss"] * 3).backward()  # a scale from upstream
    got = {key: parameter.grad / 3 for key, parameter in network.named_parameters()}
    network.zero_grad()
    expected = naive(network, IDS, LABELS)
    expected.backward()
    assert abs(out["loss"].item() - expected.item()) < 2e-6
    for key, parameter in network.named_parameters():
        size = parameter.grad.abs().max().item()
        assert (got[key] - parameter.grad).abs().max().item() < 1e-5 * size, key


def test_it_equals_hugging_faces():
    theirs = pair("gemma2").hf(input_ids=IDS, labels=LABELS).loss
    assert abs(fresh("gemma2")(input_ids=IDS, labels=LABELS)["loss"].item() - theirs.item()) < 2e-6


def test_only_what_needs_a_gradient_gets_one():
    network = fresh("gemma3")
    network.get_input_embeddings().weight.requires_grad_(False)
    network(input_ids=IDS, labels=LABELS)["loss"].backward()
    assert network.get_input_embeddings().weight.grad is None
    assert network.model.norm.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert not network(input_ids=IDS, labels=LABELS)["loss"].requires_grad


def test_logits_beside_a_loss_and_nothing_to_learn():
    network = fresh("gemma1")
    out = network(input_ids=IDS, labels=LABELS, logits_to_keep=2)
    assert out["logits"].shape == (3, 2, 320)
    nothing = network(input_ids=IDS, labels=torch.full_like(IDS, -100))["loss"]
    nothing.backward()
    assert nothing.item() == 0


def test_bfloat16_sums_in_float32():
    network = fresh("gemma1").bfloat16()
    loss = network(input_ids=IDS, labels=LABELS)["loss"]
    assert abs(loss.item() - naive(network, IDS, LABELS).item()) < 1e-5
    loss.backward()
    assert network.get_input_embeddings().weight.grad.dtype == torch.bfloat16


def test_the_logits_of_all_positions_never_exist(monkeypatch):
    """The largest tensor that forward and backward make is a chunk's logits, not [B, T, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    vocab, width, positions, chunk = 4000, 8, 300, 10
    monkeypatch.setattr(losses, "_CHUNK", vocab * chunk)
    hidden = torch.randn(1, positions + 1, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    with Watch():
        loss = losses.next_token_loss(hidden, weight, torch.randint(0, vocab, (1, positions + 1)))
        loss.backward()
    assert largest == vocab * chunk
