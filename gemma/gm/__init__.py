# SPDX-License-Identifier: Apache-2.0
"""The JAX side of gemmakit: `from gemma import gm`. Importing it loads neither JAX nor anything of this package.

Networks are in `nn`, small array functions in `math`, checkpoints in `ckpts`, sampling in `text`. The facts that they
share with the PyTorch side (sizes, weight names, tokenizer) are in the files directly in `gemma/`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {},
    modules=[
        *("ckpts", "data", "evals", "losses", "math", "nn", "sharding", "testing", "text", "tools", "train", "typing"),
        "vision",
    ],
    elsewhere={"peft": "gemma.peft"},
)
