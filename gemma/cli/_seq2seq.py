# SPDX-License-Identifier: Apache-2.0
"""T5Gemma behind the command line: the encoder reads the prompt, and what the decoder writes is the text.

It is opened by the JAX backend of `_backend.py`; the model is `gemma/research/t5gemma/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma.sampling import SamplingParams


class Writer:
    """A TextModel over an encoder-decoder: every call reads its ids anew, since an encoder sees them both ways.

    Attributes:
      separator: what is printed between the prompt and the text, which does not continue it.
    """

    separator = "\n"

    def __init__(self, loaded: Any):
        self._loaded = loaded

    def begin(self, context: int) -> None:
        """Nothing is kept between calls."""

    def tokens(self, ids: Sequence[int], params: SamplingParams, end_ids: Collection[int]) -> Iterator[int]:
        from gemma.research.t5gemma import Sampler

        loaded, count = self._loaded, params.max_new_tokens
        sampler = Sampler(
            model=loaded.model,
            params=loaded.params,
            tokenizer=loaded.tokenizer,
            sampling=dataclasses.replace(params, stop=()),  # stop strings are the caller's, who sees the text
            max_input_length=1 << max(6, (len(ids) - 1).bit_length()),  # few lengths, so that few programs are compiled
            max_output_length=1 << max(4, (count - 1).bit_length()),
        )
        for out in sampler.sample(list(ids), max_new_tokens=count, stream=True, return_state=True):
            token = int(out.tokens[-1])
            yield token
            if token in end_ids:
                return


def is_seq2seq(path: Path) -> bool:
    """Whether a checkpoint holds an encoder and a decoder; only its configuration is read. A GGUF never does."""
    from gemma.config import T5GemmaConfig
    from gemma.gm.ckpts import open_checkpoint

    if path.suffix == ".gguf":
        return False
    with open_checkpoint(path) as checkpoint:
        return isinstance(checkpoint.config(), T5GemmaConfig)


def load_writer(path: Path, dtype: str) -> tuple[Any, Writer]:
    """What `load_model` of T5Gemma gives, and the model in the form that commands use."""
    from gemma.research.t5gemma import load_model

    loaded = load_model(path, dtype=dtype)
    return loaded, Writer(loaded)
