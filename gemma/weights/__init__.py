# SPDX-License-Identifier: Apache-2.0
"""The weight table: every tensor of the family with its name and layout in every format, and what follows from it.

Expected shapes, both directions of every transform, strict binding of a file to a configuration and docs/weights.md are
all derived from the rows in `_rows.py`. Reading files is not here (that is `gemma.checkpoint` and `gemma.formats`).
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_assemble": ("assemble", "groups"),
        "_axes": ("convert", "parse", "shape_of", "sharding_of"),
        "_bind": ("bind",),
        "_identify": ("identify", "shaped"),
        "_names": ("names", "tied_copies"),
        "_pack": ("extract", "fit_rows", "pack", "unpack"),
        "_packing": ("Matrix", "is_matrix", "matrices", "summed_axes"),
        "_rows": ("FORMATS",),
        "_rows_newer": ("DENSE_FOLDER",),
        "_table": ("Slot", "Tensor", "expected", "tensors"),
    },
)
