# SPDX-License-Identifier: Apache-2.0
"""Dense supervision for the vision tower of the small PaliGemma: each patch says which digit it lies on, and its box.

A few thousand handwritten digits are too little for captions alone to teach a transformer to see. These heads are used
in training only and thrown away; `train_digits.py` drives them.

Axes: B scenes, P patches of a scene, E width of the tower.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from _digits_scenes import SIDE, Scenes
from torch import nn

NOTHING = 10  # the class of a patch that lies on no digit
REACH = 16.0  # pixels; box sides are predicted as distances from the patch's centre in this unit


@dataclasses.dataclass(frozen=True)
class PatchTargets:
    """`kind` int64 [B, P] (0..9 or NOTHING), `owner` float32 [B, P] (1: holds a box's centre), `sides` [B, P, 4]."""

    kind: torch.Tensor
    owner: torch.Tensor
    sides: torch.Tensor


def centres(per: int) -> np.ndarray:
    """The middles [P, 2] of patches, `per` in a row, as y and x in pixels."""
    middle = (np.arange(per) + 0.5) * (SIDE / per)
    return np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)


def patch_targets(scenes: Scenes, patch: int) -> PatchTargets:
    """What each patch of `patch` x `patch` pixels should say about its scene."""
    per = SIDE // patch
    centre = centres(per)
    count, places = scenes.labels.shape
    kind = np.full((count, per * per), NOTHING)
    owner, sides = np.zeros((count, per * per), np.float32), np.zeros((count, per * per, 4), np.float32)
    for k in range(places):
        box, label = scenes.boxes[:, k].astype(np.float32), scenes.labels[:, k]
        heart = (box[:, None, :2] + box[:, None, 2:]) / 2
        mine = (np.abs(centre - heart) <= patch / 2).all(-1)
        inside = (centre > box[:, None, :2]).all(-1) & (centre < box[:, None, 2:]).all(-1)
        at = (inside | mine) & (label >= 0)[:, None]
        kind = np.where(at, label[:, None], kind)
        owner[mine & (label >= 0)[:, None]] = 1
        sides = np.where(at[..., None], (box[:, None] - np.tile(centre, 2)) / REACH, sides)
    return PatchTargets(torch.from_numpy(kind), torch.from_numpy(owner), torch.from_numpy(sides.astype(np.float32)))


class PatchHeads(nn.Module):
    """Three linear heads over patch features [B, P, E]."""

    def __init__(self, width: int):
        super().__init__()
        self.kind, self.owner, self.sides = nn.Linear(width, NOTHING + 1), nn.Linear(width, 1), nn.Linear(width, 4)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, P, 11], logits [B, P] and box sides [B, P, 4]."""
        return self.kind(features), self.owner(features)[..., 0], self.sides(features)


def dense_loss(heads: PatchHeads, features: torch.Tensor, targets: PatchTargets) -> torch.Tensor:
    """The sum of the three losses; patches on digits and patches on nothing are averaged apart."""
    kind, owner, sides = heads(features)
    on = (targets.kind != NOTHING).float()
    apart = F.cross_entropy(kind.flatten(0, 1), targets.kind.flatten(), reduction="none").view_as(on)
    classes = (apart * on).sum() / on.sum() + 0.3 * (apart * (1 - on)).mean()
    hearts = F.binary_cross_entropy_with_logits(owner, targets.owner, pos_weight=torch.tensor(4.0))
    boxes = (F.smooth_l1_loss(sides, targets.sides, reduction="none", beta=0.06).mean(-1) * on).sum() / on.sum()
    return classes + hearts + 2 * boxes


def place_loss(
    places: nn.Linear, features: torch.Tensor, targets: PatchTargets, locations: torch.Tensor
) -> torch.Tensor:
    """Lets each patch on a digit name its box with the location tokens themselves, in the decoder's own terms.

    Args:
      places: a linear map from D to four times D, one for each side of the box.
      features: of the patches behind the projector [B, P, D].
      targets: of these patches.
      locations: the embeddings of the location tokens [bins, D].
    """
    on = targets.kind != NOTHING
    middle = centres(round(features.shape[1] ** 0.5))
    pixels = (targets.sides * REACH + torch.from_numpy(np.tile(middle, 2)).float())[on]
    bins = (pixels / SIDE * (len(locations) - 1)).round().long()  # [n, 4]
    given = places(features[on]).unflatten(-1, (4, -1)) @ locations.T  # [n, 4, bins]
    return F.cross_entropy(given.flatten(0, 1), bins.flatten())


@torch.no_grad()
def dense_scores(heads: PatchHeads, features: torch.Tensor, targets: PatchTargets) -> dict[str, float]:
    """Accuracy of the class at the patches that own a digit, and the mean IoU of their boxes."""
    kind, _, sides = heads(features)
    own = targets.owner > 0
    right = (kind[own].argmax(-1) == targets.kind[own]).float().mean().item()
    given, true = (sides[own] * REACH).round(), targets.sides[own] * REACH
    low, high = torch.maximum(given[:, :2], true[:, :2]), torch.minimum(given[:, 2:], true[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = (given[:, 2:] - given[:, :2]).clamp(min=0).prod(1) + (true[:, 2:] - true[:, :2]).prod(1)
    return dict(accuracy=right, iou=(both / (areas - both)).mean().item())
