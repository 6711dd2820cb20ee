# SPDX-License-Identifier: Apache-2.0
"""Lazy package faces: a public name is imported from its file on first use, so `import gemma.gm` costs milliseconds.

Only package `__init__` files use this; the names stay visible to `dir()`, `__all__` and star imports.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence


def _installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def attach(
    package: str,
    names: Mapping[str, Sequence[str]],
    modules: Sequence[str] = (),
    elsewhere: Mapping[str, str] | None = None,
    variants: tuple[str, str, Sequence[str]] | None = None,
):
    """Returns `(__getattr__, __dir__, __all__)` for a package.

    Args:
      package: the package's `__name__`.
      names: file of the package (without `.py`) to the public names that it holds.
      modules: submodules that are public themselves.
      elsewhere: public names of modules that are not submodules, to their full names.
      variants: (package, module, names): where another package is installed, these names come from that module, which
        makes them subclasses of the package's own.
    """
    elsewhere = elsewhere or {}
    home = {name: file for file, held in names.items() for name in held}
    public = sorted([*home, *modules, *elsewhere])

    def __getattr__(name: str):
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name in elsewhere:
            return importlib.import_module(elsewhere[name])
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {', '.join(public)}")
        varied = variants is not None and name in variants[2] and _installed(variants[0])
        file = variants[1] if varied else f"{package}.{home[name]}"
        value = getattr(importlib.import_module(file), name)
        setattr(sys.modules[package], name, value)  # the next access is a plain attribute
        return value

    def __dir__():
        return public

    return __getattr__, __dir__, public
