# SPDX-License-Identifier: Apache-2.0
"""gemmakit: run, chat with, fine-tune, quantize and convert the Gemma family from JAX or PyTorch.

Importing this package loads nothing: files directly in it are framework-free facts, `gemma.gm` is JAX,
`gemma.modeling_gemma` is PyTorch. ARCHITECTURE.md draws the layers.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    raise AttributeError(
        f'module "gemma" has no attribute {name!r}. Please use "from gemma import gm", NOT "import gemma as gm".'
    )
