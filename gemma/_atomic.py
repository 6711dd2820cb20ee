# SPDX-License-Identifier: Apache-2.0
"""Saving so that a kill, a full disk or a loss of power leaves the old or the new, never a mixture.

A file or a folder is written under a temporary name in the same directory, everything is synced, a folder gets its
manifest last, and one rename makes it visible. What was there before is replaced only when asked, and at once. The
single effects on the disk are in `_disk.py`, manifests in `_manifest.py`; what is written is the caller's business.

    with atomic_folder(path) as folder:      # a Path; write anything below it, by any library
        (folder / "model.safetensors").write_bytes(...)

A writer holds a lock on its temporary, which the system drops when the process dies: so any later save may remove
what a dead process left, and never what a living one is writing. Two writers to one destination use two temporaries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gemma._disk import BUSY, UNLOCKED, Disk
from gemma._manifest import MANIFEST, Manifest, describe, latest_valid, steps, verify_manifest
from gemma.errors import GemmaError, SaveError

__all__ = [
    "MANIFEST",
    "Manifest",
    "atomic_file",
    "atomic_folder",
    "check_destination",
    "clean",
    "latest_valid",
    "publish",
    "steps",
    "verify_manifest",
    "write_manifest",
]

disk = Disk()  # tests put another object here

_TEMPORARY = re.compile(r"\..*\.\d+\.[0-9a-f]{12}\.gemma-tmp")
_LONGEST = 80  # bytes of the destination's name that its temporary repeats, for people who look at the folder
_BUFFER = 1 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_OF_WRITING = _NO_SPACE | {errno.EROFS, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name when the block ends, complete and synced.

    Args:
      path: of the file; folders above it are created.
      replace: put it in the place of an existing file. False: an existing name is an error.

    Yields:
      A buffered binary file (`write`, `seek`, `read`). An exception in the block removes it.

    Raises:
      SaveError: the destination exists or cannot be written, the disk is full. Nothing was changed.
    """
    path = check_destination(path, replace=replace, folder=False)
    with _reported(path):
        _prepare(path.parent)
        temporary = _new(path, disk.create)
    raw = _Raw(temporary.fd, str(temporary.path))
    file = io.BufferedRandom(raw, _BUFFER)
    try:
        with _reported(path, temporary.path):
            yield file
        with _reported(path):
            file.flush()
            _sync(temporary.path)
            _publish(temporary, path, disk.replace if replace else disk.move)
    finally:
        raw.ended = True
        file.detach()  # its descriptor is closed below: a late write must not reach another file of that number
        temporary.leave()


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Gives a folder to write into that appears under its name when the block ends, complete and synced.

    Args:
      path: of the folder; folders above it are created.
      replace: put it in the place of an existing folder, which is then deleted. False: an existing name is an error.
      manifest: write the sizes and SHA-256 of all files into `MANIFEST` (one pass of reading).

    Yields:
      The temporary folder. Only regular files and folders may be put into it. An exception in the block removes it.

    Raises:
      SaveError: the destination exists or cannot be written, the disk is full, or the file system cannot exchange two
        folders at once (`replace`). Nothing was changed.
    """
    path = check_destination(path, replace=replace, folder=True)
    with _reported(path):
        _prepare(path.parent)
        temporary = _new(path, disk.mkdir)
    try:
        with _reported(path, temporary.path):
            yield temporary.path
        with _reported(path):
            _settle(temporary.path, manifest)
            _publish(temporary, path, _exchange if replace else disk.move)
    finally:
        temporary.leave()


def publish(staged: str | os.PathLike[str], path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Gives a complete file or folder its final name, durably, as the ends of `atomic_file` and `atomic_folder` do.

    Args:
      staged: what was written, on the same file system as `path`; gone afterwards unless this raises. A folder without
        a manifest gets one.
      path: where it is to be seen. With `replace`, what is there is deleted.

    Raises:
      SaveError: as `atomic_folder`.
    """
    staged = Path(staged)
    is_folder = staged.is_dir()
    path = check_destination(path, replace=replace, folder=is_folder)
    with _reported(path):
        _prepare(path.parent)
        temporary = _Temporary(staged, None, UNLOCKED)
        if is_folder:
            _settle(staged, manifest=not (staged / MANIFEST).is_file())
            _publish(temporary, path, _exchange if replace else disk.move)
        else:
            _sync(staged)
            _publish(temporary, path, disk.replace if replace else disk.move)
    temporary.leave()


def _settle(folder: Path, manifest: bool) -> None:
    """Makes everything in a folder durable, the manifest last."""
    if manifest:
        _add_manifest(folder)
    else:
        describe(folder, _sync, hashes=False)
    for inner, _, _ in os.walk(folder, topdown=False):
        _sync(Path(inner))


def write_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Syncs every file of a folder and writes their sizes and SHA-256 into its `MANIFEST`, itself synced last."""
    folder = Path(folder)
    with _reported(folder):
        manifest = Manifest(describe(folder, _sync))
    with atomic_file(folder / MANIFEST, replace=True) as file:
        file.write(manifest.to_json())
    return manifest


def _add_manifest(folder: Path) -> None:
    """The same for a folder that nobody sees yet."""
    data = memoryview(Manifest(describe(folder, _sync)).to_json())
    path = folder / MANIFEST
    fd = disk.create(str(path))
    try:
        while data:
            data = data[disk.write(fd, data) :]
    finally:
        disk.close(fd)
    _sync(path)


def check_destination(path: str | os.PathLike[str], *, replace: bool = False, folder: bool | None = None) -> Path:
    """Refuses, before any work is done, a destination that could not be written; returns it as an absolute path.

    Args:
      path: of the file or folder to be.
      replace: whether an existing one may be replaced.
      folder: whether it will be a folder; None: not known yet.

    Raises:
      SaveError: it exists, is a symbolic link, has a name that no file should have, or lies in a place where nothing
        can be written.
    """
    given = os.fsdecode(path)
    path = Path(os.path.abspath(given))
    if Path(given).name in ("", "..") or "\0" in given or not path.name.isprintable():
        raise SaveError(f"{given!r:.200}: expected a path that ends in a name of printable characters")
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    except OSError as error:
        raise _error(path, error) from error
    if status is not None:
        _check_existing(path, status.st_mode, replace, folder)
    above = next(p for p in path.parents if os.path.lexists(p))
    if not above.is_dir():
        raise SaveError(f"{path}: {above} is not a folder; give another destination", errno.ENOTDIR)
    if not os.access(above, os.W_OK | os.X_OK):
        raise SaveError(f"{path}: {above} cannot be written to; give another destination", errno.EACCES)
    return path


def _check_existing(path: Path, mode: int, replace: bool, folder: bool | None) -> None:
    if stat.S_ISLNK(mode):
        raise SaveError(f"{path}: is a symbolic link to {os.readlink(path)}; save to that place itself", errno.ELOOP)
    if not replace:
        raise SaveError(
            f"Destination {path} already exists. Give another name, delete it, or ask for it to be replaced",
            errno.EEXIST,
        )
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or folder not in (None, stat.S_ISDIR(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a device or pipe"
        raise SaveError(
            f"{path}: expected {'a folder' if folder else 'a file'} to replace, found {kind}; give another destination",
            errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOTDIR,
        )


def clean(folder: str | os.PathLike[str]) -> list[Path]:
    """Removes the temporaries that dead processes left in a folder; returns them. Those in use are not touched."""
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for item in sorted(Path(folder).iterdir()):
            if _TEMPORARY.fullmatch(item.name) and not item.is_symlink():
                with contextlib.suppress(OSError):  # another process is removing it, or it is somebody else's
                    lock = disk.lock(str(item))
                    if lock not in (BUSY, UNLOCKED):
                        try:
                            _remove(item)
                        finally:
                            disk.close(lock)
                        removed.append(item)
    return removed


class _Raw(io.RawIOBase):
    """An open file whose writes go through `disk`; short writes are continued by the buffer above."""

    def __init__(self, fd: int, name: str):
        self._fd, self.name, self.ended = fd, name, False

    def readable(self) -> bool:
        return True

    writable = seekable = readable

    def write(self, data) -> int:
        if self.ended:  # what the buffer still held of a save that has failed
            return len(data)
        try:
            return disk.write(self._fd, memoryview(data).cast("B"))
        except OSError as error:
            error.filename = self.name  # so that `_reported` knows whose error it is
            raise

    def readinto(self, buffer) -> int:
        return os.readv(self._fd, [buffer])

    def seek(self, offset: int, whence: int = 0) -> int:
        return os.lseek(self._fd, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = os.lseek(self._fd, 0, os.SEEK_CUR) if size is None else size
        disk.truncate(self._fd, size)
        return size

    def fileno(self) -> int:
        return self._fd


@dataclasses.dataclass
class _Temporary:
    """What is being written: its path, its open file, and the lock that says that its writer is alive."""

    path: Path
    fd: int | None
    lock: int
    keep: bool = False

    def leave(self) -> None:
        """Removes what still has the temporary name, and gives the lock back."""
        try:
            if not self.keep and os.path.lexists(self.path):
                with contextlib.suppress(OSError):  # the next save cleans it; this error must not hide the first one
                    _remove(self.path)
        finally:
            for descriptor in (self.fd, self.lock):
                if descriptor is not None and descriptor >= 0:
                    disk.close(descriptor)


def _new(path: Path, make: Callable[[str], int | None]) -> _Temporary:
    """A new, locked temporary beside `path`."""
    shown = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    while True:
        temporary = path.with_name(f".{shown}.{os.getpid()}.{secrets.token_hex(6)}.gemma-tmp")
        made = make(str(temporary))
        lock = disk.lock(str(temporary))
        if lock != BUSY:
            return _Temporary(temporary, made, lock)
        if made is not None:  # a cleaner saw it in the instant before it was locked, and removes it: make another
            disk.close(made)


def _prepare(parent: Path) -> None:
    """Creates the folders above a destination, durably, and removes what dead processes left there."""
    absent = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    for folder in reversed(absent):
        with contextlib.suppress(FileExistsError):  # another process creates it as well
            disk.mkdir(str(folder))
        _sync(folder.parent)
    if not absent:
        clean(parent)


def _publish(temporary: _Temporary, path: Path, rename: Callable[[str, str], None]) -> None:
    """Makes it visible by one rename. An old folder has the temporary name then, and is removed once that is durable."""
    rename(str(temporary.path), str(path))
    try:
        _sync(path.parent)
    except OSError as error:
        temporary.keep = True  # a loss of power may bring the old name back: then the old folder must still be whole
        raise SaveError(
            f"{path}: was written, but {path.parent} could not be synced ({error.strerror}); it may not survive a loss "
            f"of power: save it again, to another place",
            error.errno,
        ) from error


def _exchange(temporary: str, path: str) -> None:
    """Puts a folder in the place of another, or where none is."""
    while True:
        try:
            return disk.exchange(temporary, path)
        except FileNotFoundError:  # nothing there to exchange it with
            with contextlib.suppress(FileExistsError):  # another process saved in this instant: that is to be replaced
                return disk.move(temporary, path)


def _sync(path: Path) -> None:
    disk.sync(str(path))


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process removes it as well
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return disk.unlink(str(path))
        with os.scandir(path) as found:
            names = [item.name for item in found]
        for name in names:
            _remove(path / name)
        disk.rmdir(str(path))


@contextlib.contextmanager
def _reported(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns the system's errors of saving into a SaveError.

    In the caller's own block (`temporary` given) these are a disk that is full or read-only, and what names the
    temporary; a connection that breaks there, or a source that cannot be read, is not an error of saving.
    """
    try:
        yield
    except GemmaError:
        raise
    except OSError as error:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
        ours = temporary is None or error.errno in _OF_WRITING
        if ours or any(name.startswith(str(temporary)) for name in names):
            raise _error(path, error) from error
        raise


def _error(path: Path, error: OSError) -> SaveError:
    why = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        problem, remedy = "no space left on the disk", "free some, or save to another place"
    elif error.errno in _REFUSED:
        problem, remedy = f"cannot be written ({why})", "give a place where you may write"
    elif error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        problem, remedy = "already exists: another process wrote it meanwhile", "give another name"
    elif error.errno == errno.EFBIG:
        problem, remedy = "a file grew beyond what the system allows", "raise that limit, or save in smaller files"
    elif error.errno == errno.ENOTSUP:
        problem, remedy = f"cannot be replaced ({why})", "save under a new name and delete the old folder yourself"
    else:
        problem, remedy = f"could not be written ({why})", "try again, or save to another place"
    return SaveError(f"{path}: {problem}; {remedy}. What was there before is unchanged", error.errno)
