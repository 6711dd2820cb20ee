# SPDX-License-Identifier: Apache-2.0
"""Images on the JAX side: the SigLIP encoder, its tokens inside a prompt, and what is done to pixels before it.

    from gemma import gm
    pixels = gm.vision.load_images(["cat.jpg", "dog.png"], size=896)     # float32 [2, 896, 896, 3] in -1..1

Reading image files is `gemma/image.py`; where image tokens meet text is `gm/nn/_transformer.py`.
"""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_vision": ["SigLiPFromPatches", "VisionExit"],
        "_vision_utils": ["ViTModel"],
        "_image": ["load_image", "load_images", "standardize_image"],
        "_prompt": ["ImageTokens", "plan_chunks"],
    },
)
