# SPDX-License-Identifier: Apache-2.0
"""What a model is called: on the Hugging Face hub, in the official JAX package, and as a folder on this machine.

No file is looked at here: `hub.py` searches this machine for these names, `_hub_download.py` asks the hub for them.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import PurePosixPath

from gemma import config
from gemma.errors import ConfigError, HubError

OFFICIAL = "gs://gemma-data/checkpoints/"  # what the official JAX package puts before the names of its checkpoints
_OWNER = "google"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SIZED = re.compile(r"(?:(code|shield|med|translate|function)-?)?gemma-?([234]n?)?-(e?\d+[bm](?:-a\d+b)?)(?:-(pt|it))?")
_BARE = ("", "2", "3n", "4")  # generations whose pretrained repositories have no suffix
_ONLY_TUNED = ("shield", "translate", "function")


def is_repository(name: str) -> bool:
    """Whether a name is spelled as the hub spells repositories: owner/name."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name


def repository(name: str) -> str | None:
    """The hub's repository for a name: owner/name itself, an official name, or a size; None if it is none of these.

    A size alone means the model that is tuned to instructions, where there is one; `-pt` asks for the pretrained one.
    """
    if is_repository(name):
        return name
    key = name.strip().removeprefix(OFFICIAL).lower().replace("_", "-").replace(".", "-")
    found = _SIZED.fullmatch(key)
    if found is not None and _is_size(found):
        return f"{_OWNER}/{_sized(*(group or '' for group in found.groups()))}"
    return _other(key)


def _is_size(found: re.Match[str]) -> bool:
    maker, generation, size, _ = found.groups()
    if generation == "3n":
        return not maker and size in ("e2b", "e4b")
    try:
        config.preset_name(f"{maker or ''}gemma{generation or ''}_{size}")
    except ConfigError:
        return False
    return True


def _sized(maker: str, generation: str, size: str, kind: str) -> str:
    size = size.upper() if generation in ("3n", "4") else size
    stem = f"{maker}gemma-{generation + '-' if generation else ''}{size}"
    if maker == "shield" and not generation:
        return stem
    kind = "it" if maker in _ONLY_TUNED else kind or "it"
    return stem if kind == "pt" and generation in _BARE and maker in ("", "code") else f"{stem}-{kind}"


def _other(key: str) -> str | None:
    """Members whose repositories are not named by generation and size alone."""
    try:
        preset = config.preset_name(key)
    except ConfigError:
        return None
    if found := re.fullmatch(r"paligemma(2?)_(\w+)_(\d+)", preset):
        return f"{_OWNER}/paligemma{found[1]}-{found[2]}-pt-{found[3]}"
    if found := re.fullmatch(r"t5gemma2_(\w+)", preset):
        return f"{_OWNER}/t5gemma-2-{found[1].replace('_', '-')}"
    if preset.startswith("t5gemma_"):
        return f"{_OWNER}/{preset.replace('_', '-')}-prefixlm"
    return f"{_OWNER}/{preset.replace('_', '-')}" if preset.startswith("embeddinggemma") else None


def folder(repo: str) -> str:
    """The folder that a repository is kept in: its own name, with the owner's before it unless that is Google."""
    owner, _, name = repo.partition("/")
    return name if owner == _OWNER else f"{owner}--{name}"


def spellings(name: str) -> list[str]:
    """Folders and files that hold the weights of a name, the most exact first; without the endings of files."""
    found: list[str] = []
    official = name.startswith(OFFICIAL)
    stem = name.strip().removeprefix(OFFICIAL)
    if official and safe_name(stem):
        found += [stem, stem.replace("-", "_")]
    if is_repository(name):
        return [folder(name)]
    key = stem.lower().replace("-", "_").replace(".", "_")
    if key in config.ALIASES:
        found.append(key)  # codegemma_2b has the shape of gemma_2b, not its weights
    elif not official:
        with contextlib.suppress(ConfigError):  # no size by itself; it may be one with -it or -pt
            found.append(config.preset_name(stem))
    kinds = [stem] if official or key.endswith(("_it", "_pt")) else [stem, f"{stem}-pt"]
    found += [folder(repo) for repo in map(repository, kinds) if repo is not None]
    return list(dict.fromkeys(found))


def safe_name(name: str) -> bool:
    """Whether a name from elsewhere is one plain word that cannot lead out of the folder it is put into."""
    return bool(re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,200}", name)) and ".." not in name


def safe_path(name: str) -> PurePosixPath | None:
    """A file's path within a repository, as the hub lists it; None for hidden files, which no checkpoint needs.

    Raises:
      HubError: it would lead out of the folder, or has characters that no file of a checkpoint has.
    """
    parts = name.split("/")
    good = len(name) <= 512 and name.isprintable() and not any(mark in name for mark in '\\:*?"<>|')
    if not good or any(part in ("", ".", "..") or part != part.strip() for part in parts):
        raise HubError(
            f"the repository lists a file named {name[:200]!r}, which would leave its folder; not downloaded"
        )
    return None if any(part.startswith(".") for part in parts) else PurePosixPath(name)
