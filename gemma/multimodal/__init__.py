# SPDX-License-Identifier: Apache-2.0
"""Images in JAX under the names of the first published package. What they are lives in `gm/vision` and `image.py`."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {}, modules=["image", "vision", "vision_utils"])
