# SPDX-License-Identifier: Apache-2.0
"""Another path of `gm/vision/_vision_utils.py`; nothing is defined here."""

from gemma.gm.vision._vision_utils import Encoder, Encoder1DBlock, MAPHead, MlpBlock, ViTModel

__all__ = ["Encoder", "Encoder1DBlock", "MAPHead", "MlpBlock", "ViTModel"]
