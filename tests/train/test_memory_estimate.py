# SPDX-License-Identifier: Apache-2.0
"""Memory counted beforehand, beside what the compiler assigns and what the arrays take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gemma import config as configs
from gemma import gm, testing
from gemma.finetuning import RunConfig
from gemma.gm import train
from gemma.gm.train import _memory
from gemma.gm.train._state import init_state

SIZES = dict(hidden_size=160, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1, head_dim=128)
SIZES |= dict(num_hidden_layers=2, layer_pattern="L", vocab_size=1024)


def run(**fields) -> RunConfig:
    return RunConfig(
        **(dict(data="rows.jsonl", rank=16, batch_size=4, max_length=256, dtype="float32", remat="none") | fields)
    ).resolved()


def of_preset(name: str, **fields) -> dict[str, int]:
    return _memory.count_items(run(**fields), configs.text_only(configs.preset(name)), 0)


IN_A_STEP = (
    "activations",
    "activations, kept",
    "activations of one layer",
    "logits of a chunk",
    "logits, gradients of the table",
    "weights in other orders",
)


def in_a_step(items) -> int:
    return sum(items.get(name, 0) for name in IN_A_STEP)


def compiled(config, run: RunConfig):
    """What XLA assigns to a step of a run, from shapes alone; and the bytes of the arrays that last."""
    net = gm.nn.Transformer.from_config(config, dtype=jnp.float32, remat=None if run.remat == "none" else run.remat)
    if run.tuned != "full":
        net = gm.nn.LoRA(rank=run.rank, targets=run.targets, dtype=jnp.float32, model=net)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    split = train.split_trainable(shapes, "all" if run.tuned == "full" else "lora")
    optimizer = train.make_optimizer(train.OptimizerConfig(schedule="constant"))
    state = jax.eval_shape(lambda leaves: init_state(leaves, optimizer, master_dtype="float32"), split.trainable)
    shape = (run.batch_size, run.max_length)
    batch = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ("tokens", "targets", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, "bool")
    step = train.make_step(train.Supervised(net), optimizer)
    found = step.lower(state, split.frozen, batch).compile().memory_analysis()
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(t)) for t in (split.frozen, state.params)]
    return found, *sizes


CASES = [
    dict(method="lora"),
    pytest.param(dict(method="full", remat="block", max_length=128), marks=pytest.mark.slow),
    pytest.param(dict(method="lora", remat="dots", batch_size=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fields", CASES)
def test_the_estimate_is_what_the_compiler_assigns(fields):
    settings, config = run(**fields), testing.tiny_config("gemma3", **SIZES)
    found, frozen, trained = compiled(config, settings)
    items = _memory.count_items(settings, config, 0)
    assert items.get("weights, not trained", 0) == frozen
    assert items.get("adapter, in float32", 0) + items.get("weights, trained, in float32", 0) == trained
    assert items["moments of the optimizer"] == 2 * trained
    expected = in_a_step(items) + items["gradients"]
    assert expected == pytest.approx(found.temp_size_in_bytes, rel=0.2)


@pytest.mark.parametrize(
    ("preset", "fields", "assigned"),
    [
        ("gemma3_270m", dict(), 2401e6),
        ("gemma3_270m", dict(remat="dots"), 838e6),
        ("gemma3_270m", dict(remat="block"), 413e6),
        ("gemma3_270m", dict(method="full", layers=2), 2127e6),
        ("gemma3_270m", dict(method="full", layers=2, remat="dots"), 2127e6),
        ("gemma2_2b", dict(layers=3, batch_size=1), 1220e6),
    ],
)
def test_the_estimate_is_what_was_assigned_to_real_sizes(preset, fields, assigned):
    """`compile().memory_analysis()` of a step in float32, 256 tokens per row, on a CPU."""
    if jax.default_backend() != "cpu":
        pytest.skip("numbers of the compiler for CPUs")
    layers = fields.pop("layers", None)
    config = configs.text_only(configs.preset(preset))
    config = config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)
    items = _memory.count_items(run(**fields), config, 0)
    assert in_a_step(items) + items["gradients"] == pytest.approx(assigned, rel=0.1)


def test_items_follow_from_the_settings():
    lora, full = of_preset("gemma3_270m"), of_preset("gemma3_270m", method="full")
    numbers = configs.preset("gemma3_270m").num_parameters
    assert lora["weights, not trained"] == 4 * numbers and "weights, not trained" not in full
    assert (
        full["moments of the optimizer"]
        == 2 * full["gradients"]
        == 2 * full["weights, trained, in float32"]
        == 8 * numbers
    )
    assert full["logits, gradients of the table"] > 10 * lora["logits of a chunk"]
    assert of_preset("gemma3_270m", accumulate=2)["gradients"] == 2 * lora["gradients"]
    assert of_preset("gemma3_270m", ema=0.9)["moving average"] == lora["adapter, in float32"]
    assert of_preset("gemma3_270m", rank=32)["adapter, in float32"] == 2 * lora["adapter, in float32"]
    half = of_preset("gemma3_270m", method="full", dtype="bfloat16")
    assert half["weights, rounded for a step"] == 2 * numbers and "weights, rounded for a step" not in full
    assert half["activations"] == pytest.approx(full["activations"] / 2)
    packed = of_preset("gemma3_270m", method="qlora", quantize="int4")
    assert packed["weights, not trained"] < lora["weights, not trained"] / 7
    pairs = of_preset("gemma3_270m", method="dpo")
    assert pairs["activations"] == 2 * lora["activations"] and "weights of the reference" not in pairs
    assert of_preset("gemma3_270m", method="dpo", tune="full")["weights of the reference"] == 4 * numbers


def test_what_does_not_fit_is_named_with_a_change_that_makes_it_fit(tmp_path, monkeypatch):
    config = testing.tiny_config("gemma3", **SIZES)
    testing.write_tiny_safetensors(tmp_path, config)
    settings = run(model=str(tmp_path))
    monkeypatch.setattr(gm.ckpts, "load_params", None)  # nothing of it is read
    first = train.estimate_memory(settings)
    assert first.fits and first.advice == "" and "activations" in str(first)
    room = first.total - 1

    def estimate(**fields):
        return train.estimate_memory(dataclasses.replace(settings, **fields))

    monkeypatch.setattr(_memory, "_available", lambda: room)
    tight = estimate()
    assert not tight.fits and tight.advice in str(tight)
    assert tight.advice.startswith("does not fit: activations (") and "with remat block the run takes" in tight.advice
    assert estimate(remat="block").fits
    room = estimate(remat="block").total - 1
    assert (
        "with batch_size 1 with accumulate 4 the run takes" in estimate().advice
        and estimate(batch_size=1, accumulate=4).fits
    )
    room = 1000
    assert "no change of the settings" in estimate().advice
    monkeypatch.setattr(_memory, "_available", lambda: None)
    assert estimate().fits and "available" not in str(estimate())
