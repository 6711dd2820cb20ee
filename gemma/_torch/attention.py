# SPDX-License-Identifier: Apache-2.0
"""`attend`: scores, soft-cap, mask, softmax and the mean of the values; what a layer attends to is decided elsewhere.

Without a soft-cap it is PyTorch's fused attention, with one the formula written out, a block of queries at a time.
Projections, norms and RoPE are in `gemma/modeling_gemma.py`, masks in `masks.py`. Axis letters as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 512  # queries whose scores exist at once where a soft-cap keeps the fused kernels away


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of q [B, N, T, H] over k and v [B, K, S, H] to [B, N, T, H], its softmax in float32.

    Query head n looks at key head n // (N/K). `mask` is bool [B, 1, T, S], True where a query may look; None is causal,
    with S = T. The scores are multiplied by `scale`; `softcap` c makes them `c * tanh(scores / c)`, before the mask.
    """
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    if softcap is None:
        if T == 1:  # one query: the G heads of a group stand in for rows, and no key is copied for them
            return F.scaled_dot_product_attention(q.view(B, K, N // K, H), k, v, mask, scale=scale).view(q.shape)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=N != K)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None, None]
    parts, keys, values = [], k.float().transpose(-1, -2), v.float()
    for queries, seen in zip(q.split(_QUERY_BLOCK, 2), mask.split(_QUERY_BLOCK, 2)):
        t = queries.shape[2]
        scores = queries.reshape(B, K, N // K * t, H).float() @ keys * scale
        scores = (torch.tanh(scores / softcap) * softcap).view(B, K, N // K, t, S)
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        weights = torch.softmax(scores, -1).to(v.dtype).view(B, K, N // K * t, S)
        parts.append((weights.float() @ values).to(v.dtype).view(B, N, t, H))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]
