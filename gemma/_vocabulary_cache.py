# SPDX-License-Identifier: Apache-2.0
"""Keeps vocabularies that were read and checked once, as the ModelProto that `sentencepiece` runs.

One file per vocabulary in `tokenizers/` of the cache folder, named after the SHA-256 of what it was made from. Writing
is atomic, and a cache that cannot be read or written only costs time. What is in a proto is `_sentencepiece_proto.py`.

    magic (8)   SHA-256 of the rest (32)   V (4, little endian)   types [V] uint8   ModelProto
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from pathlib import Path

import numpy as np

from gemma.hub import cache_dir

_MAGIC = b"GMKTOK01"  # the number changes with the meaning of what is kept
_HEAD = len(_MAGIC) + 32
_LIMIT = 1 << 26  # bytes; the largest vocabulary of the family makes 6 MB
_WORTH = 4096  # pieces; a smaller vocabulary is built faster than a file is read


def _path(digest: str) -> Path:
    return cache_dir() / "tokenizers" / f"{digest}.{_MAGIC.decode().lower()}"


def load(digest: str) -> tuple[np.ndarray, bytes] | None:
    """(types uint8 [V], ModelProto) kept under a digest, or None; a damaged file is None too, and is written anew."""
    try:
        with open(_path(digest), "rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError:
        return None
    body = data[_HEAD:]
    if len(data) > _LIMIT or len(body) < 4 or data[:_HEAD] != _MAGIC + hashlib.sha256(body).digest():
        return None
    (count,) = struct.unpack_from("<I", body)
    return np.frombuffer(body, np.uint8, count, 4), body[4 + count :]


def store(digest: str, types: np.ndarray, proto: bytes) -> None:
    """Keeps a vocabulary; does nothing where the cache folder is read-only or full."""
    if len(types) < _WORTH:
        return
    body = struct.pack("<I", len(types)) + types.tobytes() + proto
    path = _path(digest)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except OSError:
        # The cache is a convenience: without it the next start builds the vocabulary again.
        with contextlib.suppress(OSError):
            temporary.unlink()
