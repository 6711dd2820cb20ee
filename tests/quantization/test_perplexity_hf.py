# SPDX-License-Identifier: Apache-2.0
"""`gemma eval`'s perplexity of one window is Hugging Face's: exp of the loss of a model that is given its own labels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from hf_tiny_oracles import make

from gemma.gm import nn
from gemma.gm._evaluate import Model, evaluate
from gemma.gm._windows import batches
from gemma.gm.ckpts import load_params


def test_perplexity_of_one_window(tmp_path):
    hf, _ = make("gemma3_text", num_hidden_layers=1)
    hf.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(3, 290, 23)
    tokens = torch.tensor([[2, *ids.tolist()]])
    with torch.no_grad():
        expected = float(hf(input_ids=tokens, labels=tokens).loss)
    params = load_params(tmp_path, dtype="float32")
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(tmp_path) as opened:
        net = nn.Transformer.from_config(opened.config(), dtype=jnp.float32)
    scores = evaluate(Model(net, params), batches(ids, 2, context=24, stride=12, batch=1))
    assert scores.tokens == 23
    np.testing.assert_allclose([scores.nll, scores.perplexity], [expected, np.exp(expected)], rtol=2e-5)
    assert abs(expected - np.log(300)) > 1e-3  # a model that says nothing would have that
