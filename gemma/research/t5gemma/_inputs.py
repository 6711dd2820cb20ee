# SPDX-License-Identifier: Apache-2.0
"""Checks of a T5Gemma's arguments, and the tokens of an image in its input.

Values are checked wherever they are known, that is outside of jit. The network is `t5gemma.py`; ids out of texts, and
targets for training, are `gemma/seq2seq.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import seq2seq
from gemma.errors import ConfigError, ContextFull, PromptError, ShapeError
from gemma.gm.nn import _images, _transformer
from gemma.gm.vision import _token_utils

IGNORED = seq2seq.IGNORED


def expand_images(ids: Sequence[int], config: Any) -> list[int]:
    """Each `<start_of_image>` of an input becomes the tokens of one image, between blank lines."""
    encoder = config.encoder
    image = [encoder.image_token_index] * encoder.mm_tokens_per_image
    blank = _token_utils.DOUBLE_NEW_LINE
    whole = [blank, encoder.boi_token_index, *image, encoder.eoi_token_index, blank]
    expanded = [whole if token == encoder.boi_token_index else [token] for token in ids]
    return [token for part in expanded for token in part]


def check_aligned(target_tokens: Any, labels: Any) -> None:
    """`seq2seq.check_aligned`, of which only the shapes can be looked at while tracing."""
    if known(target_tokens, labels):
        seq2seq.check_aligned(target_tokens, labels)
    elif np.shape(target_tokens) != np.shape(labels):
        raise ShapeError(f"labels: expected the shape {np.shape(target_tokens)} of target_tokens, got {labels.shape}")


# ---- checks of the network's arguments ------------------------------------------------------------------------------


def known(*arrays: Any) -> bool:
    """Whether the values can be looked at, which they cannot while tracing."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_network(config: Any) -> None:
    """Refuses a configuration that the JAX network does not compute."""
    if not config.decoder.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings is False: the JAX networks use the embedding table as output head")


def check_targets(tokens: Any, config: Any) -> tuple[jax.Array, jax.Array]:
    """Target tokens as an array, and which of them are no padding."""
    tokens = _ids("target_tokens", tokens, config.decoder_config.num_embed)
    return tokens, tokens != 0


def check_inputs(tokens: Any, mask: Any, config: Any) -> tuple[jax.Array, jax.Array]:
    """Input tokens as an array, and which of them are no padding; every row must have one."""
    tokens = _ids("input_tokens", tokens, config.encoder_config.num_embed)
    valid = tokens != 0 if mask is None else jnp.asarray(mask).astype(bool)
    if valid.shape != tokens.shape:
        raise ShapeError(f"inputs_mask: expected the shape {tokens.shape} of the tokens, got {valid.shape}")
    if known(valid):
        empty = np.flatnonzero(~np.asarray(valid).any(axis=1))
        if len(empty):
            raise PromptError(
                f"input_tokens: row {int(empty[0])} is empty, all padding: an encoder needs a token to read"
            )
    return tokens, valid


def check_memory(memory: Any, tokens: jax.Array, cache: Any) -> None:
    """`check_room` for an input that has been read."""
    check_room(next(iter(memory.values())).valid.shape, tokens, cache)


def check_room(shape: tuple[int, ...], tokens: jax.Array, cache: Any) -> None:
    """Input [B, S] and target must have as many rows, and the cache room for both."""
    if len(shape) != 2:
        raise ShapeError(f"input_tokens: expected integers [B, S], got the shape {tuple(shape)}")
    rows, length = shape
    if rows != tokens.shape[0]:
        raise ShapeError(f"expected as many rows of input as of target tokens, got {rows} and {tokens.shape[0]}")
    if cache is None:
        return
    if length > cache.prefill_length:
        raise ContextFull(length, cache.prefill_length, "the input")
    held = next(iter(cache.decoder.values()))["k"].shape[0]
    if held != rows:
        raise ShapeError(f"cache: made for {held} rows, but target_tokens hold {rows}")
    _transformer._check_room(cache.decoder, tokens != 0)


def check_images(images: Any, tokens: jax.Array, config: Any) -> jax.Array | None:
    """Pictures as [B, I, H, W, C]; their number must fit the image tokens of the fullest row."""
    if images is None:
        return None
    tower = config.encoder_config.vision_encoder
    if tower is None:
        raise PromptError("images: this model has no vision encoder; only a T5Gemma 2 reads pictures")
    shape = np.shape(images)
    if len(shape) != 5 or shape[0] != tokens.shape[0] or shape[-1] != tower.image_channels or 0 in shape:
        raise ShapeError(f"images: expected [{tokens.shape[0]}, I, H, W, {tower.image_channels}], got {tuple(shape)}")
    if known(tokens):
        per_image, marker = tower.num_mm_tokens_per_image, config.source.encoder.image_token_index
        counts = (np.asarray(tokens) == marker).sum(axis=1)
        if counts.max() != shape[1] * per_image or (counts % per_image).any():
            raise PromptError(
                f"images: {shape[1]} per row need {shape[1] * per_image} tokens of id {marker} in the fullest row, and "
                f"{per_image} for each image everywhere; the rows hold {counts.tolist()}"
            )
    return jnp.asarray(images)


def _ids(name: str, tokens: Any, rows: int) -> jax.Array:
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ShapeError(f"{name}: expected integers [B, T], at least one of each, got {tokens.dtype} {tokens.shape}")
    try:
        _images.check_ids(tokens, rows, False)
    except PromptError as error:
        raise PromptError(str(error).replace("tokens:", f"{name}:", 1)) from None
    return jnp.asarray(tokens, jnp.int32)
