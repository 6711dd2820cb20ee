# SPDX-License-Identifier: Apache-2.0
"""Members of a zip archive, bounded: names, sizes and places are checked before a byte of content is taken.

`zipfile` reads the central directory; what is added here is that a hostile one cannot cost memory, name files outside
of the archive, or let members overlap. Contents are addressed through `Source`: stored members where they lie,
deflated ones inflated on first use. What members mean is the business of `ckpt.py` and `npz.py`.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gemma.errors import FormatError, UnsupportedError
from gemma.formats._source import Source

MAX_DIRECTORY = 1 << 21  # bytes of the central directory; a thousand members take about 100,000
MAX_MEMBERS = 32_768
MAX_RATIO = 100  # deflated weights shrink by a few per cent; an archive that claims more is a bomb
_SMALL = 1 << 26  # archives that unpack to less are never called bombs
_LOCAL_HEADER = 30
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Member:
    """One file in the archive: `offset` of its bytes in the file, `stored` there, `nbytes` once inflated."""

    name: str
    offset: int
    stored: int
    nbytes: int
    deflated: bool
    crc: int


class _File(io.RawIOBase):
    """A Source as the file object that `zipfile` wants; a single read is never larger than a directory may be."""

    def __init__(self, source: Source):
        self._source, self._at = source, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._source.size)[whence]
        if at < 0:
            raise OSError("before the start of the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_DIRECTORY:
            raise FormatError(self._source.path, self._at, f"a zip directory of {count} bytes; at most {MAX_DIRECTORY}")
        data = self._source.read(self._at, count).tobytes()
        self._at += count
        return data


def read_members(source: Source) -> dict[str, Member]:
    """Every member of an archive by name.

    Raises:
      FormatError: not a zip archive, a name twice or outside of the archive, members that overlap or leave the file,
        sizes that no honest archive has.
      UnsupportedError: an encrypted member, or a compression other than deflate.
    """
    path = source.path
    try:
        with zipfile.ZipFile(_File(source)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, None, f"not a readable zip archive ({error})") from None
    if len(entries) > MAX_MEMBERS:
        raise FormatError(path, None, f"{len(entries)} members; gemmakit reads at most {MAX_MEMBERS}")
    total = sum(entry.file_size for entry in entries)
    if total > max(_SMALL, MAX_RATIO * source.size):
        raise FormatError(path, None, f"its {source.size} bytes claim to hold {total}: a zip bomb, nothing was read")
    members: dict[str, Member] = {}
    for entry in entries:
        member = _member(source, entry)
        if member.name in members:
            raise FormatError(path, entry.header_offset, f"member {member.name!r:.200} is there twice")
        members[member.name] = member
    _check_apart(path, members)
    return members


def _member(source: Source, entry: zipfile.ZipInfo) -> Member:
    name, path, at = entry.filename, source.path, entry.header_offset
    parts = name.rstrip("/").split("/")
    if not name.isprintable() or "\\" in name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise FormatError(path, at, f"member {name!r:.200}: expected a plain relative name")
    if entry.flag_bits & 1:
        raise UnsupportedError(f"{path}: member {name} is encrypted; expected a plain archive")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnsupportedError(f"{path}: member {name} has compression method {entry.compress_type}; expected deflate")
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    if not deflated and entry.compress_size != entry.file_size:
        raise FormatError(path, at, f"member {name}: stored in {entry.compress_size} bytes, but {entry.file_size} long")
    if not 0 <= at <= source.size - _LOCAL_HEADER:
        raise FormatError(path, None, f"member {name}: its header is outside of the file")
    header = source.read(at, _LOCAL_HEADER)
    if header[:4].tobytes() != b"PK\x03\x04":
        raise FormatError(path, at, f"member {name}: no local header here")
    names, extra = (int(n) for n in header[26:30].view("<u2"))
    offset = at + _LOCAL_HEADER + names + extra
    _check_same(source, entry, header, names)
    if offset + entry.compress_size > source.size:
        raise FormatError(path, offset, f"member {name}: {entry.compress_size} bytes, the file ends before")
    return Member(name, offset, entry.compress_size, entry.file_size, deflated, entry.CRC)


def _check_same(source: Source, entry: zipfile.ZipInfo, header: np.ndarray, names: int) -> None:
    """A member described twice is described alike: programs disagree about which description holds."""
    path, at, name = source.path, entry.header_offset, entry.filename
    if at + _LOCAL_HEADER + names > source.size:
        raise FormatError(path, at, f"member {name}: the file ends within its header")
    here = source.read(at + _LOCAL_HEADER, names).tobytes()
    flags, method = (int(n) for n in header[6:10].view("<u2"))
    packed, full = (int(n) for n in header[18:26].view("<u4"))
    later = flags & 8 or 0xFFFFFFFF in (packed, full)  # the sizes follow the content, or are in a zip64 field
    sizes = later or (packed, full) == (entry.compress_size, entry.file_size)
    if here != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
        raise FormatError(path, at, f"member {name}: the directory has this name, its own header {here[:80]!r}")
    if method != entry.compress_type or not sizes:
        raise FormatError(path, at, f"member {name}: the directory and its own header disagree about its size")


def _check_apart(path: Path, members: dict[str, Member]) -> None:
    """Members that share bytes are how a small archive unpacks to a huge one."""
    end, before = 0, ""
    for member in sorted((m for m in members.values() if m.stored), key=lambda m: m.offset):
        if member.offset < end:
            raise FormatError(path, member.offset, f"member {member.name} overlaps {before}")
        end, before = member.offset + member.stored, member.name


def read_member(source: Source, member: Member) -> np.ndarray:
    """The content of a member as fresh uint8 [nbytes], its size and checksum verified (0: none was written)."""
    raw = source.read(member.offset, member.stored)
    if member.deflated:
        inflate = zlib.decompressobj(-15)
        try:
            data = inflate.decompress(raw.data, member.nbytes + 1)
        except zlib.error as error:
            raise FormatError(source.path, member.offset, f"member {member.name}: {error}") from None
        if len(data) != member.nbytes or not inflate.eof:
            raise FormatError(
                source.path,
                member.offset,
                f"member {member.name}: expected {member.nbytes} bytes, it inflates to others",
            )
        raw = np.frombuffer(data, np.uint8)
    if member.crc and zlib.crc32(raw.data) != member.crc:
        raise _damaged(source, member)
    return raw


def read_start(source: Source, member: Member, count: int) -> np.ndarray:
    """The first bytes of a member, at most `count`, not verified: to see what it is without reading all of it."""
    count = min(count, member.nbytes)
    if not member.deflated:
        return source.read(member.offset, count)
    try:
        head = source.read(member.offset, min(member.stored, 2 * count + 1024)).data
        return np.frombuffer(zlib.decompressobj(-15).decompress(head, count), np.uint8)
    except zlib.error as error:
        raise FormatError(source.path, member.offset, f"member {member.name}: {error}") from None


def _damaged(source: Source, member: Member) -> FormatError:
    return FormatError(source.path, member.offset, f"member {member.name}: wrong checksum, the file is damaged")


class Verified:
    """The Source of an archive, which checks a stored member before it gives the first of its bytes.

    A zip has a checksum of each member, so a flipped bit need not become a weight. Costs one more pass over the file.
    """

    def __init__(self, source: Source, members: Iterable[Member]):
        self.path, self.size, self._source = source.path, source.size, source
        self._left = sorted((m for m in members if m.stored and m.crc and not m.deflated), key=lambda m: m.offset)
        self._starts = [member.offset for member in self._left]
        self._sound: set[int] = set()

    def view(self, offset: int, count: int) -> np.ndarray:
        """As `Source.view`; a FormatError if the member at `offset` is damaged."""
        self._verify(offset)
        return self._source.view(offset, count)

    def read(self, offset: int, count: int) -> np.ndarray:
        """As `Source.read`; a FormatError if the member at `offset` is damaged."""
        self._verify(offset)
        return self._source.read(offset, count)

    def release(self, offset: int, count: int) -> None:
        self._source.release(offset, count)

    def close(self) -> None:
        self._source.close()

    def _verify(self, offset: int) -> None:
        at = bisect.bisect_right(self._starts, offset) - 1
        if at < 0 or at in self._sound or offset >= self._starts[at] + self._left[at].stored:
            return
        member, crc = self._left[at], 0
        for start in range(0, member.stored, _CHUNK):
            part = self._source.read(member.offset + start, min(_CHUNK, member.stored - start))
            crc = zlib.crc32(part.data, crc)
        if crc != member.crc:
            raise _damaged(self._source, member)
        self._sound.add(at)


class Inflated:
    """A deflated member with the face of a Source: inflated when first asked for, dropped on `release`."""

    def __init__(self, source: Source, member: Member):
        self.path, self.size = source.path / member.name, member.nbytes
        self._source, self._member, self._data = source, member, None

    def view(self, offset: int, count: int) -> np.ndarray:
        """Read-only uint8 [count] at `offset` of the inflated member."""
        if self._data is None:
            self._data = read_member(self._source, self._member)
            self._data.flags.writeable = False
        return self._data[offset : offset + count]

    def read(self, offset: int, count: int) -> np.ndarray:
        """The same as a fresh array."""
        return self.view(offset, count).copy()

    def release(self, offset: int, count: int) -> None:
        """Forgets the inflated bytes; views that are alive keep them."""
        self._data = None

    def close(self) -> None:
        self._data = None
