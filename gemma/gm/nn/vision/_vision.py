# SPDX-License-Identifier: Apache-2.0
"""Another path of `gm/vision/_vision.py`; nothing is defined here."""

from gemma.gm.vision._vision import (
    BEGIN_IMAGE_TOKEN,
    END_IMAGE_TOKEN,
    NEW_LINE_TOKEN,
    NUM_PLACEHOLDER_TOKENS_PER_IMAGE,
    NUM_TOKENS_PER_MEDIA,
    TOKEN_PLACEHOLDER,
    SigLiPFromPatches,
    VisionExit,
    VisionInitEmbeddings,
    check_mask,
    check_special_vision_token,
    initialize_vision_tokens,
)

__all__ = [
    "BEGIN_IMAGE_TOKEN",
    "END_IMAGE_TOKEN",
    "NEW_LINE_TOKEN",
    "NUM_PLACEHOLDER_TOKENS_PER_IMAGE",
    "NUM_TOKENS_PER_MEDIA",
    "TOKEN_PLACEHOLDER",
    "SigLiPFromPatches",
    "VisionExit",
    "VisionInitEmbeddings",
    "check_mask",
    "check_special_vision_token",
    "initialize_vision_tokens",
]
