# SPDX-License-Identifier: Apache-2.0
"""Fixtures that test files of the official package take from `gm.testing`. The doubles themselves are `_dummies.py`."""

from __future__ import annotations

from gemma.errors import DependencyError

try:
    import pytest
except ImportError as error:
    raise DependencyError("pytest", "dev", "gm.testing.use_hermetic_tokenizer") from error


@pytest.fixture(autouse=True, scope="module")
def use_hermetic_tokenizer() -> None:
    """Does nothing: no tokenizer of this package ever reaches for the network."""
