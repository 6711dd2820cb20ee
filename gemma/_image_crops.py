# SPDX-License-Identifier: Apache-2.0
"""Pan and scan: crops of long pictures, and the prompt that names them. The public face is `image.py`.

Pictures are numpy arrays [H, W, C]; nothing is read or resized here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gemma.errors import PromptError


def pan_and_scan(
    image: np.ndarray, *, min_crop_size: int = 256, max_num_crops: int = 4, min_ratio_to_activate: float = 1.2
) -> list[np.ndarray]:
    """Cuts a long picture into crops along its longer side, for detail that one square view would lose.

        +--------+--------+--------+        1300 x 400: ratio 3.25, so 3 crops of up to 434 x 400
        | crop 0 | crop 1 | crop 2 |
        +--------+--------+--------+

    A model sees the whole picture first, then the crops: `[image, *pan_and_scan(image)]`, one marker in the prompt for
    each. Equivalent to Hugging Face's Gemma 3 processor, whose published settings are the defaults.

    Args:
      image: [H, W, C].
      min_crop_size: no crop is made if it would be smaller than this, in pixels.
      max_num_crops: the largest number of crops.
      min_ratio_to_activate: pictures whose longer side is less than this many times the shorter are left alone.

    Returns:
      The crops, left to right or top to bottom; empty where the picture needs none.
    """
    for label, value in (("min_crop_size", min_crop_size), ("max_num_crops", max_num_crops)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PromptError(f"{label}: expected a whole number, 1 or more, got {value!r:.80}")
    image = np.asarray(image)
    if image.ndim != 3 or 0 in image.shape:
        raise PromptError(f"image: expected [H, W, C], got shape {image.shape}")
    axis = 1 if image.shape[1] >= image.shape[0] else 0
    long, short = image.shape[axis], image.shape[1 - axis]
    if long / short < min_ratio_to_activate:
        return []
    count = min(long // min_crop_size, math.floor(long / short + 0.5))
    count = min(max_num_crops, max(2, count))
    side = math.ceil(long / count)
    if min(side, short) < min_crop_size:
        return []
    cuts = range(0, long, side)  # the last crop is the rest, up to count - 1 pixels shorter
    return [image[:, at : at + side] if axis else image[at : at + side] for at in cuts]


def insert_crops(
    prompt: str, images: Sequence[np.ndarray], *, marker: str = "<start_of_image>", **settings
) -> tuple[str, list[np.ndarray]]:
    """Pan and scan for a whole prompt: each long picture becomes itself and its crops, with the words the model knows.

      prompt, images = insert_crops("What does <start_of_image> say?", [read_image("receipt.jpg")])
      chatbot.chat(prompt, images=images)

    Equivalent to Hugging Face's Gemma 3 processor.

    Args:
      prompt: with one marker for every picture.
      images: uint8 [H, W, C] each.
      marker: where a picture goes.
      **settings: of `pan_and_scan`.

    Returns:
      The prompt with a marker for every picture and crop, and these in the order of their markers.

    Raises:
      PromptError: (a ValueError) markers and pictures differ in number.
    """
    parts = prompt.split(marker)
    if len(parts) != len(images) + 1:
        raise PromptError(f"{len(images)} images came, but the prompt holds {len(parts) - 1} markers {marker}")
    text, out = parts[0], []
    for image, rest in zip(images, parts[1:]):
        crops = pan_and_scan(image, **settings)
        out += [image, *crops]
        if crops:
            shown = " ".join([marker] * len(crops))
            text += f"Here is the original image {marker} and here are some crops to help you see better {shown}{rest}"
        else:
            text += marker + rest
    return text, out
