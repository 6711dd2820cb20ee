# SPDX-License-Identifier: Apache-2.0
"""The small files around a saved step: what it says about itself, the lock of a run's folder, room on the disk, removal.

No array is read or written here: `_checkpoints_state.py`. The rules are `_checkpoints.py`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import shutil
import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gemma import _atomic
from gemma._disk import BUSY, UNLOCKED
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, SaveError, TrainingError
from gemma.fit import format_bytes

ABOUT = "step.json"
_FORMAT, _VERSION = "gemma-step", 1
_LIMIT = 1 << 28  # bytes of `step.json`: the history and the buffers of a packing loader are in it
_DEEPEST = 64
_OVERHEAD = 1 << 20  # bytes of a step besides its arrays, roughly

Spec = tuple[str, tuple[int, ...]]  # dtype and shape of a leaf


@dataclasses.dataclass(frozen=True)
class About:
    """What a step says about itself; `extras` has one entry, or one for each process."""

    step: int
    metrics: dict[str, float]
    fingerprint: dict[str, Any] | None
    leaves: dict[str, Spec]
    extras: list[dict[str, Any]]


def write_about(folder: Path, about: About) -> None:
    """Writes `step.json`; that it is on the disk is its folder's business."""
    text = json.dumps(dict(format=_FORMAT, version=_VERSION) | dataclasses.asdict(about))
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read_about(folder: Path) -> About:
    """Reads `step.json`.

    Raises:
      CheckpointNotFound: there is none.
      FormatError: it is no such file.
    """
    path = folder / ABOUT
    try:
        with open(path, "rb") as file:
            raw = file.read(_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound(f"{path}: no such file; {folder.name} is not a step of a training run") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        values = json.loads(raw) if len(raw) <= _LIMIT else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise FormatError(path, 0, f"expected a JSON object of format {_FORMAT!r}")
    version = values.pop("version", None)
    if version != _VERSION:
        raise FormatError(path, 0, f"expected version {_VERSION}, got {version!r:.40}; another gemmakit wrote it")
    try:
        about = About(**values)
        leaves = {
            str(name): (str(dtype), tuple(int(n) for n in shape)) for name, (dtype, shape) in about.leaves.items()
        }
        good = isinstance(about.step, int) and all(isinstance(v, dict) for v in about.extras) and about.extras
        metrics = {str(name): float(value) for name, value in about.metrics.items()}
        good = good and isinstance(about.fingerprint, dict | None)
    except (TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise FormatError(
            path, 0, f"expected step, metrics, fingerprint, leaves and extras, got {sorted(values)!r:.200}"
        )
    return dataclasses.replace(about, leaves=leaves, metrics=metrics)


def plain(value: Any, path: str, depth: int = 0) -> Any:
    """The value as JSON keeps it: numpy numbers become Python's, tuples become lists.

    Raises:
      TrainingError: something that JSON would change or refuse, with its place.
    """
    if depth > _DEEPEST:
        raise TrainingError(f"{path:.200}: more than {_DEEPEST} levels deep; expected JSON values")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    kind = "a mapping with keys that are no strings" if isinstance(value, Mapping) else type(value).__name__
    raise TrainingError(f"{path}: expected JSON values (numbers, strings, lists, dictionaries), got {kind}")


def differences(saved: Any, own: Any, path: str = "") -> list[str]:
    """Lines "field: saved 1, this run has 2", for every field in which two JSON values differ."""
    if isinstance(saved, dict) and isinstance(own, dict):
        lines = []
        for key in [*saved, *(key for key in own if key not in saved)]:
            name = f"{path}.{key}" if path else key
            if key not in own:
                lines.append(f"{name}: saved {saved[key]!r:.100}, this run has none")
            elif key not in saved:
                lines.append(f"{name}: saved none, this run has {own[key]!r:.100}")
            else:
                lines += differences(saved[key], own[key], name)
        return lines
    same = type(saved) is type(own) and json.dumps(saved) == json.dumps(own)  # as text: NaN equals itself
    return [] if same else [f"{path}: saved {saved!r:.100}, this run has {own!r:.100}"]


class Lock:
    """The right to write into a folder, for this process; held until `release`, or until the process is dead."""

    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, int], Lock]] = weakref.WeakValueDictionary()
    _guard = threading.Lock()

    def __init__(self, identity: tuple[int, int], descriptor: int):
        self._identity, self._descriptor, self._users = identity, descriptor, 0
        self._end = weakref.finalize(self, _close, descriptor)

    @classmethod
    def take(cls, folder: Path) -> Lock:
        """The lock of a folder; that which this process has already, if it has it.

        Raises:
          SaveError: another process has it.
        """
        with cls._guard:
            held = cls._held.get(_identity(folder))
            if held is None:
                descriptor = _atomic.disk.lock(str(folder))
                if descriptor == BUSY:
                    raise SaveError(
                        f"{folder}: another process saves its steps there; wait for its end, or give another folder",
                        errno.EBUSY,
                    )
                held = cls(_identity(folder), descriptor)
                cls._held[held._identity] = held
            held._users += 1
            return held

    def holds(self, folder: Path) -> bool:
        """Whether it is (still) this folder's: one that was deleted and made anew is another."""
        try:
            return _identity(folder) == self._identity
        except OSError:
            return False

    def release(self) -> None:
        with self._guard:
            self._users -= 1
            if not self._users:
                self._held.pop(self._identity, None)
                self._end()


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _close(descriptor: int) -> None:
    if descriptor != UNLOCKED:
        with contextlib.suppress(OSError):  # closed already: the lock is given back
            _atomic.disk.close(descriptor)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that could not be written, before any work is done.

    Raises:
      SaveError: see `check_destination`; or it is there and cannot be written.
    """
    path = _atomic.check_destination(folder, replace=True, folder=True)
    if path.exists() and not os.access(path, os.W_OK | os.X_OK):
        raise SaveError(f"{path}: cannot be written to; give another folder for the checkpoints", errno.EACCES)


def make_folder(folder: Path) -> None:
    """Creates a folder and those above it, durably."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(absent):
            with contextlib.suppress(FileExistsError):  # another process creates it as well
                _atomic.disk.mkdir(str(path))
            _atomic.disk.sync(str(path.parent))
    except OSError as error:
        raise SaveError(f"{folder}: cannot be created ({error.strerror}); give another folder", error.errno) from error


def check_room(folder: Path, size: int, keep: int | None, held: int) -> None:
    """Compares the disk's free bytes with what the run will save: an error if not one step fits beside those held.

    Args:
      folder: where.
      size: bytes of the arrays of a step; they are not compressible as a rule.
      keep: how many steps are kept; None: all.
      held: how many are there already.
    """
    free, one = shutil.disk_usage(folder).free, size + _OVERHEAD
    if free < one:
        raise SaveError(
            f"{folder}: a checkpoint of this run takes {format_bytes(one)} and the disk has {format_bytes(free)} left; "
            f"free some, give a folder on another disk, or train less (a lower rank, no EMA)",
            errno.ENOSPC,
        )
    more = max(0, (keep or 1) + 1 - held)  # a new one is complete before the oldest goes
    if free < more * one:
        warnings.warn(
            f"{folder}: the disk has {format_bytes(free)} left, and keep={keep} takes up to {format_bytes(more * one)} "
            f"more; a later checkpoint may fail",
            UserWarning,
            stacklevel=4,
        )


def remove(folder: Path) -> None:
    """Removes a saved step: at once under its name, then file by file; a kill leaves what the next save removes."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(6)}.gemma-tmp")
    _atomic.disk.move(str(folder), str(gone))
    _atomic.clean(folder.parent)
