# SPDX-License-Identifier: Apache-2.0
"""`load_model`: a path or the word `demo` becomes network, parameters, tokenizer and configuration in one call.

Reading parameters is `gm/ckpts/_load.py`; this module decides nothing about numbers.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from gemma import config as configs
from gemma import hub, peft
from gemma.adapters import open_adapter
from gemma.errors import CheckpointError, UnsupportedError
from gemma.gm import nn
from gemma.gm.ckpts import _load as ckpts_load
from gemma.gm.ckpts import open_checkpoint
from gemma.gm.typing import DType, Params
from gemma.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Everything that generation needs.

    Attributes:
      model: the network, made from the checkpoint's own configuration.
      params: its parameters.
      tokenizer: the one that came with the checkpoint; None if none came (token ids can still be continued).
      config: the configuration.
      path: where the checkpoint is.
    """

    model: nn.Transformer
    params: Params
    tokenizer: Tokenizer | None
    config: configs.GemmaConfig
    path: Path


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DType = "float32",
    text_only: bool = True,
    adapter: str | os.PathLike[str] | None = None,
    check_base: bool = True,
) -> LoadedModel:
    """Opens a checkpoint for generation.

    Args:
      path: what `gemma.hub.resolve` takes: a file, a folder, or `demo`.
      dtype: of parameters and activations, float32 or bfloat16 (float16 where the family allows it).
      text_only: leave a vision tower in the file.
      adapter: a LoRA adapter to fold into the weights: a PEFT folder, or a GGUF adapter.
      check_base: refuse a base that the adapter was not trained on, where it says which.

    Raises:
      CheckpointNotFound, HubError, FormatError, WeightsMismatch: the checkpoint cannot be read.
      UnsupportedError: a model without a JAX text network, or float16 for Gemma 3.
      CheckpointError: the tokenizer has more ids than the model.
    """
    path = hub.resolve(path)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config()
        if not isinstance(config, configs.GemmaConfig) or config.use_bidirectional_attention:
            kind = type(config).__name__.removesuffix("Config")
            raise UnsupportedError(
                f"{path}: holds a {kind} model that does not continue text; expected a Gemma decoder"
                + ("; gemma.research.t5gemma.load_model opens it" if isinstance(config, configs.T5GemmaConfig) else "")
            )
        ckpts_load.check_dtype(dtype, config)
        source = checkpoint.tokenizer_source()
        tokenizer = None if source is None else Tokenizer.from_source(source)
        config = configs.text_only(config) if text_only else config
        if tokenizer is not None and tokenizer.vocab_size > config.table_rows:
            raise CheckpointError(
                f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {config.table_rows} rows; the two "
                f"do not belong together"
            )
        params: dict[str, Any] = {}
        leaves = ckpts_load.leaves_of(checkpoint, text_only=text_only)  # what `load_params` reads, opened once
        for name in list(leaves):
            ckpts_load.insert(params, name, ckpts_load.read(leaves.pop(name), name, None, dtype, None))
    if adapter is not None:
        params = peft.fuse_adapter(params, open_adapter(adapter, config), config, check_base=check_base)
    model = nn.Transformer.from_config(config, dtype=dtype)
    return LoadedModel(model, params, tokenizer, config, path)
