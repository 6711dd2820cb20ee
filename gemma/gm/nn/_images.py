# SPDX-License-Identifier: Apache-2.0
"""What the decoder does about images around its layers: checking arguments, expanding tokens, merging vectors.

The encoder is `gm/vision`; masks of images are in `_plan.py`. Counts are checked wherever they are known, that is
outside of jit: inside, a marker without an image stays an ordinary token and an image without a marker is not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import PromptError, ShapeError
from gemma.gm.nn._config import TransformerConfig
from gemma.gm.typing import Array, Float, Int, UInt8
from gemma.gm.utils import _attention_mask, _jax_utils
from gemma.gm.vision import _token_utils
from gemma.gm.vision._prompt import ImageTokens, mismatch, spans

SOFT = _token_utils.SOFT_TOKEN_PLACEHOLDER


class Images(NamedTuple):
    """The images of a call.

    Attributes:
      pixels: one row of pictures per row of tokens, or None where they are encoded already.
      soft_tokens: their vectors, or None.
    """

    pixels: UInt8[Array, "B I H W C"] | Float[Array, "B I H W C"] | None
    soft_tokens: Float[Array, "B I Q D"] | None

    @property
    def count(self) -> int:
        """I."""
        return (self.pixels if self.soft_tokens is None else self.soft_tokens).shape[1]


def check(model: Any, tokens: Any, images: Any, soft_tokens: Any) -> Images | None:
    """The images of a call with one batch dimension, or None.

    Raises:
      PromptError: the model has no vision encoder, both kinds were given, or the counts do not fit.
      ShapeError: a wrong shape or dtype.
    """
    if images is None and soft_tokens is None:
        return None
    config: TransformerConfig = model.config
    if config.vision_encoder is None:
        reason = " The model was created with `text_only=True`." if getattr(model, "text_only", False) else ""
        raise PromptError(
            f"The model '{type(model).__name__}' does not have vision encoder, yet images are provided.{reason}"
        )
    if images is not None and soft_tokens is not None:
        raise PromptError("images and soft_tokens: pass the pictures or their encoding, not both")
    batch = tuple(np.shape(tokens))[:-1]
    if images is not None:
        found = Images(_rows(images, batch, config.vision_encoder.image_channels), None)
        _check_markers(tokens, found, ImageTokens.of(config))
        return found
    soft_tokens = jnp.asarray(soft_tokens)
    expected = (config.vision_encoder.num_mm_tokens_per_image, config.embed_dim)
    if soft_tokens.shape[:-3] != batch or soft_tokens.ndim < 3 or soft_tokens.shape[-2:] != expected:
        raise ShapeError(
            f"soft_tokens: expected [{', '.join(map(str, batch))}{', ' if batch else ''}I, {expected[0]}, {expected[1]}] "
            f"(batch as in tokens, images, tokens of an image, width), got {tuple(soft_tokens.shape)}"
        )
    if not jnp.issubdtype(soft_tokens.dtype, jnp.floating) or not soft_tokens.shape[-3]:
        raise ShapeError(f"soft_tokens: expected floats of at least one image, got {_described(soft_tokens)}")
    found = Images(None, _jax_utils.flatten_batch(soft_tokens, batch))
    _check_runs(tokens, found.count, expected[0])
    return found


def _rows(images: Any, batch: tuple[int, ...], channels: int) -> Array:
    """Pictures as [B, I, H, W, C]; one per row may come without the axis I."""
    if not isinstance(images, (np.ndarray, jax.Array)):
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise ShapeError(
                "images: expected one array; pictures of different sizes: gm.vision.load_images"
            ) from error
    shape = tuple(images.shape)
    lead = shape[: len(batch)]
    if lead != batch or len(shape) - len(batch) not in (3, 4) or shape[-1] != channels or 0 in shape:
        names = ", ".join(map(str, batch)) + (", " if batch else "")
        raise ShapeError(
            f"images: expected [{names}I, H, W, {channels}] or [{names}H, W, {channels}] (batch as in tokens, images, "
            f"rows, columns, colours), got {_described(images)}"
        )
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ShapeError(f"images: expected uint8 (0..255), or floats in -1..1, got {_described(images)}")
    if len(shape) - len(batch) == 3:
        images = images[(*(slice(None),) * len(batch), None)]
    return images.reshape(-1, *images.shape[len(batch) :])


def _described(array: Any) -> str:
    return f"{array.dtype} of the shape {tuple(array.shape)}"


def _known(*arrays: Any) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def _check_markers(tokens: Any, images: Images, known: ImageTokens) -> None:
    """One marker per image in each row; a row with fewer images than others is filled up with black ones."""
    if not _known(tokens):
        return
    rows = np.asarray(tokens).reshape(-1, np.shape(tokens)[-1])
    if (rows == SOFT).any():
        raise PromptError(f"tokens hold {SOFT}, a part of an expanded image: pass soft_tokens and not images with them")
    markers = (rows == known.start).sum(axis=1)
    for row, count in enumerate(markers):
        name = "the prompt" if len(rows) == 1 else f"row {row}"
        if count > images.count or (len(rows) == 1 and count < images.count):
            raise PromptError(mismatch(name, int(count), images.count))
        if count < images.count and _known(images.pixels) and np.asarray(images.pixels[row, int(count) :]).any():
            raise PromptError(
                mismatch(name, int(count), images.count) + "; a row with fewer images than others ends in black ones"
            )
    if markers.max(initial=0) < images.count:
        raise PromptError(mismatch("every row", int(markers.max(initial=0)), images.count))


def _check_runs(tokens: Any, count: int, length: int) -> None:
    """Expanded tokens hold whole images, as many in the fullest row as there are encoded ones."""
    if not _known(tokens):
        return
    rows = np.asarray(tokens).reshape(-1, np.shape(tokens)[-1])
    most = 0
    for row, ids in enumerate(rows):
        runs = spans(ids.tolist())
        for start, stop in runs:
            if stop - start != length:
                raise PromptError(
                    f"row {row}: an image has {length} tokens of id {SOFT}, but {stop - start} stand at {start}: a chunk "
                    f"must not cut an image (gm.vision.plan_chunks)"
                )
        most = max(most, len(runs))
    if most != count:
        raise PromptError(f"tokens: the fullest row holds {most} expanded images, but soft_tokens {count}")


def check_ids(tokens: Any, rows: int, expanded: bool) -> None:
    """Refuses ids outside of the table, wherever they are known; `expanded` allows the placeholder of soft tokens."""
    if not _known(tokens):
        return
    ids = np.asarray(tokens)
    wrong = ids[((ids < 0) & ~(expanded & (ids == SOFT))) | (ids >= rows)]
    if wrong.size:
        hint = "; an expanded prompt needs soft_tokens" if wrong[0] == SOFT else ""
        raise PromptError(f"tokens: expected ids in 0..{rows - 1}, got {int(wrong[0])}{hint}")


def extra_length(images: Images | None, config: TransformerConfig) -> int:
    """By how much the tokens of a call grow."""
    if images is None or images.pixels is None:
        return 0
    per_image = config.vision_encoder.num_mm_tokens_per_image
    return _token_utils.get_num_mm_tokens(max_num_images=images.count, num_tokens_per_image=per_image)


def expand(tokens: Int[Array, "B T"], images: Images | None, config: TransformerConfig) -> Int[Array, "B T'"]:
    """The tokens of a call with the images' own."""
    if images is None or images.pixels is None:
        return tokens
    known = ImageTokens.of(config)
    return _token_utils.add_extra_tokens_for_images(
        tokens,
        max_num_images=images.count,
        num_tokens_per_image=known.soft,
        start_of_image=known.start,
        end_of_image=known.end,
    )


def contract(
    x: Float[Array, "B T' D"], tokens: Int[Array, "B T"], images: Images | None, config: TransformerConfig
) -> Float[Array, "B T D"]:
    """Activations at the places of the tokens that were passed in."""
    if images is None or images.pixels is None:
        return x
    known = ImageTokens.of(config)
    return _token_utils.remove_mm_logits(
        logits=x,
        tokens=tokens,
        num_tokens_per_image=known.soft,
        max_num_images=images.count,
        start_of_image=known.start,
    )


def groups(tokens: Int[Array, "B T"], images: Images | None) -> Int[Array, "B T"] | None:
    """The number of the image that each token is a part of, 0 for text."""
    return None if images is None else _attention_mask.run_numbers(tokens == SOFT)


def merge(
    x: Float[Array, "B T D"], tokens: Int[Array, "B T"], soft_tokens: Float[Array, "B I Q D"] | None
) -> Float[Array, "B T D"]:
    """Embeddings in which the images' vectors have taken their places; they are not scaled."""
    if soft_tokens is None:
        return x
    return _token_utils.merge_embeddings(text_embeddings=x, vision_embeddings=soft_tokens, mask=tokens == SOFT)
