# SPDX-License-Identifier: Apache-2.0
"""One training step, compiled once per shape of batch: gradients, accumulation, update, guard against NaN, EMA.

    step = make_step(objective, make_optimizer(config))
    state, metrics = step(state, frozen, batch)        # `state` is donated: use the new one

The loss is a sum over labels divided by their number, over all the parts of an accumulated batch together: how a batch
is cut changes nothing. Frozen leaves are arguments, and no gradient of them is computed. The loop is `_loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma.errors import ConfigError, ShapeError
from gemma.gm.train._objectives import Objective
from gemma.gm.train._state import State, cast, merge_trainable
from gemma.gm.typing import Array, DType

Metrics = dict[str, Array]
Step = Callable[[State, Any, Mapping[str, Any]], tuple[State, Metrics]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema: float | None = None,
    compute_dtype: DType | Any = None,
    schedule: optax.Schedule | None = None,
    shardings: State | None = None,
) -> Step:
    """The function `step(state, frozen, batch) -> (state, metrics)`, jitted, `state` donated.

    Args:
      objective: what is minimized.
      optimizer: of optax. It sees float32 gradients and parameters.
      accumulate: the rows of a batch are cut into so many parts, row r into part r % accumulate, of which one is in
        memory at a time; the gradient is that of the whole batch.
      ema: decay d of the moving average: ema = d * ema + (1 - d) * params after each step that was applied.
      compute_dtype: dtype, or a tree of dtypes like `state.params`, to which the trained leaves are rounded for the
        forward and backward pass, while `state.params` stays wider. None: as they are.
      schedule: only to report the learning rate.
      shardings: a `State` of shardings; the new state is placed like it. None: wherever the compiler puts it.

    Returns:
      The function. Metrics are float32 scalars: loss (mean over labels), weight (their number), grad_norm (before
      clipping), skipped (1 if the loss or a gradient was not finite, or no label came: nothing changed but the counters),
      learning_rate, and the objective's own.

    Raises:
      ConfigError: (a ValueError) accumulate below 1, or an EMA decay outside of 0..1.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate: expected 1 or more, got {accumulate}")
    if ema is not None and not 0 <= ema < 1:
        raise ConfigError(f"ema: expected a decay from 0 to below 1, or None, got {ema}")
    gradients = _gradients(objective, accumulate)

    def step(state: State, frozen: Any, batch: Mapping[str, Any]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, weight, sums, grads = gradients(cast(state.params, compute_dtype), frozen, batch, key)
        # A batch without labels divides by one: its gradient is zero, and the step is skipped.
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32) * scale, grads)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (weight > 0)
        new = _applied(state, optimizer, grads, ema)
        new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, _kept(state))
        metrics = {"loss": loss * scale, "weight": weight, "grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        metrics |= ratios(sums)
        skipped = state.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        params, opt_state, average = new
        return state.replace(
            step=state.step + jnp.int32(1), params=params, opt_state=opt_state, ema=average, skipped=skipped
        ), metrics

    placed = {} if shardings is None else dict(out_shardings=(shardings, None))
    return jax.jit(step, donate_argnums=0, **placed)


def ratios(sums: Mapping[str, tuple[Array, Array]]) -> Metrics:
    """Sum over weight of each metric; 0 where nothing was counted."""
    return {name: total / jnp.where(count > 0, count, 1.0) for name, (total, count) in sums.items()}


def _gradients(objective: Objective, accumulate: int) -> Callable[..., tuple[Array, Array, Any, Any]]:
    """The function (params, frozen, batch, key) -> sums over the batch: loss, weight, metrics, gradients."""

    def loss(params: Any, frozen: Any, batch: Mapping[str, Any], key: Array) -> tuple[Array, Any]:
        total, weight, sums = objective.loss(merge_trainable(frozen, params), batch, key=key, train=True)
        wide = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), (weight, sums))
        return jnp.asarray(total, jnp.float32), wide

    def once(params: Any, frozen: Any, batch: Mapping[str, Any], key: Array) -> tuple[Array, Array, Any, Any]:
        (total, (weight, sums)), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, key)
        return total, weight, sums, grads

    def several(params: Any, frozen: Any, batch: Mapping[str, Any], key: Array) -> tuple[Array, Array, Any, Any]:
        parts = {name: _cut(name, value, accumulate) for name, value in batch.items()}

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            index, rows = part
            new = once(params, frozen, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), so_far, new), None

        first = jax.tree.map(lambda value: value[0], parts)
        shapes = jax.eval_shape(once, params, frozen, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate, dtype=jnp.int32), parts))[0]

    return once if accumulate == 1 else several


def _cut(name: str, value: Any, parts: int) -> Array:
    """[B, ...] to [parts, B / parts, ...]. Rows are dealt out in turn, so that each device keeps rows of every part."""
    value = jnp.asarray(value)
    if value.ndim < 1 or value.shape[0] % parts:
        raise ShapeError(f"{name}: expected rows that {parts} parts divide, got the shape {tuple(value.shape)}")
    return jnp.swapaxes(value.reshape(value.shape[0] // parts, parts, *value.shape[1:]), 0, 1)


def _kept(state: State) -> tuple[Any, Any, Any]:
    return state.params, state.opt_state, state.ema


def _applied(state: State, optimizer: optax.GradientTransformation, grads: Any, ema: float | None) -> tuple:
    wide = cast(state.params, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, wide)
        params = optax.apply_updates(wide, updates)
    average = state.ema
    if average is not None and ema is not None:
        average = jax.tree.map(lambda old, new: ema * old + (1.0 - ema) * new, average, params)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), params, state.params), opt_state, average
