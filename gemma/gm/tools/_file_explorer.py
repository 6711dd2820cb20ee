# SPDX-License-Identifier: Apache-2.0
"""`FileExplorer`: reads text files and lists folders below one folder, and nothing else. It never writes.

A path is walked from the root's file descriptor, one name at a time, and no symbolic link is followed anywhere, so that
nothing that changes on the way (a folder swapped for a link) leads out. `..` is refused, not interpreted.
"""

from __future__ import annotations

import codecs
import dataclasses
import errno
import heapq
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath

from gemma.errors import ToolError
from gemma.gm.tools._tools import Example, Tool

_MAX_PATH = 4096  # characters
_SCANNED = 100_000  # entries of a folder that are looked at; beyond it, the list need not begin with the first names
_LINKS = (errno.ENOTDIR, errno.ELOOP, errno.EMLINK)  # what O_NOFOLLOW and O_DIRECTORY say of links, by system
_COMMON = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a pipe must not wait for a writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileExplorer(Tool):
    """Lets the model read text files and list folders below `root`.

    Symbolic links are shown by `ls` and never followed. A hard link is a file like any other: whoever may create files
    below the root decides what can be read there.

    Attributes:
      root: a folder; what it is called now, the one meant at construction stays the root. Default: the current folder.
      max_bytes: longer files are cut, with a mark.
      max_entries: longer folders are cut, with a mark.
    """

    root: str | os.PathLike[str] = "."
    max_bytes: int = 64_000
    max_entries: int = 500

    DESCRIPTION = "Reads a text file (`cat`) or lists a folder (`ls`). It cannot write, and sees one folder only."
    EXAMPLE = Example(
        query="What do my notes say about shopping?",
        thought="The file has to be read.",
        tool_kwargs={"method": "cat", "path": "notes/shopping.txt"},
        tool_kwargs_doc={"method": "cat OR ls", "path": "<PATH BELOW THE ROOT>"},
        result="milk, bread",
        answer="You want to buy milk and bread.",
    )
    KEYWORDS = ("file", "directory", "folder")

    def __post_init__(self):
        if not isinstance(self.root, (str, os.PathLike)):
            raise ToolError(f"root: expected the path of a folder, got {type(self.root).__name__}")
        given = Path(os.path.abspath(self.root))
        real = Path(os.path.realpath(given))
        if not real.is_dir():
            raise ToolError(f"root: expected a folder, {os.fspath(self.root)!r} is none")
        if self.max_bytes < 1 or self.max_entries < 1:
            raise ToolError(f"expected max_bytes and max_entries above 0, got {self.max_bytes} and {self.max_entries}")
        object.__setattr__(self, "root", real)
        self.__dict__["_spellings"] = (given.parts, real.parts)

    def call(self, method: str, path: str = ".") -> str:
        """Reads or lists.

        Args:
          method: "cat" for the text of a file, "ls" for the names in a folder (folders end with "/").
          path: relative to the root, or absolute below it; without "..".

        Raises:
          ToolError: (a ValueError) the path leaves the root, is not there, or is not what the method reads.
        """
        if method not in ("cat", "ls"):
            raise ToolError(f"method: expected cat or ls, got {method!r:.80}")
        names = self._names(path)
        with self._opened(names, path, folder=method == "ls") as file:
            return self._list(file, path) if method == "ls" else self._read(file, path)

    def _names(self, path: str) -> tuple[str, ...]:
        """The names to walk from the root on."""
        if not isinstance(path, str) or not path or len(path) > _MAX_PATH:
            raise ToolError(f"path: expected a path of at most {_MAX_PATH} characters, got {path!r:.80}")
        if "\0" in path:
            raise ToolError(f"path: it holds a NUL character: {path!r:.80}")
        parts = PurePosixPath(path).parts
        if ".." in parts:
            raise ToolError(f"path: '..' is not allowed: {path!r:.80}")
        if not path.startswith("/"):
            return parts
        for spelling in self.__dict__["_spellings"]:
            if parts[: len(spelling)] == spelling:
                return parts[len(spelling) :]
        raise ToolError(f"path: {path!r:.80} is not below the root; give a path relative to it, such as '.'")

    @contextmanager
    def _opened(self, names: tuple[str, ...], path: str, *, folder: bool) -> Iterator[int]:
        """The file descriptor of what the names lead to, checked to be a regular file or a folder."""
        current = None
        try:
            current = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for n, name in enumerate(names):
                inner = n < len(names) - 1 or folder
                below = os.open(name, _COMMON | (os.O_DIRECTORY if inner else 0), dir_fd=current)
                os.close(current)
                current = below
            mode = os.fstat(current).st_mode
            if folder != stat.S_ISDIR(mode) or not (folder or stat.S_ISREG(mode)):
                wanted = "a folder" if folder else "a regular file"
                raise ToolError(f"path: {path!r:.80} is not {wanted}")
            yield current
        except (OSError, ValueError) as error:
            if isinstance(error, ToolError):
                raise
            raise ToolError(f"path: {path!r:.80} cannot be opened: {_reason(error)}") from error
        finally:
            if current is not None:
                os.close(current)

    def _read(self, file: int, path: str) -> str:
        size = os.fstat(file).st_size
        data = b""
        while len(data) <= self.max_bytes:
            chunk = os.read(file, self.max_bytes + 1 - len(data))
            if not chunk:
                break
            data += chunk
        cut = len(data) > self.max_bytes
        try:
            # Not final where the file is cut: that may fall into the middle of a character.
            text = codecs.getincrementaldecoder("utf-8")().decode(data[: self.max_bytes], final=not cut)
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise ToolError(f"path: {path!r:.80} is not a text file ({size} bytes)")
        return f"{text}\n[... cut after {self.max_bytes} of {max(size, len(data))} bytes]" if cut else text

    def _list(self, file: int, path: str) -> str:
        with closing(os.scandir(file)) as entries:
            looked_at = [_line(entry) for entry in itertools.islice(entries, _SCANNED + 1)]
        lines = heapq.nsmallest(self.max_entries, looked_at)
        if len(looked_at) > len(lines):
            more = f"more than {_SCANNED - len(lines)}" if len(looked_at) > _SCANNED else len(looked_at) - len(lines)
            lines.append(f"[... {more} more]")
        return "\n".join(lines) if lines else "(the folder is empty)"


def _line(entry: os.DirEntry) -> str:
    name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
    if not name.isprintable():
        name = repr(name)  # a newline or an escape sequence in a name must not look like another entry
    if entry.is_symlink():
        return f"{name} (a link, not followed)"
    return f"{name}/" if entry.is_dir(follow_symlinks=False) else name


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in _LINKS:
        return "a link is on the way, or something that is no folder; links are not followed"
    return getattr(error, "strerror", None) or "it is not a valid path"
