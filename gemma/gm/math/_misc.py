# SPDX-License-Identifier: Apache-2.0
"""Counting on plain Python sequences; nothing here is traced. Array functions are in the neighbouring files."""

import itertools
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def count_consecutive(values: Iterable[T]) -> tuple[tuple[T, int], ...]:
    """Run lengths: `[1, 1, 2, 1]` gives `((1, 2), (2, 1), (1, 1))`."""
    return tuple((value, sum(1 for _ in run)) for value, run in itertools.groupby(values))
