# SPDX-License-Identifier: Apache-2.0
"""Doubles for the tests of programs that use `gm`: networks and tokenizers that need no file.

    loaded = gm.testing.tiny_model(images=True)        # what gm.text.load_model(path) would give
    gm.text.ChatSampler(model=loaded.model, params=loaded.params, tokenizer=loaded.tokenizer).chat("hi")

Doubles without JAX (runners, files, byte tokenizers) are in `gemma.testing`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_dummies": ("DummyGemma", "DummyTokenizer"),
        "_fixtures": ("use_hermetic_tokenizer",),
        "_tiny": ("tiny_model",),
    },
)
