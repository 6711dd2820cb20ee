# SPDX-License-Identifier: Apache-2.0
"""`pull`: a model from the Hugging Face hub, resumed where it stopped, every file checked, then visible at once.

Finding models on this machine is `hub.py`; names are `_hub_names.py`. Files are read from the hub at one fixed commit
into a hidden folder beside the destination, which keeps what arrived when the connection breaks. Only weights,
configurations and tokenizers are taken, never code; nothing that is downloaded is executed.

    models/.gemma-3-1b-it.1a2b3c4d5e6f.partial/   while it is downloaded: model.safetensors.part, config.json, ...
    models/gemma-3-1b-it/                         complete: the files, gemma_source.json, gemma_manifest.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gemma import _atomic, _hub_errors, _hub_names
from gemma._disk import BUSY
from gemma._hf_json import read_object
from gemma.errors import CheckpointError, GemmaError, HubError

SOURCE = "gemma_source.json"
Progress = Callable[[str, int, int], None]  # file, bytes that are here, bytes of all files

_CHUNK = 1 << 22
_RESERVE = 64 << 20  # bytes that are left free on the disk
_ALWAYS = ("*.json", "tokenizer.model", "*.jinja", "LICENSE*", "NOTICE*", "*.md")
_WEIGHTS = (
    ("*.safetensors",),
    ("*.gguf",),
    ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"),
    ("*.sbs", "*.npz"),
)
_CODE = ("*.py", "*.so", "*.sh", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack")
_ORBAX = (
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_sharding",
    "manifest.ocdbt",
    "d/*",
    "ocdbt.process_*",
    "array_metadatas/*",
)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `sha256` of large files, `sha1` is git's hash of small ones."""

    name: str
    size: int
    sha256: str | None
    sha1: str | None


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What `pull` left on this machine.

    Attributes:
      path: the folder.
      repository: owner/name.
      revision: the commit.
      files: their names.
      size: bytes of all files.
      downloaded: bytes that came over the network this time; 0 if everything was here.
    """

    path: Path
    repository: str
    revision: str
    files: tuple[str, ...]
    size: int
    downloaded: int


def pull(
    repository: str,
    target: str | os.PathLike[str],
    *,
    revision: str | None = None,
    patterns: Sequence[str] = (),
    endpoint: str | None = None,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Downloads a repository's weights, configuration and tokenizer into a folder.

    Args:
      repository: owner/name.
      target: the folder to be. If it was pulled before and the hub has another commit now, it is replaced.
      revision: a branch, tag or commit; None: main.
      patterns: which weights to take if the repository has several variants, for example "*Q4_K_M.gguf".
      endpoint: the hub; None: `$HF_ENDPOINT`, or huggingface.co.
      token: an access token; None: `$HF_TOKEN`, or the one that `hf auth login` stored.
      progress: called while bytes arrive.

    Raises:
      HubError: no connection, no such repository, no right to it, not enough room, or a file that arrived damaged.
      SaveError: the destination cannot be written.
    """
    target = _atomic.check_destination(target, replace=True, folder=True)
    endpoint = endpoint or _hub_errors.endpoint()
    with _hub_errors.explained(repository, revision):
        commit, files = _listing(repository, revision, endpoint, token)
    chosen = choose(files, patterns, repository)
    before = _source(target)
    if before is not None and before.get("revision") == commit and _is_whole(target, chosen):
        return Pulled(target, repository, commit, tuple(f.name for f in chosen), sum(f.size for f in chosen), 0)
    if target.exists() and before is None:
        raise HubError(f"{target}: exists and was not downloaded by gemmakit; give another folder, or delete it")
    with _partial_folder(target, commit) as folder:
        if (_source(target) or {}).get("revision") == commit and _is_whole(target, chosen):
            shutil.rmtree(folder)  # another process has finished it while this one waited for the list of files
            return Pulled(target, repository, commit, tuple(f.name for f in chosen), sum(f.size for f in chosen), 0)
        _check_room(folder, chosen)
        fetched = _fetch_all(folder, chosen, repository, commit, endpoint, token, progress)
        record = dict(repository=repository, revision=commit, files=sorted(f.name for f in chosen))
        (folder / SOURCE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _remove_others(folder, {f.name for f in chosen} | {SOURCE})
        _atomic.publish(folder, target, replace=True)
    return Pulled(target, repository, commit, tuple(f.name for f in chosen), sum(f.size for f in chosen), fetched)


def _listing(repository: str, revision: str | None, endpoint: str | None, token: Any) -> tuple[str, list[RemoteFile]]:
    """The commit that a revision means now, and its files; names are checked before anything is done with them."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint, token=token).model_info(repository, revision=revision, files_metadata=True)
    files = []
    for item in info.siblings or ():
        name, size = item.rfilename, item.size
        if _hub_names.safe_path(name) is None:
            continue
        if not isinstance(size, int) or size < 0:
            raise HubError(f"{repository}: the hub names no size for {name[:200]}; try again later")
        large = item.lfs
        sha256 = None if large is None else large["sha256"] if isinstance(large, Mapping) else large.sha256
        files.append(RemoteFile(name, size, sha256, None if large is not None else item.blob_id))
    if not info.sha or not _hub_names.safe_name(info.sha):
        raise HubError(f"{repository}: the hub names no commit for revision {revision or 'main'}; try again later")
    return info.sha, files


def choose(files: Sequence[RemoteFile], patterns: Sequence[str], repository: str) -> list[RemoteFile]:
    """The files to download: one kind of weights, and what belongs to every kind.

    Raises:
      HubError: there are no weights that gemmakit reads, or several variants and no pattern.
    """
    usable = [f for f in files if not _matches(f.name, _CODE)]
    top = [f for f in usable if "/" not in f.name]
    always = [f for f in top if _matches(f.name, _ALWAYS)]
    if patterns:
        weights = [f for f in usable if any(fnmatch.fnmatchcase(f.name, pattern) for pattern in patterns)]
        if not weights:
            names = ", ".join(sorted(f.name for f in usable if f not in always)[:12])
            raise HubError(f"{repository}: no file matches {' '.join(patterns)}; it has: {names or 'no weights'}")
        return _together(always, weights)
    for kind in _WEIGHTS:
        weights = [f for f in top if _matches(f.name, kind)]
        if weights and "manifest.ocdbt" in kind:
            weights = [f for f in usable if any(fnmatch.fnmatchcase(f.name, pattern) for pattern in _ORBAX)]
        if len(weights) > 1 and kind[0] not in ("*.safetensors", "_METADATA"):
            names = ", ".join(sorted(f.name for f in weights)[:12])
            raise HubError(f"{repository}: several variants, say which with --file: {names}")
        if weights:
            return _together(always, weights)
    raise HubError(
        f"{repository}: holds no .safetensors, .gguf, Orbax, .sbs or .npz at its top level; files in subfolders are "
        f"taken with --file. Pickled weights are not downloaded"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern) for pattern in patterns)


def _together(*groups: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Small files first: what is wrong with the repository shows before gigabytes have come."""
    found = {f.name: f for group in groups for f in group}
    folded: dict[str, str] = {}
    for name in found:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise HubError(f"{other} and {name} differ only in case and cannot both be kept; take one with --file")
    return sorted(found.values(), key=lambda f: (f.size, f.name))


# ---- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _partial_folder(target: Path, commit: str) -> Iterator[Path]:
    """The hidden folder of an unfinished download, locked; one process at a time fills it."""
    folder = target.with_name(f".{target.name[:80]}.{commit[:12]}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(f"{folder}: cannot be created ({error.strerror}); {_elsewhere()}") from error
    if folder.is_symlink():
        raise HubError(f"{folder}: is a symbolic link; delete it")
    lock = _atomic.disk.lock(str(folder))
    if lock == BUSY:
        raise HubError(f"another process is downloading {target.name}; wait for it, or give another folder with --to")
    try:
        yield folder
    finally:
        if lock >= 0:
            _atomic.disk.close(lock)


def _check_room(folder: Path, files: Sequence[RemoteFile]) -> None:
    here = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    need, free = sum(f.size for f in files) - here, shutil.disk_usage(folder).free
    if need > 0 and need + _RESERVE > free:
        raise HubError(
            f"{folder.parent}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some, or {_elsewhere()}"
        )


def _elsewhere() -> str:
    return "give another folder with --to, or set GEMMA_CACHE_DIR"


def _fetch_all(
    folder: Path,
    files: Sequence[RemoteFile],
    repository: str,
    commit: str,
    endpoint: str | None,
    token: Any,
    progress: Progress | None,
) -> int:
    """Downloads what is not here yet; returns how many bytes came."""
    total, done, fetched = sum(f.size for f in files), 0, 0

    def report(name: str, here: int) -> None:
        if progress is not None:
            progress(name, done + here, total)

    for file in files:
        path = folder / _hub_names.safe_path(file.name)
        if _has_links(folder, path):
            raise HubError(f"{path}: leads through a symbolic link; delete {folder}")
        if not (path.is_file() and path.stat().st_size == file.size and _problem(path, file) is None):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _hub_errors.explained(repository, commit, file.name):
                fetched += _fetch(path, file, repository, commit, endpoint, token, report)
        done += file.size
        report(file.name, 0)
    return fetched


def _has_links(folder: Path, path: Path) -> bool:
    return any(p.is_symlink() for p in (path, *path.parents) if folder in p.parents)


def _fetch(
    path: Path,
    file: RemoteFile,
    repository: str,
    commit: str,
    endpoint: str | None,
    token: Any,
    report: Callable[[str, int], None],
) -> int:
    """One file: continued where it stopped, compared with the hub's hash, then given its name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(path.name + ".part")
    if part.is_symlink() or (part.exists() and part.stat().st_size > file.size):
        part.unlink()
    url = hf_hub_url(repository, file.name, revision=commit, endpoint=endpoint)
    # A compressed answer has neither a known length nor parts that can be asked for.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    with open(part, "ab") as out:
        start = out.tell()
        counted = _Counted(out, lambda here: report(file.name, here), file.size)
        if start < file.size:
            http_get(
                url,
                counted,
                resume_size=start,
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
                tqdm_class=_NoBar,
            )
    problem = _problem(part, file)
    if problem is not None:
        part.unlink()  # to continue it would keep the damage
        raise HubError(f"{repository}: {file.name} arrived damaged ({problem}) and was deleted; pull again")
    os.replace(part, path)
    return counted.received


class _Counted:
    """The file that the hub's client writes into: counts, reports, and refuses more than was announced."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None], size: int):
        self._file, self._report, self._size, self.received = file, report, size, 0

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            raise HubError(f"the server sent more than the {self._size} bytes that the file has; try again later")
        count = self._file.write(data)
        self.received += count
        self._report(self._file.tell())
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        return self._file.truncate(size)

    def flush(self) -> None:
        self._file.flush()


class _NoBar:
    """Stands where the hub's client would draw its own progress bar."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        pass

    def close(self) -> None:
        pass


def _problem(path: Path, file: RemoteFile) -> str | None:
    """How a file differs from what the hub says it is; None if it does not."""
    size = path.stat().st_size
    if size != file.size:
        return f"expected {file.size} bytes, got {size}"
    kind, expected = ("SHA-256", file.sha256) if file.sha256 else ("git's SHA-1", file.sha1)
    if expected is None:
        return None
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as opened:
        while block := opened.read(_CHUNK):
            digest.update(block)
    return None if digest.hexdigest() == expected else f"expected {kind} {expected}, got {digest.hexdigest()}"


def _source(folder: Path) -> dict[str, Any] | None:
    """What `pull` noted about a folder; None if it was not made by it."""
    try:
        return read_object(folder / SOURCE)
    except GemmaError:
        return None


def _is_whole(target: Path, files: Sequence[RemoteFile]) -> bool:
    """Whether the folder still is what was downloaded: all names and sizes; hashes were compared then."""
    try:
        held = _atomic.verify_manifest(target, hashes=False).files
    except CheckpointError:
        return False
    return all(file.name in held and held[file.name].size == file.size for file in files)


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Leftovers of an earlier choice of files do not become part of the checkpoint."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty: it holds files that stay
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in keep:
            path.unlink()
