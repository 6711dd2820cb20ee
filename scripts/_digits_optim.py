# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the small PaliGemma: Muon for the matrices inside the blocks, Adam for all else, a running average.

PyTorch's own Muon orthogonalizes in bfloat16, which is slow on CPUs without instructions for it; this one stays in
float32 and handles all matrices of one shape in one batched product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of each matrix [n, a, b]: Newton-Schulz with the quintic of Muon (K. Jordan, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.transpose(1, 2) if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized; updates are scaled to the size that Adam's have, so that one rate serves both."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    state = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    state.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state, group["momentum"]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, orthogonal(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


class Average:
    """The running average of a module's parameters; short at first, so that it does not remember the beginning."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
