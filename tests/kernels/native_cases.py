# SPDX-License-Identifier: Apache-2.0
"""Weights of every type for the tests of products, and how far a product may be from the exact one.

Error of a packed integer type. Activations become 15-bit integers and a sign with a scale for each 32: each is off by at
most half a step, peak / 65534 of its block. That is all that exact sums of integers add; then a few float32 operations
for each block of 16 or 32 round their operands, which are as large as code times scale and minimum times sum, even
where these cancel in the weight itself. Float types only have the second part, one operation for each element.
"""

import numpy as np

from gemma.kernels._native import TYPE_IDS
from gemma.quants import PackedTensor, QuantType, quantize

EPS = 2.0**-24  # float32: half a unit in the last place, relative
TYPES = list(QuantType)
FLOATS = (QuantType.F32, QuantType.F16, QuantType.BF16, QuantType.SFP8)  # activations meet them as floats

# Where the codes of a block stand (first byte, past the last), for `magnitudes`; other types are codes throughout.
_CODES = {"Q4_0": (2, 18), "Q4_1": (4, 20), "Q5_0": (2, 22), "Q5_1": (4, 24), "Q8_0": (2, 34), "Q2_K": (16, 80)}
_CODES |= {"Q3_K": (0, 96), "Q4_K": (16, 144), "Q5_K": (16, 176), "Q6_K": (0, 192)}
# Where its fp16 numbers stand.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
_HALVES |= {"Q6_K": (208,)}


def columns(type: QuantType, blocks: int) -> int:
    """An odd length where the type permits one, else an odd number of blocks."""
    return blocks * 32 + 5 if type.block_size == 1 else blocks * type.block_size


def raw_weight(type: QuantType, rows: int, cols: int, seed: int = 0) -> PackedTensor:
    """Random bytes, that is every code, with finite factors of mixed sign between 2**-9 and 2**-4."""
    rng = np.random.default_rng([seed, rows, cols, TYPES.index(type)])
    if type.is_float:
        return quantize(rng.standard_normal((rows, cols), np.float32), type)
    data = rng.integers(0, 256, (rows, type.row_bytes(cols)), np.uint8)
    if type.has_scale:
        n = 1 if type is QuantType.SFP8 else rows
        if type is QuantType.SFP8:
            data[data == 128] = 0  # reserved
        return PackedTensor(type, (rows, cols), data, rng.uniform(0.01, 0.03, n).astype(np.float32))
    blocks = data.reshape(-1, type.block_bytes)
    for at in _HALVES.get(type.name, (0,)):
        halves = np.exp2(rng.uniform(-9, -4, len(blocks))) * rng.choice([-1, 1], len(blocks))
        blocks[:, at : at + 2] = halves.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return PackedTensor(type, (rows, cols), data)


def fitted_weight(type: QuantType, rows: int, cols: int, seed: int = 0) -> PackedTensor:
    """A normal matrix, packed by our own quantizer."""
    rng = np.random.default_rng([seed, cols, rows, 7])
    return quantize(rng.standard_normal((rows, cols), np.float32) * np.float32(0.05), type, threads=1)


def magnitudes(packed: PackedTensor) -> np.ndarray:
    """float64, of the weight's shape: at least |code * factor| + |minimum|, what float operations round."""
    values = packed.dequantize().astype(np.float64)
    if packed.type in FLOATS:
        return np.abs(values)
    ends = []
    for byte in (0x00, 0x7F, 0x80, 0xFF):  # the extreme codes of signed and unsigned fields alike
        data = packed.data.copy()
        start, stop = _CODES.get(packed.type.name, (0, packed.type.block_bytes))
        data.reshape(-1, packed.type.block_bytes)[:, start:stop] = byte
        ends.append(PackedTensor(packed.type, packed.shape, data, packed.scale).dequantize().astype(np.float64))
    ends = np.stack(ends)
    return np.abs(ends).max(0) + np.ptp(ends, axis=0)


def bound(packed: PackedTensor, x: np.ndarray) -> np.ndarray:
    """float64 [M, rows]: how far a product in the library's arithmetic may be from the exact one; x is finite."""
    cols, x = packed.shape[1], np.abs(x.astype(np.float64))
    if packed.type in FLOATS:
        return EPS * (cols + 8) * x @ magnitudes(packed).T + cols * 2.0**-148  # below 2**-126 steps are absolute
    padded = np.pad(x, ((0, 0), (0, -cols % 32))).reshape(len(x), -1, 32)
    step = np.broadcast_to(padded.max(2, keepdims=True) / 65534 * (1 + 8 * EPS), padded.shape)
    step = np.maximum(step.reshape(len(x), -1)[:, :cols], 2.0**-110)  # smaller blocks count as zero
    weights = np.abs(packed.dequantize().astype(np.float64))
    return step @ weights.T + EPS * (cols / 16 + 12) * (x + step) @ magnitudes(packed).T


def gradient_bound(packed: PackedTensor, dy: np.ndarray) -> np.ndarray:
    """float64 [M, cols]: the same for `matmul_grad`, which decodes the weight and sums floats over its rows."""
    return (
        EPS * (packed.shape[0] + 8) * np.abs(dy).astype(np.float64) @ magnitudes(packed) + len(packed.data) * 2.0**-148
    )


def misaligned(array: np.ndarray, offset: int = 1) -> np.ndarray:
    """A copy whose first byte stands `offset` past an address divisible by 64, the last one at the end of its memory."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def write_cases(path) -> None:
    """Products of every type with what they must come to, for the C++ driver; native_driver/products.cpp has the layout.

    Two odd shapes for each type, small enough for an emulator, on both sides of the sizes of tiles.
    """
    cases = [(type, rows, blocks, m) for type in TYPES for rows, blocks, m in ((1, 1, 2), (37, 2, 13))]
    with open(path, "wb") as file:
        file.write(np.int64(len(cases)).tobytes())
        for type, rows, blocks, m in cases:
            packed = raw_weight(type, rows, columns(type, 1 if type.block_size == 256 else blocks))
            rng, cols = np.random.default_rng(rows), packed.shape[1]
            x = (rng.standard_normal((m, cols)) * np.exp2(rng.integers(-6, 6, (m, 1)))).astype(np.float32)
            dy = rng.standard_normal((m, rows)).astype(np.float32)
            exact, wide = packed.dequantize(), packed.dequantize().astype(np.float64)
            scales = 0 if packed.scale is None else packed.scale.size
            head = np.int64([TYPE_IDS[type], rows, cols, packed.data.shape[1], scales, m])
            scale = np.zeros(0, np.float32) if packed.scale is None else packed.scale
            products = [x.astype(np.float64) @ wide.T, bound(packed, x)]
            gradient = [dy.astype(np.float64) @ wide, gradient_bound(packed, dy)]
            for part in (head, packed.data, scale, x, exact, *products, dy, *gradient):
                file.write(np.ascontiguousarray(part).tobytes())
