# SPDX-License-Identifier: Apache-2.0
"""The manifest of a saved folder: every file's size and SHA-256, written last; and the newest step that agrees with it.

A folder whose manifest agrees is complete, byte for byte, as it was saved. Writing it safely is `_atomic.py`'s part.

    {"format": "gemma-manifest", "version": 1, "files": {"d/ab12": {"size": 5, "sha256": "..."}}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma._hf_json import parse_object
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, SaveError

MANIFEST = "gemma_manifest.json"
_FORMAT, _VERSION = "gemma-manifest", 1
_LIMIT = 1 << 24  # bytes of a manifest, some hundred thousand files
_DEEPEST = 64  # folders
_CHUNK = 1 << 22
_STEP = re.compile(r"(?:[A-Za-z]{1,32}[-_])?(\d{1,15})")


class DamagedCheckpointWarning(UserWarning):
    """A saved step is not what its manifest says, and an older one was taken."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file: `size` in bytes and `sha256` in hexadecimal."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a folder, by their path within it with "/" between the parts; the manifest itself is not listed."""

    files: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> bytes:
        files = {name: dataclasses.asdict(entry) for name, entry in sorted(self.files.items())}
        return json.dumps(dict(format=_FORMAT, version=_VERSION, files=files), indent=1).encode() + b"\n"


def entry_of(path: Path) -> Entry:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return Entry(size, digest.hexdigest())


def describe(folder: Path, settle: Callable[[Path], None], *, hashes: bool = True) -> dict[str, Entry]:
    """Every file of a folder that is being saved, each first made durable by `settle`."""
    files = {}
    for name, mode in _walk(folder):
        if not stat.S_ISREG(mode):
            raise SaveError(f"{folder / name}: only files and folders can be saved, this is a link or a device")
        if name != MANIFEST:
            settle(folder / name)
            if hashes:
                files[name] = entry_of(folder / name)
    return files


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Path within the folder and mode of all that is no folder, sorted, following no link."""
    if prefix.count("/") > _DEEPEST:
        raise CheckpointError(f"{folder}: more than {_DEEPEST} folders deep; expected a saved checkpoint")
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        mode = item.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(folder / item.name, f"{prefix}{item.name}/")
        else:
            yield prefix + item.name, mode


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder, as it is; nothing is compared.

    Raises:
      CheckpointNotFound: the folder has none.
      FormatError: it is no manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        with open(path, "rb") as file:
            raw = file.read(_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound(
            f"{path}: no such file; the folder was not saved completely, or not by gemmakit"
        ) from None
    except OSError as error:
        raise CheckpointNotFound(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > _LIMIT:
        raise FormatError(path, _LIMIT, f"expected a manifest of at most {_LIMIT} bytes")
    values = parse_object(raw, path)
    if values.get("format") != _FORMAT or values.get("version") != _VERSION or len(values) != 3:
        raise FormatError(path, 0, f"expected format {_FORMAT!r}, version {_VERSION} and files")
    files = values.get("files")
    if not isinstance(files, dict):
        raise FormatError(path, 0, "files: expected an object")
    return Manifest({name: _entry(path, name, value) for name, value in files.items()})


def _entry(path: Path, name: str, value: Any) -> Entry:
    good = isinstance(value, dict) and set(value) == {"size", "sha256"}
    good = good and type(value["size"]) is int and 0 <= value["size"] < 1 << 63
    if not good or not isinstance(value["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", value["sha256"]):
        raise FormatError(path, None, f"{name[:200]!r}: expected a size and 64 hexadecimal digits of SHA-256")
    return Entry(**value)


def verify_manifest(folder: str | os.PathLike[str], *, hashes: bool = True) -> Manifest:
    """Compares a folder with its manifest, completely, and lists every difference.

    Args:
      folder: as saved.
      hashes: read every file and compare its SHA-256; False: only names and sizes.

    Raises:
      CheckpointNotFound: no manifest there.
      FormatError: the manifest is damaged.
      CheckpointError: files are missing, are there in addition, or differ.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    found = dict(_walk(folder))
    found.pop(MANIFEST, None)
    problems = [f"missing: {name[:200]}" for name in manifest.files if name not in found]
    problems += [f"unexpected: {name[:200]}" for name in found if name not in manifest.files]
    for name, mode in found.items():  # names come from the disk: one in the manifest is never opened
        if name in manifest.files:
            problem = _difference(folder / name, mode, manifest.files[name], hashes)
            problems += [f"{name[:200]}: {problem}"] if problem else []
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"{folder}: not what its {MANIFEST} says; take another copy:{lines}")
    return manifest


def _difference(path: Path, mode: int, expected: Entry, hashes: bool) -> str:
    if not stat.S_ISREG(mode):
        return "expected a regular file, got a link or a device"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"expected {expected.size} bytes, got {size}"
        got = entry_of(path) if hashes else expected
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if got == expected else f"expected SHA-256 {expected.sha256}, got {got.sha256}"


def steps(root: str | os.PathLike[str]) -> dict[int, Path]:
    """The steps saved below a folder, number to path, ascending: subfolders named `7`, `step_7`, `ckpt_7` or `run-7`.

    Of two that have the same number the shortest name counts. A folder that is not there has no steps.
    """
    found: dict[int, Path] = {}
    try:
        items = sorted(Path(root).iterdir(), key=lambda item: (len(item.name), item.name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for item in items:
        match = _STEP.fullmatch(item.name)
        if match and item.is_dir():
            found.setdefault(int(match[1]), item)
    return dict(sorted(found.items()))


def latest_valid(root: str | os.PathLike[str], *, hashes: bool = True) -> Path | None:
    """The newest step below a folder that is what its manifest says; None if there is none.

    A newer one that is damaged or was not completed is passed over with a DamagedCheckpointWarning.

    Args:
      root: the folder that holds the steps.
      hashes: as in `verify_manifest`.
    """
    for number, folder in reversed(steps(root).items()):
        try:
            verify_manifest(folder, hashes=hashes)
            return folder
        except (CheckpointError, OSError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines())
            warnings.warn(
                f"step {number} is not usable, an older one is looked for: {reason}",
                DamagedCheckpointWarning,
                stacklevel=2,
            )
    return None
