# SPDX-License-Identifier: Apache-2.0
"""Blocks of every readable GGUF type (and of SFP8, INT8, INT4) to float32, and the driver that runs over many of them.

Each decoder takes whole blocks, uint8 [n, block_bytes], and fills float32 [n, block_size]; it equals the ggml reference
bit for bit. Bit work runs eight bytes at a time on uint64 views; signed codes are built in the top bits of an int8, so
that one cast gives `q * 2**k`, and the power of two goes into the scale, which is exact. The table of types and the
public functions are in `quants.py`; `_quants_encode.py` is the inverse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHUNK = 1 << 17  # elements decoded at a time: packed bytes, codes and floats together stay within a second-level cache

Fetch = Callable[[int, int], np.ndarray]  # (first block, number of blocks) -> uint8 [n, block_bytes]


def _every(byte: int) -> np.uint64:
    return np.uint64(byte * 0x0101010101010101)


def _bits(codes: np.ndarray, shift: int, mask: int, flip: int = 0) -> np.ndarray:
    """`((byte << shift) & mask) ^ flip` for each byte (a negative shift goes right), as fresh uint8 of the same shape.

    `codes` is contiguous, a multiple of eight bytes, aligned to them. Shifting eight bytes as one word moves bits
    across their borders; the mask must clear the ones that arrive.
    """
    words = codes.reshape(-1).view(np.uint64)
    if shift > 0:
        words = words << np.uint64(shift)
        words &= _every(mask)
    elif shift < 0:
        words = words >> np.uint64(-shift)
        words &= _every(mask)
    else:
        words = words & _every(mask)
    if flip:
        words ^= _every(flip)
    return words.view(np.uint8).reshape(codes.shape)


def _part(raw: np.ndarray, start: int, count: int) -> np.ndarray:
    """Bytes start .. start + count of each block, as a contiguous, aligned copy uint8 [n, count]."""
    field = np.dtype({"names": ["part"], "formats": [f"V{count}"], "offsets": [start], "itemsize": raw.shape[1]})
    return np.ascontiguousarray(raw.view(field)["part"]).view(np.uint8)


def _joined(parts: int, width: int, planes) -> np.ndarray:
    """Interleaves planes of codes by groups of `width` bytes, as uint8 [n, elements].

    Each plane is contiguous; group g of plane p becomes group `g * parts + p`. Groups move as single items, so that
    the cast to float that follows runs over contiguous bytes.
    """
    codes = np.empty((planes[0].size // width, parts), f"V{width}")
    for index, plane in enumerate(planes):
        codes[:, index] = plane.reshape(-1).view(f"V{width}")
    return codes.view(np.uint8).reshape(len(planes[0]), -1)


def _halves(bits: np.ndarray) -> np.ndarray:
    """fp16 as uint16 to float32, exactly; several times faster than numpy's cast, which it is for infinity and NaN."""
    words = bits.astype(np.uint32)
    sign = words & np.uint32(0x8000)
    words ^= sign
    if words.max(initial=0) >= 0x7C00:
        return bits.view(np.float16).astype(np.float32)
    words <<= np.uint32(13)
    values = words.view(np.float32)
    values *= np.float32(2.0**112)  # moves the exponent's bias; subnormal numbers become normal
    sign <<= np.uint32(16)
    words |= sign
    return values


def _half(raw: np.ndarray, offset: int) -> np.ndarray:
    """The fp16 at `offset` of each block, as float32 [n]."""
    return _halves(raw[:, offset : offset + 2].view("<u2")[:, 0])


def _f32(raw, out):
    out[...] = raw.view("<f4")


def _f16(raw, out):
    out[:, 0] = _halves(raw.view("<u2")[:, 0])


def _bf16(raw, out):
    words = out.view(np.uint32)
    words[...] = raw.view("<u2")
    words <<= np.uint32(16)


def _q8_0(raw, out):
    out[...] = raw[:, 2:].view(np.int8)
    out *= _half(raw, 0)[:, None]


def _q4_0(raw, out):
    packed = _part(raw, 2, 16)
    codes = _joined(2, 16, (_bits(packed, 4, 0xF0, 0x80), _bits(packed, 0, 0xF0, 0x80)))
    out[...] = codes.view(np.int8)  # 16 * (q - 8)
    out *= (_half(raw, 0) * np.float32(1 / 16))[:, None]


def _q4_1(raw, out):
    packed = _part(raw, 4, 16)
    out[...] = _joined(2, 16, (_bits(packed, 0, 0x0F), _bits(packed, -4, 0x0F)))
    out *= _half(raw, 0)[:, None]
    out += _half(raw, 2)[:, None]


def _fifth_bits(raw: np.ndarray, start: int) -> np.ndarray:
    """The 32 bits at `start` of each block as bytes 0 or 1 in element order, uint8 [n, 32]."""
    return np.unpackbits(_part(raw, start, 4), axis=1, bitorder="little")


def _q5_0(raw, out):
    packed = _part(raw, 6, 16)
    codes = _joined(2, 16, (_bits(packed, 3, 0x78), _bits(packed, -1, 0x78)))
    codes |= _bits(_fifth_bits(raw, 2), 7, 0x80, 0x80)
    out[...] = codes.view(np.int8)  # 8 * (q - 16)
    out *= (_half(raw, 0) * np.float32(1 / 8))[:, None]


def _q5_1(raw, out):
    packed = _part(raw, 8, 16)
    codes = _joined(2, 16, (_bits(packed, 0, 0x0F), _bits(packed, -4, 0x0F)))
    codes |= _bits(_fifth_bits(raw, 4), 4, 0x10)
    out[...] = codes
    out *= _half(raw, 0)[:, None]
    out += _half(raw, 2)[:, None]


def _scale_min(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, uint8 [n, 8] each; four bytes at a time as one uint32."""
    low, mid, high = _part(raw, 4, 12).view(np.uint32).T
    six, four, two = (np.uint32(bits * 0x01010101) for bits in (0x3F, 0x0F, 0x30))
    to_nibble, to_top = np.uint32(4), np.uint32(2)
    scale, minimum = np.empty((2, len(raw), 2), np.uint32)
    scale[:, 0], scale[:, 1] = low & six, (high & four) | ((low >> to_top) & two)
    minimum[:, 0], minimum[:, 1] = mid & six, ((high >> to_nibble) & four) | ((mid >> to_top) & two)
    return scale.view(np.uint8), minimum.view(np.uint8)


def _times_minus(out, width, scale, minimum):
    """`out = out * scale - minimum` with one scale and minimum for each `width` elements."""
    parts = out.reshape(len(out), -1, width)
    parts *= scale[:, :, None]
    parts -= minimum[:, :, None]


def _q4_k(raw, out):
    packed = _part(raw, 16, 128)
    out[...] = _joined(2, 32, (_bits(packed, 0, 0x0F), _bits(packed, -4, 0x0F)))
    scale, minimum = _scale_min(raw)
    _times_minus(out, 32, _half(raw, 0)[:, None] * scale, _half(raw, 2)[:, None] * minimum)


def _q5_k(raw, out):
    packed, high = _part(raw, 48, 128), _part(raw, 16, 32)
    codes = _joined(2, 32, (_bits(packed, 0, 0x0F), _bits(packed, -4, 0x0F)))
    codes |= _joined(8, 32, [_bits(high, 4 - g, 0x10) for g in range(8)])
    out[...] = codes
    scale, minimum = _scale_min(raw)
    _times_minus(out, 32, _half(raw, 0)[:, None] * scale, _half(raw, 2)[:, None] * minimum)


def _q2_k(raw, out):
    packed = _part(raw, 16, 64)
    out[...] = _joined(4, 32, [_bits(packed, -2 * g, 0x03) for g in range(4)])
    scales = _part(raw, 0, 16)
    scale, minimum = _bits(scales, 0, 0x0F), _bits(scales, -4, 0x0F)
    _times_minus(out, 16, _half(raw, 80)[:, None] * scale, _half(raw, 82)[:, None] * minimum)


def _q3_k(raw, out):
    high, packed = _part(raw, 0, 32), _part(raw, 32, 64)
    # 32 * (q2 + 4 * h - 4): two bits below the sign, which is set where h is clear
    codes = _joined(4, 32, [_bits(packed, 5 - 2 * g, 0x60) for g in range(4)])
    codes |= _joined(8, 32, [_bits(high, 7 - g, 0x80, 0x80) for g in range(8)])
    out[...] = codes.view(np.int8)
    low, top = _part(raw, 96, 8), _part(raw, 104, 4).view(np.uint32)
    scale = np.concatenate([_bits(low, 0, 0x0F), _bits(low, -4, 0x0F)], axis=1)
    # two top bits of scale j: byte j % 4 at bit 2 * (j // 4)
    shifted = (top << np.uint32(4), top << np.uint32(2), top, top >> np.uint32(2))
    scale |= np.concatenate(shifted, axis=1).view(np.uint8) & np.uint8(0x30)
    scale = (scale.view(np.int8) - np.int8(32)).astype(np.float32)
    parts = out.reshape(-1, 16, 16)
    parts *= ((_half(raw, 108) * np.float32(1 / 32))[:, None] * scale)[:, :, None]


def _q6_k(raw, out):
    low, high = _part(raw, 0, 128), _part(raw, 128, 64)
    # 4 * (q - 32): four low bits, of 64 elements at a time, then two high bits, the topmost flipped
    codes = _joined(2, 64, (_bits(low, 2, 0x3C), _bits(low, -2, 0x3C)))
    codes |= _joined(4, 32, [_bits(high, 6 - 2 * g, 0xC0, 0x80) for g in range(4)])
    out[...] = codes.view(np.int8)
    scale = (_half(raw, 208) * np.float32(1 / 4))[:, None] * raw[:, 192:208].view(np.int8)
    parts = out.reshape(-1, 16, 16)
    parts *= scale[:, :, None]


def _sfp8_values() -> np.ndarray:
    code = np.arange(128)
    small = (1 + (code & 3) / 4) * 2.0 ** ((code >> 2) - 23)
    large = (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 15)
    half = np.where(code < 64, small, large)
    half[0] = 0.0
    values = np.concatenate([half, -half]).astype(np.float32)
    values[128] = 0.0  # reserved, never written: there is no negative zero
    return values


SFP8_VALUES = _sfp8_values()  # float32 [256]: the value of each code


def _sfp8(raw, out):
    np.take(SFP8_VALUES, raw, out=out, mode="clip")


def _int8(raw, out):
    out[...] = raw.view(np.int8)


def _int4(raw, out):
    packed = _part(raw, 0, 16)
    out[...] = _joined(2, 16, (_bits(packed, 0, 0x0F), _bits(packed, -4, 0x0F)))
    out -= np.float32(8)


_DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "SFP8": _sfp8,
    "INT8": _int8,
    "INT4": _int4,
}


def decode(name: str, block_size: int, fetch: Fetch, blocks: int, out: np.ndarray) -> None:
    """Decodes `blocks` blocks into `out`, flat and contiguous, of any float dtype; float32 needs no scratch.

    Beside `out`, memory is a few chunks. It keeps to one thread; several tensors at once is the caller's choice.
    """
    rows, decoder, step = out.reshape(blocks, block_size), _DECODERS[name], CHUNK // block_size
    scratch = None if out.dtype == np.float32 else np.empty((min(step, blocks), block_size), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # values are counted by the loader, not warned about here
        for start in range(0, blocks, step):
            count = min(step, blocks - start)
            target = rows[start : start + count]
            values = target if scratch is None else scratch[:count]
            decoder(fetch(start, count), values)
            if scratch is not None:
                target[...] = values
