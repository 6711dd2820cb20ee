# SPDX-License-Identifier: Apache-2.0
"""The research corner: models beside the main line, built from the same parts. Each is a package of its own.

Nothing in `gemma.gm` imports from here. A model of your own needs no place here either: see docs/research.md.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {}, modules=["t5gemma"])
