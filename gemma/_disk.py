# SPDX-License-Identifier: Apache-2.0
"""Every effect that saving has on a disk, one method each, so that a test can stop, fail or record any single one.

`_atomic.py` decides the order of these calls; nothing here knows what is being saved. The two renames that Python
lacks (refuse an existing name; exchange two names at once) are system calls, reached through ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys

try:
    import fcntl
except ImportError:  # a system without advisory locks: temporaries of dead processes are then left alone
    fcntl = None

NOREPLACE, EXCHANGE = "noreplace", "exchange"
BUSY, UNLOCKED = -1, -2  # what `Disk.lock` returns instead of a descriptor
_AT_FDCWD = -100
_FLAGS = {"linux": {NOREPLACE: 1, EXCHANGE: 2}, "darwin": {NOREPLACE: 4, EXCHANGE: 2}}
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class Disk:
    """The operating system. Paths are strings; errors are the system's OSError."""

    def create(self, path: str) -> int:
        """A new file, open for reading and writing; an existing name is an error."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def write(self, fd: int, data) -> int:
        """Writes some of `data` (memoryview); returns how many bytes."""
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, path: str) -> None:
        """Makes a file's content, or a folder's list of names, survive a loss of power."""
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            if hasattr(fcntl, "F_FULLFSYNC"):  # where fsync stops at the drive's own cache
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            else:
                os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot sync a folder and keep its order themselves; a file must be synced.
            if error.errno not in _UNSUPPORTED or not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise
        finally:
            os.close(fd)

    def move(self, source: str, target: str) -> None:
        """Renames; an existing target is an error (FileExistsError)."""
        if _rename(source, target, NOREPLACE):
            return
        if not os.path.isdir(source):
            os.link(source, target)  # fails if the name exists; then the first name goes
            os.unlink(source)
            return
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)  # a folder with something in it is never replaced by this

    def replace(self, source: str, target: str) -> None:
        """Renames a file over another at once."""
        os.replace(source, target)

    def exchange(self, one: str, other: str) -> None:
        """Exchanges two names at once; OSError ENOTSUP where the system cannot."""
        if _rename(one, other, EXCHANGE):
            return
        if not os.path.lexists(other):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), other)
        raise OSError(errno.ENOTSUP, "this file system cannot exchange two folders at once", other)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def lock(self, path: str) -> int:
        """Takes the lock of a file or folder until the returned descriptor is closed.

        Returns BUSY if another process has it or the path is gone, UNLOCKED where there are no locks.
        """
        if fcntl is None:
            return UNLOCKED
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return BUSY
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else removed, and made anew by somebody else
                return fd
            answer = BUSY
        except OSError as error:
            answer = BUSY if error.errno in (errno.EWOULDBLOCK, errno.ENOENT) else UNLOCKED
        os.close(fd)
        return answer

    def close(self, fd: int) -> None:
        os.close(fd)


def _rename(source: str, target: str, kind: str) -> bool:
    """A rename with a flag; False where the system or the file system does not have it."""
    flags = _FLAGS.get(sys.platform)
    if flags is None:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    one, other = os.fsencode(source), os.fsencode(target)
    if sys.platform == "darwin":
        call = getattr(library, "renamex_np", None)
        done = call and call(one, other, ctypes.c_uint(flags[kind]))
    else:
        call = getattr(library, "renameat2", None)
        done = call and call(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(flags[kind]))
    if call is None:
        return False
    code = ctypes.get_errno()
    if done == 0:
        return True
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), source, None, target)
