# SPDX-License-Identifier: Apache-2.0
"""Boxes in PaliGemma's text: `<loc0123>` tokens to pixels and back, several objects, scores, and boxes on a picture.

A box is four tokens in the order y0 x0 y1 x1, each a bin 0..1023 of the picture's own height or width, then the label;
objects are separated by " ; ". An outline is 16 `<segNNN>` tokens after the box, which `segmentation.py` turns into a
mask. What a model wrote is never trusted: text that holds no whole box is passed over, a degenerate box is dropped.

Source of the rules: the training code of PaliGemma. It rounds a coordinate times 1023 and divides by 1023 to read it;
some demonstrations divide by 1024, which is up to 0.1 % of the side smaller.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma.errors import PromptError, ShapeError

if TYPE_CHECKING:
    from gemma.image import ImageSource

LOC_BINS = 1024  # <loc0000> .. <loc1023>
SEG_CODES = 128  # <seg000> .. <seg127>
SEG_TOKENS = 16  # of one mask, a grid of 4 x 4
SEPARATOR = " ; "
LOC = re.compile(r"<loc(\d{4})>")
SEG = re.compile(r"<seg(\d{3})>")
_MARK = re.compile(r"<loc(?P<loc>\d{4})>|<seg(?P<seg>\d{3})>")
_LABEL_LIMIT = 200  # characters of a label that are kept: a model that rambles names nothing
_COLORS = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (0, 128, 128), (170, 110, 40))


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """One object that a model pointed at.

    Attributes:
      label: what it called the object, without surrounding blanks; may be empty.
      box: (x0, y0, x1, y1) in pixels of the picture, x0 < x1 and y0 < y1, origin at the top left.
      score: mean probability of the object's tokens, 0..1; None where no log-probabilities were given.
      mask: bool [height, width] of the whole picture; None where there is none.
      codes: the 16 codes of `<segNNN>` that followed the box, each 0..127; None where there are none.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float | None = None
    mask: np.ndarray | None = None
    codes: tuple[int, ...] | None = None


@dataclasses.dataclass
class _Run:
    """Consecutive loc and seg tokens, and the text from there to the next run."""

    start: int
    locs: list[int]
    segs: list[int]
    end: int  # of the tokens
    text: str = ""


def parse_detections(
    text: str,
    width: int,
    height: int,
    *,
    pieces: Sequence[str] | None = None,
    logprobs: Sequence[float] | None = None,
) -> list[Detection]:
    """Reads the objects out of what a model wrote, in its order; time is linear in the text.

    Args:
      text: decoded with the special tokens spelled out, for example `"<loc0100><loc0200><loc0300><loc0400> cat"`.
      width, height: of the picture in pixels, before it was resized for the model.
      pieces: the text of each generated token; joined they are `text`.
      logprobs: natural log-probability of each of them. With both, every detection has a score.

    Returns:
      One Detection per well-formed box. Left out are boxes of fewer than four tokens, surplus tokens of a run, boxes
      without area, and outlines that are not exactly 16 codes (the box itself stays). A box without a label takes
      its successor's (`"<box><box> cat"` is two cats), else its predecessor's; labels may also stand before the boxes.

    Raises:
      ShapeError: a size that is not positive, or `pieces` and `logprobs` that do not fit the text.
    """
    if width < 1 or height < 1:
        raise ShapeError(f"parse_detections: expected a picture of at least 1 x 1 pixels, got {width} x {height}")
    chances = _character_logprobs(text, pieces, logprobs)
    runs = _runs(text)
    found: list[tuple[_Run, int, str]] = []  # a run holds one box, or several without labels between them
    before = _label(text[: runs[0].start]) if runs else ""
    for run in runs:
        label = _label(run.text)
        for at in range(0, len(run.locs) - 3, 4):
            found.append((run, at, label))
    if before and not _label(runs[-1].text):  # "cat <box> ; dog <box>": the labels stand before their boxes
        texts = [before, *(_label(run.text) for run in runs[:-1])]
        named = dict(zip(map(id, runs), texts))
        found = [(run, at, named[id(run)]) for run, at, _ in found]
    labels = _fill(found)
    detections = []
    for (run, at, _), label in zip(found, labels):
        box = _box(run.locs[at : at + 4], width, height)
        if box is None:
            continue
        last = at + 4 == len(run.locs)
        codes = tuple(run.segs) if last and len(run.segs) == SEG_TOKENS else None
        score = None if chances is None else _score(chances, run.start + at * 9, run.start + at * 9 + 36)
        detections.append(Detection(label, box, score, None, codes))
    return detections


def _runs(text: str) -> list[_Run]:
    """The runs of marks, each with the text behind it. Blanks between the marks of one run are passed over."""
    runs: list[_Run] = []
    for found in _MARK.finditer(text):
        loc, seg = found["loc"], found["seg"]
        value = int(loc if loc is not None else seg)
        if value >= (LOC_BINS if loc is not None else SEG_CODES):
            continue  # <loc9999> is no token: text like any other
        fresh = not runs or text[runs[-1].end : found.start()] != "" or (loc is not None and runs[-1].segs)
        if fresh:
            if runs:
                runs[-1].text = text[runs[-1].end : found.start()]
            runs.append(_Run(found.start(), [], [], found.end()))
        (runs[-1].locs if loc is not None else runs[-1].segs).append(value)
        runs[-1].end = found.end()
    if runs:
        runs[-1].text = text[runs[-1].end :]
    return runs


def _label(text: str) -> str:
    """What a stretch of text calls the object: up to the separator or the end of the line."""
    text = text.lstrip(" ;,\t")
    return re.split(r"[;\n]|<eos>", text, maxsplit=1)[0].strip()[:_LABEL_LIMIT]


def _fill(found: Sequence[tuple[_Run, int, str]]) -> list[str]:
    """Labels, where an object without one takes its successor's, and the last ones the predecessor's."""
    labels = [label for _, _, label in found]
    for at in range(len(labels) - 2, -1, -1):
        labels[at] = labels[at] or labels[at + 1]
    for at in range(1, len(labels)):
        labels[at] = labels[at] or labels[at - 1]
    return labels


def _box(bins: Sequence[int], width: int, height: int) -> tuple[float, float, float, float] | None:
    y0, x0, y1, x1 = (value / (LOC_BINS - 1) for value in bins)
    return (x0 * width, y0 * height, x1 * width, y1 * height) if x1 > x0 and y1 > y0 else None


def _character_logprobs(text: str, pieces, logprobs) -> np.ndarray | None:
    """The log-probability of each character's token [len(text)], or None where none were given."""
    if pieces is None and logprobs is None:
        return None
    if pieces is None or logprobs is None or len(pieces) != len(logprobs) or "".join(pieces) != text:
        raise ShapeError(
            "parse_detections: scores need both `pieces` and `logprobs`, one of each per token, and the pieces joined "
            "must be the text"
        )
    return np.repeat(np.asarray(logprobs, np.float64), [len(piece) for piece in pieces])


def _score(chances: np.ndarray, start: int, end: int) -> float:
    """Mean probability of the four tokens of a box, each spelled with nine characters."""
    return float(np.exp(chances[start:end:9]).mean())


# --- targets


def encode_box(box: Sequence[float], width: int, height: int) -> str:
    """The four tokens of a box, `<locY0><locX0><locY1><locX1>`.

    Args:
      box: (x0, y0, x1, y1) in pixels; values outside the picture are cut to it.
      width, height: of the picture in pixels.

    Raises:
      PromptError: not four finite numbers, or a box without area.
    """
    values = [float(value) for value in box]
    if width < 1 or height < 1:
        raise ShapeError(f"encode_box: expected a picture of at least 1 x 1 pixels, got {width} x {height}")
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[0] >= values[2] or values[1] >= values[3]:
        raise PromptError(f"encode_box: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {tuple(box)}")
    x0, y0, x1, y1 = values
    return "".join(
        f"<loc{round(min(max(value / side, 0.0), 1.0) * (LOC_BINS - 1)):04d}>"
        for value, side in ((y0, height), (x0, width), (y1, height), (x1, width))
    )


def encode_codes(codes: Sequence[int]) -> str:
    """The 16 tokens `<segNNN>` of a mask's codes (`segmentation.encode_mask` makes them)."""
    if len(codes) != SEG_TOKENS or not all(0 <= int(code) < SEG_CODES for code in codes):
        raise PromptError(f"encode_codes: expected {SEG_TOKENS} numbers in 0..{SEG_CODES - 1}, got {list(codes)[:20]}")
    return "".join(f"<seg{int(code):03d}>" for code in codes)


def encode_detections(detections: Iterable[Detection], width: int, height: int) -> str:
    """The text a model is trained to write for these objects, in this order: `<loc..>x4 label ; <loc..>x4 label`."""
    parts = []
    for found in detections:
        codes = "" if found.codes is None else encode_codes(found.codes)
        if ";" in found.label or _MARK.search(found.label):
            raise PromptError(f"encode_detections: a label holds no ';' and no <loc> or <seg>, got {found.label!r}")
        parts.append(f"{encode_box(found.box, width, height)}{codes} {found.label.strip()}".rstrip())
    return SEPARATOR.join(parts)


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """How much two boxes (x0, y0, x1, y1) agree: area shared over area covered by either, 0..1."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


# --- drawing


def draw(image: ImageSource, detections: Sequence[Detection]) -> np.ndarray:
    """The picture with every box, mask, label and score on it.

    Args:
      image: anything `gemma.image.read_image` reads; it is not changed.
      detections: of this picture, in its pixels.

    Returns:
      uint8 [H, W, 3], as large as the picture. One color per label.
    """
    from PIL import Image, ImageDraw

    from gemma.image import read_image

    canvas = np.array(read_image(image))
    height, width = canvas.shape[:2]
    names = list(dict.fromkeys(found.label for found in detections))
    colors = {name: _COLORS[at % len(_COLORS)] for at, name in enumerate(names)}
    for found in detections:
        if found.mask is not None:
            if found.mask.shape != (height, width):
                raise ShapeError(f"mask of {found.label!r}: expected {(height, width)}, got {found.mask.shape}")
            inside = found.mask.astype(bool)
            canvas[inside] = (0.5 * canvas[inside] + 0.5 * np.array(colors[found.label])).astype(np.uint8)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    line = max(1, round(min(height, width) / 150))
    for found in detections:
        x0, y0 = (min(max(v, 0.0), side - 1.0) for v, side in zip(found.box[:2], (width, height)))
        x1, y1 = (min(max(v, low), side - 1.0) for v, low, side in zip(found.box[2:], (x0, y0), (width, height)))
        pen.rectangle((x0, y0, x1, y1), outline=colors[found.label], width=line)
        caption = found.label if found.score is None else f"{found.label} {found.score:.0%}".strip()
        if caption:
            _write(pen, caption, x0, y0, colors[found.label], width)
    return np.asarray(picture)


def _write(pen, caption: str, x: float, y: float, color: tuple[int, int, int], width: int) -> None:
    """A caption on a patch of its box's color: above the box, or inside where there is no room."""
    caption = caption.encode("latin-1", "replace").decode("latin-1")  # the built-in font has no other letters
    left, top, right, bottom = pen.textbbox((0, 0), caption)
    w, h = right - left + 4, bottom - top + 4
    x = min(x, max(0.0, width - w))
    y = y - h if y >= h else y
    pen.rectangle((x, y, x + w, y + h), fill=color)
    pen.text((x + 2 - left, y + 2 - top), caption, fill=(255, 255, 255))
