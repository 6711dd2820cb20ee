# SPDX-License-Identifier: Apache-2.0
"""Doubles for the tests of programs that use `gm`: a network and a tokenizer that need no file.

Doubles without JAX (runners, files, byte tokenizers) are in `gemma.testing`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {"_dummies": ("DummyGemma", "DummyTokenizer", "use_hermetic_tokenizer")}
)
