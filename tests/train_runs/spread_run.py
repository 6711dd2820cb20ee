# SPDX-License-Identifier: Apache-2.0
"""A tiny Gemma, every leaf trained, on one device and spread over eight: prints the losses as lines of JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python spread_run.py "all three" fsdp tensor data move=FOLDER

"move=FOLDER" is `small_run.move` in the same process, 16 steps on eight devices and then on two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small_run

from gemma import gm
from gemma.gm import train

# 320 ids are divided among two devices; 49 MLP columns and one head of keys are not, nor are six rows among four.
SIZES = dict(vocab_size=320, hidden_size=24, intermediate_size=49, num_attention_heads=2, num_key_value_heads=1)
SIZES |= dict(num_hidden_layers=1, layer_pattern="L")
STEPS, ROWS, LENGTH = 10, 6, 10


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, 60, (ROWS, LENGTH + 1)).astype(np.int32)
    labels = np.arange(LENGTH)[None] >= rng.integers(0, LENGTH - 1, (ROWS, 1))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), labels.shape)
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:] * labels, loss_mask=labels, positions=np.array(positions))


def descend(strategy: Any) -> list[float]:
    """Losses of plain descents along the gradient of every leaf: less to compile than an optimizer."""
    tiny = gm.testing.tiny_model("gemma3", **SIZES)
    objective = train.Supervised(tiny.model)
    placement = None if strategy is None else train.Placement(strategy)
    params = tiny.params if placement is None else placement.put(tiny.params)
    where = None if placement is None else (None, placement.params(tiny.params))

    def step(params: Any, rows: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            total, count, _ = objective.loss(params, rows, key=jax.random.key(0), train=True)
            return total / count

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    step = jax.jit(step, out_shardings=where)
    losses = []
    for seed in range(STEPS):
        rows = batch(seed) if placement is None else placement.batch(batch(seed))
        value, params = step(params, rows)
        losses.append(float(value))
    table = params["embedder"]["input_embedding"]
    assert len(table.sharding.device_set) == (1 if strategy is None else 8)
    if isinstance(strategy, gm.sharding.TensorSharding):
        assert table.sharding.spec[0] == "tensor", table.sharding
        assert params["layer_0"]["mlp"]["linear"].sharding.spec[0] is None  # 49 columns
    return losses


def strategies() -> dict[str, Any]:
    sharding = gm.sharding
    config = gm.testing.tiny_model("gemma3", **SIZES).config
    return {
        "all three": sharding.TensorSharding(config, sharding.make_mesh(data=2, fsdp=2, tensor=2)),
        "fsdp": sharding.FSDPSharding(min_size=1),
        "tensor": sharding.TensorSharding(config, sharding.make_mesh(data=4, tensor=2)),
        "data": sharding.ReplicatedSharding(),
    }


if __name__ == "__main__":
    assert jax.device_count() == 8
    names = sys.argv[1:]
    for name in names:
        if name.startswith("move="):
            small_run.move(Path(name.removeprefix("move=")), 16, [8, 2])
    print(json.dumps({"single": descend(None)}), flush=True)
    for name, strategy in strategies().items():
        if name in names:
            print(json.dumps({name: descend(strategy)}), flush=True)
