# SPDX-License-Identifier: Apache-2.0
"""How the processes of one run agree: who this is, and small values that each of them tells all others.

All of them call these functions in the same order; with one process nothing is sent. Starting the processes and
spreading arrays over them is `_distributed.py`'s part.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np


def process() -> tuple[int, int]:
    """(index, count) of this process among those of the run."""
    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in their order, known to all. They travel as JSON where there are several."""
    if process()[1] == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)  # all send equally much
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]
