# SPDX-License-Identifier: Apache-2.0
"""Group-relative policy optimization: advantages of sampled answers, and the clipped loss on their tokens.

Pure functions of rewards and of log-probabilities of tokens [B, T], which `token_logps` computes without logits of all
positions. Values and gradients are those of TRL 1.16's `GRPOTrainer`. Sampling and rewards are the caller's: the answers
of one prompt are neighbours on the first axis, B = prompts times group size. Losses of pairs are `_preference.py`.

With w = p / p_old of a token and advantage a, a token costs -min(w a, clip(w, 1 - low, 1 + high) a) + beta KL, where KL is
the estimator r - ln r - 1 of r = p_reference / p, which is never negative. Kinds differ in what tokens are divided by:

    kind       total                                       weight
    dapo       sum over the tokens of all answers          their number
    bnpo       their mean over this batch                  1
    grpo       sum of each answer's mean                   number of answers
    dr_grpo    sum over the tokens of all answers          number of answers times max_length

    GRPO arXiv:2402.03300 · DAPO 2503.14476 · Dr. GRPO 2503.20783 · sequence level (GSPO) 2507.18071
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma.errors import ConfigError, ShapeError
from gemma.gm.typing import Array, Bool, Float

KINDS = ("grpo", "bnpo", "dr_grpo", "dapo")
_SCALES = ("group", "batch", "none")
_EPSILON = 1e-4  # beside a standard deviation, as in TRL: groups whose rewards are all the same get 0


def group_advantages(rewards: Float[Array, " B"], group_size: int, *, scale: str = "group") -> Float[Array, " B"]:
    """How much better an answer is than the other answers to its prompt.

    Args:
      rewards: of each answer; those of one prompt beside each other. NaN: the answer could not be scored; it is left
        out of means and deviations, and its advantage is 0.
      group_size: answers per prompt.
      scale: by which standard deviation (n - 1 in the denominator) differences to the mean of the group are divided:
        that of the "group", of the whole "batch", or "none" (Dr. GRPO: no bias towards easy and hard prompts).

    Raises:
      ConfigError: an unknown scale, or a group size that is no whole number above 0. ShapeError: not [B], or groups that
        are not full.
    """
    if scale not in _SCALES:
        raise ConfigError(f"scale: expected one of {', '.join(_SCALES)}, got {scale!r}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"group_size: expected a whole number of at least 1, got {group_size!r}")
    rewards = _wide(rewards)
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ShapeError(f"rewards: expected [B] with B a multiple of {group_size}, got {tuple(rewards.shape)}")
    groups = rewards.reshape(-1, group_size)
    known = ~jnp.isnan(groups)
    away = groups - _mean(groups, known, axis=1)
    if scale == "group":
        away = away / (_deviation(groups, known, axis=1) + _EPSILON)
    elif scale == "batch":
        away = away / (_deviation(groups, known, axis=None) + _EPSILON)
    return jnp.where(known, away, 0).reshape(-1)


def grpo(
    policy_logps: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    old_logps: Float[Array, "B T"] | None = None,
    reference_logps: Float[Array, "B T"] | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    level: str = "token",
    kind: str = "dapo",
    max_length: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """The clipped policy-gradient loss of sampled answers: a sum, and what it is to be divided by.

    Formulas and kinds are in the text of this module (`gemma/gm/losses/_grpo.py`).

    Divide the total of all micro-batches and devices by the weight of all of them (or by 1 where it is 0).

    Args:
      policy_logps: ln p of the answers' tokens under the model that is trained, nats.
      advantages: of each answer (`group_advantages`), or of each token; constants.
      mask: True at tokens of answers; elsewhere anything may stand, NaN too.
      old_logps: of the model that sampled. None: the one that is trained, as it is now (w is 1, its slope that of ln p).
      reference_logps: of the model that beta pulls to; needed if beta is not 0.
      beta: weight of the KL.
      epsilon: how far below 1, and without epsilon_high also above, w still counts.
      epsilon_high: how far above 1 ("clip higher" of DAPO).
      delta: w is never taken for more, whatever the sign of the advantage (two-sided clipping). None: no bound.
      level: "token", or "sequence": one w for an answer, the geometric mean of those of its tokens.
      kind: "dapo", "bnpo", "grpo" or "dr_grpo".
      max_length: tokens that an answer could have had; for dr_grpo, else not used.

    Returns:
      The total, the weight, and metrics, each as (sum, weight): `kl` (where beta is not 0; nats per token),
      `clipped_low` and `clipped_high` (shares of w beyond a bound with an advantage that pushes further), `ratio` (of w).

    Raises:
      ConfigError: an unknown kind or level, a number outside of its range, or something missing. ShapeError.
    """
    _check(kind, level, beta, epsilon, epsilon_high, delta, max_length)
    if beta and reference_logps is None:
        raise ConfigError(f"reference_logps: needed for the KL, beta is {beta}")
    policy, mask = _answers(policy_logps, mask)
    old = jax.lax.stop_gradient(policy if old_logps is None else _tokens("old_logps", old_logps, policy))
    log_w = jnp.where(mask, policy - old, 0)
    bounds = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    each, metrics = _clipped(log_w, _advantages(advantages, policy), mask, level, bounds, delta)
    if beta:
        behind = jax.lax.stop_gradient(_tokens("reference_logps", reference_logps, policy))
        log_r = jnp.where(mask, behind - policy, 0)
        kl = jnp.expm1(log_r) - log_r
        each, metrics["kl"] = each + beta * kl, _masked(kl, mask)
    return *_reduced(jnp.where(mask, each, 0), mask, kind, max_length), jax.tree.map(jax.lax.stop_gradient, metrics)


def _answers(policy: Array, mask: Array) -> tuple[Array, Array]:
    """Log-probabilities, 0 where the mask is False, and the mask."""
    policy, mask = _tokens("policy_logps", policy, None), jnp.asarray(mask)
    if mask.shape != policy.shape or mask.dtype != jnp.bool_:
        raise ShapeError(f"mask: expected booleans {tuple(policy.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return jnp.where(mask, policy, 0), mask


def _clipped(
    log_w: Array, gain: Array, mask: Array, level: str, bounds: tuple[float, float], delta: float | None
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """What each token costs [B, T], without the KL, and metrics."""
    if level == "sequence":
        log_w = _row_means(log_w, mask)[:, None]
    w = jnp.exp(log_w)
    used = w if delta is None else jnp.minimum(w, delta)
    each = -jnp.minimum(used * gain, jnp.clip(w, *bounds) * gain)
    return jnp.broadcast_to(each, mask.shape), _metrics(used, gain, *bounds, mask)


def _reduced(each: Array, mask: Array, kind: str, max_length: int | None) -> tuple[Array, Array]:
    """(total, weight) of what each token costs."""
    count, rows = jnp.sum(mask, dtype=each.dtype), jnp.asarray(each.shape[0], each.dtype)
    if kind == "grpo":
        return jnp.sum(_row_means(each, mask)), rows
    if kind == "bnpo":
        return jnp.sum(each) / jnp.maximum(count, 1), jnp.ones_like(count)
    return jnp.sum(each), count if kind == "dapo" else rows * max_length


def _metrics(w: Array, gain: Array, low: float, high: float, mask: Array) -> dict[str, tuple[Array, Array]]:
    seen = mask if w.shape == mask.shape else jnp.any(mask, axis=1, keepdims=True)
    gain = jnp.broadcast_to(gain, mask.shape) if w.shape == mask.shape else gain[:, :1]
    clipped = dict(clipped_low=(w < low) & (gain < 0), clipped_high=(w > high) & (gain > 0))
    return {name: _masked(x.astype(w.dtype), seen) for name, x in clipped.items()} | dict(ratio=_masked(w, seen))


def _masked(x: Array, mask: Array) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(mask, x, 0)), jnp.sum(mask, dtype=x.dtype)


def _row_means(x: Array, mask: Array) -> Array:
    """[B] of [B, T] that is 0 where it does not count."""
    return jnp.sum(x, axis=1) / jnp.maximum(jnp.sum(mask, axis=1, dtype=x.dtype), 1)


def _mean(x: Array, known: Array, axis: int | None) -> Array:
    count = jnp.maximum(jnp.sum(known, axis=axis, keepdims=True), 1)
    return jnp.sum(jnp.where(known, x, 0), axis=axis, keepdims=True) / count


def _deviation(x: Array, known: Array, axis: int | None) -> Array:
    """Standard deviation of what is known, without bias; 0 of fewer than two."""
    away = jnp.where(known, x - _mean(x, known, axis), 0)
    count = jnp.sum(known, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.sum(jnp.square(away), axis=axis, keepdims=True) / jnp.maximum(count - 1, 1))


def _advantages(values: Array, policy: Array) -> Array:
    """[B, 1] or [B, T], constants."""
    values = jax.lax.stop_gradient(_wide(values))
    if values.shape not in (policy.shape[:1], policy.shape):
        shape = tuple(policy.shape)
        raise ShapeError(f"advantages: expected {shape[:1]} or {shape}, got {tuple(values.shape)}")
    return values[:, None] if values.ndim == 1 else values


def _tokens(name: str, values: Array, like: Array | None) -> Array:
    values = _wide(values)
    if values.ndim != 2 or (like is not None and values.shape != like.shape):
        expected = "[B, T]" if like is None else tuple(like.shape)
        raise ShapeError(f"{name}: expected {expected}, got the shape {tuple(values.shape)}")
    return values


def _wide(x: Array) -> Array:
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _check(
    kind: str,
    level: str,
    beta: float,
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    max_length: int | None,
) -> None:
    if kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if level not in ("token", "sequence"):
        raise ConfigError(f"level: expected token or sequence, got {level!r}")
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("beta", beta), ("epsilon", epsilon), ("epsilon_high", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ConfigError(f"{name}: expected a number of at least 0, got {value!r}")
    if delta is not None and not delta > 1 + high:
        raise ConfigError(f"delta: expected more than 1 + epsilon_high = {1 + high:g}, or None, got {delta!r}")
    if kind == "dr_grpo" and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length: dr_grpo divides by it; expected a whole number above 0, got {max_length!r}")
