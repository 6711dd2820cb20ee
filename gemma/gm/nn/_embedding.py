# SPDX-License-Identifier: Apache-2.0
"""EmbeddingGemma: a text encoder that makes one unit vector of each sequence.

A Gemma 3 whose tokens see the future too, the mean over the tokens of a row, dense layers, and the unit length. Texts
in and vectors out is `gm/text/_embedding.py`; task prompts and the layout of published folders are `gemma/embedding.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma.config import EMBEDDING_DENSE, preset
from gemma.errors import ConfigError, PromptError
from gemma.gm.nn import _images, _layers, _transformer
from gemma.gm.nn._config import ModelInfo, TransformerConfig
from gemma.gm.nn._transformer import Transformer
from gemma.gm.typing import Array, Bool, Float, Int
from gemma.gm.utils import _jax_utils


class EmbeddingGemma(Transformer, kw_only=True):
    """An encoder of any configuration with `use_bidirectional_attention`; `from_config` as of `Transformer`.

    Attributes: those of `Transformer`, and
      dim: keep so many numbers of each vector, which has unit length again; None: all.
    """

    dim: int | None = None

    def setup(self):
        super().setup()
        source = self.config.source
        if not source.use_bidirectional_attention:
            raise ConfigError(
                "EmbeddingGemma: the configuration is of a decoder; use_bidirectional_attention is needed"
            )
        if self.dim is not None and not 1 <= self.dim <= self.width:
            raise ConfigError(f"dim: expected 1..{self.width}, the width of an embedding, got {self.dim}")
        widths = (source.hidden_size, *source.embedding_dense)
        self.dense = [
            _layers.Einsum(shape=shape, dtype=self.dtype, name=f"dense_{i}")
            for i, shape in enumerate(itertools.pairwise(widths))
        ]

    @property
    def width(self) -> int:
        """Numbers of a whole embedding."""
        source = self.config.source
        return (source.hidden_size, *source.embedding_dense)[-1]

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        mask: Bool[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
    ) -> Float[Array, "*B D"]:
        """Embeds.

        Args:
          tokens: ids; 0 is padding, on either side.
          mask: False where a token is to be left out; None: on padding.
          positions: 0-based; None: counted over the tokens that count.

        Returns:
          float32, of unit length.

        Raises:
          PromptError: (a ValueError) a row without tokens, as far as that is known: not under jit.
          ShapeError: (a ValueError) the shapes or dtypes of the arguments do not fit.
        """
        _images.check_ids(tokens, self.config.num_embed, False)
        batch, tokens, positions, _ = _transformer._flatten(
            _transformer._integers("tokens", tokens), positions, None, 0
        )
        if mask is None:
            mask = tokens != 0
        else:
            mask = jnp.broadcast_to(jnp.asarray(mask, bool), (*batch, tokens.shape[1])).reshape(tokens.shape)
        if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(axis=1).all():
            raise PromptError("tokens: a row has no tokens besides padding, so there is nothing to embed")
        if positions is None:
            positions = _transformer._positions(mask, None)
        x = self._embed(tokens, None)
        x, _ = self._decode(x, positions, mask, None, None, None, tokens)
        x = pooled(self.final_norm(x), mask)
        for dense in self.dense:
            x = dense("BD,DE->BE", x)
        x = x.astype(jnp.float32)[:, : self.dim]
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return _jax_utils.unflatten_batch(x, shape=batch)


def pooled(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The mean over the tokens that count, in float32; 0 where none does."""
    weight = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(jnp.where(mask[..., None], x, 0).astype(jnp.float32), axis=1)
    return (total / jnp.maximum(jnp.sum(weight, axis=1), 1.0)).astype(x.dtype)


class EmbeddingGemma_300M(EmbeddingGemma, kw_only=True):
    """EmbeddingGemma 300M: 768 numbers, of which the first 512, 256 or 128 serve, too."""

    INFO: ClassVar[ModelInfo] = ModelInfo(tokenizer_version=3)
    config: TransformerConfig = TransformerConfig.of(
        dataclasses.replace(preset("embeddinggemma_300m"), embedding_dense=EMBEDDING_DENSE)
    )
