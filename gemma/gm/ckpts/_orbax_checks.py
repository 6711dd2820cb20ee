# SPDX-License-Identifier: Apache-2.0
"""What is checked about an Orbax folder before an array of it is read: its metadata, names, chunks, sizes and claims.

The checkpoint itself is `_orbax.py`. Every failure is an error that names the folder and what is wrong in it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma._hf_json import parse_object
from gemma._manifest import MANIFEST, read_manifest
from gemma._orbax_folder import METADATA, OCDBT_MANIFEST
from gemma.checkpoint import TensorInfo
from gemma.errors import CheckpointNotFound, FormatError
from gemma.gm.ckpts._compat import Keys

METADATA_LIMIT = 1 << 24  # bytes; the largest of the family has 300 kB, a trainer's state three times that
MOST_ARRAYS, MOST_CHUNKS, _LONGEST_NAME = 1 << 16, 1 << 22, 1024
# A tree may claim this many times the bytes of its files, and a little for small ones: what zstd reaches on zeros.
_RATIO, _SMALL = 1 << 15, 1 << 30
_CHUNK = re.compile(r"(.+?)/(?:c(?:/\d+)*|\d+(?:\.\d+)*)")  # a key of a chunk; names of arrays may hold slashes
_EMPTY = {"Dict", "None", "List", "Tuple", "NamedTuple"}


def broken(folder: Path, what: str, error: Exception) -> FormatError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return FormatError(folder, None, f"{what}; the checkpoint is damaged or incomplete, take another copy ({reason})")


def read_metadata(folder: Path) -> dict[str, Any]:
    """What `_METADATA` says: keys of the arrays (None without it), empty branches, which driver and store."""
    path = folder / METADATA
    ocdbt = (folder / OCDBT_MANIFEST).is_file()
    try:
        with open(path, "rb") as file:
            raw = file.read(METADATA_LIMIT + 1)
    except FileNotFoundError:
        return dict(keys=None, empty=[], ocdbt=ocdbt, driver="zarr", complete=False, custom={})
    except OSError as error:
        raise CheckpointNotFound(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > METADATA_LIMIT:
        raise FormatError(path, METADATA_LIMIT, f"expected at most {METADATA_LIMIT} bytes")
    values = parse_object(raw, path)
    tree = values.get("tree_metadata")
    if not isinstance(tree, dict) or not 0 < len(tree) <= MOST_ARRAYS:
        raise FormatError(path, None, f"tree_metadata: expected an object of 1 to {MOST_ARRAYS} leaves")
    keys, empty = [], []
    for entry in tree.values():
        found, kind = _entry(path, entry)
        (empty if kind in _EMPTY else keys).append(found)
    if len(set(keys)) != len(keys):
        raise FormatError(path, None, "a leaf is named twice")
    if values.get("use_ocdbt", True) is True and not ocdbt:
        raise FormatError(folder, None, f"{METADATA} says that arrays are in {OCDBT_MANIFEST}, which is missing")
    custom = values.get("custom_metadata")
    return dict(
        keys=keys,
        empty=empty,
        ocdbt=ocdbt,
        driver="zarr3" if values.get("use_zarr3") is True else "zarr",
        complete=values.get("store_array_data_equal_to_fill_value") is True,
        custom={"custom_metadata": custom} if isinstance(custom, dict) else {},
    )


def _entry(path: Path, entry: Any) -> tuple[Keys, str]:
    try:
        found = tuple(part["key"] for part in entry["key_metadata"])
        kind = entry["value_metadata"]["value_type"]
    except (TypeError, KeyError):
        raise FormatError(path, None, "tree_metadata: expected key_metadata and value_metadata for each leaf") from None
    if not found or not all(isinstance(key, str) for key in (*found, kind)):
        raise FormatError(path, None, "tree_metadata: expected names as keys")
    _check_name(path, found)
    return found, kind


def _check_name(path: Path, keys: Keys) -> None:
    """Names become paths in a store, which without OCDBT is a folder: none may lead out of it."""
    joined = "/".join(keys)
    parts = joined.split("/")
    if len(joined) > _LONGEST_NAME or not joined.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise FormatError(
            path, None, f"{joined[:80]!r}: not the name of a leaf; expected printable words between slashes"
        )


def keys_of(stored: Iterable[str], folder: Path) -> list[Keys]:
    """The arrays of a folder without `_METADATA`: a name's parts are joined by dots."""
    names = {key.rpartition("/")[0] for key in stored if key.endswith(("/.zarray", "/zarr.json"))}
    keys = [tuple(name.split(".")) for name in sorted(names)]
    if not keys or len(keys) > MOST_ARRAYS:
        raise FormatError(folder, None, f"expected 1 to {MOST_ARRAYS} arrays, found {len(keys)}")
    for key in keys:
        _check_name(folder, key)
    return keys


def check_chunks(arrays: Mapping[Keys, Any], stored: Iterable[str], folder: Path) -> None:
    """Every chunk of every array must be there: a lost one would read as zeros.

    Args:
      arrays: keys to the opened TensorStore.
      stored: all keys of the store: "a.b/.zarray", and a chunk's "a.b/0.1" or, in zarr 3, "a.b/c/0/1".
      folder: for the error.
    """
    counts: dict[str, int] = {}
    for key in stored:
        chunk = _CHUNK.fullmatch(key)
        if chunk:
            counts[chunk[1]] = counts.get(chunk[1], 0) + 1
    missing = []
    for keys, store in arrays.items():
        parts = store.chunk_layout.write_chunk.shape or ()  # None: a single number
        expected = math.prod(-(-size // max(1, part)) for size, part in zip(store.shape, parts, strict=True))
        got = counts.get(".".join(keys), 0)
        if got < expected:
            missing.append(f"{'/'.join(keys)[:200]}: {expected} chunks, {got} stored")
    if missing:
        lines = "".join(f"\n  {line}" for line in missing)
        raise FormatError(folder, None, f"parts of arrays are missing; take another copy:{lines}")


def check_sizes(path: Path) -> None:
    """Where gemmakit saved it: every file is there in its full length. (Hashes are `verify_manifest`'s.)"""
    if not (path / MANIFEST).is_file():
        return
    wrong = []
    for name, entry in read_manifest(path).files.items():
        parts = name.split("/")
        try:
            size = None if ".." in parts or name.startswith("/") else os.stat(path / name).st_size
        except OSError:
            size = None
        if size != entry.size:
            wrong.append(f"{name[:200]}: expected {entry.size} bytes, {'missing' if size is None else f'got {size}'}")
    if wrong:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise FormatError(path, None, f"not what was saved; take another copy:{lines}")


def check_claim(infos: Iterable[TensorInfo], folder: Path) -> None:
    """The claimed bytes must be in proportion to the bytes that are there, before any of them is allocated."""
    claimed = sum(info.nbytes for info in infos)
    present = sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
    if claimed > _SMALL + _RATIO * present:
        raise FormatError(folder, None, f"claims arrays of {claimed} bytes, but its files have {present}")
