# SPDX-License-Identifier: Apache-2.0
"""Data for training: examples out of plain text, as numpy arrays. No framework is loaded by it.

Decoder inputs and labels of an encoder-decoder are made in `gemma/seq2seq.py`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"_span_corruption": ["Denoiser", "PrefixLMTask", "SpanCorruptionTask", "UL2Task", "UL2_DENOISERS"]},
)
