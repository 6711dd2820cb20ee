# SPDX-License-Identifier: Apache-2.0
"""The published models as classes, one line each.

Their sizes are in `gemma/config.py`, the network is in `_transformer.py`.
"""

from __future__ import annotations

from typing import ClassVar

from gemma.config import preset
from gemma.errors import ConfigError
from gemma.gm.nn._config import ModelInfo, TransformerConfig
from gemma.gm.nn._transformer import Transformer


def _of(name: str) -> TransformerConfig:
    return TransformerConfig.of(preset(name))


class _Gemma2(Transformer, kw_only=True):  # Gemma 1 has the tokenizer of Gemma 2
    INFO: ClassVar[ModelInfo] = ModelInfo(tokenizer_version=2)


class _Gemma3(Transformer, kw_only=True):
    INFO: ClassVar[ModelInfo] = ModelInfo(tokenizer_version=3)


class _TextOnly(Transformer, kw_only=True):
    """Attributes: those of `Transformer`, and
    text_only: True; the towers of these models are not part of the library.
    """

    text_only: bool = True

    def __post_init__(self):
        if not self.text_only:
            name = type(self).__name__
            raise ConfigError(f"{name}: text_only=False: only the text model of Gemma 3n and 4 is here, without towers")
        super().__post_init__()


class _Gemma3n(_TextOnly, kw_only=True):
    INFO: ClassVar[ModelInfo] = ModelInfo(tokenizer_version="3n")


class _Gemma4(_TextOnly, kw_only=True):
    INFO: ClassVar[ModelInfo] = ModelInfo(tokenizer_version=4)


class _Gemma3Vision(_Gemma3, kw_only=True):
    """Attributes: those of `Transformer`, and
    text_only: leave the vision encoder out.
    """

    text_only: bool = False

    def __post_init__(self):
        if self.text_only:
            object.__setattr__(self, "config", self.config.text_only())
        super().__post_init__()


class Gemma_2B(_Gemma2, kw_only=True):
    """Gemma 1 2B, and CodeGemma 2B."""

    config: TransformerConfig = _of("gemma_2b")


class Gemma_7B(_Gemma2, kw_only=True):
    """Gemma 1 7B, and CodeGemma 7B."""

    config: TransformerConfig = _of("gemma_7b")


class Gemma2_2B(_Gemma2, kw_only=True):
    """Gemma 2 2B."""

    config: TransformerConfig = _of("gemma2_2b")


class Gemma2_9B(_Gemma2, kw_only=True):
    """Gemma 2 9B."""

    config: TransformerConfig = _of("gemma2_9b")


class Gemma2_27B(_Gemma2, kw_only=True):
    """Gemma 2 27B."""

    config: TransformerConfig = _of("gemma2_27b")


class Gemma3_270M(_Gemma3, kw_only=True):
    """Gemma 3 270M."""

    config: TransformerConfig = _of("gemma3_270m")


class Gemma3_1B(_Gemma3, kw_only=True):
    """Gemma 3 1B."""

    config: TransformerConfig = _of("gemma3_1b")


class Gemma3_4B(_Gemma3Vision, kw_only=True):
    """Gemma 3 4B."""

    config: TransformerConfig = _of("gemma3_4b")


class Gemma3_12B(_Gemma3Vision, kw_only=True):
    """Gemma 3 12B."""

    config: TransformerConfig = _of("gemma3_12b")


class Gemma3_27B(_Gemma3Vision, kw_only=True):
    """Gemma 3 27B."""

    config: TransformerConfig = _of("gemma3_27b")


class Gemma3n_E2B(_Gemma3n, kw_only=True):
    """Gemma 3n E2B, its text model."""

    config: TransformerConfig = _of("gemma3n_e2b")


class Gemma3n_E4B(_Gemma3n, kw_only=True):
    """Gemma 3n E4B, its text model."""

    config: TransformerConfig = _of("gemma3n_e4b")


class Gemma4_E2B(_Gemma4, kw_only=True):
    """Gemma 4 E2B, its text model."""

    config: TransformerConfig = _of("gemma4_e2b")


class Gemma4_E4B(_Gemma4, kw_only=True):
    """Gemma 4 E4B, its text model."""

    config: TransformerConfig = _of("gemma4_e4b")


class Gemma4_31B(_Gemma4, kw_only=True):
    """Gemma 4 31B, its text model."""

    config: TransformerConfig = _of("gemma4_31b")


class Gemma4_26B_A4B(_Gemma4, kw_only=True):
    """Gemma 4 26B-A4B, its text model: every expert computes every token."""

    config: TransformerConfig = _of("gemma4_26b_a4b")
