# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of the next token, in chunks of positions: the logits [B, T, V] never exist, forwards or backwards.

The gradients of a chunk are computed with its logits at hand, so that the backward pass only scales them. One product
more than keeping the logits would cost, for a peak of one chunk instead of all positions. The head's weight and its
soft-cap come from `gemma/modeling_gemma.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma._torch.linear import linear, times
from gemma.errors import PromptError, ShapeError

IGNORE = -100
_CHUNK = 1 << 25  # logits of one chunk


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None) -> Tensor:
    """The mean cross-entropy of label t + 1 under the logits of position t.

    Args:
      hidden: activations [B, T, D] after the final norm.
      weight: the head [V, D], or a PackedWeight of that shape.
      labels: integers [B, T], -100 where nothing counts.
      softcap: of the logits.

    Returns:
      float32 []; 0 if nothing counts.

    Raises:
      ShapeError: labels that are not [B, T]. PromptError: a label outside of the vocabulary.
    """
    if labels.shape != hidden.shape[:2] or labels.is_floating_point():
        raise ShapeError(
            f"labels: expected integers {tuple(hidden.shape[:2])}, got {labels.dtype} {tuple(labels.shape)}"
        )
    targets = labels[:, 1:].reshape(-1).to(hidden.device)
    counted = (targets != IGNORE).nonzero()[:, 0]
    targets = targets[counted]
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= weight.shape[0]):
        raise PromptError(f"labels: expected ids in 0..{weight.shape[0] - 1} or {IGNORE}, got one outside")
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, counted)
    return _ChunkedCrossEntropy.apply(rows, weight, targets, softcap, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(rows [P, D], weight [V, D], targets [P]) to the mean loss []."""

    @staticmethod
    def forward(ctx, rows, weight, targets, softcap, with_grad):
        needs_rows, needs_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        count = max(len(rows), 1)
        size = max(1, _CHUNK // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.zeros_like(rows) if needs_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(rows), size):
            part, wanted = rows[start : start + size], targets[start : start + size, None]
            logits = linear(part, weight).float()
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits, slope = bent * softcap, 1 - bent * bent
            norm = torch.logsumexp(logits, -1, keepdim=True)
            total += (norm - logits.gather(1, wanted)).sum()
            if needs_rows or needs_weight:
                grad = logits.sub_(norm).exp_()  # softmax
                grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
                grad = (grad if slope is None else grad * slope).div_(count)
                if needs_weight:
                    grad_weight.addmm_(grad.T, part.float())
                if needs_rows:
                    grad_rows[start : start + size] = times(grad, weight).to(weight.dtype)
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grad_rows, grad_weight = ctx.saved_tensors
        if grad_rows is not None:
            grad_rows = (grad_rows * upstream).to(grad_rows.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_rows, grad_weight, None, None, None
