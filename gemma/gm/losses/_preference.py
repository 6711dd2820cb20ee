# SPDX-License-Identifier: Apache-2.0
"""Losses of preferences, as functions of log-probabilities: DPO and its kin, NPO, ORPO, SimPO, KTO.

Log-probabilities come from `sequence_logps`, whose batches are [B, 2, T] here: 0 is the chosen answer, 1 the rejected
one. Each function returns a loss for every row and a dictionary of what to watch, for every row, too; means, weights
and devices are the trainer's business (`gm.train`). Values are those of TRL 1.16 where TRL has the loss. Definitions:

    DPO arXiv:2305.18290 · IPO 2310.12036 · hinge 2305.10425 · robust 2403.00409 · EXO 2402.00856 · NCA 2402.05369
    APO 2408.06266 · SPPO 2405.00675 · NPO 2404.05868 · ORPO 2403.07691 · SimPO 2405.14734 · KTO 2402.01306
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ConfigError, ShapeError
from gemma.gm.typing import Array, Bool, Float

Metrics = dict[str, Float[Array, " B"]]

_HALF = 0.6931471805599453  # -ln(1/2): below it log1p(-exp(x)) keeps more digits, above it log(-expm1(x))
_SURE = -1e-7  # a mean log-probability is not taken for higher: at 0 the odds are infinite


def dpo(
    policy_logps: Float[Array, "B 2"],
    reference_logps: Float[Array, "B 2"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
    lengths: Float[Array, "B 2"] | None = None,
) -> tuple[Float[Array, " B"], Metrics]:
    """Direct preference optimization, d = (policy - reference) of the chosen minus that of the rejected answer.

    | kind | loss of a row | log-probabilities |
    |---|---|---|
    | sigmoid | -ln s(beta d); with label smoothing e, (1 - e) of it and e of -ln s(-beta d) | summed |
    | hinge | max(0, 1 - beta d) | summed |
    | ipo | (d - 1 / (2 beta))^2 | means |
    | sigmoid_norm | -ln s(beta d) | means |
    | robust | sigmoid without the bias of label noise e | summed |
    | exo_pair | KL of s(beta d) to the labels, of which a share e > 0 is wrong | summed |
    | nca_pair, bco_pair, sppo_hard, apo_zero, apo_down | of both answers by themselves, see the papers | summed |

    Args:
      policy_logps: of the model that is trained, nats.
      reference_logps: of the model that it started from; constants.
      beta: strength of the pull to the reference.
      label_smoothing: e, the share of pairs assumed to be the wrong way round; of sigmoid, robust and exo_pair.
      kind: see above.
      lengths: number of tokens of each answer, by which the sums are divided for the kinds that use means. None: the
        log-probabilities of those kinds are means already (`sequence_logps(average=True)`).

    Returns:
      Losses, and `rewards_chosen`, `rewards_rejected` (beta times policy - reference), `margins` (their difference) and
      `accuracies` (1 where it is positive), of the log-probabilities as they were passed.

    Raises:
      ConfigError: an unknown kind, or a number outside of its range. ShapeError: not [B, 2].
    """
    beta = _positive("beta", beta)
    if kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    _check_smoothing(kind, label_smoothing)
    policy, reference = _pairs("policy_logps", policy_logps), _pairs("reference_logps", reference_logps)
    ratios = policy - jax.lax.stop_gradient(reference)
    used = ratios
    if kind in _MEANS and lengths is not None:
        used = ratios / jnp.maximum(_pairs("lengths", lengths), 1)
    loss = KINDS[kind](used[:, 0], used[:, 1], beta, float(label_smoothing))
    return loss, _rewards(beta * ratios)


def npo(
    policy_logps: Float[Array, " B"], reference_logps: Float[Array, " B"], *, beta: float = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Negative preference optimization: -ln s(-beta (policy - reference)), to unlearn answers.

    The paper's loss is 2 / beta times this one, which is the official package's.

    Args:
      policy_logps: summed log-probabilities of the model that is trained, nats.
      reference_logps: of the model that it started from; constants.
      beta: strength of the pull to the reference.

    Returns:
      Losses, and `rewards_rejected` (beta times policy - reference).
    """
    beta = _positive("beta", beta)
    policy, reference = _rows("policy_logps", policy_logps), _rows("reference_logps", reference_logps)
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    return -jax.nn.log_sigmoid(-rewards), {"rewards_rejected": jax.lax.stop_gradient(rewards)}


def orpo(
    average_logps: Float[Array, "B 2"],
    chosen_nll: Float[Array, " B"] | Float[Array, ""] | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, " B"], Metrics]:
    """Odds ratio preference optimization: nll - beta ln s(ln odds(chosen) - ln odds(rejected)); no reference model.

    Args:
      average_logps: mean log-probability of a token of each answer (`sequence_logps(average=True)`), nats.
      chosen_nll: cross-entropy of the chosen rows, of each or of all. TRL takes prompt and answer together, over all
        tokens of the batch; None: that of the chosen answers.
      beta: weight of the odds ratio (lambda in the paper).

    Returns:
      Losses, and the metrics of `dpo` (rewards are beta times the mean log-probability), `log_odds` and `nll`.
    """
    beta = _positive("beta", beta)
    average = _pairs("average_logps", average_logps)
    nll = -average[:, 0] if chosen_nll is None else jnp.broadcast_to(_wide(chosen_nll), average.shape[:1])
    bounded = jnp.minimum(average, _SURE)
    log_odds = bounded - _log1mexp(bounded)
    ratio = log_odds[:, 0] - log_odds[:, 1]
    metrics = _rewards(beta * average) | dict(log_odds=jax.lax.stop_gradient(ratio), nll=jax.lax.stop_gradient(nll))
    return nll - beta * jax.nn.log_sigmoid(ratio), metrics


def simpo(
    average_logps: Float[Array, "B 2"], *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Simple preference optimization: -ln s(beta (chosen - rejected) - gamma), of means; no reference model.

    Args:
      average_logps: mean log-probability of a token of each answer (`sequence_logps(average=True)`), nats.
      beta: scale of the rewards.
      gamma: by how much the chosen reward shall be above the other.
      label_smoothing: as in `dpo`.

    Returns:
      Losses, and the metrics of `dpo`; rewards are beta times the mean log-probability.
    """
    beta = _positive("beta", beta)
    _check_smoothing("sigmoid", label_smoothing)
    average = _pairs("average_logps", average_logps)
    margin = average[:, 0] - average[:, 1] - gamma / beta
    return _sigmoid(margin, 0, beta, float(label_smoothing)), _rewards(beta * average)


def kto(
    policy_logps: Float[Array, " B"],
    reference_logps: Float[Array, " B"],
    good: Bool[Array, " B"],
    kl: Float[Array, ""] | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kind: str = "kto",
) -> tuple[Float[Array, " B"], Metrics]:
    """Kahneman-Tversky optimization: answers with a thumb up or down, without pairs.

    With r = policy - reference, a good answer costs 1 - s(beta (r - kl)), a bad one 1 - s(beta (kl - r)).

    Args:
      policy_logps: summed log-probabilities of the model that is trained, nats.
      reference_logps: of the model that it started from; constants.
      good: True for a thumb up.
      kl: of `kto_kl`, nats.
      beta: strength of the pull to the reference.
      desirable_weight: by which losses of good answers are multiplied.
      undesirable_weight: by which losses of bad answers are multiplied.
      kind: "kto"; or "apo_zero_unpaired", which does without kl.

    Returns:
      Losses, and `rewards` (beta r), `accuracies` (1 where a good answer's r is above kl, or a bad one's below) and `kl`.
    """
    beta = _positive("beta", beta)
    if kind not in ("kto", "apo_zero_unpaired"):
        raise ConfigError(f"kind: expected kto or apo_zero_unpaired, got {kind!r}")
    policy, reference = _rows("policy_logps", policy_logps), _rows("reference_logps", reference_logps)
    good = jnp.asarray(good)
    if good.dtype != jnp.bool_ or good.shape != policy.shape:
        raise ShapeError(f"good: expected booleans {tuple(policy.shape)}, got {good.dtype} {tuple(good.shape)}")
    ratio = policy - jax.lax.stop_gradient(reference)
    point = jnp.zeros_like(ratio) if kind != "kto" else jnp.broadcast_to(jax.lax.stop_gradient(_wide(kl)), ratio.shape)
    gain = beta * (ratio - point)
    weight = jnp.where(good, desirable_weight, undesirable_weight).astype(ratio.dtype)
    # 1 - s(x) is s(-x): without the cancellation
    loss = weight * jax.nn.sigmoid(jnp.where(good, -gain, gain))
    right = (gain > 0) == good
    metrics = dict(rewards=beta * ratio, accuracies=right.astype(ratio.dtype), kl=point)
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def kto_kl(policy_logps: Float[Array, " B"], reference_logps: Float[Array, " B"]) -> Float[Array, ""]:
    """The reference point of `kto`, max(0, mean(policy - reference)), from answers that belong to other prompts.

    Both are summed log-probabilities of the batch that `mismatched` makes; no gradient flows through them.
    """
    policy, reference = _rows("policy_logps", policy_logps), _rows("reference_logps", reference_logps)
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(policy - reference), 0))


def mismatched(batch: Mapping[str, Array]) -> dict[str, Array]:
    """Each prompt of a batch with the answer of the row before it; the first prompt gets the last answer.

    Args:
      batch: `tokens`, `targets` and `loss_mask` [B, T], padded on the right, one answer per row, at its end. B must be
        above 1 for any answer to change its prompt.

    Returns:
      The same three, of the same shapes; an answer that does not fit behind its new prompt is cut.
    """
    tokens, targets, mask = (jnp.asarray(batch[name]) for name in ("tokens", "targets", "loss_mask"))
    if tokens.ndim != 2 or targets.shape != tokens.shape or mask.shape != tokens.shape:
        raise ShapeError(
            f"batch: expected tokens, targets and loss_mask [B, T], got {tokens.shape}, {targets.shape}, {mask.shape}"
        )
    first, count = jnp.argmax(mask, axis=1), jnp.sum(mask, axis=1)  # the first target is the answer's first token
    place = jnp.arange(tokens.shape[1])[None, :] - first[:, None]  # within the answer, at the targets
    count = jnp.roll(count, 1)[:, None]
    source = jnp.roll(first, 1)[:, None] + jnp.clip(place, 0, None)
    answer = jnp.take_along_axis(jnp.roll(targets, 1, axis=0), jnp.minimum(source, tokens.shape[1] - 1), axis=1)
    kept = (place >= 0) & (place < count)
    shifted = jnp.pad(jnp.where(kept, answer, 0), ((0, 0), (1, 0)))[:, :-1]  # as inputs, one later
    return dict(
        tokens=jnp.where(place <= 0, tokens, shifted).astype(tokens.dtype),
        targets=jnp.where(kept, answer, 0).astype(targets.dtype),
        loss_mask=kept,
    )


# ---- losses of pairs: (ratio of the chosen, of the rejected, beta, label smoothing) ----------------------------------


def _sigmoid(chosen: Array, rejected: Array | float, beta: float, smoothing: float) -> Array:
    x = beta * (chosen - rejected)
    return -(1 - smoothing) * jax.nn.log_sigmoid(x) - smoothing * jax.nn.log_sigmoid(-x)


def _plain(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def _hinge(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return jax.nn.relu(1 - beta * (chosen - rejected))


def _ipo(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def _robust(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    x = beta * (chosen - rejected)
    right, wrong = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)


def _exo(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    x = beta * (chosen - rejected)
    right, wrong = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    labels = jnp.log1p(-jnp.asarray(smoothing, x.dtype)), jnp.log(jnp.asarray(smoothing, x.dtype))
    return jnp.exp(right) * (right - labels[0]) + jnp.exp(wrong) * (wrong - labels[1])


def _nca(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    log = jax.nn.log_sigmoid
    return -log(beta * chosen) - 0.5 * log(-beta * chosen) - 0.5 * log(-beta * rejected)


def _bco(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def _sppo(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def _apo_zero(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def _apo_down(chosen: Array, rejected: Array, beta: float, smoothing: float) -> Array:
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


KINDS: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _plain,
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
_MEANS = ("ipo", "sigmoid_norm")
_SMOOTHED = ("sigmoid", "robust", "exo_pair")


def _rewards(rewards: Float[Array, "B 2"]) -> Metrics:
    rewards = jax.lax.stop_gradient(rewards)
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    right = (chosen > rejected).astype(rewards.dtype)
    return dict(rewards_chosen=chosen, rewards_rejected=rejected, margins=chosen - rejected, accuracies=right)


def _log1mexp(x: Array) -> Array:
    """ln(1 - exp(x)) of x < 0."""
    low = x < -_HALF
    far, near = jnp.where(low, x, -1.0), jnp.where(low, -0.5, x)  # the branch not taken must have a gradient, too
    return jnp.where(low, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))


def _wide(x: Any) -> Array:
    """As it is in float64, in float32 otherwise."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _pairs(name: str, x: Any) -> Float[Array, "B 2"]:
    x = _wide(x)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ShapeError(f"{name}: expected [B, 2], the chosen answer first, got the shape {tuple(x.shape)}")
    return x


def _rows(name: str, x: Any) -> Float[Array, " B"]:
    x = _wide(x)
    if x.ndim != 1:
        raise ShapeError(f"{name}: expected [B], got the shape {tuple(x.shape)}")
    return x


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)


def _check_smoothing(kind: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 0.5:
        raise ConfigError(f"label_smoothing: expected a number from 0 to below 0.5, got {value!r}")
    if value and kind not in _SMOOTHED:
        raise ConfigError(f"label_smoothing: {kind} has none; expected 0, or one of the kinds {', '.join(_SMOOTHED)}")
    if kind == "exo_pair" and not value:
        raise ConfigError("label_smoothing: exo_pair needs a number above 0, such as 0.001")
