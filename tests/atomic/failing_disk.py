# SPDX-License-Identifier: Apache-2.0
"""A disk that dies, fails or loses power at a chosen operation. Used by the tests of saving; see gemma/_disk.py.

`Dying(n)` raises at operation n and at every later one, as a killed process does nothing more. `Failing(n, code)` fails
once, as a full disk does. `Recording()` keeps what has become durable, to show what a loss of power leaves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from gemma import _atomic
from gemma._disk import Disk

EFFECTS = ("create", "mkdir", "write", "truncate", "sync", "move", "replace", "exchange", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing works afterwards."""


class Counting(Disk):
    """Counts the effects in `self.count`; `before` is asked first. Descriptors are remembered, to be closed by `end`."""

    def __init__(self):
        self.count, self.open, self.log = 0, [], []

    def before(self, name: str, args: tuple) -> None:
        pass

    def lock(self, path):
        fd = super().lock(path)
        self.open += [fd] if fd >= 0 else []
        return fd

    def create(self, path):
        self._effect("create", (path,))
        fd = super().create(path)
        self.open.append(fd)
        return fd

    def close(self, fd):
        if fd in self.open:
            self.open.remove(fd)
            super().close(fd)

    def end(self):
        """What the system does for a dead process: its descriptors are closed, its locks given back."""
        for fd in self.open:
            os.close(fd)
        self.open = []

    def _effect(self, name, args):
        self.count += 1
        self.before(name, args)
        self.log.append((name, *args))


def _counted(name):
    def method(self, *args):
        self._effect(name, args)
        return getattr(Disk, name)(self, *args)

    return method


for _name in EFFECTS:
    if _name != "create":
        setattr(Counting, _name, _counted(_name))


class Dying(Counting):
    """Killed just before effect number `at`; with `torn`, a write at that point still puts half of its bytes down."""

    def __init__(self, at: int, torn: bool = False):
        super().__init__()
        self.at, self.torn = at, torn

    def before(self, name, args):
        if self.count >= self.at:
            if self.torn and self.count == self.at and name == "write":
                Disk.write(self, args[0], args[1][: len(args[1]) // 2])
            raise Killed

    def close(self, fd):
        if self.count < self.at:
            super().close(fd)


class Failing(Counting):
    """Effect number `at` fails with the system's error `code`; with `forever`, so does every later one that adds data."""

    def __init__(self, at: int, code: int, forever: bool = False):
        super().__init__()
        self.at, self.code, self.forever = at, code, forever

    def before(self, name, args):
        again = self.forever and self.count > self.at and name in ("create", "mkdir", "write")
        if self.count == self.at or again:
            raise OSError(self.code, os.strerror(self.code))


class Short(Counting):
    """Writes at most seven bytes at a time, as a pipe or a full quota may."""

    def write(self, fd, data):
        self._effect("write", (fd, data))
        return Disk.write(self, fd, data[:7])


@contextlib.contextmanager
def on(disk):
    """Saves through `disk`; a Killed ends the block."""
    before, _atomic.disk = _atomic.disk, disk
    try:
        yield disk
    except Killed:
        pass
    finally:
        _atomic.disk = before
        if isinstance(disk, Counting):
            disk.end()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, temporaries of saving left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not any(part.endswith(".gemma-tmp") for part in path.relative_to(folder).parts)
    }


def temporaries(folder: Path) -> list[Path]:
    return [path for path in Path(folder).rglob("*.gemma-tmp")]


class Power:
    """What survives a loss of power, kept beside a real folder: only synced content, only names of synced folders.

    `eager=True` is the other extreme that file systems show: every rename survives at once, data that was not synced
    is lost all the same.
    """

    def __init__(self, root: Path, eager: bool):
        self.root, self.eager = root, eager
        self.data: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.kinds: dict[int, bool] = {}
        for folder, _, files in os.walk(root):
            self.sync(folder)
            for name in files:
                self.sync(os.path.join(folder, name))

    def sync(self, path) -> None:
        status = os.stat(path)
        if os.path.isdir(path):
            self.kinds[status.st_ino] = True
            self.names[status.st_ino] = {item.name: item.inode() for item in os.scandir(path)}
            for item in os.scandir(path):
                self.kinds.setdefault(item.inode(), item.is_dir(follow_symlinks=False))
        else:
            self.kinds[status.st_ino] = False
            self.data[status.st_ino] = Path(path).read_bytes()

    def look(self) -> None:
        """After each effect: the eager kind keeps all names as they are now."""
        if self.eager:
            for folder, _, _ in os.walk(self.root):
                self.sync(folder)

    def restore(self, target: Path) -> None:
        """Builds in `target` what a reader finds after the loss of power."""
        shutil.rmtree(target, ignore_errors=True)
        self._build(os.stat(self.root).st_ino, target)

    def _build(self, inode: int, target: Path) -> None:
        if not self.kinds[inode]:
            target.write_bytes(self.data.get(inode, b""))
            return
        target.mkdir()
        for name, child in self.names.get(inode, {}).items():
            self._build(child, target / name)


class Recording(Counting):
    """Tells a `Power` of every sync, and stops at effect number `at`."""

    def __init__(self, power: Power, at: int):
        super().__init__()
        self.power, self.at = power, at

    def before(self, name, args):
        self.power.look()
        if self.count >= self.at:
            raise Killed

    def sync(self, path):
        self._effect("sync", (path,))
        self.power.sync(path)

    def close(self, fd):
        if self.count < self.at:
            super().close(fd)
