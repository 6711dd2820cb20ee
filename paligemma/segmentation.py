# SPDX-License-Identifier: Apache-2.0
"""PaliGemma's masks: 16 `<segNNN>` codes to an outline of 64 x 64, pasted into its box, and back; numpy only.

The codes are the vocabulary of a small VQ-VAE that was trained on outlines; its weights are a file of their own
(`vae-oid.npz`, with PyTorch's names and layouts) that comes with no checkpoint of the language model. Reading the codes
out of a text is `detection.py`. A mask costs about 0.1 GFLOP, so no framework is needed.

Axes: B masks, C channels, H rows, W columns; images are [B, H, W, C] here, kernels as in the file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from gemma.checkpoint import open_checkpoint
from gemma.errors import FormatError, PromptError, ShapeError, WeightsMismatch
from gemma.image import resize
from paligemma.detection import SEG_CODES, SEG_TOKENS, Detection

MASK_SIZE = 64  # pixels of a decoded mask, square
_GRID = 4  # codes of a mask, 4 x 4, row by row
_MAX_BYTES = 64 * 2**20  # of the weights, unpacked; the published file is a tenth of that
_RESIDUAL = (0, 2, 4)  # the convolutions of a residual block: 3 x 3, 3 x 3, 1 x 1
_WIDTHS = (128, 64, 32, 16)  # channels after each upsampling; halved backwards on the way down


def expected_shapes(width: int = 512, narrowing: Sequence[int] = (32, 64, 128)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weight file.

    Args:
      width: of a code vector.
      narrowing: channels after the encoder's first three steps; the fourth and the rest have 128.
    """
    shapes = {"_vq_vae._embedding": (SEG_CODES, width)}

    def add(name: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0] if bias is None else bias,)

    top = _WIDTHS[0]
    for side, blocks in (("decoder", (2, 3)), ("encoder", (8, 9))):
        for block in blocks:
            for at, kernel in zip(_RESIDUAL, (3, 3, 1)):
                add(f"{side}.{block}.net.{at}", top, top, kernel, kernel)
    add("decoder.0", top, width, 1, 1)
    for at, (source, target) in zip((4, 6, 8, 10), zip((top, *_WIDTHS), _WIDTHS)):
        add(f"decoder.{at}", source, target, 4, 4, bias=target)  # transposed: [in, out, H, W]
    add("decoder.12", 1, _WIDTHS[-1], 1, 1)
    for at, (source, target) in zip((0, 2, 4, 6), zip((1, *narrowing), (*narrowing, top))):
        add(f"encoder.{at}", target, source, 4, 4)
    add("encoder.10", width, top, 1, 1)
    return shapes


class MaskCodec:
    """Outlines to codes and back.

    Example:
      codec = MaskCodec.from_file("vae-oid.npz")
      detections = codec.add_masks(parse_detections(text, width, height), width, height)
    """

    def __init__(self, weights: Mapping[str, np.ndarray], *, path: str = "weights"):
        """Checks and keeps the weights.

        Args:
          weights: as `expected_shapes` lists them; without any `encoder.` only decoding works.
          path: where they came from, for errors.

        Raises:
          WeightsMismatch: missing, unexpected or mis-shaped arrays, all of them listed.
        """
        table = weights.get("_vq_vae._embedding")
        steps = [weights.get(f"encoder.{at}.weight") for at in (0, 2, 4)]
        found = dict(width=table.shape[1]) if table is not None and table.ndim == 2 else {}
        if all(step is not None and step.ndim == 4 for step in steps):
            found["narrowing"] = [step.shape[0] for step in steps]
        expected = expected_shapes(**found)
        self.can_encode = any(name.startswith("encoder.") for name in weights)
        if not self.can_encode:
            expected = {name: shape for name, shape in expected.items() if not name.startswith("encoder.")}
        missing = [name for name in expected if name not in weights]
        # Counters of the training run lie in the published file too.
        unexpected = [name for name in weights if name not in expected and not name.startswith("_vq_vae.")]
        wrong = [
            f"{name}: expected {shape}, got {weights[name].shape}"
            for name, shape in expected.items()
            if name in weights and weights[name].shape != shape
        ]
        if missing or unexpected or wrong:
            raise WeightsMismatch(path, missing=missing, unexpected=unexpected, misshaped=wrong)
        self._weights = {name: np.asarray(weights[name], np.float32) for name in expected}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MaskCodec:
        """Reads an `.npz`; nothing in it is unpickled, and its size is checked before it is read."""
        with open_checkpoint(path) as checkpoint:
            if checkpoint.format != "npz":
                raise FormatError(
                    path, None, f"expected the mask decoder's .npz (vae-oid.npz), not {checkpoint.format}"
                )
            total = sum(info.nbytes for info in checkpoint.tensors.values())
            if total > _MAX_BYTES:
                raise FormatError(path, None, f"expected at most {_MAX_BYTES} bytes of weights, it states {total}")
            weights = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}
        return cls(weights, path=os.fspath(path))

    def decode(self, codes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Codes to outlines.

        Args:
          codes: [B, 16], each 0..127; a grid of 4 x 4, row by row.

        Returns:
          float32 [B, 64, 64], about -1..1; above 0 is the object.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != SEG_TOKENS or codes.dtype.kind not in "iu":
            raise ShapeError(f"codes: expected whole numbers [B, {SEG_TOKENS}], got {codes.dtype} {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < SEG_CODES:
            raise PromptError(f"codes: expected 0..{SEG_CODES - 1}, got {codes.min()}..{codes.max()}")
        table = self._weights["_vq_vae._embedding"]
        x = table[codes].reshape(len(codes), _GRID, _GRID, table.shape[1])
        x = np.maximum(self._conv(x, "decoder.0"), 0)
        for block in (2, 3):
            x = self._residual(x, f"decoder.{block}")
        for at in (4, 6, 8, 10):
            x = np.maximum(self._upsample(x, f"decoder.{at}"), 0)
        return self._conv(x, "decoder.12")[..., 0]

    def encode(self, masks: np.ndarray) -> np.ndarray:
        """Outlines to codes, for training targets.

        Args:
          masks: [B, 64, 64], 0..1 or bool: the object inside its box, resized (`crop_mask`).

        Returns:
          int64 [B, 16].
        """
        if not self.can_encode:
            raise WeightsMismatch("mask codec", missing=["encoder.*"], hint="these weights hold the decoder only")
        masks = np.asarray(masks, np.float32)
        if masks.ndim != 3 or masks.shape[1:] != (MASK_SIZE, MASK_SIZE):
            raise ShapeError(f"masks: expected [B, {MASK_SIZE}, {MASK_SIZE}], got {masks.shape}")
        x = 2 * masks[..., None] - 1
        for at in (0, 2, 4, 6):
            x = np.maximum(self._conv(x, f"encoder.{at}", stride=2), 0)
        for block in (8, 9):
            x = self._residual(x, f"encoder.{block}")
        table = self._weights["_vq_vae._embedding"]
        x = self._conv(x, "encoder.10").reshape(len(masks), SEG_TOKENS, table.shape[1])
        distance = (x**2).sum(-1, keepdims=True) - 2 * x @ table.T + (table**2).sum(-1)
        return distance.argmin(-1)

    def add_masks(self, detections: Sequence[Detection], width: int, height: int) -> list[Detection]:
        """The same detections; those with codes get a mask of the whole picture, bool [height, width]."""
        coded = [found for found in detections if found.codes is not None]
        outlines = iter(self.decode([found.codes for found in coded]) if coded else ())
        return [
            found
            if found.codes is None
            else dataclasses.replace(found, mask=paste_mask(next(outlines), found.box, width, height))
            for found in detections
        ]

    # --- layers

    def _conv(self, x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        """A convolution, padded so that stride 1 keeps the size and stride 2 halves it: [B, H, W, C]."""
        kernel, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        size = kernel.shape[2]
        pad = (size - 1) // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
        return np.tensordot(windows, kernel, axes=((3, 4, 5), (1, 2, 3))) + bias

    def _residual(self, x: np.ndarray, name: str) -> np.ndarray:
        first, second, third = (f"{name}.net.{at}" for at in _RESIDUAL)
        inner = np.maximum(self._conv(np.maximum(self._conv(x, first), 0), second), 0)
        return x + self._conv(inner, third)

    def _upsample(self, x: np.ndarray, name: str) -> np.ndarray:
        """A transposed convolution, 4 x 4 with stride 2 and padding 1: twice the size.

        Each output row sees two input rows: row 2i takes kernel rows 1 and 3 of the inputs i and i - 1, row 2i + 1
        takes kernel rows 2 and 0 of the inputs i and i + 1; columns likewise.
        """
        kernel, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        count, rows, columns, _ = x.shape
        out = np.empty((count, 2 * rows, 2 * columns, kernel.shape[1]), np.float32)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = ((1, 1), (3, 0)), ((2, 1), (0, 2))  # parity of the output to (kernel index, offset in the padded input)
        for even_row, row_taps in enumerate(taps):
            for even_column, column_taps in enumerate(taps):
                out[:, even_row::2, even_column::2] = bias + sum(
                    padded[:, dy : dy + rows, dx : dx + columns] @ kernel[:, :, ky, kx]
                    for ky, dy in row_taps
                    for kx, dx in column_taps
                )
        return out


def paste_mask(outline: np.ndarray, box: Sequence[float], width: int, height: int) -> np.ndarray:
    """An outline [64, 64] (above 0 is the object) in its box (x0, y0, x1, y1): bool [height, width].

    The outline is stretched bilinearly to the box's whole pixels first and cut at 0 then, so edges stay smooth.
    """
    from PIL import Image

    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = (int(value) for value in box)
    x0, x1, y0, y1 = max(x0, 0), min(x1, width), max(y0, 0), min(y1, height)
    if x1 > x0 and y1 > y0:
        values = Image.fromarray(np.asarray(outline, np.float32))
        mask[y0:y1, x0:x1] = np.asarray(values.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)) > 0
    return mask


def crop_mask(mask: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The part of a mask, bool [H, W], in its box (x0, y0, x1, y1), as float32 [64, 64] in 0..1 for `encode`."""
    x0, y0, x1, y1 = (round(value) for value in box)
    part = np.asarray(mask, bool)[max(y0, 0) : y1, max(x0, 0) : x1]
    if not part.size:
        raise PromptError(f"crop_mask: the box {tuple(box)} holds no pixel of a mask of {mask.shape}")
    grey = np.repeat(part[..., None].astype(np.uint8) * 255, 3, axis=2)
    return resize(grey, MASK_SIZE, MASK_SIZE)[..., 0].astype(np.float32) / 255
