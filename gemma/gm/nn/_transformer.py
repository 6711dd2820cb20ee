# SPDX-License-Identifier: Apache-2.0
"""The decoder: tokens and images in, logits and a new cache out. The models with sizes are in `_gemma.py`.

`Transformer.__call__` is not jitted: whoever calls it often (a sampler, a training step) jits around it, so a wrapper
that intercepts its layers (LoRA, quantization) can never meet a program compiled for another wrapper.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma.config import GemmaConfig
from gemma.errors import ConfigError, ContextFull, ShapeError
from gemma.gm.math import _pos_utils
from gemma.gm.nn import _cache, _images, _layers, _modules, _per_layer, _plan, _remat, _streams
from gemma.gm.nn._config import ModelInfo, TransformerConfig
from gemma.gm.typing import Array, Bool, DType, Float, Int, Sharding, UInt8
from gemma.gm.utils import _jax_utils

REQUIRED = "__KEY_REQUIRED__"  # a trainer must say where this input comes from


@flax.struct.dataclass
class Output:
    """Result of a forward pass.

    Attributes:
      logits: [*B, T, V], or [*B, V] with `return_last_only`, in the dtype of the weights.
      cache: the new cache, if one was passed.
      hidden_states: [*B, T, D] or [*B, D] after the final norm, if asked for.
    """

    logits: Float[Array, "*B T V"] | Float[Array, "*B V"]
    cache: _cache.Cache | None
    hidden_states: Float[Array, "*B T D"] | Float[Array, "*B D"] | None


class Transformer(nn.Module, kw_only=True):
    """A Gemma decoder of any configuration.

    Attributes:
      config: sizes and layer kinds.
      dtype: in which parameters are created.
      return_last_only: only the logits after the last token of each row; may be given here or at the call.
      tokens: where a trainer finds the input of this name in its batch; likewise the next three.
      images: see `tokens`.
      positions: see `tokens`.
      attention_mask: see `tokens`.
      remat: what a training step keeps of each layer for its backward pass; the rest is computed a second time. "block":
        the layer's input only; "dots": its products with weights, too. None: everything. It changes no number, and
        nothing where no gradient is taken or a cache is passed.
    """

    config: TransformerConfig
    dtype: DType = jnp.bfloat16
    return_last_only: bool | None = None
    tokens: str = REQUIRED
    images: str | None = None
    positions: str | None = None
    attention_mask: str | None = None
    remat: str | None = None

    INFO: ClassVar[ModelInfo] = ModelInfo()

    @classmethod
    def from_config(cls, config: GemmaConfig, *, dtype: DType = jnp.bfloat16, **fields: Any) -> Transformer:
        """The network of any GemmaConfig, such as the one that a checkpoint carries."""
        return cls(config=TransformerConfig.of(config), dtype=dtype, **fields)

    def setup(self):
        config = self.config
        if not config.source.tie_word_embeddings:
            raise ConfigError("tie_word_embeddings is False: the JAX networks use the embedding table as output head")
        if self.remat not in (None, *_SAVED):
            raise ConfigError(f"remat: expected None, {' or '.join(map(repr, _SAVED))}, got {self.remat!r}")
        encoder = config.vision_encoder
        if encoder is None:
            vision = {}
        else:
            self._encoder = encoder.clone(parent=self, name="vision_encoder")
            vision = dict(vision_proj_dim=encoder.width, vision_norm_eps=encoder.siglip_encoder.norm_eps)
        newer = _newer_inputs(config)
        self.embedder = _modules.Embedder(config.num_embed, config.embed_dim, dtype=self.dtype, **vision, **newer)
        self.blocks = [
            _modules.Block.of(spec, config, dtype=self.dtype, name=f"layer_{spec.index}") for spec in config.layers
        ]
        plus_one = config.source.norm_plus_one
        self.final_norm = _layers.RMSNorm(eps=config.source.rms_norm_eps, dtype=self.dtype, plus_one=plus_one)
        self.altup_projections = self._projections("altup_projection")
        self.altup_unembed_projections = self._projections("altup_unembed_projection")

    def _projections(self, name: str) -> list[_layers.Einsum]:
        """Square kernels, one for each stream after the first; each is called like its module, as published."""
        altup, shape = self.config.source.altup, (self.config.embed_dim,) * 2
        names = [] if altup is None else [f"{name}_{i}" for i in range(altup.num_inputs - 1)]
        return [_layers.Einsum(shape=shape, weight_name=n, dtype=self.dtype, name=n) for n in names]

    def __kontext_keys__(self) -> dict[str, str | None]:
        """Input name to its place in a trainer's batch; kauldron asks for it."""
        return {name: getattr(self, name) for name in ("tokens", "images", "positions", "attention_mask")}

    @property
    def vision_encoder(self) -> Any:
        """The vision encoder of the configuration, or None."""
        return self.config.vision_encoder

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        images: UInt8[Array, "*B I H W C"] | UInt8[Array, "*B H W C"] | Float[Array, "*B I H W C"] | None = None,
        soft_tokens: Float[Array, "*B I Q D"] | None = None,
        positions: Int[Array, "*B T'"] | None = None,
        cache: _cache.Cache | None = None,
        attention_mask: Bool[Array, "*B T' S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
    ) -> Output:
        """The forward pass. `*B` is any number of batch dimensions, none included; a cache has one, their product.

        Args:
          tokens: ids; 0 is padding, on either side, which nothing attends to.
          images: the pictures of each row, in the order of the `<start_of_image>` in it, each of which becomes the
            tokens of one picture: T' is T plus Q + 3 for each of the I pictures. uint8 of any size, or floats in -1..1
            of the encoder's size (`gm.vision.load_images`). Rows with fewer pictures than others end in black ones.
          soft_tokens: instead, what `encode_images` made of them. The tokens are expanded already, T' is T.
          positions: 0-based, in tokens. None: counted over the real tokens, on top of what the cache holds.
          cache: from `init_cache` or an earlier call, in either layout. Its dtype may differ from the weights'.
          attention_mask: True where a query (T') may look at a key (S), before sliding windows. The columns are the
            tokens themselves without a cache, the slots of a cache in the full layout, the row's token numbers in the
            windowed layout. None: causal, without padding, and both ways inside an image.
          return_last_only: logits and hidden states after the last real token of each row only.
          return_hidden_states: also return the activations after the final norm.

        Returns:
          An `Output`, of T positions: logits at a `<start_of_image>` are those after its picture.

        Raises:
          ShapeError: (a ValueError) the shapes or dtypes of the arguments do not fit.
          PromptError: (a ValueError) images came and the model has no vision encoder, or markers and images differ in
            number, or an id is outside of the table; under jit the numbers are unknown and nothing is noticed.
          ContextFull: (a ValueError) more tokens than the cache has room for. Under jit only a chunk longer than a full
            cache is noticed: whoever jits counts the tokens, as the samplers do.
          ConfigError: (a ValueError) float16 parameters in Gemma 3, or a configuration with an untied head.
        """
        if self.return_last_only is not None or return_last_only is not None:
            return_last_only = nn.merge_param("return_last_only", self.return_last_only, return_last_only)
        tokens = _integers("tokens", tokens)
        pictures = _images.check(self, tokens, images, soft_tokens)
        _images.check_ids(tokens, self.config.num_embed, soft_tokens is not None)
        extra = _images.extra_length(pictures, self.config)
        batch, tokens, positions, attention_mask = _flatten(tokens, positions, attention_mask, extra)
        given, tokens = tokens, _images.expand(tokens, pictures, self.config)
        valid = tokens != 0
        if cache is not None:
            _check_cache(cache, self.config, tokens.shape[0])
            _check_room(cache, valid)
        if positions is None:
            positions = _positions(valid, cache)
        x, groups = self._embed(tokens, pictures), _images.groups(tokens, pictures)
        x, cache = self._decode(x, positions, valid, cache, attention_mask, groups, tokens)
        x = _last(x, valid) if return_last_only else _images.contract(x, given, pictures, self.config)
        x = self.final_norm(x)
        logits = self._head(x)
        restore = functools.partial(_jax_utils.unflatten_batch, shape=batch)
        return Output(restore(logits), cache, restore(x) if return_hidden_states else None)

    def init_cache(
        self,
        *,
        batch_size: int,
        dtype: DType,
        cache_length: int,
        sharding: Sharding | None = None,
        windowed: bool = False,
    ) -> _cache.Cache:
        """An empty cache.

        Args:
          batch_size: rows, the product of all batch dimensions.
          dtype: of keys and values.
          cache_length: tokens that fit.
          sharding: where its arrays live.
          windowed: the layout whose local layers keep a ring of their window; see `_cache.py`. Otherwise every layer
            keeps `cache_length` slots.
        """
        return self.config.init_cache(
            batch_size, dtype, cache_length=cache_length, windowed=windowed, sharding=sharding
        )

    def encode_images(
        self, images: UInt8[Array, "*B I H W C"] | Float[Array, "*B I H W C"]
    ) -> Float[Array, "*B I Q D"]:
        """Pictures to the vectors that stand for them in a prompt, for `soft_tokens` of as many calls as one likes.

        `model.apply({"params": params}, images, method="encode_images")`; the pictures as in `__call__`.
        """
        encoder = self.config.vision_encoder
        if encoder is None:
            _images.check(self, (), images, None)  # says so
        patches = self._encoder.patchify_images(images)
        lead, patches = patches.shape[:-2], patches.reshape(-1, 1, *patches.shape[-2:])
        encoded = self._encoder(patches=patches, is_training=False)
        soft_tokens = self.embedder.encode_vision(encoded)
        return soft_tokens.reshape(*lead, *soft_tokens.shape[-2:])

    def _embed(self, tokens: Int[Array, "B T"], pictures: _images.Images | None) -> Float[Array, "B T D"]:
        soft_tokens = None if pictures is None else pictures.soft_tokens
        if pictures is not None and soft_tokens is None:
            soft_tokens = self.encode_images(pictures.pixels)
        elif pictures is None and self.config.vision_encoder is not None and self.is_initializing():
            encoder = self.config.vision_encoder
            self.encode_images(jnp.zeros((1, *encoder.image_shape), jnp.float32))  # so that its parameters exist
        x = self.embedder.encode(jnp.maximum(tokens, 0))
        return _images.merge(x, tokens, soft_tokens)

    def _decode(self, x, positions, valid, cache, mask, groups, tokens) -> tuple[Array, _cache.Cache | None]:
        specs = self.config.layers
        plans = _plan.plan_layers(specs, positions=positions, valid=valid, cache=cache, mask=mask, groups=groups)
        if x.dtype == jnp.float16 and self.config.use_qk_norm:
            raise ConfigError(
                "float16 cannot hold the activations of Gemma 3 and later (they exceed 65504 and turn into NaN): use "
                "bfloat16 or float32 parameters"
            )
        per_layer = self.embedder.encode_per_layer(tokens, x) if self.embedder.per_layer is not None else None
        new, shared = {}, {spec.kv_source: None for spec in specs if spec.shares_kv}
        if self.altup_projections:
            x = _streams.spread(x, self.altup_projections)
        training = self.remat is not None and cache is None and not self.is_initializing()
        call = _remat.checkpoint(_call_block, _SAVED[self.remat]) if training else _call_block
        for block, spec, plan in zip(self.blocks, specs, plans):
            layer = None if cache is None or spec.shares_kv else cache[block.name]
            more = {}
            if shared or per_layer is not None:
                kv = shared[spec.kv_source] if spec.shares_kv else None
                more = dict(
                    inputs=_per_layer.LayerInputs(kv, None if per_layer is None else per_layer[..., spec.index, :])
                )
            stored, x, *kv = call(block, x, positions, layer, plan, more)
            if not spec.shares_kv:
                new[block.name] = stored
            if spec.index in shared:
                shared[spec.index] = kv[0]
        if self.altup_projections:
            x = _streams.merge(x, self.altup_unembed_projections)
        if isinstance(cache, _cache.WindowedCache):
            return x, _cache.WindowedCache(new, cache_length=cache.cache_length)
        return x, None if cache is None else new

    def _head(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        cap = self.config.final_logit_softcap
        if cap is None:
            return self.embedder.decode(x)
        logits = self.embedder.logits(x)  # float32: the cap is applied before rounding
        return (jnp.tanh(logits / cap) * cap).astype(x.dtype)


# What `remat` keeps besides the inputs of a layer.
_SAVED = {"block": None, "dots": _remat.products}


def _call_block(block: nn.Module, x: Array, positions: Array, cache: Any, plan: _plan.LayerPlan, more: dict[str, Any]):
    return block(x, positions, cache, plan.mask, plan, **more)


def _newer_inputs(config: TransformerConfig) -> dict[str, Any]:
    """What an `Embedder` needs to know for per-layer inputs."""
    source = config.source
    if not source.hidden_size_per_layer_input:
        return {}
    norm = dict(eps=source.rms_norm_eps, plus_one=source.norm_plus_one)
    rows = source.vocab_size_per_layer_input or source.vocab_size
    sizes = dict(vocab_size=rows, num_layers=config.num_layers, width=source.hidden_size_per_layer_input)
    return dict(per_layer=dict(**sizes, norm=norm))


def _integers(name: str, array: Any) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ShapeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim < 1:
        raise ShapeError(f"{name}: expected at least 1 axes, got the shape {tuple(array.shape)}")
    return array


def _flatten(tokens: Array, positions: Any, attention_mask: Any, extra: int):
    """Arguments as arrays with one batch dimension, and the batch shape to restore; images add `extra` queries."""
    positions = None if positions is None else _integers("positions", positions)
    attention_mask = None if attention_mask is None else jnp.asarray(attention_mask)
    if attention_mask is not None and attention_mask.dtype != jnp.bool_:
        raise ShapeError(f"attention_mask: expected booleans, got {attention_mask.dtype}")
    batch = _jax_utils.batch_shape(
        {"tokens": (tokens, 1), "positions": (positions, 1), "attention_mask": (attention_mask, 2)}
    )
    length = tokens.shape[-1]
    if length == 0:
        raise ShapeError("tokens: expected at least one token per row, got none")
    for name, array, axis in (("positions", positions, -1), ("attention_mask", attention_mask, -2)):
        if array is not None and array.shape[axis] != length + extra:
            wanted = (
                f"{length} queries as in tokens" if not extra else f"{length + extra} queries, image tokens included"
            )
            raise ShapeError(f"{name}: expected {wanted}, got the shape {tuple(array.shape)}")
    tokens, positions, attention_mask = (
        _jax_utils.flatten_batch(array, batch) for array in (tokens, positions, attention_mask)
    )
    return batch, tokens, None if positions is None else positions.astype(jnp.int32), attention_mask


def _check_cache(cache: _cache.Cache, config: TransformerConfig, batch: int) -> None:
    own = [spec.index for spec in config.layers if not spec.shares_kv]
    expected = {f"layer_{i}" for i in own}
    if set(cache) != expected:
        wrong = sorted(expected ^ set(cache))
        raise ShapeError(f"cache: expected the layers layer_0 .. layer_{own[-1]}; these differ: {wrong}")
    for name, layer in cache.items():
        if layer["k"].shape[0] != batch:
            raise ShapeError(f"cache[{name!r}]: made for {layer['k'].shape[0]} rows, but tokens hold {batch}")
    if not isinstance(cache, _cache.WindowedCache) and len({layer["k"].shape[1] for layer in cache.values()}) > 1:
        raise ShapeError(
            "cache: its layers have different lengths, but it is no WindowedCache; a windowed cache was perhaps copied "
            "with dict(...): use jax.tree.map, or gm.nn.WindowedCache(layers, cache_length=...)"
        )


def _check_room(cache: _cache.Cache, valid: Bool[Array, "B T"]) -> None:
    """Refuses tokens that the cache has no room for, as far as that is known: under jit only the shapes are."""
    layer = cache["layer_0"]
    windowed = isinstance(cache, _cache.WindowedCache)
    limit = cache.cache_length if windowed else layer["k"].shape[1]
    if not windowed and valid.shape[1] > limit:
        raise ContextFull(valid.shape[1], limit, "this chunk")
    if isinstance(layer["end_index"], jax.core.Tracer) or isinstance(valid, jax.core.Tracer):
        return
    new = np.asarray(valid).sum(axis=1) if windowed else valid.shape[1]  # the full layout stores padding, too
    used = int((np.asarray(layer["end_index"]) + new).max())
    if used > limit:
        raise ContextFull(used, limit, "the cache's content and this chunk")


def _positions(valid: Bool[Array, "B T"], cache: _cache.Cache | None) -> Int[Array, "B T"]:
    positions = _pos_utils.build_positions_from_mask(valid)
    return positions if cache is None else positions + _cache.next_position(cache)[:, None]


def _last(x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The activations of the last real token of each row; of the last position where a row has none."""
    length = valid.shape[1]
    back = jnp.argmax(valid[:, ::-1], axis=1)  # 0 if there is none
    return jnp.take_along_axis(x, (length - 1 - back)[:, None, None], axis=1)[:, 0]
