# SPDX-License-Identifier: Apache-2.0
"""Whole models: our JAX logits against tiny random Hugging Face models of the same weights, in float32.

Every parameter is random, every sequence is longer than the window, and every way to run a model (alone, in a padded
batch, cached, in chunks, with a ring cache) must give what the oracle gives for the whole sequence alone.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from parity_harness import BASES, LENGTHS, TOLERANCE, VARIANTS, flatten, gap, pair, ragged

from gemma import gm
from gemma.hf_config import read_config, write_config


def runs(names=tuple(VARIANTS), framework="JAX"):
    """Parameters whose tests stand behind the "run" cells of docs/support.md."""
    return [pytest.param(name, marks=pytest.mark.supports(VARIANTS[name].family, framework, "run")) for name in names]


# ---- configuration and weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_config_json_reads_as_the_configuration_by_hand(name):
    its = pair(name)
    ours = read_config(its.hf.config.to_dict())
    assert ours.layers == its.config.layers
    fields = "vocab_size hidden_size rms_norm_eps final_logit_softcapping use_post_norms use_qk_norm model_type"
    fields += " max_position_embeddings tie_word_embeddings pad_token_id bos_token_id end_token_ids"
    for field in fields.split():  # all but the two facts of the JAX layout, which no config.json has
        assert getattr(ours, field) == getattr(its.config, field), field
    assert read_config(write_config(ours)) == ours


def from_table(state, config):
    """{nested Flax path: array} of a Hugging Face state dict, through the rows of gemma.weights."""
    from gemma.weights import convert, tensors

    tree = {}
    for tensor in tensors(config):
        hf, flax = tensor.slots["hf"], tensor.slots["flax"]
        canonical = convert(state[hf.name], hf.axes, tensor.axes, tensor.dims)
        tree.setdefault(flax.name, {})[flax.index] = convert(canonical, tensor.axes, flax.axes, tensor.dims)
    return {
        path: parts[()] if () in parts else np.stack([parts[index] for index in sorted(parts)])
        for path, parts in tree.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weight_table_converts_as_by_hand(name):
    its = pair(name)
    ours = from_table(its.state, its.config)
    assert set(ours) == set(its.flat)
    rows = its.config.vocab_size
    for path, expected in its.flat.items():
        expected = expected[:rows] if path == "embedder/input_embedding" else expected
        assert np.array_equal(ours[path], expected), path


@pytest.mark.parametrize("name", BASES)
def test_a_saved_hugging_face_folder_loads(name, tmp_path):
    its = pair(name)
    its.hf.save_pretrained(tmp_path)
    ours = flatten(gm.ckpts.load_params(tmp_path))
    assert set(ours) == set(its.flat)
    for path, expected in its.flat.items():
        if path.endswith("gating_einsum") and ours[path].shape != expected.shape:
            expected = expected.transpose(0, 2, 1)  # config.json does not say which of the two layouts is wanted
        assert np.array_equal(ours[path], expected), path


# ---- the full forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", runs())
def test_full_forward_batched_with_padding(name):
    """Rows of 4, 5, 6, 13 and 19 tokens, padded on the right: each equals the oracle on that row alone."""
    its = pair(name)
    tokens, prompts = ragged()
    ours = its.logits(tokens)
    for row, prompt in zip(ours, prompts):
        assert gap(row[: len(prompt)], its.expected(prompt)) < TOLERANCE


@pytest.mark.parametrize("name", runs(framework="native CPU"))
def test_the_native_decoder_reads_its_folder(name, tmp_path):
    """Float weights where Hugging Face's own writer put them; in one piece, and in chunks that cut the window."""
    from gemma.checkpoint import open_checkpoint
    from gemma.kernels import _native
    from gemma.kernels._model import NativeModel

    if _native.library() is None:
        pytest.skip(f"native library: {_native.why_missing()}")
    its = pair(name)
    its.hf.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        native = NativeModel(checkpoint, threads=1)
    prompt = ragged()[1][-1]
    native.open(1, len(prompt), chunk=len(prompt))
    assert gap(native.score(0, prompt), its.expected(prompt)) < TOLERANCE
    native.open(1, len(prompt), chunk=3)
    native.prefill(0, prompt[:-1])
    native.step([0], prompt[-1:])
    assert gap(native.logits(0), its.expected(prompt)[-1]) < TOLERANCE


def test_one_sequence_without_a_batch_axis():
    its = pair("gemma3")
    prompt = ragged()[1][-1]
    assert gap(its.logits(prompt), its.expected(prompt)) < TOLERANCE


def test_last_only_and_hidden_states():
    its = pair("gemma2")
    tokens, prompts = ragged()
    static = (("return_last_only", True), ("return_hidden_states", True))
    out = its.apply(its.params, jnp.asarray(tokens), static=static)
    assert out.cache is None and out.hidden_states.shape == (len(prompts), its.config.hidden_size)
    expected = np.stack([its.expected(prompt)[-1] for prompt in prompts])
    assert gap(np.asarray(out.logits), expected) < TOLERANCE


def causal(positions: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, T, T]: query t may see key s if s stands before or at t and is not padding."""
    t = np.arange(positions.shape[1])
    return (t[None, :, None] >= t[None, None, :]) & valid[:, None, :]


@pytest.mark.parametrize("name", runs(BASES))
def test_left_padding_through_positions_and_mask(name):
    its = pair(name)
    tokens, prompts = ragged(left=True)
    valid = tokens != 0
    positions = np.maximum(valid.cumsum(1) - 1, 0)
    ours = its.logits(tokens, positions=jnp.asarray(positions, jnp.int32), attention_mask=causal(positions, valid))
    assert np.isfinite(ours).all()  # rows that may see nothing at all included
    for row, prompt in zip(ours, prompts):
        assert gap(row[-len(prompt) :], its.expected(prompt)) < TOLERANCE


# ---- cached ---------------------------------------------------------------------------------------------------------

CACHE = 32  # slots; the sequences below fill 28
CHUNK = 12  # more than two windows: a ring of 5 slots takes it at once
BATCH = 4


class Cached:
    """Feeds chunks of one batch to a model, as a sampler does. `windowed` chooses the layout of the cache."""

    def __init__(self, its, batch: int, windowed: bool):
        self.its, self.windowed = its, windowed
        self.cache = its.model.init_cache(
            batch_size=batch, dtype=jnp.float32, cache_length=CACHE, **(dict(windowed=True) if windowed else {})
        )
        self.valid = np.zeros((batch, CACHE), bool)
        self.start = 0

    def feed(self, tokens) -> np.ndarray:
        """tokens [B, T], 0 is padding, to logits [B, T, V].

        In the full layout every row writes the same T slots, so that the caller says which of them are padding and
        where a row's tokens stand; in the windowed layout the model counts them itself.
        """
        tokens = np.asarray(tokens, np.int32)
        slots = np.arange(self.start, self.start + tokens.shape[1])
        self.valid[:, slots] = tokens != 0
        call = {}
        if not self.windowed:
            positions = np.maximum(self.valid.cumsum(1) - 1, 0)[:, slots]
            mask = (np.arange(CACHE)[None, None, :] <= slots[None, :, None]) & self.valid[:, None, :]
            call = dict(positions=jnp.asarray(positions, jnp.int32), attention_mask=jnp.asarray(mask))
        out = self.its.apply(self.its.params, jnp.asarray(tokens), cache=self.cache, **call)
        self.cache, self.start = out.cache, self.start + tokens.shape[1]
        assert out.logits.shape[:2] == tokens.shape
        return np.asarray(out.logits, np.float32)[..., : self.its.config.vocab_size]


LAYOUTS = pytest.mark.parametrize("windowed", [False, True], ids=["full", "ring"])


def allowance(its, prompt, start: int) -> float:
    """Thrice what the oracle's own cached decode differs from its full forward, if that is more than TOLERANCE."""
    return max(TOLERANCE, 3 * its.cached_spread(prompt.tolist(), start))


@LAYOUTS
@pytest.mark.parametrize("name", runs(BASES))
def test_chunked_prefill_and_cached_decode(name, windowed):
    """Chunks of 12 and 12, then single tokens up to 28: every chunk and step compared with the whole forward."""
    its = pair(name)
    tokens = np.random.default_rng(5).integers(3, 290, (BATCH, 2 * CHUNK + 4))
    run = Cached(its, BATCH, windowed)
    got = [run.feed(tokens[:, :CHUNK]), run.feed(tokens[:, CHUNK : 2 * CHUNK])]
    got += [run.feed(tokens[:, t : t + 1]) for t in range(2 * CHUNK, tokens.shape[1])]
    expected = np.stack([its.expected(row) for row in tokens])
    assert gap(np.concatenate(got, 1), expected) < allowance(its, tokens[0], 2 * CHUNK)


@LAYOUTS
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", runs(BASES))
def test_cached_decode_of_prompts_of_different_lengths(name, left, windowed):
    """Prompts of 4, 5, 6 and 12 tokens, padded on either side, then eight tokens each: every row as if alone."""
    its, steps = pair(name), 8
    prompts = [np.random.default_rng(n).integers(3, 290, n + steps) for n in (*LENGTHS[:3], CHUNK)]
    padded = np.zeros((BATCH, CHUNK), np.int32)
    for row, prompt in zip(padded, prompts):
        start = len(prompt) - steps
        row[slice(CHUNK - start, None) if left else slice(start)] = prompt[:start]
    run = Cached(its, BATCH, windowed)
    run.feed(padded)
    got = np.concatenate([run.feed([[prompt[i - steps]] for prompt in prompts]) for i in range(steps)], 1)
    for row, prompt in zip(got, prompts):
        assert gap(row, its.expected(prompt)[-steps:]) < allowance(its, prompt, len(prompt) - steps)
