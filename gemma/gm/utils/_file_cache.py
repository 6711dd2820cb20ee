# SPDX-License-Identifier: Apache-2.0
"""Where files are looked for before anything else: `$GEMMA_CACHE_DIR`, or `~/.gemma`. Nothing is fetched here.

The hub's own lookup is `gemma/hub.py`.
"""

from __future__ import annotations

import os
from pathlib import Path


def maybe_get_from_cache(*, remote_file_path: str | os.PathLike[str], cache_subdir: str) -> str | os.PathLike[str]:
    """The file of that name in the cache, if it is there; otherwise the path as given.

    Args:
      remote_file_path: any path or address; its last part is the name.
      cache_subdir: folder of the cache.
    """
    cached = _get_cache_dir() / cache_subdir / Path(remote_file_path).name
    return cached if cached.exists() else remote_file_path  # no Path: it would make one slash of an address's two


def _get_cache_dir() -> Path:
    return Path(os.environ.get("GEMMA_CACHE_DIR") or "~/.gemma").expanduser()
