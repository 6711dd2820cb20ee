# SPDX-License-Identifier: Apache-2.0
"""`MapTransform`, the base of what is applied to each element of a data set: `map(element)`, and the same as a call.

grain and kauldron accept such objects wherever they accept their own: each has an abstract class, of which this one
becomes a virtual subclass as soon as a program that uses them makes one. Nothing here imports them.
"""

from __future__ import annotations

import abc
import sys
from typing import Any


class MapTransform(abc.ABC):
    """One element in, one out; the given element stays as it is."""

    def __new__(cls, *args: Any, **kwargs: Any):
        # Also where a worker process unpickles one: `__init__` does not run there.
        _announce()
        return super().__new__(cls)

    @abc.abstractmethod
    def map(self, element: Any) -> Any:
        """The transformed element."""

    def __call__(self, element: Any) -> Any:
        return self.map(element)


_HOMES = ("grain", "grain.python", "grain.transforms")
_known: set[int] = set()


def _announce() -> None:
    """Registers `MapTransform` with grain's abstract class, if grain is there; it has had two names and three homes."""
    for home in _HOMES:
        module = sys.modules.get(home)
        for name in ("MapTransform", "Map"):
            found = getattr(module, name, None)
            if isinstance(found, abc.ABCMeta) and id(found) not in _known:
                found.register(MapTransform)
                _known.add(id(found))
