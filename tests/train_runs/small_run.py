# SPDX-License-Identifier: Apache-2.0
"""A whole run on a tiny model of its own: packed and shuffled text, dropout, AdamW, EMA, a log, checkpoints.

python small_run.py FOLDER STEPS                     prints each step, until it ends or is killed
python small_run.py FOLDER STEPS INDEX COORDINATOR   as one of two processes, spread over the devices of both
python small_run.py FOLDER STEPS 8,2                 ends at STEPS / 2 on eight devices, and at STEPS on two of them
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import gm
from gemma.errors import GemmaError
from gemma.gm import data, train
from gemma.testing import ByteTokenizer

STEPS = 24
TEXT = "a small model learns what it is told and a killed run must not notice that it was killed at all"
WORDS = TEXT.split()
PACKED = dict(batch_size=4, max_length=64, packing=True, packing_buffer=4, seed=7)


@dataclasses.dataclass(frozen=True)
class Model(train.Objective):
    """Predicts an id from the one before and from the mean of its segment so far, with dropout."""

    model: Any = None
    keep: float = 0.8

    def loss(self, params, batch, *, key, train):
        hidden = params["table"]["w"][batch["tokens"]]
        same = batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None, :]
        same &= jnp.tril(jnp.ones(same.shape[1:], bool))
        hidden += jnp.einsum("bts,bsd->btd", same.astype(jnp.float32), hidden) / (1 + batch["positions"][..., None])
        if train:
            hidden *= jax.random.bernoulli(key, self.keep, hidden.shape) / self.keep
        logits = jax.nn.log_softmax(hidden @ params["head"]["w"])
        nll = -jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        mask = batch["loss_mask"]
        return jnp.sum(nll * mask), jnp.sum(mask), {"positions": (jnp.sum(batch["positions"] * mask), jnp.sum(mask))}


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"table": (300, 16), "head": (16, 300)}
    return {name: {"w": jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)} for name, shape in shapes.items()}


def examples() -> list[data.Text]:
    rng = np.random.default_rng(1)
    return [data.Text(" ".join(rng.choice(WORDS, rng.integers(2, 9)))) for _ in range(83)]


def trainer(
    folder: Path, *, steps: int = STEPS, keep: float = 0.8, shard: tuple[int, int] = (0, 1), **options: Any
) -> train.Trainer:
    loader = options.pop("loader", None) or data.Loader(examples(), ByteTokenizer(), shard=shard, **PACKED)
    fields = dict(
        optimizer=train.OptimizerConfig(learning_rate=0.05, warmup_steps=3, total_steps=STEPS, weight_decay=0.01),
        checkpoints=train.Checkpoints(folder / "steps", keep=2),
        loggers=[train.Csv(folder / "log.csv")],
        ema=0.9,
        save_every=1,
    )
    return train.Trainer(Model(keep=keep), params(), "all", loader, steps=steps, **(fields | options))


class Tell(train.Callback):
    def on_save(self, step):
        print(step, flush=True)


def spread(folder: Path, steps: int, index: int, coordinator: str) -> None:
    """Half of the rows, and a part of every array. Dropout depends on where a row stands, hence without."""
    assert train.initialize_distributed(coordinator, 2, index, timeout_s=100) == (index, 2)
    strategy = gm.sharding.FSDPSharding(min_size=1)
    options = dict(keep=1.0, sharding=strategy, shard=train.Placement(strategy).shard)
    trainer(folder, steps=steps // 2, **options).fit()
    result = trainer(folder, steps=steps, **options).fit()  # what both saved, both resume
    table = result.state.params["table"]["w"]
    assert not table.is_fully_addressable and not table.is_fully_replicated and table.sharding.num_devices == 8
    assert all(m.sharding == table.sharding for m in jax.tree.leaves(result.state.opt_state) if m.shape == table.shape)
    missing = train.Checkpoints(folder / "none")
    for refused in (missing.restore, lambda: train.Checkpoints(folder / "steps").restore(1)):
        try:
            refused()
        except GemmaError as error:
            print(type(error).__name__)


def move(folder: Path, steps: int, counts: list[int]) -> None:
    """A part of the run on each number of devices; every array that can be is cut into as many parts."""
    for part, count in enumerate(counts, 1):
        mesh = gm.sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
        strategy = gm.sharding.FSDPSharding(mesh, min_size=1)
        state = trainer(folder, steps=steps * part // len(counts), keep=1.0, sharding=strategy).fit().state
        head = [state.params["head"]["w"], state.ema["head"]["w"]]
        assert all(leaf.sharding.num_devices == count and not leaf.is_fully_replicated for leaf in head)


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    if len(sys.argv) == 4:
        move(Path(sys.argv[1]), int(sys.argv[2]), [int(count) for count in sys.argv[3].split(",")])
    elif len(sys.argv) > 3:
        spread(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), callbacks=[Tell()]).fit()
    print("done", flush=True)
