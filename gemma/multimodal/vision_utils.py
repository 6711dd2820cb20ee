# SPDX-License-Identifier: Apache-2.0
"""The vision transformer's parts, re-exported from `gm/vision/_vision_utils.py`."""

from gemma.gm.vision._vision_utils import Encoder, Encoder1DBlock, MAPHead, MlpBlock, ViTModel

__all__ = ["Encoder", "Encoder1DBlock", "MAPHead", "MlpBlock", "ViTModel"]
