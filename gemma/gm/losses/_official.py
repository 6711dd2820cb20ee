# SPDX-License-Identifier: Apache-2.0
"""`DpoLoss` and `NpoLoss` with the fields and `get_values` of the official package, without Kauldron.

They take logits of all positions, as Kauldron's configurations pass them; whoever trains with `gm.train` uses the
chunked functions of `_cross_entropy.py` and `_preference.py`, which these are made of. The subclasses that Kauldron's
trainer takes are in `gemma/gm/_kauldron.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ShapeError
from gemma.gm._plain import PlainForm
from gemma.gm.losses import _preference
from gemma.gm.losses._cross_entropy import logits_logps
from gemma.gm.typing import Array, Bool, Float, Int

REQUIRED = "__KEY_REQUIRED__"  # a trainer must say where this input comes from


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Keys(PlainForm):
    """Where a trainer finds the inputs of a loss in its context.

    Attributes:
      tokens: the target tokens.
      sequence_mask: where targets count.
      policy_logits: of the model that is trained.
      anchor_logits: of the model that it started from.
    """

    KAULDRON_FIELDS = frozenset({"mask", "normalize_by", "step", "weight"})

    tokens: str = REQUIRED
    sequence_mask: str = REQUIRED
    policy_logits: str = REQUIRED
    anchor_logits: str = REQUIRED

    def __kontext_keys__(self) -> dict[str, str]:
        """Input name to its place in a trainer's context; kauldron asks for it."""
        return {name: getattr(self, name) for name in ("tokens", "sequence_mask", "policy_logits", "anchor_logits")}

    def __call__(self, **inputs: Any) -> Float[Array, ""]:
        """The mean of `get_values`."""
        return jnp.mean(self.get_values(**inputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoLoss(_Keys):
    """Direct preference optimization; see `dpo`.

    Attributes:
      tau: strength of the pull to the anchor, `beta` of `dpo`.
      label_smoothing: share of pairs assumed to be the wrong way round.
      tokens, sequence_mask, policy_logits, anchor_logits: places of the inputs in a trainer's context.
    """

    tau: float = 0.1
    label_smoothing: float = 0.0

    def get_values(
        self,
        *,
        tokens: Int[Array, "*B 2 L"],
        sequence_mask: Bool[Array, "*B 2 L"],
        policy_logits: Float[Array, "*B 2 L V"],
        anchor_logits: Float[Array, "*B 2 L V"],
    ) -> Float[Array, "*B 1"]:
        """The loss of each pair; index 0 is the chosen answer. Logits at a position are those of the token there.

        Raises:
          ShapeError: (a ValueError) shapes that do not fit.
        """
        policy, anchor = _logps(tokens, sequence_mask, policy_logits, anchor_logits)
        if tokens.ndim < 2 or tokens.shape[-2] != 2:
            raise ShapeError(f"tokens: expected [..., 2, L], the chosen answer first, got {tuple(tokens.shape)}")
        pairs = [x.reshape(-1, 2) for x in (policy, anchor)]
        values, _ = _preference.dpo(*pairs, beta=self.tau, label_smoothing=self.label_smoothing)
        return values.reshape(*tokens.shape[:-2], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpoLoss(_Keys):
    """Negative preference optimization, to unlearn answers; see `npo`.

    Attributes:
      tau: strength of the pull to the anchor, `beta` of `npo`.
      tokens, sequence_mask, policy_logits, anchor_logits: places of the inputs in a trainer's context.
    """

    tau: float = 1.0

    def get_values(
        self,
        *,
        tokens: Int[Array, "*B L 1"],
        sequence_mask: Bool[Array, "*B L 1"],
        policy_logits: Float[Array, "*B L V"],
        anchor_logits: Float[Array, "*B L V"],
    ) -> Float[Array, "*B 1"]:
        """The loss of each row. Logits at a position are those of the token there.

        Raises:
          ShapeError: (a ValueError) shapes that do not fit.
        """
        if tokens.ndim != policy_logits.ndim or tokens.shape[-1] != 1 or sequence_mask.shape != tokens.shape:
            raise ShapeError(
                f"tokens and sequence_mask: expected [..., L, 1], got {tuple(tokens.shape)}, {tuple(sequence_mask.shape)}"
            )
        policy, anchor = _logps(tokens[..., 0], sequence_mask[..., 0], policy_logits, anchor_logits)
        values, _ = _preference.npo(policy.reshape(-1), anchor.reshape(-1), beta=self.tau)
        return values.reshape(*tokens.shape[:-2], 1)


def _logps(tokens: Array, mask: Array, policy: Array, anchor: Array) -> tuple[Array, Array]:
    """ln p of the tokens that count, summed over a row, under both logits."""
    for name, logits in (("policy_logits", policy), ("anchor_logits", anchor)):
        if logits.shape[:-1] != tokens.shape or mask.shape != tokens.shape:
            raise ShapeError(
                f"{name}: expected [{', '.join(map(str, tokens.shape))}, V] and a mask as tokens, got "
                f"{tuple(logits.shape)} and {tuple(mask.shape)}"
            )
    counted = mask.astype(bool)
    targets = jnp.where(counted, tokens, 0)
    policy, anchor = (
        jnp.sum(jnp.where(counted, logits_logps(logits, targets), 0), axis=-1) for logits in (policy, anchor)
    )
    return policy, jax.lax.stop_gradient(anchor)
