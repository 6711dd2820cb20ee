# SPDX-License-Identifier: Apache-2.0
"""Losses of preferences: equal to TRL's numbers (`trl_golden.json`, made by `trl_golden.py`), and to their formulas."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma.errors import ConfigError, ShapeError
from gemma.gm import losses
from gemma.gm.losses import _preference

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("trl_golden", HERE / "trl_golden.py")
trl_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trl_golden)
FOUND = json.loads((HERE / "trl_golden.json").read_text(encoding="utf-8"))["found"]


def summed(name):
    """[2 B] of the golden inputs; the chosen rows come first there."""
    given = trl_golden.inputs()
    return (given[name] * given["mask"][:, 1:]).sum(1)


def pairs(values):
    return np.stack(np.split(np.asarray(values), 2), axis=1)


def lengths():
    return trl_golden.inputs()["mask"][:, 1:].sum(1)


@pytest.fixture(scope="module")
def ours():
    """Every loss that the golden file has, in one program of float64."""

    def compute(policy, reference, lengths, good, kl_policy, kl_reference):
        of = {}
        for kind, smoothing in trl_golden.DPO:
            how = dict(beta=0.3, kind=kind, label_smoothing=smoothing, lengths=lengths)
            of[f"dpo/{kind}/{smoothing}"] = losses.dpo(policy, reference, **how)
        flat = [x.T.reshape(-1) for x in (policy, reference)]
        weights = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
        kl = losses.kto_kl(kl_policy, kl_reference)
        for kind in ("kto", "apo_zero_unpaired"):
            of[f"kto/{kind}"] = losses.kto(*flat, good, kl, kind=kind, **weights)
        average = policy / lengths
        for smoothing in (0.0, 0.1):
            how = dict(beta=2.5, gamma=0.6, label_smoothing=smoothing)
            of[f"simpo/{smoothing}"] = losses.simpo(average, **how)
        return of | {"orpo": losses.orpo(average, jnp.zeros(()), beta=0.4)}

    given = trl_golden.inputs()
    arguments = [pairs(summed("policy")), pairs(summed("reference")), pairs(lengths()), given["good"]]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(compute)(*arguments, summed("kl_policy"), summed("kl_reference")))


@pytest.mark.parametrize("name", [name for name in FOUND if not name.startswith(("grpo", "advantages"))])
def test_equal_to_trl(ours, name):
    expected, (rows, metrics) = FOUND[name], ours[name]
    assert rows.dtype == jnp.float64
    rounded = name == "orpo" or "exo" in name  # TRL has their inputs, or their smoothing, in float32
    tolerance = 1e-6 if rounded else 1e-9
    if "rows" in expected:
        np.testing.assert_allclose(rows, expected["rows"], rtol=tolerance)
    else:
        np.testing.assert_allclose(np.mean(rows), expected["loss"], rtol=tolerance)
    if "log_odds" in expected:
        np.testing.assert_allclose(np.mean(metrics["log_odds"]), expected["log_odds"], rtol=tolerance)
    if name.startswith("dpo"):
        assert len(rows) == trl_golden.ROWS
        for ours_, theirs in (("rewards_chosen", "chosen"), ("rewards_rejected", "rejected"), ("margins", "margins")):
            np.testing.assert_allclose(np.mean(metrics[ours_]), expected[f"rewards/{theirs}"], rtol=1e-9)
        np.testing.assert_allclose(np.mean(metrics["accuracies"]), expected["rewards/accuracies"], rtol=1e-6)
    if name.startswith("kto"):
        good = trl_golden.inputs()["good"]
        np.testing.assert_allclose(np.mean(metrics["rewards"][good]), expected["rewards/chosen"], rtol=tolerance)
        np.testing.assert_allclose(metrics["kl"][0], expected["kl"], rtol=tolerance)


@pytest.mark.slow
def test_the_golden_file_is_what_trl_computes():
    pytest.importorskip("trl")
    found = trl_golden.compute()
    assert found.keys() == FOUND.keys()
    for name, values in found.items():
        for key, value in values.items():
            np.testing.assert_allclose(value, FOUND[name][key], rtol=1e-12, err_msg=f"{name} {key}")


def test_formulas_and_gradients():
    """float32, against numpy; references and reference points are constants."""
    rng = np.random.default_rng(2)
    policy, reference = (-rng.gamma(2.0, 3.0, (6, 2)).astype(np.float32) for _ in range(2))
    good = np.arange(6) % 2 == 0

    def total(policy, reference):
        many = losses.dpo(policy, reference)[0] + losses.orpo(policy)[0] + losses.npo(policy[:, 0], reference[:, 0])[0]
        return jnp.sum(
            many + losses.kto(policy[:, 1], reference[:, 1], good, losses.kto_kl(policy[0], reference[0]))[0]
        )

    @jax.jit
    def run(policy, reference):
        npo = losses.npo(policy[:, 0], reference[:, 0], beta=0.7)
        # a certain answer has infinite odds, and still a gradient
        sure = jax.grad(lambda x: losses.orpo(x)[0].sum())(jnp.asarray([[0.0, -1.0], [-1e-9, 0.0]]))
        none = losses.kto_kl(policy[:, 0] - 100, reference[:, 0])
        return jax.grad(total, argnums=(0, 1))(policy, reference), npo, losses.orpo(policy)[0], sure, none

    slopes, (npo, metrics), orpo, sure, none = run(policy, reference)
    assert np.isfinite(slopes[0]).all() and np.abs(slopes[0]).min() > 0 and not np.asarray(slopes[1]).any()

    def log_s(x):
        return -np.logaddexp(0, -x.astype(np.float64))

    np.testing.assert_allclose(npo, -log_s(-0.7 * (policy - reference)[:, 0]), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards_rejected"], 0.7 * (policy - reference)[:, 0], rtol=1e-6)
    p = np.exp(policy.astype(np.float64))
    odds = np.log(p / (1 - p))
    np.testing.assert_allclose(orpo, -policy[:, 0] - 0.1 * log_s(odds[:, 0] - odds[:, 1]), rtol=1e-5)
    assert np.isfinite(sure).all() and none == 0


def test_settings_are_checked():
    x = jnp.zeros((3, 2))
    with pytest.raises(ConfigError, match="kind: expected one of sigmoid, hinge, ipo"):
        losses.dpo(x, x, kind="dpo2")
    with pytest.raises(ConfigError, match="label_smoothing: hinge has none"):
        losses.dpo(x, x, kind="hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="from 0 to below 0.5"):
        losses.dpo(x, x, kind="robust", label_smoothing=0.5)
    with pytest.raises(ConfigError, match="exo_pair needs"):
        losses.dpo(x, x, kind="exo_pair")
    with pytest.raises(ConfigError, match="beta: expected a number above 0, got 0"):
        losses.simpo(x, beta=0)
    with pytest.raises(ShapeError, match=r"policy_logps: expected \[B, 2\]"):
        losses.dpo(x.T, x)
    with pytest.raises(ShapeError, match=r"good: expected booleans \(3,\)"):
        losses.kto(x[:, 0], x[:, 0], x[:, 0])
    assert set(_preference._SMOOTHED) | set(_preference._MEANS) <= set(_preference.KINDS)


def test_mismatched_answers():
    #            prompt | answer, as inputs and as targets
    tokens = np.array([[2, 10, 11, 40, 41, 0], [2, 20, 50, 0, 0, 0], [2, 30, 31, 32, 60, 61]])
    mask = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], bool)
    targets = np.array([[0, 0, 40, 41, 1, 0], [0, 50, 1, 0, 0, 0], [0, 0, 0, 60, 61, 1]])
    got = jax.jit(losses.mismatched)(dict(tokens=tokens, targets=targets, loss_mask=mask))
    assert got["tokens"].tolist() == [[2, 10, 11, 60, 61, 1], [2, 20, 40, 41, 1, 0], [2, 30, 31, 32, 50, 1]]
    assert got["targets"].tolist() == [[0, 0, 60, 61, 1, 0], [0, 40, 41, 1, 0, 0], [0, 0, 0, 50, 1, 0]]
    assert np.array_equal(got["loss_mask"], np.asarray(got["targets"]) > 0)


# ---- the official package's classes ----------------------------------------------------------------------------------


def test_official_classes():
    rng = np.random.default_rng(3)
    policy, anchor = (rng.standard_normal((2, 3, 2, 5, 11)).astype(np.float32) for _ in range(2))
    tokens, mask = rng.integers(0, 11, (2, 3, 2, 5)), rng.random((2, 3, 2, 5)) < 0.6

    def logps(logits):
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return (np.take_along_axis(log_p, tokens[..., None], -1)[..., 0] * mask).sum(-1)

    delta = logps(policy) - logps(anchor)
    loss = losses.DpoLoss(tau=0.5, label_smoothing=0.1)
    given = dict(tokens=tokens, sequence_mask=mask, policy_logits=policy, anchor_logits=anchor)
    values, mean = jax.jit(lambda given: (loss.get_values(**given), loss(**given)))(given)
    x = 0.5 * (delta[..., 0] - delta[..., 1])
    np.testing.assert_allclose(values, (0.9 * np.logaddexp(0, -x) + 0.1 * np.logaddexp(0, x))[..., None], rtol=1e-5)
    np.testing.assert_allclose(mean, np.mean(values), rtol=1e-6)
    assert losses.DpoLoss(tokens="batch.targets").__kontext_keys__()["tokens"] == "batch.targets"

    one = dict(tokens=tokens[:, 0, 0, :, None], sequence_mask=mask[:, 0, 0, :, None])
    one |= dict(policy_logits=policy[:, 0, 0], anchor_logits=anchor[:, 0, 0])
    np.testing.assert_allclose(
        jax.jit(lambda one: losses.NpoLoss().get_values(**one))(one),
        np.logaddexp(0, delta[:, 0, 0])[:, None],
        rtol=1e-5,
    )
    with pytest.raises(ShapeError, match=r"tokens and sequence_mask: expected \[..., L, 1\]"):
        losses.NpoLoss().get_values(**(one | dict(tokens=tokens[:, 0, 0])))
    with pytest.raises(ShapeError, match="policy_logits: expected"):
        losses.DpoLoss().get_values(**(given | dict(policy_logits=policy[..., :3, :])))
