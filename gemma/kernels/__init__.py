# SPDX-License-Identifier: Apache-2.0
"""Kernels for the CPU: weights stay packed as the file holds them, and products run on their bytes.

`_native.py` is the numpy face of the library whose C++ sources lie in `native/` and which `build.py` compiles. Where
there is no library (no compiler at hand), everything runs through XLA or PyTorch instead, only slower; `why_missing()`
says why. A whole decoder is `_model.py`; the same products inside JAX are `_jax.py`, inside PyTorch `_torch.py`.
"""

from gemma._lazy import attach

_NAMES = {
    "_native": ["Context", "NativeWeight", "library", "why_missing", "instruction_sets"],
}
_MODULES = ["build"]

__getattr__, __dir__, __all__ = attach(__name__, _NAMES, _MODULES)
