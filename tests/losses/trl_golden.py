# SPDX-License-Identifier: Apache-2.0
"""Losses as TRL computes them, for `test_preferences.py` and `test_policy_losses.py`: writes `trl_golden.json`.

    python tests/losses/trl_golden.py            TRL 1.16, which takes longer to import than all tests here to run

Inputs are random log-probabilities in float64. Trainers are not built: their own loss functions are called on objects
that hold what those functions read.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("trl_golden.json")
ROWS = 5
LENGTH = 7  # tokens of a row; the first is never a label
DPO = [
    ("sigmoid", 0.0),
    ("hinge", 0.0),
    ("ipo", 0.0),
    ("sigmoid_norm", 0.0),
    ("robust", 0.3),
    ("exo_pair", 0.05),
    ("nca_pair", 0.0),
    ("bco_pair", 0.0),
    ("sppo_hard", 0.0),
    ("apo_zero", 0.0),
    ("apo_down", 0.0),
]
# How GRPO is asked for: kind, beta, low and high epsilon, delta, level.
GRPO = [
    ("grpo", 0.0, 0.2, 0.2, None, "token"),
    ("bnpo", 0.04, 0.2, 0.28, None, "token"),
    ("dr_grpo", 0.1, 0.1, 0.3, 1.6, "token"),
    ("dapo", 0.04, 0.2, 0.28, None, "token"),
    ("grpo", 0.04, 0.003, 0.004, None, "sequence"),
]
GROUP = 3
SCALES = ("group", "batch", "none")


def inputs() -> dict[str, np.ndarray]:
    """Per-token log-probabilities [2 B, L - 1], chosen rows first, and masks [2 B, L] of different lengths."""
    rng = np.random.default_rng(7)
    mask = np.zeros((2 * ROWS, LENGTH), bool)
    for row in mask:
        start = rng.integers(1, 4)
        row[start : start + rng.integers(1, LENGTH - start + 1)] = True
    policy, reference = -rng.gamma(1.0, 2.0, (2, 2 * ROWS, LENGTH - 1))
    good = rng.random(2 * ROWS) < 0.5
    other = -rng.gamma(1.0, 2.0, (2, 2 * ROWS, LENGTH - 1))
    return dict(
        policy=policy, reference=reference, mask=mask, good=good, kl_policy=other[0], kl_reference=other[1] - 0.3
    )


def sampled() -> dict[str, np.ndarray]:
    """Answers of two prompts and of one whose rewards are all the same: [B, T]; one of them has no token."""
    rng = np.random.default_rng(11)
    rows = 3 * GROUP
    rewards = np.concatenate([rng.standard_normal(2 * GROUP), np.ones(GROUP)])
    rewards[1] = np.nan  # could not be scored
    mask = np.arange(LENGTH)[None] < rng.integers(1, LENGTH + 1, rows)[:, None]
    mask[4] = False
    old = -rng.gamma(1.0, 2.0, (rows, LENGTH))
    policy = old + rng.normal(0, 0.3, old.shape)
    reference = old + rng.normal(0, 0.5, old.shape)
    return dict(
        policy=policy, old=old, reference=reference, mask=mask, rewards=rewards, advantages=rng.standard_normal(rows)
    )


def name_of(case: tuple) -> str:
    return "grpo/" + "/".join(map(str, case))


def compute() -> dict[str, Any]:
    """Every loss: a mean over rows where TRL gives no more, else one for each row."""
    found = {f"dpo/{kind}/{smoothing}": _dpo(kind, smoothing) for kind, smoothing in DPO}
    found |= {f"kto/{kind}": _kto(kind) for kind in ("kto", "apo_zero_unpaired")}
    found |= {name_of(case): _grpo(*case) for case in GRPO}
    found |= {f"advantages/{scale}": _advantages(scale) for scale in SCALES}
    return found | _pairs_without_reference()


class _Outputs(SimpleNamespace):
    pass


def _model(log_probs: np.ndarray, mask: np.ndarray) -> Any:
    """What TRL's fused head would return; positions without a label are 0, as there."""
    import torch

    values = torch.tensor(np.where(mask[:, 1:], log_probs, 0.0))
    zeros = torch.zeros_like(values)
    return lambda **_: _Outputs(
        log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), loss=zeros.sum()
    )


class _Anything:
    """An accelerator of one process."""

    device = "cpu"
    num_processes = 1

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def unwrap_model(self, model):
        return model


class _Self(SimpleNamespace):
    """A trainer as far as a loss function reads one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _batch(given: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    mask = torch.tensor(given["mask"])
    ids = torch.ones_like(mask, dtype=torch.long)
    return dict(input_ids=ids, attention_mask=ids, completion_mask=mask.long())


def _fields(given: dict[str, np.ndarray]) -> dict[str, Any]:
    return dict(
        accelerator=_Anything(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        beta=0.3,
        f_divergence_type="reverse_kl",
        ref_model=_model(given["reference"], given["mask"]),
        precompute_ref_logps=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        model=SimpleNamespace(training=True),
        _total_train_tokens=0,
        _tp_size=1,
    )


def _quiet(module: Any) -> None:
    """Nothing here has gradient checkpointing or adapters to switch off."""
    import contextlib

    module.disable_gradient_checkpointing = lambda *args, **kwargs: contextlib.nullcontext()
    module.is_peft_model = lambda model: False


def _dpo(kind: str, smoothing: float) -> dict[str, Any]:
    from trl.trainer import dpo_trainer

    _quiet(dpo_trainer)
    given = inputs()
    trainer = _Self(**_fields(given), loss_types=[kind], loss_weights=[1.0], label_smoothing=smoothing)
    model = _model(given["policy"], given["mask"])
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, _batch(given), return_outputs=False)
    return dict(loss=float(loss)) | _metrics(trainer)


def _metrics(trainer: Any) -> dict[str, float]:
    return {
        name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith(("rewards", "kl"))
    }


def _kto(kind: str) -> dict[str, Any]:
    import torch
    from trl.trainer import kto_trainer

    _quiet(kto_trainer)
    given = inputs()
    weights = dict(desirable_weight=1.5, undesirable_weight=0.7)
    trainer = _Self(**_fields(given), loss_type=kind, calculate_KL=kind == "kto", **weights)
    by_id = {id(trainer.ref_model): given["kl_reference"]}
    model = _model(given["policy"], given["mask"])
    mask = torch.tensor(given["mask"])[:, 1:]

    def kl_logps(asked: Any, batch: Any) -> Any:
        values = torch.tensor(by_id.get(id(asked), given["kl_policy"]))
        return (values * mask).sum(-1) if kind == "kto" else None

    trainer._compute_kl_logps = kl_logps
    batch = _batch(given) | dict(label=torch.tensor(given["good"]))
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    return dict(loss=float(loss)) | _metrics(trainer)


def _pairs_without_reference() -> dict[str, Any]:
    import torch
    from trl.experimental.cpo import cpo_trainer
    from trl.experimental.orpo import orpo_trainer

    given = inputs()
    mask = given["mask"][:, 1:]
    average = torch.tensor((given["policy"] * mask).sum(1) / mask.sum(1))
    chosen, rejected = average.chunk(2)
    found = {}
    for smoothing in (0.0, 0.1):
        fields = dict(beta=2.5, alpha=0.0, simpo_gamma=0.6, label_smoothing=smoothing, loss_type="simpo")
        trainer = _Self(accelerator=_Anything(), **fields)
        found[f"simpo/{smoothing}"] = dict(rows=cpo_trainer.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].tolist())
    trainer = _Self(accelerator=_Anything(), beta=0.4)
    losses, *_, log_odds = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    # the loss that TRL trains on is the cross-entropy of the chosen rows minus this term; it is float32 there
    return found | {"orpo": dict(rows=(-losses).tolist(), log_odds=float(log_odds))}


def _grpo(kind: str, beta: float, low: float, high: float, delta: float | None, level: str) -> dict[str, Any]:
    """The loss, its gradient at the log-probabilities, and what is logged of KL and clipping."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    given = {name: torch.tensor(values) for name, values in sampled().items()}
    policy = given["policy"].clone().requires_grad_()
    fields = dict(beta=beta, epsilon_low=low, epsilon_high=high, loss_type=kind, importance_sampling_level=level)
    fields |= dict(top_entropy_quantile=1.0, max_completion_length=LENGTH, current_gradient_accumulation_steps=1)
    trainer = _Self(accelerator=_Anything(), **fields)
    trainer.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (policy, torch.zeros_like(policy), None)
    mask = given["mask"].long()
    batch = dict(prompt_ids=mask[:, :1], prompt_mask=mask[:, :1], completion_ids=mask, completion_mask=mask)
    batch |= dict(advantages=given["advantages"], old_per_token_logps=given["old"], num_items_in_batch=mask.sum())
    batch |= dict(ref_per_token_logps=given["reference"])
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    logged = {
        name: values[-1]
        for name, values in trainer._metrics["train"].items()
        if name in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean")
    }
    return dict(loss=float(loss), slope=policy.grad.tolist()) | logged


def _advantages(scale: str) -> dict[str, Any]:
    """The statements of TRL that turn rewards to advantages, cut out of the function that also samples."""
    import inspect
    import textwrap

    import torch
    from trl.trainer import grpo_trainer

    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    end = "        advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    first = source.index("        if self.multi_objective_aggregation ==")
    names = dict(
        vars(grpo_trainer),
        self=SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
        ),
        rewards_per_func=torch.tensor(sampled()["rewards"])[:, None],
        unscorable_mask=torch.isnan(torch.tensor(sampled()["rewards"])),
        num_generations=GROUP,
        device="cpu",
    )
    exec(textwrap.dedent(source[first : source.index(end) + len(end)]), names)
    return dict(rows=names["advantages"].tolist())


if __name__ == "__main__":
    document = dict(trl=importlib.metadata.version("trl"), found=compute())
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(FILE)
