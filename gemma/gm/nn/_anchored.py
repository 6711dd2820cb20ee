# SPDX-License-Identifier: Apache-2.0
"""`AnchoredPolicy`: a model that is trained beside a frozen copy of itself, for losses that compare the two (DPO).

Loading both from one checkpoint is `gm.ckpts.AnchoredPolicyLoader`, the losses are `gm.losses.DpoLoss` and `NpoLoss`.
gemmakit's own trainer computes the log-probabilities of the frozen model once, before training, and needs no wrapper.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
from flax import linen as nn


@flax.struct.dataclass
class AnchoredPolicyOutput:
    """What both models say.

    Attributes:
      policy: the output of the model that is trained.
      anchor: that of the frozen one; no gradient passes it.
    """

    policy: Any
    anchor: Any


class AnchoredPolicy(nn.Module):
    """Two models that are called with the same arguments; their parameters are {"policy": ..., "anchor": ...}.

    Attributes:
      policy: the model that is trained.
      anchor: the frozen one. None: the same network, with parameters of its own.
    """

    policy: nn.Module
    anchor: nn.Module | None = None

    def setup(self):
        # A copy: one module under two names would be one set of parameters.
        self._frozen = self.policy.clone(name="anchor", parent=self) if self.anchor is None else self.anchor

    def __call__(self, *args: Any, **kwargs: Any) -> AnchoredPolicyOutput:
        """Calls both models.

        Returns:
          Their outputs; for networks of `gm.nn` `preds.policy.logits` and `preds.anchor.logits`, [*B, T, V].
        """
        policy = self.policy(*args, **kwargs)
        return AnchoredPolicyOutput(policy, jax.lax.stop_gradient(self._frozen(*args, **kwargs)))

    def __kontext_keys__(self) -> dict[str, str | None]:
        """Where a trainer finds the inputs of both."""
        return self.policy.__kontext_keys__()
