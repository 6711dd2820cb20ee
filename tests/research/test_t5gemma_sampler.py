# SPDX-License-Identifier: Apache-2.0
"""Sampling from a T5Gemma in JAX, training it until it knows its pairs, its checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity_harness import flatten
from t5gemma_harness import CONFIGS, QUICK, TOLERANCE, gap, ids, pair, write_hf

from gemma import gm, testing
from gemma.config import T5GemmaConfig
from gemma.errors import (
    CheckpointNotFound,
    ConfigError,
    ContextFull,
    PromptError,
    SamplingError,
    ShapeError,
    UnsupportedError,
    WeightsMismatch,
)
from gemma.gm import ckpts
from gemma.gm.nn._cross import Memory
from gemma.research import t5gemma
from gemma.sampling import SamplingParams
from gemma.seq2seq import IGNORED, make_targets

TEXTS = ["What is it?", "A", "Rather a longer question, as it goes"]
TOKENIZER = testing.ByteTokenizer()


@pytest.fixture(scope="module")
def sampler():
    found = pair("t5gemma")
    return t5gemma.Sampler(
        model=found.model, params=found.params, tokenizer=TOKENIZER, max_input_length=64, max_output_length=16
    )


def test_greedy_text_is_that_of_hugging_face(sampler):
    """Without a bos in front of the input; batch, alone, streamed and step by step are one text."""
    out = sampler.sample(TEXTS, max_new_tokens=8, return_state=True)
    assert [len(text) for text in (out.text, out.tokens, out.state.done)] == [3, 3, 3]
    for text, tokens, row in zip(TEXTS, out.tokens, out.text):
        given = torch.tensor([TOKENIZER.encode(text)])
        never = [0, *range(TOKENIZER.vocab_size, 320)]
        options = dict(do_sample=False, suppress_tokens=never, eos_token_id=[1, 6], pad_token_id=0)
        theirs = (
            pair("t5gemma").hf.generate(given, max_new_tokens=8, decoder_start_token_id=2, **options)[0, 1:].numpy()
        )
        np.testing.assert_array_equal(tokens[: len(theirs)], theirs)
        assert not tokens[len(theirs) :].any()
        assert row == TOKENIZER.decode([i for i in tokens.tolist() if i > 2])
    assert out.state.encoder_mask.sum(axis=1).tolist() == [len(TOKENIZER.encode(text)) for text in TEXTS]
    pieces = list(sampler.sample(TEXTS, max_new_tokens=8, stream=True))
    assert ["".join(row) for row in zip(*pieces)] == out.text
    alone = sampler.sample([TEXTS[2]] * 3, max_new_tokens=8, return_state=True)  # the compiled shape, other neighbours
    np.testing.assert_array_equal(alone.tokens[1], out.tokens[2])
    np.testing.assert_allclose(alone.state.predicted_logprobs[1], out.state.predicted_logprobs[2], atol=TOLERANCE)
    assert (out.state.predicted_logprobs <= 0).all()


def test_ways_of_sampling(sampler):
    first = sampler.sample(TEXTS, max_new_tokens=3, sampling=SamplingParams(seed=5, temperature=2.0, top_k=50))
    assert first == sampler.sample(TEXTS, max_new_tokens=3, sampling=SamplingParams(seed=5, temperature=2.0, top_k=50))
    assert first != sampler.sample(TEXTS, max_new_tokens=3, sampling=SamplingParams(seed=6, temperature=2.0, top_k=50))
    assert t5gemma.TopkSampling is gm.text.TopkSampling and t5gemma.Greedy is gm.text.Greedy
    top = sampler.sample(TEXTS, max_new_tokens=3)
    forbidden = dataclasses.replace(
        sampler, forbidden_tokens=[int(sampler.sample(TEXTS, return_state=True).tokens[0, 0])]
    )
    assert forbidden.sample(TEXTS, max_new_tokens=3)[0] != top[0]
    with pytest.warns(UserWarning, match="more than max_output_length 16"):
        assert sampler.sample(TEXTS, max_new_tokens=99) == sampler.sample(TEXTS)
    begun = dataclasses.replace(sampler, bos=True)
    assert begun.sample(TEXTS, max_new_tokens=8) != sampler.sample(TEXTS, max_new_tokens=8)
    row = begun.sample(TEXTS, max_new_tokens=3, return_state=True).state
    assert row.encoder_mask.sum(axis=1).tolist() == [1 + len(TOKENIZER.encode(text)) for text in TEXTS]


def test_sampler_refuses(sampler):
    assert sampler.sample([]) == []
    with pytest.raises(PromptError, match="Max prompt length 65 is longer than max input length 64"):
        sampler.sample("x" * 65)
    for empty in ("", ["", "a"]):
        with pytest.raises(PromptError, match="prompt 0 is empty"):
            sampler.sample(empty)
    with pytest.raises(PromptError, match=r"input_tokens: expected ids in 0\.\.319, got 320"):
        sampler.sample([[320]])
    with pytest.raises(SamplingError, match="at least 1, got 0"):
        sampler.sample("a", max_new_tokens=0)
    with pytest.raises(SamplingError, match="ends at tokens"):
        sampler.sample("a", sampling=SamplingParams(stop=("x",)))


def test_images_of_a_prompt_are_counted():
    """Before anything is computed: a picture that no token stands for is not passed over; ids are taken as they are."""
    found = pair("t5gemma2")
    reader = t5gemma.Sampler(model=found.model, params=found.params, tokenizer=TOKENIZER)
    pictures = np.zeros((1, 1, 56, 56, 3), np.uint8)
    whole = [5, 298, *[300] * 4, 299, 6]
    parsed = lambda prompt: gm.text._prompts.parse(prompt)
    assert reader._inputs(parsed([whole]), pictures)[0, :8].tolist() == whole
    for prompt in ("no marker", [5, 6], [*whole, *whole]):
        with pytest.raises(PromptError, match="1 per row need 4 tokens of id 300"):
            reader.sample(prompt, images=pictures.tolist(), max_new_tokens=1)
    with pytest.raises(ShapeError, match=r"images: expected \[1, I, H, W, 3\]"):
        reader.sample([whole], images=pictures[0], max_new_tokens=1)
    with pytest.raises(PromptError, match="got length=2"):
        t5gemma.encode_inputs(TOKENIZER, ["a", "longer"], length=2)
    with pytest.raises(PromptError, match="input 0 holds padding"):
        t5gemma.encode_inputs(TOKENIZER, "a<pad>b")


def pairs(count: int = 32) -> tuple[list[str], list[str]]:
    """Words and what they are to be answered with, which no rule connects."""
    rng = np.random.default_rng(4)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(count)]
    answers = ["".join(rng.choice(list("mnopqrst"), rng.integers(2, 5))) for _ in range(count)]
    assert len(set(words)) == count
    return words, answers


@pytest.mark.supports("T5Gemma", "JAX", "train")
def test_overfits_32_pairs(standard_promotion):
    """From random weights to every answer, eos included, by teacher forcing alone."""
    side = testing.tiny_config("gemma2", num_hidden_layers=1, hidden_size=32, intermediate_size=48, head_dim=16)
    side = dataclasses.replace(
        side, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=None
    )
    model = t5gemma.T5GemmaConfig.of(T5GemmaConfig(side, side)).make(dtype=jnp.float32)
    words, answers = pairs()
    inputs = t5gemma.encode_inputs(TOKENIZER, words, bos=False)
    made = make_targets([TOKENIZER.encode(answer) for answer in answers])
    shapes = jax.eval_shape(model.init, jax.random.key(0), made.target_tokens, inputs)["params"]
    keys = iter(jax.random.split(jax.random.key(0), 200))
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape) if leaf.ndim == 1 else 0.15 * jax.random.normal(next(keys), leaf.shape),
        shapes,
    )
    tx = optax.adam(optax.cosine_decay_schedule(8e-3, 200))

    @jax.jit
    def train(params, state):
        value, grads = jax.value_and_grad(
            lambda p: t5gemma.loss(
                model, p, jnp.asarray(inputs), jnp.asarray(made.target_tokens), jnp.asarray(made.labels)
            )
        )(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(200):
        params, state, value = train(params, state)
        if value < 0.01:
            break
    assert float(value) < 0.05
    sampler = t5gemma.Sampler(model=model, params=params, tokenizer=TOKENIZER, max_output_length=8)
    said = sampler.sample(words, return_state=True)
    assert said.text == answers and said.state.done.all()


def test_loss_is_that_of_hugging_face():
    found = pair("t5gemma")
    target, tokens = ids((3, 9), seed=2), ids((3, 13), seed=1, lengths=(13, 6, 4))
    labels = np.concatenate([target[:, 1:], np.ones((3, 1), np.int32)], axis=1)
    labels[1, 5:] = IGNORED
    run = jax.jit(lambda p, *arrays: t5gemma.loss(found.model, p, arrays[0], None, arrays[1]), compiler_options=QUICK)
    ours = run(found.params, tokens, labels)
    given = {name: torch.as_tensor(array).long() for name, array in (("input_ids", tokens), ("labels", labels))}
    theirs = found.hf(**given, attention_mask=(given["input_ids"] != 0).long()).loss
    assert float(ours) == pytest.approx(theirs.item(), abs=1e-5)
    with pytest.raises(PromptError, match="should say .* at place 0, but the decoder reads"):
        t5gemma.loss(found.model, found.params, tokens, labels.clip(0), labels)  # not shifted
    twice = t5gemma.shift_right(t5gemma.shift_right(labels))
    with pytest.raises(PromptError, match="shifted against the decoder's input once"):
        t5gemma.loss(found.model, found.params, tokens, twice, labels)
    with pytest.raises(ShapeError, match=r"the shape \[B, T\] of target_tokens"):
        t5gemma.loss(found.model, found.params, tokens, target, labels[:, 1:])
    with pytest.raises(PromptError, match="nothing to learn"):
        t5gemma.loss(found.model, found.params, tokens, None, np.full_like(labels, IGNORED))


@pytest.mark.parametrize("name", ["t5gemma_unbalanced", "t5gemma2"])
def test_checkpoints(name, tmp_path):
    """Hugging Face's files and Orbax folders give one tree; tied copies in a file are seen to be copies."""
    found = pair(name)
    loaded = t5gemma.load_model(write_hf(found, tmp_path / "hf"))
    assert loaded.config == found.config and loaded.tokenizer is None
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, found.flat[path], err_msg=path)
    ckpts.save_params(loaded.params, tmp_path / "orbax", config=loaded.config)
    again = t5gemma.load_model(tmp_path / "orbax", dtype="bfloat16")
    assert again.config == found.config and again.model.dtype == "bfloat16"
    assert set(flatten(again.params)) == set(found.flat)
    from safetensors.torch import save_file

    state = {key: tensor.clone() for key, tensor in found.hf.state_dict().items()}  # with every copy
    save_file(state, tmp_path / "hf/model.safetensors")
    assert set(flatten(ckpts.load_params(tmp_path / "hf"))) == set(found.flat)
    state["lm_head.out_proj.weight"] += 1
    save_file(state, tmp_path / "hf/model.safetensors")
    with pytest.raises(WeightsMismatch):
        ckpts.load_params(tmp_path / "hf")


def test_the_other_architecture(tmp_path):
    config = testing.tiny_config("gemma2")
    testing.write_tiny_safetensors(tmp_path / "gemma2", config)
    with pytest.raises(UnsupportedError, match="a Gemma model without an encoder"):
        t5gemma.load_model(tmp_path / "gemma2")
    write_hf(pair("t5gemma"), tmp_path / "t5")
    with pytest.raises(UnsupportedError, match="T5Gemma"):
        gm.text.load_model(tmp_path / "t5")
    ckpts.save_params(ckpts.load_params(tmp_path / "t5"), tmp_path / "tree", config=CONFIGS["t5gemma"])
    like = jax.eval_shape(gm.nn.Transformer.from_config(config).init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))[
        "params"
    ]
    with pytest.raises(WeightsMismatch, match="ask for another model"):
        ckpts.load_params(tmp_path / "tree", params=like)
    with pytest.raises(CheckpointNotFound, match="t5gemma-s-s-ul2-it: not on this machine"):
        t5gemma.T5GemmaPreset.GEMMA2_SMALL_SMALL.get_checkpoint_from_kaggle(
            t5gemma.CKPTType.IT, t5gemma.PretrainType.UL2
        )


def random_tree(model):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)


def test_begins_as_gemma2():
    """Cross-attention is a copy of self-attention where the widths agree, random where they do not."""
    side = testing.tiny_config("gemma2", num_hidden_layers=1, num_key_value_heads=4)
    decoder = gm.nn.Transformer.from_config(side, dtype=jnp.float32)
    tree = random_tree(decoder)
    config = T5GemmaConfig(side, side)
    params = t5gemma.init_from_gemma(config, tree)
    shapes = jax.eval_shape(
        t5gemma.T5GemmaConfig.of(config).make().init, jax.random.key(0), *[jnp.ones((1, 2), int)] * 2
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes["params"])
    layer = params["decoder"]["layer_0"]
    np.testing.assert_array_equal(layer["cross_attn"]["kv_einsum"]["w"], layer["attn"]["qkv_einsum"]["w"][1:])
    assert params["encoder"]["layer_0"]["mlp"]["linear"] is tree["layer_0"]["mlp"]["linear"]  # shared, not copied
    wide = dataclasses.replace(side, hidden_size=80)
    other = random_tree(gm.nn.Transformer.from_config(wide, dtype=jnp.float32))
    params = t5gemma.init_from_gemma(T5GemmaConfig(wide, side), tree, other, rng=3)
    cross = params["decoder"]["layer_0"]["cross_attn"]["kv_einsum"]["w"]
    assert cross.shape == (2, 4, 80, 24) and 0.01 < float(cross.std()) < 0.03
    with pytest.raises(WeightsMismatch, match="the Gemma 2 given for the encoder"):
        t5gemma.init_from_gemma(T5GemmaConfig(wide, side), tree)
    with pytest.raises(ConfigError, match="got T5Gemma2Config"):
        t5gemma.init_from_gemma(CONFIGS["t5gemma2"], tree)


def test_network_refuses():
    found = pair("t5gemma")
    run = lambda *args, **more: found.model.apply({"params": found.params}, *args, **more)
    target, tokens = ids((2, 3)), ids((2, 4))
    with pytest.raises(PromptError, match="row 1 is empty"):
        run(target, tokens * np.array([[1], [0]], np.int32))
    with pytest.raises(ShapeError, match=r"input_tokens: expected integers \[B, T\], at least one of each"):
        run(target, tokens[:, :0])
    with pytest.raises(ShapeError, match="needs none"):
        run(target)
    with pytest.raises(ShapeError, match="as many rows of input as of target tokens, got 2 and 1"):
        run(target[:1], tokens)
    with pytest.raises(PromptError, match=r"target_tokens: expected ids in 0\.\.319"):
        run(target + 400, tokens)
    with pytest.raises(PromptError, match="only a T5Gemma 2 reads pictures"):
        run(target, tokens, images=np.zeros((2, 1, 56, 56, 3), np.float32))
    cache = found.model.init_cache(batch_size=2, prefill_length=3, generation_length=2)
    with pytest.raises(ContextFull, match="the input needs 4 tokens, but the context holds 3"):
        run(target[:, :1], tokens, cache)
    with pytest.raises(ContextFull):
        run(target, tokens[:, :3], cache)
    with pytest.raises(ShapeError, match="cache: made for 2 rows, but target_tokens hold 1"):
        run(target[:1, :1], tokens[:1, :3], cache)
    memory = {f"layer_{i}": Memory(*[jnp.zeros((2, 3, 2, 24))] * 2, jnp.ones((2, 3), bool)) for i in range(2)}
    with pytest.raises(ShapeError, match="has read an input already"):
        run(target[:, 1:2], tokens[:, :3], cache.replace(memory=memory))
    with pytest.raises(ConfigError, match="window: expected one of 'hf', 'deepmind'"):
        found.model.clone(window="both").apply({"params": found.params}, target, tokens)


def test_the_official_methods():
    """`compute_*_activations` and `decode_one_step` are the parts that `__call__` is made of."""
    found = pair("t5gemma")
    target, tokens = ids((3, 9), seed=2), ids((3, 13), seed=1, lengths=(13, 6, 4))
    full = found.logits(target, tokens)
    mask = jnp.asarray(tokens != 0)
    cache = found.model.init_cache(batch_size=3, prefill_length=13, generation_length=9)
    held = found.apply(found.params, target[:, :1], input_tokens=tokens, cache=cache).cache

    @functools.partial(jax.jit, compiler_options=QUICK)
    def parts(params, target, tokens, held):
        apply = lambda *args, method, **more: found.model.apply({"params": params}, *args, method=method, **more)
        encoded = apply(tokens, mask, method="compute_encoder_activations").activations[-1]
        decoded = apply(target, mask, encoded, method="compute_decoder_activations")
        positions, own = jnp.full((3, 1), 1, jnp.int32), jnp.arange(9)[None, None] <= 1
        second = apply(target[:, 1:2], positions, mask[:, None], own, held, method="decode_one_step")
        narrow = mask[:, None] & (jnp.arange(13) < 2)[None, None]
        narrow = apply(target[:, 2:3], None, narrow, None, second.cache, method="decode_one_step")
        wide = apply(target[:, 2:3], cache=second.cache, method="decode_one_step")
        return encoded, decoded, second, narrow, wide

    encoded, decoded, second, narrow, wide = parts(found.params, target, tokens, held)
    assert encoded.shape == (3, 13, 72) and len(decoded.activations) == 3
    assert gap(np.asarray(second.logits)[:, 0], full[:, 1]) < TOLERANCE
    assert gap(np.asarray(wide.logits)[:, 0], full[:, 2]) < TOLERANCE
    assert gap(np.asarray(narrow.logits)[:, 0], full[:, 2]) > 1e-3
