# SPDX-License-Identifier: Apache-2.0
"""GRPO: equal to TRL's losses, gradients and advantages (`trl_golden.json`, made by `trl_golden.py`)."""

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

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("trl_golden_policy", HERE / "trl_golden.py")
trl_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trl_golden)
FOUND = json.loads((HERE / "trl_golden.json").read_text(encoding="utf-8"))["found"]


def run(case, policy, given, **changes):
    kind, beta, low, high, delta, level = case
    how = dict(beta=beta, epsilon=low, epsilon_high=high, delta=delta, level=level, kind=kind)
    how |= dict(max_length=trl_golden.LENGTH, old_logps=given["old"], reference_logps=given["reference"])
    return losses.grpo(policy, given["advantages"], given["mask"], **(how | changes))


SCALES = trl_golden.SCALES


@pytest.fixture(scope="module")
def ours():
    """Every case of the golden file in one program of float64: (loss, metrics), gradient."""
    given = trl_golden.sampled()
    hole = np.where(given["mask"], 0, np.nan)  # what is no token of an answer may be anything
    given |= {name: given[name] + hole for name in ("policy", "old", "reference")}

    def compute(policy):
        def loss(policy, case):
            total, weight, metrics = run(case, policy, given)
            return total / weight, {name: part / whole for name, (part, whole) in metrics.items()}

        found = {
            trl_golden.name_of(case): jax.value_and_grad(loss, has_aux=True)(policy, case) for case in trl_golden.GRPO
        }
        of = {scale: losses.group_advantages(given["rewards"], trl_golden.GROUP, scale=scale) for scale in SCALES}
        return found, of

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(compute)(jnp.asarray(given["policy"])))


@pytest.mark.parametrize("case", trl_golden.GRPO, ids=trl_golden.name_of)
def test_equal_to_trl_in_value_and_gradient(ours, case):
    expected, ((loss, metrics), slope) = FOUND[trl_golden.name_of(case)], ours[0][trl_golden.name_of(case)]
    assert slope.dtype == np.float64 and np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-9)
    np.testing.assert_allclose(slope, expected["slope"], rtol=1e-9, atol=1e-15)
    if case[1]:
        np.testing.assert_allclose(metrics["kl"], expected["kl"], rtol=1e-6)  # float32 there
    assert metrics["clipped_high"] > 0
    if case[5] == "token":  # TRL counts clipped answers without a token too
        np.testing.assert_allclose(metrics["clipped_low"], expected["clip_ratio/low_mean"], rtol=1e-6)
        np.testing.assert_allclose(metrics["clipped_high"], expected["clip_ratio/high_mean"], rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_are_those_of_trl(ours, scale):
    # TRL has the factor n / (n - 1) in float32
    np.testing.assert_allclose(ours[1][scale], FOUND[f"advantages/{scale}"]["rows"], rtol=1e-7, atol=1e-15)
    assert not ours[1][scale][[1, 6, 7, 8]].any()  # not scored, and rewards that are all the same


def test_micro_batches_add_up_and_the_first_step_is_the_policy_gradient():
    given = {name: jnp.asarray(values) for name, values in trl_golden.sampled().items()}
    case = ("dapo", 0.04, 0.2, 0.28, None, "token")

    @jax.jit
    def parts(given):
        cut = [jax.tree.map(lambda x, part=part: x[part], given) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
        found = [run(case, x["policy"], x)[:2] for x in cut]
        first = jax.grad(lambda p: run(case, p, given, old_logps=None, beta=0.0)[0])(given["policy"])
        return run(case, given["policy"], given)[:2], found, first

    (total, weight), found, first = parts(given)
    assert total.dtype == weight.dtype == jnp.float32 and [int(w) for _, w in found][1] == 0
    np.testing.assert_allclose(sum(t for t, _ in found), total, rtol=1e-5)
    assert sum(float(w) for _, w in found) == weight == given["mask"].sum()
    np.testing.assert_allclose(first, -jnp.where(given["mask"], given["advantages"][:, None], 0), rtol=1e-6)


def test_settings_are_checked():
    x, mask = jnp.zeros((4, 3)), jnp.ones((4, 3), bool)
    for match, how in {
        "kind: expected one of grpo, bnpo": dict(kind="ppo"),
        "level: expected token or sequence": dict(level="word"),
        "epsilon: expected a number of at least 0": dict(epsilon=-0.1),
        "delta: expected more than 1": dict(delta=1.1),
        "max_length: dr_grpo divides by it": dict(kind="dr_grpo"),
        "reference_logps: needed for the KL": dict(beta=0.1),
    }.items():
        with pytest.raises(ConfigError, match=match):
            losses.grpo(x, x[:, 0], mask, **how)
    with pytest.raises(ShapeError, match=r"advantages: expected \(4,\) or \(4, 3\), got \(3,\)"):
        losses.grpo(x, x[0], mask)
    with pytest.raises(ShapeError, match="mask: expected booleans"):
        losses.grpo(x, x[:, 0], x)
    with pytest.raises(ShapeError, match=r"old_logps: expected \(4, 3\)"):
        losses.grpo(x, x[:, 0], mask, old_logps=x[:, :2])
    with pytest.raises(ShapeError, match="B a multiple of 3"):
        losses.group_advantages(x[:, 0], 3)
    with pytest.raises(ConfigError, match="scale: expected one of group"):
        losses.group_advantages(x[:, 0], 2, scale="all")
