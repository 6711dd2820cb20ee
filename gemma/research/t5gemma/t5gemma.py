# SPDX-License-Identifier: Apache-2.0
"""`T5Gemma`: an encoder that reads the input both ways, and a decoder that writes while it looks at what was read.

    input ids  ── encoder ── activations [B, S, Z] ── each decoder layer's keys and values, computed once (Memory)
                                                           │
    target ids ── decoder: own attention ── cross-attention ── MLP ── logits
                          └ T5Gemma 2: one attention over both ┘

Arguments are checked in `_inputs.py`, layers are `modules.py`, sampling `sampling.py`, training `_loss.py`.
Axis letters: B batch, S input tokens, T target tokens, Z encoder width, D decoder width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma import config as configs
from gemma.errors import ConfigError, ShapeError
from gemma.gm.math import _pos_utils
from gemma.gm.nn import _cache, _modules
from gemma.gm.nn._config import TransformerConfig
from gemma.gm.nn._transformer import REQUIRED
from gemma.gm.typing import Array, Bool, DType, Float, Int
from gemma.gm.vision import _token_utils
from gemma.research.t5gemma import _inputs
from gemma.research.t5gemma.modules import Memory, Side, T5GemmaCache, TransformerOutput

AnyConfig = configs.T5GemmaConfig | configs.T5Gemma2Config


@flax.struct.dataclass
class T5GemmaOutput:
    """Result of a forward pass.

    Attributes:
      logits: [B, T, V], or [B, V] with `return_last_only`.
      activations: of the decoder, L + 1 arrays [B, T, D]; the last one is after the final norm.
      encoder_activations: the same of the encoder; None if the input came from the cache.
      cache: the new cache, if one was passed.
    """

    logits: Float[Array, "B T V"] | Float[Array, "B V"]
    activations: tuple[Array, ...]
    encoder_activations: tuple[Array, ...] | None
    cache: T5GemmaCache | None


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """The two sides in the names of the JAX API; `of` makes it from a configuration of `gemma.config`."""

    encoder_config: TransformerConfig
    decoder_config: TransformerConfig
    source: AnyConfig = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self):
        if self.source is None:
            sides = (self.encoder_config.gemma, self.decoder_config.gemma)
            object.__setattr__(self, "source", configs.T5GemmaConfig(*sides))

    @classmethod
    def of(cls, config: AnyConfig) -> T5GemmaConfig:
        """The view of a T5Gemma's or T5Gemma 2's configuration."""
        if not isinstance(config, AnyConfig):
            raise ConfigError(f"expected a T5GemmaConfig or T5Gemma2Config, got {type(config).__name__}")
        return cls(TransformerConfig.of(config.encoder), TransformerConfig.of(config.decoder), source=config)

    @property
    def merged(self) -> bool:
        """T5Gemma 2: one attention over both sequences, one embedding table for all."""
        return isinstance(self.source, configs.T5Gemma2Config)

    def init_cache(
        self, batch_size: int, prefill_length: int, generation_length: int, dtype: DType = jnp.bfloat16
    ) -> T5GemmaCache:
        """An empty cache: inputs of up to `prefill_length` tokens, and `generation_length` tokens of the decoder."""
        if prefill_length < 1:
            raise ConfigError(f"init_cache: prefill_length must be at least 1, got {prefill_length}")
        decoder = self.decoder_config.init_cache(batch_size, dtype, cache_length=generation_length, windowed=True)
        return T5GemmaCache(decoder, None, prefill_length)

    def make(self, name: str | None = "encoder_decoder", **fields: Any) -> T5Gemma:
        """The network; `fields` are those of `T5Gemma`."""
        return T5Gemma(self, name=name, **fields)


class T5Gemma(nn.Module):
    """A T5Gemma or T5Gemma 2.

    Attributes:
      config: both sides.
      dtype: in which parameters are created.
      target_tokens: where a trainer finds the input of this name in its batch; likewise `input_tokens`.
      window: how far a local layer of a T5Gemma's encoder sees each way: "hf", W tokens as in Hugging Face's code, or
        "deepmind", W - 1. They differ for inputs of more than W tokens (4096 in published models).
    """

    config: T5GemmaConfig
    dtype: DType = jnp.bfloat16
    target_tokens: str = REQUIRED
    input_tokens: str = REQUIRED
    window: Literal["hf", "deepmind"] = "hf"

    def setup(self):
        config, source = self.config, self.config.source
        _inputs.check_network(source)
        layers = configs.encoder_layers(source, window=self.window)
        own = dict(embeds=not config.merged, dtype=self.dtype)
        self.encoder = Side(config.encoder_config, layers, **own)
        cross = None if config.merged else config.encoder_config.embed_dim
        self.decoder = Side(config.decoder_config, config.decoder_config.layers, cross_features=cross, **own)
        if not config.merged:
            return
        sizes, tower = config.encoder_config, config.encoder_config.vision_encoder
        vision: dict[str, Any] = dict(eoi_token=source.encoder.eoi_token_index)
        if tower is not None:
            vision |= dict(vision_proj_dim=tower.width, vision_norm_eps=tower.siglip_encoder.norm_eps)
            self._vision = tower.clone(parent=self, name="vision_encoder")
        self.embedder = _modules.Embedder(sizes.num_embed, sizes.embed_dim, dtype=self.dtype, **vision)

    def __kontext_keys__(self) -> dict[str, str]:
        """Input name to its place in a trainer's batch; kauldron asks for it."""
        return {name: getattr(self, name) for name in ("target_tokens", "input_tokens")}

    def init_cache(
        self, *, batch_size: int, prefill_length: int, generation_length: int, dtype: DType | None = None
    ) -> T5GemmaCache:
        """An empty cache; see `T5GemmaConfig.init_cache`."""
        return self.config.init_cache(batch_size, prefill_length, generation_length, dtype or self.dtype)

    def __call__(
        self,
        target_tokens: Int[Array, "B T"],
        input_tokens: Int[Array, "B S"] | None = None,
        cache: T5GemmaCache | None = None,
        *,
        images: Array | None = None,
        return_last_only: bool = False,
    ) -> T5GemmaOutput:
        """The logits after each target token.

        Args:
          target_tokens: what the decoder reads: bos, then the tokens so far (`make_targets` for training). 0 is padding.
          input_tokens: what the encoder reads; 0 is padding. May be None when `cache` has read an input already.
          cache: from `init_cache` or an earlier call. The first call with it reads the input; later ones need none.
          images: pictures of a T5Gemma 2's input, [B, I, H, W, 3] uint8 or floats in -1..1: `input_tokens` hold
            `mm_tokens_per_image` times the image token for each; rows with fewer end in black ones.
          return_last_only: the logits after each row's last target token only.

        Raises:
          ShapeError: (a ValueError) shapes or dtypes that do not fit, or no input at all.
          PromptError: (a ValueError) ids outside of the table, an empty input, or images that do not fit the tokens.
          ContextFull: (a ValueError) more target tokens than the cache has room for.
        """
        target_tokens, valid = _inputs.check_targets(target_tokens, self.config)
        encoded, memory = None, None if cache is None else cache.memory
        if memory is None:
            if input_tokens is None:
                raise ShapeError("input_tokens: expected [B, S]; only a cache that has read an input needs none")
            _inputs.check_room(np.shape(input_tokens), target_tokens, cache)
            encoded = self.compute_encoder_activations(input_tokens, images=images).activations
            memory = self.decoder.remember(encoded[-1], jnp.asarray(input_tokens) != 0)
        elif input_tokens is not None or images is not None:
            raise ShapeError("cache: it has read an input already; start with a new one, or pass input_tokens=None")
        else:
            _inputs.check_memory(memory, target_tokens, cache)
        x, new = self._decode(target_tokens, valid, cache, memory)
        hidden = x[-1]
        if return_last_only:
            hidden = _last(hidden, valid)
        return T5GemmaOutput(self._head(hidden), x, encoded, new)

    def compute_encoder_activations(
        self, tokens: Int[Array, "B S"], inputs_mask: Bool[Array, "B S"] | None = None, *, images: Array | None = None
    ) -> TransformerOutput:
        """The encoder alone: `.activations[-1]` is what the decoder looks at. `inputs_mask` None: what is not 0."""
        tokens, valid = _inputs.check_inputs(tokens, inputs_mask, self.config)
        positions = _pos_utils.build_positions_from_mask(valid)
        embed = self.embedder.encode if self.config.merged else self.encoder.encode
        x = self._with_images(embed(tokens), tokens, images)
        return self.encoder(x, positions=positions, valid=valid)

    def compute_decoder_activations(
        self,
        target_tokens: Int[Array, "B T"],
        inputs_mask: Bool[Array, "B S"],
        encoder_outputs: Float[Array, "B S Z"] | None = None,
        cache: T5GemmaCache | None = None,
    ) -> TransformerOutput:
        """The decoder alone, on what the encoder computed, or on what the cache remembers of it."""
        target_tokens, valid = _inputs.check_targets(target_tokens, self.config)
        memory = None if cache is None else cache.memory
        if memory is None:
            if encoder_outputs is None:
                raise ShapeError("encoder_outputs: expected [B, S, Z]; only a cache that has read an input needs none")
            memory = self.decoder.remember(jnp.asarray(encoder_outputs), jnp.asarray(inputs_mask).astype(bool))
        _inputs.check_memory(memory, target_tokens, cache)
        activations, new = self._decode(target_tokens, valid, cache, memory)
        return TransformerOutput(activations, new)

    def decode_one_step(
        self,
        target_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cross_attn_mask: Bool[Array, "B 1 S"] | None = None,
        self_attn_mask: Bool[Array, "B T S"] | None = None,
        cache: T5GemmaCache | None = None,
    ) -> T5GemmaOutput:
        """The next tokens of a decoder whose cache has read an input.

        Args:
          target_tokens: new tokens, usually one per row.
          positions: theirs; None: after those that the cache holds.
          cross_attn_mask: which input tokens may be looked at; None: those that are no padding.
          self_attn_mask: which tokens of its own row each new one may look at; None: all up to itself.
          cache: with its memory filled.
        """
        target_tokens, valid = _inputs.check_targets(target_tokens, self.config)
        if cache is None or cache.memory is None:
            raise ShapeError("cache: expected one that has read an input; call the model with input_tokens first")
        memory = cache.memory
        if cross_attn_mask is not None:
            seen = jnp.asarray(cross_attn_mask).astype(bool)[:, 0]
            memory = {name: layer.replace(valid=seen) for name, layer in memory.items()}
        _inputs.check_memory(memory, target_tokens, cache)
        mask = None if self_attn_mask is None else jnp.asarray(self_attn_mask).astype(bool)
        activations, new = self._decode(target_tokens, valid, cache, memory, positions, mask)
        return T5GemmaOutput(self._head(activations[-1]), activations, None, new.replace(memory=cache.memory))

    def _decode(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: T5GemmaCache | None,
        memory: dict[str, Memory],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T S"] | None = None,
    ) -> tuple[tuple[Array, ...], T5GemmaCache | None]:
        held = None if cache is None else cache.decoder
        if positions is None:
            positions = _pos_utils.build_positions_from_mask(valid)
            positions = positions if held is None else positions + _cache.next_position(held)[:, None]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*tokens.shape, mask.shape[-1]))
        x = (self.embedder if self.config.merged else self.decoder).encode(tokens)
        out = self.decoder(x, positions=positions, valid=valid, cache=held, mask=mask, memory=memory)
        new = None if cache is None else T5GemmaCache(out.cache, memory, cache.prefill_length)
        return out.activations, new

    def _head(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        logits, cap = (self.embedder if self.config.merged else self.decoder).logits(x), None
        cap = self.config.decoder_config.final_logit_softcap
        return (logits if cap is None else jnp.tanh(logits / cap) * cap).astype(x.dtype)

    def _with_images(self, x: Float[Array, "B S Z"], tokens: Int[Array, "B S"], images: Array | None) -> Array:
        tower = self.config.encoder_config.vision_encoder
        images = _inputs.check_images(images, tokens, self.config)
        if images is None:
            if tower is not None and self.is_initializing():  # so that its parameters exist
                self._soft_tokens(jnp.zeros((1, 1, *tower.image_shape), jnp.float32))
            return x
        mask = tokens == self.config.source.encoder.image_token_index
        return _token_utils.merge_embeddings(text_embeddings=x, vision_embeddings=self._soft_tokens(images), mask=mask)

    def _soft_tokens(self, images: Array) -> Float[Array, "B I Q Z"]:
        patches = self._vision.patchify_images(images)
        flat = self._vision(patches=patches.reshape(-1, 1, *patches.shape[-2:]), is_training=False)
        return self.embedder.encode_vision(flat).reshape(*images.shape[:2], -1, self.config.encoder_config.embed_dim)


def _last(x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    place = x.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
