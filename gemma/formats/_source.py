# SPDX-License-Identifier: Apache-2.0
"""One open file: its size checked on opening, bytes read by position or through a read-only map.

Knows nothing of any format; `gguf.py` and `safetensors.py` parse through it, `gemma.checkpoint` reads tensors through
it. Positional reads never meet SIGBUS. A map does when another process truncates the file in place (replacing it by
renaming is safe: the map keeps the old file), so its size is asked again before every view.
"""

from __future__ import annotations

import mmap as _mmap
import os
import stat
from pathlib import Path

import numpy as np

from gemma.errors import CheckpointNotFound, FormatError


class Source:
    """A regular file opened for reading.

    Attributes:
      path: the file.
      size: its bytes when it was opened; nothing beyond is ever addressed.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True):
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block us
        except FileNotFoundError:
            raise CheckpointNotFound(f"{self.path}: no such file; check the path") from None
        except ValueError:
            raise CheckpointNotFound(f"{str(self.path)!r:.200}: no file can have this name") from None
        except OSError as error:
            raise CheckpointNotFound(f"{self.path}: cannot be opened ({error.strerror})") from None
        self._map: _mmap.mmap | None = None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(self.path, None, f"expected a regular file, got {_kind(status.st_mode)}")
            self.size = status.st_size
            if mmap and self.size:
                self._map = _mmap.mmap(self._fd, self.size, access=_mmap.ACCESS_READ)
        except BaseException:
            self.close()
            raise

    @property
    def mapped(self) -> bool:
        return self._map is not None

    def buffer(self) -> memoryview | None:
        """The whole mapped file, or None without a map."""
        self._check_size()
        return None if self._map is None else memoryview(self._map)

    def read(self, offset: int, count: int) -> np.ndarray:
        """A fresh uint8 array of `count` bytes at `offset`."""
        out = np.empty(count, np.uint8)
        self.read_into(offset, out)
        return out

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous uint8 array with the bytes at `offset`; a file that has shrunk is a FormatError."""
        self._check_open()
        target, done = memoryview(out).cast("B"), 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if got <= 0:
                raise FormatError(self.path, offset + done, "the file ends here; it was truncated after it was opened")
            done += got

    def view(self, offset: int, count: int) -> np.ndarray:
        """A read-only uint8 array of `count` bytes: a view of the map, or a copy when the file is not mapped."""
        if self._map is None:
            out = self.read(offset, count)
            out.flags.writeable = False
            return out
        self._check_size()
        return np.frombuffer(self._map, np.uint8, count, offset)

    def release(self, offset: int, count: int) -> None:
        """Tells the system that these mapped pages are done with; they leave the resident set, never the file."""
        if self._map is not None and hasattr(_mmap, "MADV_DONTNEED"):
            start = -(-offset // _mmap.PAGESIZE) * _mmap.PAGESIZE
            if offset + count - start >= _mmap.PAGESIZE:
                self._map.madvise(_mmap.MADV_DONTNEED, start, offset + count - start)

    def close(self) -> None:
        """Closes the file. Views that are still alive keep their pages; new reads raise ValueError."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:  # views are alive: the map ends with the last of them
                self._map = None

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.path}: read after close()")

    def _check_size(self) -> None:
        self._check_open()
        size = os.fstat(self._fd).st_size
        if size < self.size:
            raise FormatError(
                self.path, size, f"the file ends here; it had {self.size} bytes when opened: do not truncate it in use"
            )


def _kind(mode: int) -> str:
    """What is not a regular file, in words."""
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"
