# SPDX-License-Identifier: Apache-2.0
"""`tiny_model`: a whole model in a few hundred kilobytes, random, with a tokenizer of bytes; no file is read.

It has every trait of its family and answers nonsense. Configurations and files without JAX are `gemma/testing.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.config import SiglipVisionConfig
from gemma.gm.nn import Transformer
from gemma.gm.text import LoadedModel
from gemma.gm.typing import DType
from gemma.testing import ByteTokenizer, tiny_config

_SIDE, _PATCH, _SOFT = 16, 4, 4  # pixels, pixels, tokens: 4 x 4 patches are pooled to 2 x 2


def tiny_model(
    family: str = "gemma3", *, images: bool = False, seed: int = 0, dtype: DType = "float32", **changes: Any
) -> LoadedModel:
    """What `gm.text.load_model` would give, for a random model that compiles quickly.

    Args:
      family: "gemma", "gemma2" or "gemma3".
      images: with an encoder for pictures of 16 x 16 pixels, four tokens each; of "gemma3".
      seed: of the parameters.
      dtype: of parameters and activations.
      **changes: fields of `GemmaConfig` to replace; see `gemma.testing.tiny_config`.

    Returns:
      The model, its parameters, a `gemma.testing.ByteTokenizer`, the configuration, and an empty path.
    """
    tokenizer = ByteTokenizer()
    if images:
        special = tokenizer.special
        tower = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=_SIDE,
            patch_size=_PATCH,
        )
        marks = dict(boi_token_index=special.start_of_image, eoi_token_index=special.end_of_image)
        soft = tokenizer.pieces.index("<image_soft_token>")
        changes = dict(vision=tower, mm_tokens_per_image=_SOFT, image_token_index=soft) | marks | changes
    # Two layers, one of each kind: enough for every trait, and quickly compiled.
    short = {} if family == "gemma" else dict(num_hidden_layers=2, layer_pattern="LG")
    config = tiny_config(family, **(short | dict(max_position_embeddings=512) | changes))
    model = Transformer.from_config(config, dtype=jnp.dtype(dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), "int32"))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _random(rng, path, leaf), shapes)
    return LoadedModel(model, params, tokenizer, config, Path())


def _random(rng: np.random.Generator, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # Layers outweigh the embedding: a tied head would otherwise repeat the last token.
    std = 0.04 if path[-1].key == "input_embedding" else 0.4
    values = rng.standard_normal(math.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape) * std
    return jnp.asarray(values, leaf.dtype)
