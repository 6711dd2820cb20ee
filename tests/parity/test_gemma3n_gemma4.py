# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n and Gemma 4, text: our JAX logits and gradients against tiny random Hugging Face models, in float32.

Every layer kind occurs, layers that share keys and values among them, and every sequence is longer than the window.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from newer_harness import VARIANTS, allowance, mutated, newer
from parity_harness import flatten, flatten_shapes, gap, ragged

from gemma import gm, weights
from gemma.config import PRESETS
from gemma.errors import ConfigError, ShapeError, WeightsMismatch
from gemma.hf_config import read_config, write_config
from gemma.sampling import SamplingParams

SHARING = ("gemma3n", "gemma4_e")
CHUNK, CACHE, BATCH = 9, 24, 3


def runs(names=tuple(VARIANTS)):
    return [pytest.param(name, marks=pytest.mark.supports(VARIANTS[name].family, "JAX", "run")) for name in names]


# ---- configuration and weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_config_json_reads_as_the_configuration_by_hand(name):
    its = newer(name)
    ours = read_config(its.hf.config.to_dict())
    assert ours == its.config
    assert read_config(write_config(ours)) == ours


@pytest.mark.parametrize("name", SHARING)
def test_a_saved_hugging_face_folder_loads(name, tmp_path):
    its = newer(name)
    its.hf.save_pretrained(tmp_path)
    ours = flatten(gm.ckpts.load_params(tmp_path))
    assert set(ours) == set(its.flat)
    assert all(np.array_equal(ours[path], its.flat[path]) for path in ours)


def test_names_that_published_files_have_besides():
    """Towers, and keys and values of layers that share those of others: passed over. Anything else is refused."""
    config = newer("gemma4_e").config
    shapes = {
        f"model.language_{k}" if k.startswith("model.") else k: s for k, s in weights.expected(config, "hf").items()
    }
    more = {"model.vision_tower.x.weight": (3,), "model.embed_audio.y.weight": (2, 2)}
    more |= {f"model.language_model.layers.{i}.self_attn.k_proj.weight": (24, 72) for i in (2, 3)}
    bound = weights.bind(shapes | more, config, format="hf", path="x")
    assert len(bound) == len(weights.tensors(config))
    own = {"model.language_model.layers.3.self_attn.z.weight": (1,)}
    with pytest.raises(WeightsMismatch, match="unexpected"):
        weights.bind(shapes | own, config, format="hf", path="x")
    lacking = {name: shape for name, shape in shapes.items() if "layers.1.self_attn.k_proj" not in name}
    with pytest.raises(WeightsMismatch, match="missing"):
        weights.bind(lacking, config, format="hf", path="x")


@pytest.mark.parametrize("name", ["gemma3n_e4b", "gemma4_31b"])
def test_the_tables_of_every_size(name):
    """The cheap half of the next test."""
    config = PRESETS[name]
    assert sum(tensor.size for tensor in weights.tensors(config)) == config.num_parameters


@pytest.mark.parametrize("name", ["gemma3n_e2b", "gemma4_e2b", "gemma4_26b_a4b"])
def test_formula_table_and_network_agree(name):
    config = PRESETS[name]
    table = weights.tensors(config)
    assert sum(tensor.size for tensor in table) == config.num_parameters
    model = getattr(gm.nn, name.upper().replace("GEMMA3N", "Gemma3n").replace("GEMMA4", "Gemma4"))()
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes = flatten_shapes(tree)
    assert shapes == {t.slots["flax"].name: t.slots["flax"].shape for t in table}
    assert model.INFO.tokenizer_version == ("3n" if "3n" in name else 4)


def test_the_published_trees_of_gemma_3n():
    """Leaves and values of the official E4B text tree, whose table has no rows for soft tokens."""
    shapes = weights.expected(PRESETS["gemma3n_e4b"], "flax")
    assert len(shapes) == 751 and sum(int(np.prod(s)) for s in shapes.values()) == 6_834_711_280
    assert shapes["layer_0/altup/prediction_coefs"] == (4, 4, 4)
    assert shapes["embedder/per_layer_input_embedding"] == (262_144, 35, 256)
    assert not any(name.startswith("layer_20/attn/k") for name in shapes)


# ---- the full forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", runs())
def test_full_forward_batched_with_padding(name):
    """Rows of 4, 5, 6, 13 and 19 tokens, padded on the left and on the right: each equals the oracle on it alone."""
    its = newer(name)
    for left in (False, True):
        tokens, prompts = ragged(left=left)
        limit = allowance(its, prompts[-2:])
        for row, mask, prompt in zip(its.logits(tokens), tokens != 0, prompts):
            assert gap(row[mask], its.expected(prompt)) < limit


@pytest.mark.parametrize(
    ("name", "windowed"),
    [("gemma3n", True), ("gemma4_e", True), ("gemma4_dense", False)],
)
def test_chunked_prefill_and_cached_decode(name, windowed):
    """Chunks of 9 and 9, then single tokens: the cache holds what layers of their own have, and no more."""
    its = newer(name)
    tokens = np.random.default_rng(5).integers(3, 290, (BATCH, 2 * CHUNK + 4))
    cache = its.model.init_cache(batch_size=BATCH, dtype=jnp.float32, cache_length=CACHE, windowed=windowed)
    own = [spec for spec in its.config.layers if spec.kv_source == spec.index]
    assert set(cache) == {f"layer_{spec.index}" for spec in own}
    if windowed:
        held = sum(layer[x].size for layer in cache.values() for x in "kv") * 4
        assert held == BATCH * its.config.cache_bytes(CACHE, 4)
    got, cuts = [], (0, CHUNK, 2 * CHUNK, *range(2 * CHUNK + 1, tokens.shape[1] + 1))
    for start, stop in itertools.pairwise(cuts):
        call = {}
        if not windowed:
            call["positions"] = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (BATCH, stop - start))
        out = its.apply(its.params, jnp.asarray(tokens[:, start:stop], jnp.int32), cache=cache, **call)
        cache = out.cache
        got.append(np.asarray(out.logits))
    expected = np.stack([its.expected(row) for row in tokens])
    assert gap(np.concatenate(got, 1), expected) < max(4e-5, allowance(its, tokens[:1]))


def test_generation_is_that_of_the_full_forward():
    """Through the sampler's engine: prefill, ring caches, greedy; every token is the likeliest after those before."""
    its = newer("gemma4_e")
    prompt = [2, *ragged()[1][3][:8].tolist()]
    loaded = gm.text.LoadedModel(its.model, its.params, None, its.config, Path("tiny"))
    ids = list(gm.text.generate_ids(loaded, prompt, SamplingParams(temperature=0.0, max_new_tokens=8)))
    whole = [*prompt, *ids]
    likely = its.expected(whole).argmax(axis=1)
    assert ids == likely[len(prompt) - 1 : -1].tolist()


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.supports(VARIANTS[n].family, "JAX", "train"))
                                  for n in SHARING])  # fmt: skip
def test_gradients(name):
    """Of the mean log-likelihood, for every parameter: keys and values that several layers use collect from all."""
    its = newer(name)
    tokens = np.stack([ragged()[1][-1][:12]] * 2)
    tokens[1] = np.random.default_rng(8).integers(3, 290, 12)

    def loss(params):
        logits = its.model.apply({"params": params}, jnp.asarray(tokens, jnp.int32)).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=2)
        return -jnp.mean(chosen)

    ours = flatten(jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(its.params))
    hf = its.hf
    hf.zero_grad()
    logits = hf(input_ids=torch.tensor(tokens)).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, 320), torch.tensor(tokens)[:, 1:].reshape(-1)).backward()
    known = dict(hf.named_parameters())
    state = {
        key: known[key].grad.numpy() if key in known else None for key in hf.state_dict() if key != "lm_head.weight"
    }
    state = {key: np.zeros(1, np.float32) if value is None else value for key, value in state.items()}  # a buffer there
    theirs = weights.pack(weights.unpack(state, its.config, format="hf"), its.config, format="flax")
    assert set(ours) == set(theirs)
    for path, expected in theirs.items():
        assert np.abs(ours[path]).max() > 0, f"{path} is created and not used"
        if not path.endswith("skip_scale"):  # no parameter there
            assert gap(ours[path], expected) < 2e-5 + 2e-4 * np.abs(expected).max(), path


# ---- what would go unnoticed otherwise ------------------------------------------------------------------------------

MUTATIONS = {
    "gemma3n": [
        dict(query_pre_attn_scalar=None),
        dict(activation_sparsity_pattern=(0.9, 0.5, 0.0, 0.0)),
        dict(sliding_window=6),
    ],
    "gemma4_dense": [
        dict(use_value_norm=False),
        dict(partial_rotary_factor=0.5),
        dict(sliding_window=4),
        dict(rms_norm_eps=1e-4),
    ],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_configuration_shows(name):
    its, tokens = newer(name), ragged()[1][3]  # 13 tokens
    assert mutated(name, tokens) < allowance(its, [tokens])
    for changes in MUTATIONS[name]:
        assert mutated(name, tokens, **changes) > 1e-4, changes


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_refusals():
    its = newer("gemma4_e")
    with pytest.raises(ConfigError, match="Gemma4_E2B: text_only=False"):
        gm.nn.Gemma4_E2B(text_only=False)
    block = gm.nn.Block.of(its.config.layers[2], its.model.config)
    x, positions = jnp.ones((1, 2, 72)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ShapeError, match="no keys and values of its own"):
        block.init(jax.random.key(0), x, positions, None, jnp.ones((1, 2, 2), bool))
    with pytest.raises(ConfigError, match="num_kv_shared_layers: 3 leave no layer of each kind"):
        read_config(its.hf.config.to_dict() | dict(num_kv_shared_layers=3))
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        read_config(its.hf.config.to_dict() | dict(use_bidirectional_attention="all"))
