# SPDX-License-Identifier: Apache-2.0
"""The configuration classes under the import path that PaliGemma users expect; they are stated in `gemma.config`."""

from gemma.config import PRESETS, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

__all__ = ["GemmaConfig", "PRESETS", "PaliGemmaConfig", "SiglipVisionConfig"]
