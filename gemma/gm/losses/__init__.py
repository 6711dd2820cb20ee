# SPDX-License-Identifier: Apache-2.0
"""What a model is trained on: cross-entropy without logits of all positions, losses of preferences and of sampled answers.

    hidden = gm.losses.hidden_states(model, params, batch)
    total, count = gm.losses.token_nll(model, params, hidden, batch["targets"], batch["loss_mask"])

Everything is a pure function of arrays; `DpoLoss` and `NpoLoss` have the fields of the official package's. Loops,
optimizers and which loss belongs to which method are `gm.train`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_head": ["Head", "head", "hidden_states", "packing_mask"],
        "_cross_entropy": ["cross_entropy", "logits_logps", "sequence_logps", "token_logps", "token_nll"],
        "_grpo": ["group_advantages", "grpo"],
        "_preference": ["dpo", "kto", "kto_kl", "mismatched", "npo", "orpo", "simpo"],
        "_official": ["DpoLoss", "NpoLoss"],
    },
    variants=("kauldron", "gemma.gm._kauldron", ["DpoLoss", "NpoLoss"]),
)
