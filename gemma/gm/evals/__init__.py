# SPDX-License-Identifier: Apache-2.0
"""Evaluation by sampling: what a model answers to the prompts of a data set.

Where kauldron is installed, `SamplerEvaluator` is an evaluator of its trainer (`gm/_kauldron.py`). Losses, perplexity and
accuracy of gemmakit's own trainer are `gm.train.evaluate`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"_sample": ["SamplerEvaluator", "Samples"]},
    variants=("kauldron", "gemma.gm._kauldron", ["SamplerEvaluator"]),
)
