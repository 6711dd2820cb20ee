# SPDX-License-Identifier: Apache-2.0
"""Real networks, tiny: learning by heart, adapters alone, preferences with their reference, classes, samples."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_helpers import LENGTH, Rows, batch, equal

from gemma import chat, gm, peft, testing
from gemma.errors import ConfigError
from gemma.gm import train
from gemma.gm.train import _evaluate
from gemma.gm.train._state import init_state


@functools.cache
def tiny():
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, head_dim=8, num_hidden_layers=1)
    return gm.testing.tiny_model("gemma3", layer_pattern="L", **sizes)


@functools.cache
def adapted(**fields):
    """(model, params) with adapters, in bfloat16 over float32, whose `b` are zero."""
    model = gm.nn.LoRA(rank=2, model=tiny().model, **fields)
    fresh = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    return model, peft.merge_params(tiny().params, peft.split_params(fresh).lora)


class Same:
    """The same batch for ever."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        while True:
            yield self.data


def test_eight_rows_are_learnt_by_heart_from_ln_v_on():
    loaded = tiny()
    assert loaded.params["layer_0"]["mlp"]["linear"].dtype == jnp.float32
    optimizer = train.OptimizerConfig(learning_rate=0.02, warmup_steps=5)
    data = batch(8)
    trainer = train.Trainer(
        train.Supervised(loaded.model),
        loaded.params,
        "all",
        Same(data),
        optimizer=optimizer,
        steps=200,
        eval_loader=[data],
        sample_prompts=["say", [2, 5]],
        sample_tokens=3,
        tokenizer=loaded.tokenizer,
        callbacks=[seen := Samples()],
    )
    result = trainer.fit()
    # Random labels: the loss of a model that knows nothing.
    assert result.history[0]["loss"] == pytest.approx(math.log(loaded.config.vocab_size), rel=0.02)
    assert result.history[-2]["loss"] < 0.01
    assert result.history[-1]["eval_loss"] < 0.01 and result.history[-1]["eval_accuracy"] == 1.0
    assert [prompt for prompt, _ in seen.pairs] == ["say", [2, 5]] and all(
        isinstance(text, str) for _, text in seen.pairs
    )
    scores = train.evaluate(train.Supervised(loaded.model), loaded.params, [data])
    assert scores["loss"] == pytest.approx(result.history[0]["loss"], rel=1e-4) and scores["accuracy"] < 0.2


def test_prompts_of_samples_are_encoded_and_bounded_before_the_first_step():
    tokenizer = tiny().tokenizer
    options = dict(tokens=4, limit=tiny().config.max_position_embeddings)
    turn = chat.encode_chat(tokenizer, [chat.Turn("user", "Hello")]).ids
    assert _evaluate.encode_prompts(["Hello", [2, 5]], tokenizer, chat=True, **options) == [turn, [2, 5]]
    assert _evaluate.encode_prompts(["Hello"], tokenizer, **options) == [tokenizer.encode("Hello", add_bos=True)]
    for bad in ([5] * (options["limit"] - 3), [0], 3.5):
        with pytest.raises(ConfigError, match=r"sample_prompts\[1\]: "):
            settings = dict(tokenizer=tokenizer, sample_prompts=["a", bad], sample_tokens=4, steps=1)
            train.Trainer(train.Supervised(tiny().model), tiny().params, "all", [batch(1)], **settings)
    # One that just fits is longer than the cache began with once.
    long = [5] * (options["limit"] - 4)
    (text,) = _evaluate.sample(tiny().model, tiny().params, tokenizer, [long], tokens=4)
    assert isinstance(text, str)


class Samples(train.Callback):
    pairs = ()

    def on_samples(self, step, samples):
        self.pairs = samples


def test_adapters_alone_are_trained_over_packed_weights_too(tmp_path):
    model, params = adapted(dropout=0.1)
    testing.write_tiny_safetensors(tmp_path, tiny().config)
    base = gm.ckpts.load_params(tmp_path, quantize="int8")
    packed = peft.merge_params(base, peft.split_params(params).lora)
    assert "uint8" in {str(leaf.dtype) for leaf in jax.tree.leaves(packed)}
    before = jax.tree.map(np.array, packed)
    trainer = train.Trainer(
        train.Supervised(model), packed, "lora", Rows(), steps=4, optimizer=train.OptimizerConfig(learning_rate=0.01)
    )
    result = trainer.fit()
    assert equal(peft.split_params(result.params).original, peft.split_params(before).original)
    old, new = peft.split_params(before).lora, peft.split_params(result.params).lora
    assert not any(equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}
    frozen = {id(leaf) for leaf in jax.tree.leaves(packed)}
    assert not frozen & {id(leaf) for leaf in jax.tree.leaves(result.state)}


def pairs(rows=4, seed=0):
    chosen, rejected = batch(rows, seed), batch(rows, seed + 50, labels=[5] * rows)
    return {name: np.stack([chosen[name], rejected[name]], axis=1) for name in chosen}


def run(objective, params, data, trainable="lora", **fields):
    optimizer = train.OptimizerConfig(learning_rate=0.02, schedule="constant")
    options = dict(optimizer=optimizer, steps=6) | fields
    return train.Trainer(objective, params, trainable, Same(data), **options).fit()


def test_preferences_start_at_their_reference_and_leave_it():
    model, params = adapted()
    result = run(train.Preference(model, beta=0.5), params, pairs(), accumulate=2)
    first, last = result.history[0], result.history[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5) and first["weight"] == 8
    assert first["margins"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < first["loss"] and last["accuracies"] == 1.0 and last["margins"] > 0.1


@pytest.mark.slow
def test_reference_scores_that_come_with_the_batch_are_used_as_they_are():
    given = pairs() | {"reference_logps": np.zeros((4, 2), np.float32)}
    whole = run(train.Preference(tiny().model, beta=0.5), tiny().params, given, "mlp", steps=1)
    hidden = gm.losses.hidden_states(tiny().model, tiny().params, pairs())
    logps = gm.losses.sequence_logps(tiny().model, tiny().params, hidden, given["targets"], given["loss_mask"])
    margin = float(jnp.mean(logps[:, 0] - logps[:, 1])) * 0.5
    assert whole.history[0]["margins"] == pytest.approx(margin, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hinge", "ipo", "npo", "orpo", "simpo"])
def test_every_kind_of_preference_goes_down(kind):
    model, params = adapted()
    result = run(train.Preference(model, kind), params, pairs())
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert int(result.state.skipped) == 0


@pytest.mark.slow
def test_full_preferences_keep_a_copy_of_the_reference():
    result = run(train.Preference(tiny().model, beta=0.5), tiny().params, pairs(), "all", steps=3)
    assert result.history[0]["margins"] == pytest.approx(0, abs=1e-4) and result.history[2]["margins"] > 0.1


@pytest.mark.slow
def test_kto_starts_at_a_half_and_filler_rows_do_not_count():
    model, params = adapted()
    data = batch(4, labels=[3] * 4) | {"good": np.array([True, False, True, False])}
    result = run(train.Kto(model, beta=0.5), params, data)
    assert result.history[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert result.history[-1]["loss"] < 0.5 and result.history[-1]["accuracies"] == 1.0
    filled = {name: np.concatenate([value, np.zeros_like(value[:2])]) for name, value in data.items()}
    again = run(train.Kto(model, beta=0.5), params, filled, steps=2)
    assert again.history[0]["weight"] == 4
    assert again.history[1]["loss"] == pytest.approx(result.history[1]["loss"], rel=1e-3)


def test_classes_are_told_by_one_token():
    model, params = adapted()
    data = batch(8, labels=[1] * 8)
    label = np.arange(8, dtype=np.int32) % 2
    ids = np.array([40, 41], np.int32)
    data["targets"][:, -1] = ids[label]
    filled = {
        name: np.concatenate([value, np.zeros_like(value[:1])]) for name, value in (data | {"label": label}).items()
    }
    filled["label"][-1] = -1
    result = run(train.Classification(model, ids), params, filled, steps=25, eval_loader=[filled])
    assert result.history[0]["loss"] == pytest.approx(math.log(tiny().config.vocab_size), rel=0.05)
    assert result.history[0]["weight"] == 8
    assert (
        result.history[-1]["eval_accuracy"] == 1.0 and result.history[-1]["eval_loss"] < result.history[0]["loss"] - 0.3
    )
    among = train.evaluate(train.Classification(model, ids, among_labels=True), params, [filled])
    assert among["loss"] == pytest.approx(math.log(2), rel=0.1)
    with pytest.raises(ConfigError, match="label_ids"):
        train.Classification(model, [40, 40])


@pytest.mark.slow
def test_a_part_of_a_batch_counts_by_its_labels_in_a_network():
    """Accumulation again, with the chunked loss: the gradient of a parameter is what one step of sgd takes away."""
    import optax

    split = train.split_trainable(tiny().params, "all")
    data = batch(16, labels=[LENGTH, 1, 2, 1] * 4)
    states = []
    for parts in (1, 4, 16):
        step = train.make_step(train.Supervised(tiny().model), optax.sgd(1.0), accumulate=parts)
        states.append(step(init_state(split.trainable, optax.sgd(1.0)), {}, data)[0].params)
    for other in states[1:]:
        for start, a, b in zip(*map(jax.tree.leaves, (split.trainable, states[0], other)), strict=True):
            scale = np.abs(np.asarray(a - start)).max() + np.abs(np.asarray(start)).max()
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale)
