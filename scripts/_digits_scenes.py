# SPDX-License-Identifier: Apache-2.0
"""Scenes of handwritten digits for the small PaliGemma: the split of the data, the augmentation, the composition.

The digits are the 1,797 8 x 8 images that scikit-learn carries. They are split by sample into `train`, `val` and `test`;
a scene is made of the digits of one split only. What is asked about a scene is `_digits_tasks.py`.

Axes: B scenes, K places for digits in a scene, M digits drawn, S side of a scene in pixels, C side of a canvas.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

SIDE = 64  # S, pixels of a scene
CANVAS = 36  # C, pixels around one digit: room for the largest one, turned
INK = 0.35  # a pixel counts as ink from here on (0 ground, 1 full ink); boxes are tight around such pixels
SPLIT_SEED = 0
SHARES = dict(train=0.7, val=0.1, test=0.2)
SHAPES = ("square", "triangle", "disk", "plus", "cross", "star", "half")


@dataclasses.dataclass(frozen=True)
class Digits:
    """The digits of one split. `images` float32 [n, 8, 8] in 0..1, `labels` int64 [n], `index` rows of the data set."""

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray


@functools.cache
def load_split(name: str) -> Digits:
    """The digits of `train`, `val` or `test`: each class is divided 70 / 10 / 20, in an order shuffled by a fixed seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(data.target == label))
        first, second = (round(len(rows) * share) for share in (SHARES["train"], SHARES["train"] + SHARES["val"]))
        chosen.append(dict(train=rows[:first], val=rows[first:second], test=rows[second:])[name])
    index = np.sort(np.concatenate(chosen))
    return Digits((data.images[index] / 16).astype(np.float32), data.target[index].astype(np.int64), index)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes with what is true about them.

    `images` uint8 [B, S, S, 3]; `labels` int64 [B, K], -1 where a place is empty; `boxes` int64 [B, K, 4] as
    y0 x0 y1 x1 in pixels, the ends exclusive; `sources` int64 [B, K], rows of the data set.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    sources: np.ndarray

    def digits(self, scene: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        """(digit, box) of one scene, in reading order: by the upper edge, then by the left one."""
        found = [
            (int(label), tuple(int(v) for v in box))
            for label, box in zip(self.labels[scene], self.boxes[scene])
            if label >= 0
        ]
        return sorted(found, key=lambda item: item[1])


# --- drawing digits


@functools.cache
def _enlarged(name: str) -> torch.Tensor:
    """The digits of a split at four times their size [n, 1, 32, 32], for smooth resampling."""
    images = torch.from_numpy(load_split(name).images)[:, None]
    return F.interpolate(images, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def draw_digits(
    name: str, rows: torch.Tensor, sizes: torch.Tensor, generator: torch.Generator, *, augment: bool
) -> torch.Tensor:
    """Canvases float32 [M, C, C] with one digit each; `sizes` [M] is the side in pixels of its 8 x 8 field.

    `augment` turns (15 degrees at most), slants, stretches and bends it and changes the thickness of its strokes.
    """
    count = len(rows)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand((count, *shape), generator=generator) * (high - low) + low

    scale = CANVAS / sizes
    angle, slant = torch.zeros(count), torch.zeros(count)
    tall, wide = scale.clone(), scale.clone()
    if augment:
        angle, slant = uniform(-0.26, 0.26), uniform(-0.25, 0.25)
        tall, wide = scale * uniform(0.87, 1.15), scale * uniform(0.82, 1.2)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([wide * cos, wide * (slant - sin), tall * sin, tall * (cos + slant * sin)], 1).view(-1, 2, 2)
    axis = (torch.arange(CANVAS) + 0.5) * (2 / CANVAS) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).view(1, -1, 2) @ matrix.transpose(1, 2)
    if augment:
        bend = uniform(-1, 1, 2, 4, 4) * uniform(0, 0.13, 1, 1, 1) * scale.view(-1, 1, 1, 1)
        bend = F.interpolate(bend, size=(CANVAS, CANVAS), mode="bicubic", align_corners=True)
        grid = grid + bend.flatten(2).transpose(1, 2)
    grid = grid.view(count, CANVAS, CANVAS, 2)
    canvas = F.grid_sample(_enlarged(name)[rows], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[
        :, 0
    ]
    if augment:
        canvas = canvas ** uniform(0.55, 1.6, 1, 1)
    return canvas


def ink_boxes(canvas: torch.Tensor) -> torch.Tensor:
    """Tight boxes int64 [M, 4] (y0 x0 y1 x1, ends exclusive) around the ink of canvases [M, C, C]."""
    ink = canvas > INK
    sides = []
    for other in (2, 1):
        line = ink.any(other).int()
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (y0, y1), (x0, x1) = sides
    return torch.stack([y0, x0, y1, x1], 1)


# --- other things in a scene


@functools.cache
def _shapes(count: int = 420, side: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Canvases float32 [count, side, side] of filled shapes that are no digits, and their boxes [count, 4]."""
    rng, fine, out = np.random.default_rng(7), 6, []
    for number in range(count):
        kind = SHAPES[number % len(SHAPES)]
        image = Image.new("L", (side * fine, side * fine))
        draw, middle = ImageDraw.Draw(image), side * fine / 2
        radius, turn = rng.uniform(3, 6.3) * fine, rng.uniform(0, 2 * math.pi)

        def ring(n: int, radii=(1.0,), turn=turn, radius=radius, middle=middle):
            angles = [turn + 2 * math.pi * i / n for i in range(n)]
            return [
                (
                    middle + radius * radii[i % len(radii)] * math.cos(a),
                    middle + radius * radii[i % len(radii)] * math.sin(a),
                )
                for i, a in enumerate(angles)
            ]

        corners = dict(square=(4, (1,)), triangle=(3, (1,)), star=(10, (1, 0.45)))
        if kind in corners:
            draw.polygon(ring(*corners[kind]), fill=255)
        elif kind in ("disk", "half"):
            around = (middle - radius, middle - radius, middle + radius, middle + radius)
            degrees = math.degrees(turn)
            draw.pieslice(around, degrees, degrees + (180 if kind == "half" else 360), fill=255)
        else:
            tilt = rng.uniform(-0.2, 0.2) + (math.pi / 4 if kind == "cross" else 0)
            ends, width = ring(4, turn=tilt), int(radius * rng.uniform(0.25, 0.5))
            draw.line([ends[0], ends[2]], fill=255, width=width)
            draw.line([ends[1], ends[3]], fill=255, width=width)
        out.append(np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255)
    shapes = np.stack(out)
    return shapes, ink_boxes(torch.from_numpy(shapes)).numpy()


def _grounds(count: int, rng: np.random.Generator) -> np.ndarray:
    """Backgrounds float32 [B, S, S, 3]: a dark colour that changes along one direction, and sometimes a faint line."""
    base, far = rng.uniform(0, 0.32, (2, count, 1, 1, 3))
    angle = rng.uniform(0, 2 * math.pi, (count, 1, 1))
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    along = (np.cos(angle) * x + np.sin(angle) * y + 0.71) / 1.42
    ground = base + (far - base) * along[..., None]
    tilt, offset = rng.uniform(0, math.pi, (count, 1, 1)), rng.uniform(-0.4, 0.4, (count, 1, 1))
    distance = np.abs(np.cos(tilt) * x + np.sin(tilt) * y - offset) * SIDE
    line = np.clip(rng.uniform(0.7, 1.5, (count, 1, 1)) - distance + 0.5, 0, 1) * (rng.random((count, 1, 1)) < 0.4)
    shade = rng.uniform(0.08, 0.22, (count, 1, 1, 3))
    return (ground + line[..., None] * shade).astype(np.float32)


# --- composition


def _place(
    boxes: np.ndarray, taken: list[np.ndarray], rng: np.random.Generator, gap: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random corners int64 [B, 2] at which boxes [B, 4] overlap nothing in `taken`, and whether one was found [B]."""
    tries, count = 40, len(boxes)
    size = boxes[:, 2:] - boxes[:, :2]
    corner = (rng.random((count, tries, 2)) * (SIDE - size + 1)[:, None]).astype(np.int64)
    end, free = corner + size[:, None], np.ones((count, tries), bool)
    for other in taken:
        start, stop = other[:, None, :2] - gap, other[:, None, 2:] + gap
        free &= ((end <= start) | (corner >= stop)).any(-1)
    first = free.argmax(1)
    return corner[np.arange(count), first], free.any(1)


def _paste(scene: np.ndarray, canvas: np.ndarray, y: int, x: int, colour: np.ndarray) -> None:
    """Lays a canvas over a scene with its corner at (y, x), which may lie outside."""
    top, left, height, width = max(y, 0), max(x, 0), canvas.shape[0], canvas.shape[1]
    below, right = min(y + height, SIDE), min(x + width, SIDE)
    mask = canvas[top - y : below - y, left - x : right - x, None]
    part = scene[top:below, left:right]
    part += mask * (colour - part)


def make_scenes(
    split: str, counts: np.ndarray, seed: tuple[int, ...], *, augment: bool, sizes: tuple[float, float] = (15.0, 25.0)
) -> Scenes:
    """Scenes of `counts` [B] digits each; the same arguments give the same scenes.

    Args:
      split: whose digits.
      counts: how many digits; where there is no room for one, the scene has fewer.
      seed: any integers.
      augment: distort the digits, as in training. Test scenes show them as they are, only resized.
      sizes: pixels of a digit's 8 x 8 field, drawn evenly.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    scenes, places = len(counts), max(1, int(counts.max(initial=0)))
    pool = load_split(split)
    rows = rng.integers(len(pool.labels), size=(scenes, places))
    used = np.arange(places) < counts[:, None]
    field = torch.from_numpy(rng.uniform(*sizes, scenes * places).astype(np.float32))
    canvas = draw_digits(split, torch.from_numpy(rows.reshape(-1)), field, generator, augment=augment)
    tight = ink_boxes(canvas).numpy().reshape(scenes, places, 4)
    canvases = canvas.numpy().reshape(scenes, places, CANVAS, CANVAS)

    nowhere = np.full((scenes, 4), -SIDE * 4)
    taken, corners = [], []
    for k in range(places):
        corner, found = _place(tight[:, k], taken, rng, gap=1)
        used[:, k] &= found
        size = tight[:, k, 2:] - tight[:, k, :2]
        taken.append(np.where(used[:, k, None], np.concatenate([corner, corner + size], 1), nowhere))
        corners.append(corner - tight[:, k, :2])
    image = _grounds(scenes, rng)
    _add_shapes(image, taken, rng)
    ink = rng.uniform(0.6, 1.0, (scenes, places, 3)).astype(np.float32)
    for b, k in np.argwhere(used):
        y, x = corners[k][b]
        _paste(image[b], canvases[b, k], int(y), int(x), ink[b, k])
    noise = rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.06, (scenes, 1, 1, 1)).astype(np.float32)
    pixels = (np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
    boxes = np.stack(taken, 1)
    labels = np.where(used, pool.labels[rows], -1)
    return Scenes(pixels, labels, np.where(used[..., None], boxes, 0), np.where(used, pool.index[rows], -1))


def _add_shapes(image: np.ndarray, taken: list[np.ndarray], rng: np.random.Generator) -> None:
    """Up to three shapes a scene, where no digit is; in place."""
    shapes, tight = _shapes()
    taken = list(taken)
    number = rng.integers(0, 4, len(image))
    for k in range(3):
        which = rng.integers(len(shapes), size=len(image))
        corner, found = _place(tight[which], taken, rng, gap=1)
        found &= number > k
        size = tight[which, 2:] - tight[which, :2]
        taken.append(np.where(found[:, None], np.concatenate([corner, corner + size], 1), -SIDE * 4))
        colour = rng.uniform(0.35, 1.0, (len(image), 3)).astype(np.float32)
        for b in np.flatnonzero(found):
            y, x = corner[b] - tight[which[b], :2]
            _paste(image[b], shapes[which[b]], int(y), int(x), colour[b])
