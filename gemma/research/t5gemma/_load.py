# SPDX-License-Identifier: Apache-2.0
"""`load_model`: a checkpoint of a T5Gemma becomes network, parameters and tokenizer in one call.

Parameters are read by `gemma.gm.ckpts`, from Hugging Face folders and Orbax folders alike.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from gemma import config as configs
from gemma import hub
from gemma.errors import CheckpointError, UnsupportedError
from gemma.gm import ckpts
from gemma.gm.ckpts import _load as ckpts_load
from gemma.gm.typing import DType, Params
from gemma.research.t5gemma.t5gemma import T5Gemma, T5GemmaConfig
from gemma.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedT5Gemma:
    """Everything that sampling needs; `tokenizer` is None where none came with the checkpoint."""

    model: T5Gemma
    params: Params
    tokenizer: Tokenizer | None
    config: configs.T5GemmaConfig
    path: Path


def load_model(
    path: str | os.PathLike[str], *, dtype: DType = "float32", config: Any = None, window: str = "hf"
) -> LoadedT5Gemma:
    """Opens a checkpoint of a T5Gemma or T5Gemma 2.

    Args:
      path: what `gemma.hub.resolve` takes: a Hugging Face folder, a safetensors file, or an Orbax folder.
      dtype: of parameters and activations: float32, bfloat16, or float16 where the family allows it.
      config: of an Orbax folder that does not carry its own and is of no preset's size.
      window: see `T5Gemma`.

    Raises:
      CheckpointNotFound, HubError, FormatError, WeightsMismatch: the checkpoint cannot be read.
      UnsupportedError: it holds a model without an encoder.
      CheckpointError: the tokenizer has more ids than the model.
    """
    path = hub.resolve(path)
    with ckpts.open_checkpoint(path, config=config) as checkpoint:
        found = checkpoint.config()
        if not isinstance(found, configs.T5GemmaConfig):
            kind = type(found).__name__.removesuffix("Config")
            raise UnsupportedError(
                f"{path}: holds a {kind} model without an encoder; gm.text.load_model opens Gemma decoders, and "
                f"init_from_gemma makes a T5Gemma of a Gemma 2"
            )
        ckpts_load.check_dtype(dtype, found.decoder)
        source = checkpoint.tokenizer_source()
    tokenizer = None if source is None else Tokenizer.from_source(source)
    if tokenizer is not None and tokenizer.vocab_size > found.decoder.table_rows:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {found.decoder.table_rows} rows; the "
            f"two do not belong together"
        )
    params = ckpts.load_params(path, dtype=dtype, config=config)
    model = T5GemmaConfig.of(found).make(dtype=dtype, window=window)
    return LoadedT5Gemma(model, params, tokenizer, found, path)
