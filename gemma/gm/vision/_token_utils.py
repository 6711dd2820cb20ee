# SPDX-License-Identifier: Apache-2.0
r"""An image's tokens inside a row of token ids, on the device: expanding, merging, and dropping them again.

In a prompt an image is one token, `<start_of_image>`. Expanded, it becomes n + 4 tokens for its n soft tokens:

    ... x  \n\n  <start_of_image>  -2 -2 ... -2  <end_of_image>  \n\n  y ...        -2: overwritten by the encoder

All functions have fixed shapes, so that they can be jitted. The same on the host, with counts that are checked, is
`_prompt.py`. Axis letters: T text tokens, T' tokens after the expansion, I images of a row, Q soft tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gemma.config import GemmaConfig
from gemma.gm.typing import Array, Bool, Float, Int

SOFT_TOKEN_PLACEHOLDER = -2  # no id of the vocabulary
DOUBLE_NEW_LINE = 108  # the piece "\n\n" of the vocabulary of Gemma 3
START_OF_IMAGE, END_OF_IMAGE = GemmaConfig().boi_token_index, GemmaConfig().eoi_token_index


def get_num_mm_tokens(*, max_num_images: int, num_tokens_per_image: int) -> int:
    """How many tokens a row grows by: the marker of an image is in it already."""
    return max_num_images * (num_tokens_per_image + 3)


def image_sequence(num_tokens_per_image: int, start: int = START_OF_IMAGE, end: int = END_OF_IMAGE) -> list[int]:
    """The ids that take the place of one marker."""
    soft = [SOFT_TOKEN_PLACEHOLDER] * num_tokens_per_image
    return [DOUBLE_NEW_LINE, start, *soft, end, DOUBLE_NEW_LINE]


def add_extra_tokens_for_images(
    tokens: Int[Array, "B T"],
    *,
    max_num_images: int,
    num_tokens_per_image: int,
    start_of_image: int = START_OF_IMAGE,
    end_of_image: int = END_OF_IMAGE,
) -> Int[Array, "B T'"]:
    """Expands the first `max_num_images` markers of each row; T' is T plus `get_num_mm_tokens`.

    Rows with fewer markers end in zeros, the padding. Markers beyond `max_num_images` stay as they are.
    """
    sequence = image_sequence(num_tokens_per_image, start_of_image, end_of_image)
    return insert_sequence(tokens, at=start_of_image, sequence=sequence, max_num_images=max_num_images)


def insert_sequence(
    tokens: Int[Array, "B T"], *, at: int, sequence: Sequence[int] | Int[Array, " L"], max_num_images: int
) -> Int[Array, "B T'"]:
    """Replaces the first `max_num_images` tokens `at` of each row by `sequence`; rows end in zeros."""
    sequence = jnp.asarray(sequence, jnp.int32)
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    more = sequence.shape[0] - 1
    markers, place = _places(tokens, at, more, max_num_images)
    index = jnp.arange(tokens.shape[1] + max_num_images * more, dtype=jnp.int32)
    # The token whose place is the last one at or before each index, and how far behind it that index is.
    source = jax.vmap(lambda row: jnp.searchsorted(row, index, side="right"))(place).astype(jnp.int32) - 1
    behind = index[None] - jnp.take_along_axis(place, source, axis=1)
    own = jnp.where(behind == 0, jnp.take_along_axis(tokens, source, axis=1), 0)
    inserted = jnp.where(behind <= more, sequence[jnp.minimum(behind, more)], 0)
    return jnp.where(jnp.take_along_axis(markers, source, axis=1), inserted, own)


def _places(
    tokens: Int[Array, "B T"], at: int, more: int, max_num_images: int | None
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Which tokens are expanded, and where each token (or its expansion) begins afterwards."""
    markers = tokens == at
    if max_num_images is not None:
        markers = markers & (jnp.cumsum(markers, axis=1, dtype=jnp.int32) <= max_num_images)
    before = jnp.cumsum(markers, axis=1, dtype=jnp.int32) - markers.astype(jnp.int32)
    return markers, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + before * more


def merge_embeddings(
    *, text_embeddings: Float[Array, "B T D"], vision_embeddings: Float[Array, "B I Q D"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Puts a row's image vectors, in order, where `mask` is True; vectors that are left over are dropped."""
    B, I, Q, D = vision_embeddings.shape
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    flat = vision_embeddings.reshape(B, I * Q, D).astype(text_embeddings.dtype)
    chosen = jnp.take_along_axis(flat, jnp.clip(rank, 0, I * Q - 1)[..., None], axis=1)
    return jnp.where((mask & (rank < I * Q))[..., None], chosen, text_embeddings)


def remove_mm_logits(
    *,
    logits: Float[Array, "B T' V"],
    tokens: Int[Array, "B T"],
    num_tokens_per_image: int,
    max_num_images: int | None = None,
    start_of_image: int = START_OF_IMAGE,
) -> Float[Array, "B T V"]:
    r"""Rows of an expanded prompt back at the places of its tokens before the expansion.

    A marker takes the row of the last token that stands for it (the second \n\n), which has seen the whole image:
    what follows it predicts the token after the image, as everywhere else.

    Args:
      logits: or any other activations.
      tokens: before the expansion.
      num_tokens_per_image: Q.
      max_num_images: how many markers of a row were expanded; None: all.
      start_of_image: the marker.
    """
    more = num_tokens_per_image + 3
    markers, place = _places(jnp.asarray(tokens), start_of_image, more, max_num_images)
    return jnp.take_along_axis(logits, (place + markers.astype(jnp.int32) * more)[..., None], axis=1)
