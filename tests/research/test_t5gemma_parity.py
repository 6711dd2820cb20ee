# SPDX-License-Identifier: Apache-2.0
"""T5Gemma and T5Gemma 2 in JAX against Hugging Face's, on the same random weights, and cached against uncached."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_tiny_oracles import randomize
from parity_harness import flatten_shapes, nest
from t5gemma_harness import QUICK, TOLERANCE, WINDOW, gap, ids, oracle, pair

from gemma import config as configs
from gemma import weights
from gemma.gm.nn import _plan
from gemma.research import t5gemma

NAMES = ("t5gemma", "t5gemma_unbalanced", "t5gemma2")
LENGTHS = (13, WINDOW + 1, WINDOW - 1)  # rows of the encoder: far above, just above and below the window
RUN = {
    name: pytest.mark.supports(family, "JAX", "run") for name, family in zip(NAMES, ("T5Gemma",) * 2 + ("T5Gemma 2",))
}
EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=RUN[name]) for name in NAMES])


def batch(rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Targets [B, 9], which begin with bos, and inputs [B, 13] with padding."""
    target = ids((rows, 9), seed=2)
    target[:, 0] = 2
    return target, ids((rows, 13), seed=1, lengths=LENGTHS[:rows])


@EACH
def test_logits_are_those_of_hugging_face(name):
    target, tokens = batch()
    found = pair(name)
    assert gap(found.logits(target, tokens), found.expected(target, tokens)) < TOLERANCE
    shapes = jax.eval_shape(found.model.init, jax.random.key(0), target, tokens)["params"]
    assert flatten_shapes(shapes) == {path: leaf.shape for path, leaf in found.flat.items()}
    total = sum(leaf.size for leaf in found.flat.values())
    assert total == found.config.num_parameters


@EACH
def test_padding_and_neighbours_change_nothing(name):
    target, tokens = batch()
    found = pair(name)
    together = found.logits(target, tokens)
    tokens[1, LENGTHS[1] :] = 0
    other = np.roll(tokens, 1, axis=0)  # other neighbours, the same row among them
    moved = found.logits(np.roll(target, 1, axis=0), other)
    np.testing.assert_allclose(np.roll(moved, -1, axis=0), together, atol=2e-6)
    left = np.zeros_like(tokens)  # padding in front of the input instead of behind it
    for row, ours in zip(tokens, left):
        ours[len(row) - (row != 0).sum() :] = row[row != 0]
    assert gap(found.logits(target, left), together) < TOLERANCE
    alone = found.expected(target[1:2], tokens[1:2, : LENGTHS[1]])
    assert gap(together[1:2], alone) < TOLERANCE


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_cached_equals_full(name):
    """One token at a time, in a ring shorter than the text, on memories that were filled once."""
    target, tokens = batch()
    found = pair(name)
    cache = found.model.init_cache(batch_size=3, prefill_length=13, generation_length=9)
    out = found.apply(found.params, target[:, :1], input_tokens=tokens, cache=cache)
    rows, encoded = [out.logits], out.encoder_activations
    assert len(encoded) == found.config.encoder.num_hidden_layers + 1
    assert len(out.activations) == found.config.decoder.num_hidden_layers + 1
    for step in range(1, 9):
        out = found.apply(found.params, target[:, step : step + 1], cache=out.cache)
        rows.append(out.logits)
    assert out.encoder_activations is None
    full = found.logits(target, tokens)
    assert gap(np.concatenate(rows, axis=1), full) < TOLERANCE
    layer = out.cache.decoder["layer_0"]
    assert layer["k"].shape[1] == WINDOW and int(layer["end_index"][0]) == 9


def test_the_window_of_the_official_code():
    """`|q - k| < W` is Hugging Face's law with a window that is one smaller, in the encoder only."""
    target, tokens = batch()
    found = pair("t5gemma")
    cls, config = oracle("t5gemma")
    config.encoder.sliding_window = WINDOW - 1
    narrow = randomize(cls._from_config(config, attn_implementation="eager"))
    model = found.model.clone(window="deepmind")
    # Two programs are compared at 1e-6 below: both by the emitters that users have (tests/conftest.py).
    users = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}

    def run(network):
        program = jax.jit(lambda p, a, b: network.apply({"params": p}, a, b).logits, compiler_options=QUICK | users)
        return np.asarray(program(found.params, target, tokens))

    ours = run(model)
    theirs = dataclasses.replace(found, hf=narrow).expected(target, tokens)
    assert gap(ours, theirs) < TOLERANCE
    wide = run(found.model)
    assert gap(ours[:1], wide[:1]) > 1e-3  # 13 tokens: the window bites
    assert gap(ours[2:], wide[2:]) < 1e-6  # 4 tokens: it does not


@pytest.mark.parametrize("name", ["t5gemma", "t5gemma2"])
def test_reach_of_the_encoder(name):
    """What a local layer of each encoder sees, drawn from the published laws."""
    spec = configs.encoder_layers(pair(name).config)[0]
    place = np.arange(13)
    d = place[:, None] - place[None]
    law = (
        abs(d) <= WINDOW
        if name == "t5gemma"
        else ((d >= 0) & (d < (WINDOW + 1) // 2)) | ((d < 0) & (-d <= WINDOW // 2))
    )
    at = jnp.asarray(place[None])
    np.testing.assert_array_equal(_plan.reach_mask(at, at, spec.reach)[0], law)
    assert configs.encoder_layers(pair(name).config)[1].reach is None


def test_the_encoder_sees_both_ways():
    """The last input token changes the first activation, and the decoder's last token changes no earlier logit."""
    target, tokens = batch()
    found = pair("t5gemma")
    changed, later = tokens.copy(), target.copy()
    changed[0, -1] += 1
    later[0, -1] += 1
    before = found.apply(found.params, target, input_tokens=tokens)
    after = found.apply(found.params, target, input_tokens=changed)
    first = [np.asarray(out.encoder_activations[-1])[0, 0] for out in (before, after)]
    assert gap(*first) > 1e-3
    after = found.logits(later, tokens)
    np.testing.assert_array_equal(np.asarray(before.logits)[0, :-1], after[0, :-1])
    assert gap(np.asarray(before.logits)[0, -1], after[0, -1]) > 1e-3


def test_images_of_t5gemma2():
    found = pair("t5gemma2")
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((2, 56, 56, 3)).astype(np.float32)
    image = [298, *[300] * 4, 299]
    tokens = np.array([[5, *image, 6, 7, *image, 8]], np.int32)
    target, _ = batch(1)
    theirs = found.expected(target, tokens, pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    ours = found.logits(target, tokens, images=jnp.asarray(pixels[None]))
    assert gap(ours, theirs) < TOLERANCE
    swapped = found.logits(target, tokens, images=jnp.asarray(pixels[None, ::-1]))
    assert gap(ours, swapped) > 1e-4


def _swap(a: str, b: str):
    """Exchanges two leaves in every decoder layer."""

    def change(flat):
        return {k: flat[k.replace(a, "#").replace(b, a).replace("#", b)] for k in flat}

    return change


MUTATIONS = {
    "cross norms swapped": _swap("pre_cross_attention_norm", "post_cross_attention_norm"),
    "cross query scaled by two": lambda flat: {
        k: v * 2 if k.endswith("cross_attn/q_einsum/w") else v for k, v in flat.items()
    },
    "keys and values swapped": lambda flat: {
        k: v[::-1] if k.endswith("cross_attn/kv_einsum/w") else v for k, v in flat.items()
    },
    "one table for both sides": lambda flat: (
        flat | {"encoder/embedder/input_embedding": flat["decoder/embedder/input_embedding"]}
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_notices(mutation):
    """Each of these errors must be seen by the comparison above."""
    target, tokens = batch()
    found = pair("t5gemma")
    params = jax.tree.map(jnp.asarray, nest(MUTATIONS[mutation](found.flat)))
    assert gap(found.logits(target, tokens, params), found.expected(target, tokens)) > 10 * TOLERANCE


def test_parity_notices_a_causal_encoder(monkeypatch):
    target, tokens = batch()
    found = pair("t5gemma")
    real = configs.encoder_layers
    causal = lambda *a, **k: tuple(dataclasses.replace(s, bidirectional=False, reach=None) for s in real(*a, **k))
    monkeypatch.setattr(configs, "encoder_layers", causal)
    run = jax.jit(lambda p, a, b: found.model.apply({"params": p}, a, b).logits, compiler_options=QUICK)
    assert gap(np.asarray(run(found.params, target, tokens)), found.expected(target, tokens)) > 10 * TOLERANCE


def test_presets_construct():
    """Every published size: the table's leaves are as many and as large as published, and the network has just those.

    The networks are traced with one layer a side, which shows every leaf that the others have, too.
    """
    token = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    published = {"s-s": (172, 312_648_704), "2b-2b": (602, 5_597_443_584), "9b-2b": (746, 12_293_128_960)}
    published |= {"ml-ml": (550, 2_200_640_256)}
    every = [preset.config.source for preset in t5gemma.T5GemmaPreset]
    every += [configs.preset(f"t5gemma2_{size}_{size}") for size in ("270m", "1b", "4b")]
    for source in every:
        leaves = weights.expected(source, "flax")
        count = sum(math.prod(shape) for shape in leaves.values())
        merged = isinstance(source, configs.T5Gemma2Config)
        tables = (source.decoder,) if merged else (source.encoder, source.decoder)
        assert count - sum((c.table_rows - c.vocab_size) * c.hidden_size for c in tables) == source.num_parameters
        name = next((p.value for p in t5gemma.T5GemmaPreset if p.config.source == source), None)
        assert (len(leaves), count) == published.get(name, (len(leaves), count))
        sides = {s: dataclasses.replace(getattr(source, s), num_hidden_layers=1) for s in ("encoder", "decoder")}
        if merged:
            vision = dataclasses.replace(source.encoder.vision, num_hidden_layers=1)
            sides["encoder"] = dataclasses.replace(sides["encoder"], vision=vision)
        small = dataclasses.replace(source, **sides)
        model = t5gemma.T5GemmaConfig.of(small).make("transformer")
        shapes = jax.eval_shape(model.init, jax.random.key(0), token, token)["params"]
        assert flatten_shapes(shapes) == weights.expected(small, "flax")
