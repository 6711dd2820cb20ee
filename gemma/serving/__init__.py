# SPDX-License-Identifier: Apache-2.0
"""The engine: what drives a model of any framework. `runner.py` is the contract between engine and hardware."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "engine": ("Engine", "Stats"),
        "request": ("Event", "Request", "State"),
        "runner": ("Runner", "RunnerInfo", "StepIn", "StepOut"),
    },
)
