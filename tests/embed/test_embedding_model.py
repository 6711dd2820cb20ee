# SPDX-License-Identifier: Apache-2.0
"""EmbeddingGemma: our vectors against the Hugging Face encoder with mean, dense layers and unit length in torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma import embedding, gm, weights
from gemma.errors import ConfigError, PromptError, ShapeError, UnsupportedError

TOLERANCE = 2e-5  # as of the parity tests; vectors have unit length
LENGTHS = (3, 4, 5, 9, 19)  # the window of 6 reaches three tokens either way


def rows(seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 290, n) for n in LENGTHS]


def padded(prompts, left, width=20):
    table = np.zeros((len(prompts), width), np.int32)
    for line, prompt in zip(table, prompts):
        line[slice(-len(prompt), None) if left else slice(len(prompt))] = prompt
    return table


def theirs(oracle, prompt, dim=None):
    """What the modules of sentence-transformers do, one after the other."""
    with torch.no_grad():
        x = oracle.hf(input_ids=torch.tensor(prompt[None]), use_cache=False).last_hidden_state[0].mean(0)
        for w in oracle.dense:
            x = torch.nn.functional.linear(x, torch.tensor(w))
        return torch.nn.functional.normalize(torch.nn.functional.normalize(x, dim=0)[:dim], dim=0).numpy()


@pytest.fixture(scope="module")
def params(oracle):
    return gm.ckpts.load_params(oracle.folder)


@pytest.fixture(scope="module")
def embed(oracle, params):
    model = gm.nn.EmbeddingGemma.from_config(oracle.config, dtype=jnp.float32)
    apply = jax.jit(lambda tokens, mask=None: model.apply({"params": params}, tokens, mask=mask))
    return lambda tokens, mask=None: np.asarray(apply(jnp.asarray(tokens, jnp.int32), mask))


@pytest.mark.supports("EmbeddingGemma", "JAX", "run")
def test_vectors_are_those_of_the_reference(oracle, embed):
    """Rows on both sides of the window, in one batch, padded on the right and on the left: each as if alone."""
    prompts = rows()
    for left in (False, True):
        for ours, prompt in zip(embed(padded(prompts, left)), prompts, strict=True):
            assert np.abs(ours - theirs(oracle, prompt)).max() < TOLERANCE
            assert ours.dtype == np.float32 and abs(np.linalg.norm(ours) - 1) < 1e-6


def test_padding_and_batch_change_nothing(embed):
    prompts = rows(seed=5)
    right, left = embed(padded(prompts, False)), embed(padded(prompts, True))
    shuffled = embed(padded(prompts[::-1], False))[::-1]
    assert np.abs(right - left).max() < 2e-6 and np.abs(right - shuffled).max() < 2e-6
    masked = padded(prompts, False)
    masked[masked == 0] = 7  # padding of another id, said by the mask
    again = embed(masked, jnp.asarray(padded(prompts, False) != 0))
    assert np.abs(again - right).max() < 2e-6
    assert np.abs(embed(masked) - right).max() > 1e-3


def test_the_last_word_reaches_the_first_token(oracle, params, embed):
    """A causal model would give the first token the same activations."""
    prompts = rows()
    other = [p.copy() for p in prompts]
    for prompt in other:
        prompt[-1] = 299
    assert (np.abs(embed(padded(prompts, False)) - embed(padded(other, False))).max(axis=1) > 1e-3).all()
    model = gm.nn.Transformer.from_config(oracle.config, dtype=jnp.float32)
    encoder = {name: leaf for name, leaf in params.items() if not name.startswith("dense")}
    pair = jnp.asarray(np.stack([prompts[0], other[0]]), jnp.int32)
    hidden = jax.jit(lambda t: model.apply({"params": encoder}, t, return_hidden_states=True).hidden_states)(pair)
    assert np.abs(np.asarray(hidden[0] - hidden[1])[0]).max() > 1e-3


def test_shorter_vectors(oracle, params):
    """`dim` on the model, `shortened` afterwards and sentence-transformers' truncation agree."""
    prompt = rows()[-1]
    model = gm.nn.EmbeddingGemma.from_config(oracle.config, dtype=jnp.float32, dim=16)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(prompt, jnp.int32)))
    assert ours.shape == (16,)
    expected = theirs(oracle, prompt, 16)
    assert np.abs(ours - expected).max() < TOLERANCE
    assert np.abs(embedding.shortened(theirs(oracle, prompt), 16) - expected).max() < 1e-6
    with pytest.raises(ConfigError, match=r"dim: expected 1..48"):
        gm.nn.EmbeddingGemma.from_config(oracle.config, dim=49).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ShapeError, match=r"dim: expected 1..48"):
        embedding.shortened(theirs(oracle, prompt), 0)


def test_the_published_size():
    model = gm.nn.EmbeddingGemma_300M()
    config = model.config.gemma
    assert config.num_parameters == 302_863_104 + 2 * 768 * 3072 and model.width == 768
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    assert tree["dense_0"]["w"].shape == (768, 3072) and tree["dense_1"]["w"].shape == (3072, 768)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.num_parameters
    assert sum(tensor.size for tensor in weights.tensors(config)) == config.num_parameters
    assert model.INFO.tokenizer_version == 3 and embedding.SIZES[0] == model.width


def test_refusals(oracle, params):
    model = gm.nn.EmbeddingGemma.from_config(oracle.config, dtype=jnp.float32)
    with pytest.raises(PromptError, match="no tokens besides padding"):
        model.apply({"params": params}, jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(PromptError, match="ids in 0..319"):
        model.apply({"params": params}, jnp.full((1, 4), 320))
    with pytest.raises(UnsupportedError, match="float16"):
        gm.ckpts.load_params(oracle.folder, dtype="float16")
    decoder = dataclasses.replace(oracle.config, use_bidirectional_attention=False)
    with pytest.raises(ConfigError, match="use_bidirectional_attention is needed"):
        gm.nn.EmbeddingGemma.from_config(decoder).init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))
