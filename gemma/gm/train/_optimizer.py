# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules as data, made into optax's transformations.

    config = OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_steps=10, total_steps=200)
    optimizer = make_optimizer(config)

The rules are optax's own. What is decided here: which leaves decay, where a schedule begins and ends, and that
gradients are clipped by their common norm first. The step that uses them is `_step.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma.errors import ConfigError

OPTIMIZERS = ("adamw", "adafactor", "sgd", "lion")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
# Gains, offsets and magnitudes: pulling them to zero would switch channels off, not regularize them.
_UNDECAYED = re.compile(r"(^|/)(scale|bias|magnitude)$|norm[^/]*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer as data.

    Attributes:
      name: "adamw", "adafactor", "sgd" or "lion".
      learning_rate: the highest one, reached after the warm-up.
      schedule: what follows the warm-up: "constant"; "linear" or "cosine" down to the end; or "wsd" (warm-up, stable,
        decay): constant, then linear in the last `decay_share` of all steps.
      warmup_steps: W. Step n < W has (n + 1) / (W + 1) of the rate, step W all of it: no step has none.
      total_steps: N, where the schedule ends; the last step, N - 1, is one away from it. `Trainer` fills it in.
      end_ratio: the rate at the end, as a share of the highest one.
      decay_share: see `schedule`.
      weight_decay: multiplied by the rate; never of norms, biases, scales, DoRA's magnitudes and other vectors.
      b1: decay of the first moment (adamw, lion).
      b2: decay of the second moment (adamw, lion).
      eps: added to the root of the second moment (adamw).
      momentum: of sgd.
      clip_norm: gradients together are made no longer than this; None: not clipped.
      momentum_dtype: of the first moment (adamw, lion); None: float32.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    total_steps: int | None = None
    end_ratio: float = 0.0
    decay_share: float = 0.2
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    clip_norm: float | None = 1.0
    momentum_dtype: str | None = None

    def __post_init__(self):
        _one_of("name", self.name, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        for name, low, high in (
            ("learning_rate", 0, math.inf),
            ("warmup_steps", 0, math.inf),
            ("end_ratio", 0, 1),
            ("decay_share", 0, 1),
            ("weight_decay", 0, math.inf),
            ("b1", 0, 1),
            ("b2", 0, 1),
            ("momentum", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high or not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number from {low} to {high}, got {value!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: expected a number above 0, or None for no clipping, got {self.clip_norm!r}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ConfigError(f"total_steps: expected 1 or more, got {self.total_steps!r}")
        if self.total_steps is not None and self.schedule != "constant" and self.warmup_steps >= self.total_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: expected fewer than the {self.total_steps} steps of the run"
            )


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of steps taken so far, an integer or an int32 array.

    Raises:
      ConfigError: (a ValueError) a schedule that ends, without `total_steps`.
    """
    if config.schedule != "constant" and config.total_steps is None:
        raise ConfigError(f"total_steps: schedule={config.schedule!r} has to know where the run ends")
    peak, end, warm = config.learning_rate, config.end_ratio, config.warmup_steps
    total = config.total_steps or 0

    def share(step: Any) -> Any:
        """Of the peak, after the warm-up."""
        if config.schedule == "constant":
            return jnp.ones_like(step)
        start = warm if config.schedule != "wsd" else max(warm, round(total * (1 - config.decay_share)))
        gone = jnp.clip((step - start) / max(total - start, 1), 0.0, 1.0)
        down = 0.5 * (1 + jnp.cos(jnp.pi * gone)) if config.schedule == "cosine" else 1 - gone
        return end + (1 - end) * down

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.where(step < warm, (step + 1) / (warm + 1), share(step))

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation that a config describes; the learning rate counts the steps that were applied."""
    rate, decay = make_schedule(config), dict(weight_decay=config.weight_decay, mask=decay_mask)
    if config.name == "adamw":
        moments = dict(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.momentum_dtype)
        rule = optax.adamw(rate, **moments, **decay)
    elif config.name == "lion":
        rule = optax.lion(rate, b1=config.b1, b2=config.b2, mu_dtype=config.momentum_dtype, **decay)
    else:
        # optax's adafactor does not multiply its decay by the rate; here all four optimizers do.
        first = (
            [optax.trace(config.momentum)]
            if config.name == "sgd"
            else [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()]
        )
        rule = optax.chain(*first, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate))
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(*clip, rule)


def decay_mask(params: Any) -> Any:
    """Truth values like `params`: True for weights that decay."""

    def decays(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.ndim > 1 and not _UNDECAYED.search(name)

    return jax.tree_util.tree_map_with_path(decays, params)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
