# SPDX-License-Identifier: Apache-2.0
"""`PlainForm`, the base of classes that kauldron has a form of, too: it says so where kauldron's fields are given to ours.

Which names that are, and kauldron's forms of them, is `_kauldron.py`. Nothing here imports kauldron.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gemma.errors import DependencyError


class PlainForm:
    """A class of `gm` that is a class of kauldron's where kauldron is installed.

    Attributes:
      KAULDRON_FIELDS: fields of that class that this one does not have.
    """

    KAULDRON_FIELDS: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *args: Any, **fields: Any):
        asked = sorted(cls.KAULDRON_FIELDS & fields.keys())
        if asked:
            raise DependencyError("kauldron", "kauldron", f"{cls.__name__} with {', '.join(asked)}")
        return super().__new__(cls)
