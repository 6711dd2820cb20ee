# SPDX-License-Identifier: Apache-2.0
"""Small array functions: rotary position embedding and counting. The networks that use them are in `gm/nn`."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_positional_embeddings": ["apply_rope"],
        "_misc": ["count_consecutive"],
    },
)
