# SPDX-License-Identifier: Apache-2.0
"""One side of a T5Gemma: layers and final norm, for the encoder and for the decoder. Layers are those of `gemma.gm.nn`.

What differs between the sides is data: the layers' specs (`T5GemmaConfig.layers`), whether a layer has a cross-attention,
and what it remembers of the encoded input. How the sides meet is `t5gemma.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
from flax import linen as nn

from gemma.config import LayerSpec
from gemma.gm.nn import _cache, _layers, _modules, _plan
from gemma.gm.nn._config import AttentionType, QueryPreAttentionNormalisation, TransformerConfig
from gemma.gm.nn._cross import Memory
from gemma.gm.typing import Array, Bool, DType, Float, Int

__all__ = ["AttentionType", "Memory", "QueryPreAttentionNormalisation", "Side", "T5GemmaCache", "TransformerConfig"]
__all__ += ["TransformerOutput"]


@flax.struct.dataclass
class TransformerOutput:
    """What one side computed.

    Attributes:
      activations: L + 1 arrays [B, T, D]: after each layer, and the last of them after the final norm.
      cache: the decoder's, if there is one.
    """

    activations: tuple[Array, ...]
    cache: Any = None


@flax.struct.dataclass
class T5GemmaCache:
    """What a decoder keeps between two steps.

    Attributes:
      decoder: keys and values of the tokens that it has read, in the windowed layout of `gm.nn`.
      memory: of each layer, keys and values of the encoded input; None: no input has been read yet.
      prefill_length: the longest input that may be read.
    """

    decoder: _cache.Cache
    memory: dict[str, Memory] | None
    prefill_length: int = flax.struct.field(pytree_node=False)


class Side(nn.Module):
    """The layers of an encoder or a decoder, and the norm after them.

    Attributes:
      config: sizes.
      specs: what each layer does; of an encoder they see both ways.
      cross_features: Z, width of the encoder, where layers have a cross-attention; None elsewhere.
      embeds: whether the side has a table of its own.
      dtype: in which parameters are created.
    """

    config: TransformerConfig
    specs: tuple[LayerSpec, ...]
    cross_features: int | None = None
    embeds: bool = True
    dtype: DType | None = None

    def setup(self):
        config = self.config
        if self.embeds:
            self.embedder = _modules.Embedder(config.num_embed, config.embed_dim, dtype=self.dtype)
        more = dict(cross_features=self.cross_features, dtype=self.dtype)
        self.blocks = [_modules.Block.of(spec, config, name=f"layer_{spec.index}", **more) for spec in self.specs]
        self.final_norm = _layers.RMSNorm(eps=config.source.rms_norm_eps, dtype=self.dtype)

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Ids to embeddings, with the side's own table."""
        return self.embedder.encode(tokens)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Activations to float32 logits, with the side's own table."""
        return self.embedder.logits(x)

    def remember(self, source: Float[Array, "B S Z"], valid: Bool[Array, "B S"]) -> dict[str, Memory]:
        """What each layer looks at of an encoded input."""
        return {block.name: Memory(*block.remember(source), valid) for block in self.blocks}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: _cache.Cache | None = None,
        mask: Bool[Array, "B T S"] | None = None,
        memory: Mapping[str, Memory] | None = None,
    ) -> TransformerOutput:
        """Embeddings through all layers; arguments as in `_plan.plan_layers`, and `memory` by layer."""
        plans = _plan.plan_layers(self.specs, positions=positions, valid=valid, cache=cache, mask=mask)
        new, activations = {}, []
        for block, plan in zip(self.blocks, plans):
            layer = None if cache is None else cache[block.name]
            seen = None if memory is None else memory[block.name]
            new[block.name], x = block(x, positions, layer, plan.mask, plan, seen)
            activations.append(x)
        if isinstance(cache, _cache.WindowedCache):
            new = _cache.WindowedCache(new, cache_length=cache.cache_length)
        return TransformerOutput((*activations, self.final_norm(x)), None if cache is None else new)
