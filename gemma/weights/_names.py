# SPDX-License-Identifier: Apache-2.0
"""All names that one tensor may have in files of one format, for readers that look single tensors up (adapters).

Whole checkpoints are bound by `_bind.py`, which picks one root for all names.
"""

from __future__ import annotations

from gemma.weights._bind import _copies
from gemma.weights._table import AnyConfig, Tensor, family, roots


def names(tensor: Tensor, format: str, config: AnyConfig) -> tuple[str, ...]:
    """The names under every root that files of the format use, the one that is written first; () if it has none."""
    slot = tensor.slots.get(format)
    if slot is None:
        return ()
    known = roots(family(config, tensor.name), format, tensor.part)
    tail = slot.name.removeprefix(known[0])
    return tuple(root + tail for root in known)


def tied_copies(config: AnyConfig, format: str) -> tuple[str, ...]:
    """Names that may hold a copy of the embedding: the output head of a tied model."""
    return tuple(name for name, tensor in _copies(config, format).items() if tensor in ("embed", "decoder.embed"))
