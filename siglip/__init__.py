# SPDX-License-Identifier: Apache-2.0
"""SigLIP, the vision tower of PaliGemma and Gemma 3; its sizes are stated in `gemma.config`."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["PaliGemmaConfig", "SiglipVisionConfig"],
        "modeling_siglip": ["SiglipVisionTransformer"],
    },
    modules=["config", "modeling_siglip"],
)
