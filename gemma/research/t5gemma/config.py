# SPDX-License-Identifier: Apache-2.0
"""The published T5Gemmas by the names of the official package. Their sizes are in `gemma/config.py`.

What a configuration is in JAX is `t5gemma.py`; T5Gemma 2 has no official JAX names, `T5GemmaConfig.of` takes its presets.
"""

from __future__ import annotations

import enum
from pathlib import Path

from gemma import hub
from gemma.config import preset
from gemma.errors import CheckpointNotFound
from gemma.gm.text import Gemma2Tokenizer
from gemma.research.t5gemma.t5gemma import T5GemmaConfig


class CKPTType(enum.StrEnum):
    """Pretrained, or tuned to instructions."""

    PT = "pt"
    IT = "it"


class PretrainType(enum.StrEnum):
    """What a model was adapted with: span corruption (good to tune further), or continuing a prefix (good to generate)."""

    UL2 = "ul2"
    PREFIXLM = "prefixlm"


class T5GemmaPreset(enum.StrEnum):
    """A published size, encoder and decoder: `T5GemmaPreset.GEMMA2_2B_2B.config.make("transformer")`."""

    GEMMA2_2B_2B = "2b-2b"
    GEMMA2_9B_9B = "9b-9b"
    GEMMA2_9B_2B = "9b-2b"
    GEMMA2_SMALL_SMALL = "s-s"
    GEMMA2_BASE_BASE = "b-b"
    GEMMA2_LARGE_LARGE = "l-l"
    GEMMA2_ML_ML = "ml-ml"
    GEMMA2_XL_XL = "xl-xl"

    @property
    def config(self) -> T5GemmaConfig:
        """The configuration of this size."""
        return T5GemmaConfig.of(preset(f"t5gemma_{self.value}"))

    @property
    def tokenizer(self) -> Gemma2Tokenizer:
        """The tokenizer of every T5Gemma."""
        return Gemma2Tokenizer()

    def checkpoint_name(self, ckpt_type: CKPTType | str, pretrain_type: PretrainType | str) -> str:
        """What a checkpoint is called: "t5gemma-2b-2b-prefixlm-it"."""
        tuned = "-it" if CKPTType(ckpt_type) is CKPTType.IT else ""
        return f"t5gemma-{self.value}-{PretrainType(pretrain_type).value}{tuned}"

    def get_checkpoint_from_kaggle(self, ckpt_type: CKPTType | str, pretrain_type: PretrainType | str) -> Path:
        """Where a checkpoint is on this machine; nothing is downloaded.

        It is looked for under its name, and in the folders that Kaggle's own client makes, below
        `$GEMMA_CHECKPOINT_DIR` and the cache folder: see `gemma.hub.resolve`.

        Raises:
          CheckpointNotFound: it is not here; the message says how to get it.
        """
        name = self.checkpoint_name(ckpt_type, pretrain_type)
        try:
            return hub.resolve(f"google/{name}")
        except CheckpointNotFound as error:
            raise CheckpointNotFound(
                f"{name}: not on this machine. `gemma pull google/{name}` fetches the Hugging Face files, which load_model "
                f"and gm.ckpts.load_params read; or put a folder of that name into $GEMMA_CHECKPOINT_DIR ({error})"
            ) from None
