# SPDX-License-Identifier: Apache-2.0
"""Mutated `.sbs`, `.ckpt` and `.npz` files for `fuzz.py`: valid small ones, with one thing or a few made wrong.

Containers are rebuilt around what was broken inside (a zip with right checksums around a wrong pickle), so that the
readers are met at every depth.
"""

from __future__ import annotations

import functools
import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np

from gemma.formats import ckpt, npz, sbs
from gemma.formats._sbs_fields import TocEntry, config_words
from gemma.testing import tiny_config

Scramble = Callable[..., bytes]
NUMBERS = [
    0,
    1,
    2,
    3,
    255,
    256,
    257,
    4096,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"w_{n}": rng.normal(size=(3, 4 + n)).astype(np.float32) for n in range(3)}


# ---- gemma.cpp ------------------------------------------------------------------------------------------------------


@functools.cache
def _sbs_new() -> bytes:
    arrays, out = _arrays(), io.BytesIO()
    entries = [TocEntry(name, "F32", *array.shape) for name, array in arrays.items()]
    entries.append(TocEntry("codes", "SFP8", 2, 8))
    codes = np.arange(16, dtype=np.uint8)
    config = config_words(tiny_config("gemma2", query_pre_attn_scalar=24.0), "SFP8")
    sbs.write_sbs(out, entries, lambda name: arrays.get(name, codes), {"config": config, "tokenizer": b"none" * 8})
    return _without_padding(out.getvalue())


def _without_padding(data: bytes) -> bytes:
    """The file without the zeros that fill it up to 64 KiB: mutations should meet what means something."""
    magic, count, _ = struct.unpack("<4sIQ", data[-16:])
    tail = data[-16 - 32 * count : -16]
    body = data[: -16 - 32 * count].rstrip(b"\0")
    body += b"\0" * (-len(body) % 256)
    return body + tail + struct.pack("<4sIQ", magic, count, len(body) + len(tail) + 16)


@functools.cache
def _sbs_old() -> bytes:
    """Directory first, a letter for the type before each name."""
    blobs = {f"F{name}": array.tobytes() for name, array in _arrays().items()} | {"$codes": bytes(range(1, 17))}
    offset, places, body = 16 + 32 * len(blobs), [], b""
    offset += -offset % 256
    for data in blobs.values():
        places.append((offset + len(body), len(data)))
        body += data + b"\0" * (-len(data) % 256)
    keys = b"".join(name.encode().ljust(16, b"\0") for name in blobs)
    head = struct.pack("<4sIQ", b"SBS\n", len(blobs), offset + len(body)) + keys
    head += b"".join(struct.pack("<QQ", *place) for place in places)
    return head.ljust(offset, b"\0") + body


def make_sbs(rng: random.Random, scramble: Scramble) -> bytes:
    data = bytearray(_sbs_new() if rng.random() < 0.7 else _sbs_old())
    if rng.random() < 0.3:
        return scramble(rng, bytes(data))
    for _ in range(rng.choice([1, 1, 2, 3])):
        width = rng.choice([4, 4, 8])
        at = rng.choice(
            [rng.randrange(0, 256, 4), len(data) - 4 * rng.randrange(2, 70), rng.randrange(0, len(data) - 8, 4)]
        )
        at = max(0, min(at, len(data) - width))
        old = int.from_bytes(data[at : at + width], "little")
        new = rng.choice([*NUMBERS, old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * width)])
        data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(data)


# ---- zip archives ---------------------------------------------------------------------------------------------------


@functools.cache
def _ckpt() -> dict[str, bytes]:
    arrays = _arrays() | {"q.weight": np.ones((2, 3), np.int8), "q.weight_scaler": np.ones(2, np.float32)}
    out = io.BytesIO()
    ckpt.write_ckpt(out, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.__getitem__)
    return _members(out)


@functools.cache
def _npz() -> dict[str, bytes]:
    out = io.BytesIO()
    npz.write_npz(out, _arrays().items())
    return _members(out)


def _members(file: io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(rng: random.Random, members: dict[str, bytes]) -> bytes:
    out, names = io.BytesIO(), list(members)
    if rng.random() < 0.1:
        old = rng.choice(names)
        new = rng.choice(["../x", "/etc/x", "a\\b", "", "x/" * 200, f"{old}x", rng.choice(names)])
        members = {(new if name == old else name): data for name, data in members.items()}
    method = rng.choice([zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name or "x"), data, method)
    return out.getvalue()


def make_ckpt(rng: random.Random, scramble: Scramble) -> bytes:
    members = dict(_ckpt())
    kind = rng.random()
    if kind < 0.7:
        members["model/data.pkl"] = _broken_pickle(rng, members["model/data.pkl"], scramble)
    elif kind < 0.8:
        name = rng.choice(list(members))
        members[name] = scramble(rng, members[name])
    data = _zipped(rng, members)
    return scramble(rng, data) if kind > 0.8 else data


def _broken_pickle(rng: random.Random, data: bytes, scramble: Scramble) -> bytes:
    if rng.random() < 0.3:
        return scramble(rng, data)
    starts = [at for _, _, at in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    for _ in range(rng.choice([1, 1, 2])):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            del parts[at : at + rng.choice([1, 1, 2, 5])]
        elif kind == 1:
            parts[at:at] = parts[other : other + rng.choice([1, 2, 8])]
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = rng.choice(
                [
                    b"cos\nsystem\n",
                    b"cbuiltins\neval\n",
                    b"\x93",
                    b"R",
                    b"b",
                    b"\x81",
                    b"i",
                    b"o",
                    b"Q",
                    b"P1\n",
                    b"L9L\n",
                ]
            )
        else:
            parts[at] = b"\x8a\x08" + struct.pack("<Q", rng.choice(NUMBERS))
        if not parts:
            break
    return b"".join(parts)


def make_npz(rng: random.Random, scramble: Scramble) -> bytes:
    members = dict(_npz())
    kind, name = rng.random(), rng.choice(list(members))
    if kind < 0.6:
        text = members[name]
        head = text[10 : 10 + int.from_bytes(text[8:10], "little")]
        swaps = [(b"<f4", b"|O8"), (b"<f4", b">f4"), (b"<f4", b"<f8"), (b"False", b"True"), (b"(3,", b"(-3,")]
        swaps += [(b"(3,", b"(9999999999,"), (b"(3,", b"(" + b"(" * 500), (b"'shape'", b"'sharp'"), (b"4", b"5")]
        members[name] = text[:10] + head.replace(*rng.choice(swaps)) + text[10 + len(head) :]
    elif kind < 0.8:
        members[name] = scramble(rng, members[name], rng.choice([None, 128]))
    data = _zipped(rng, members)
    return scramble(rng, data) if kind > 0.85 else data
