# SPDX-License-Identifier: Apache-2.0
"""A `Loader` as a `grain.IterDataset`: the same batches and states, for grain's prefetching and orbax's checkpoints.

grain is optional (the extra [train]) and slow to import, so only `Loader.to_grain` comes here.
"""

from __future__ import annotations

from typing import Any

from gemma.errors import DependencyError

try:
    import grain
except ImportError as error:
    raise DependencyError("grain", "train", "Loader.to_grain") from error


class _Dataset(grain.IterDataset):
    def __init__(self, loader: Any):
        super().__init__()
        self._loader = loader

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self._loader)


class _Iterator(grain.DatasetIterator):
    def __init__(self, loader: Any):
        super().__init__()
        self._batches = iter(loader)

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)


def as_dataset(loader: Any) -> grain.IterDataset:
    """The loader's batches as a dataset of grain."""
    return _Dataset(loader)
