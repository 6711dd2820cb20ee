# SPDX-License-Identifier: Apache-2.0
"""`CheckpointPath`: the official names of published parameters.

A name says which parameters, not where they are on this machine: `gemma.hub.resolve` finds them, in this order, in
`$GEMMA_CHECKPOINT_DIR`, in the cache folder, or by a download from the Hugging Face hub.
"""

from __future__ import annotations

import enum

from gemma.hub import OFFICIAL

_SIZES = {
    "gemma2": ("2b", "9b", "27b"),
    "gemma3": ("270m", "1b", "4b", "12b", "27b"),
    "gemma3n": ("e2b", "e4b"),
    "gemma4": ("e2b", "e4b", "31b", "26b-a4b"),
}

CheckpointPath = enum.StrEnum(
    "CheckpointPath",
    {
        f"{family}_{size}_{kind}".upper().replace("-", "_"): f"{OFFICIAL}{family}-{size}-{kind}"
        for family, sizes in _SIZES.items()
        for size in sizes
        for kind in ("pt", "it")
    },
    module=__name__,
)
CheckpointPath.__doc__ = "Names of published parameters, pretrained (PT) and tuned to instructions (IT)."
