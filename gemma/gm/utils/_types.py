# SPDX-License-Identifier: Apache-2.0
"""The input of a multimodal model as one value: text, images, and what follows from both after the expansion.

Samplers of the official package's kind are written against it. The expansion itself is `gm/vision/_token_utils.py`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gemma.config import GemmaConfig
from gemma.errors import PromptError, ShapeError
from gemma.gm.math import _pos_utils
from gemma.gm.typing import Array, Bool, Int, UInt8
from gemma.gm.utils import _attention_mask
from gemma.gm.vision import _token_utils

_PADDING_ID = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What the input has to know about the model.

    Attributes:
      support_images: whether the model has a vision encoder.
      num_tokens_per_image: Q.
      special_tokens: an enumeration with START_OF_IMAGE and END_OF_IMAGE; those of Gemma 3 where it lacks them.
      already_expanded: the text holds the placeholders of soft tokens itself.
    """

    support_images: bool
    num_tokens_per_image: int
    special_tokens: Any
    already_expanded: bool = False


@functools.lru_cache(maxsize=64)
def image_tokens_of(config: GemmaConfig) -> type[enum.IntEnum]:
    """The special tokens of a configuration's images, as an enumeration."""
    tokens = dict(START_OF_IMAGE=config.boi_token_index, END_OF_IMAGE=config.eoi_token_index)
    return enum.IntEnum("ImageSpecialTokens", tokens)


@flax.struct.dataclass
class Input:
    """Text and images of a batch.

    Attributes:
      text: token ids with one marker per image, padded with 0.
      images: the pictures of each row, or None.
      config: of the model.
    """

    text: Int[Array, "B T"]
    images: UInt8[Array, "B I H W C"] | None
    config: InputConfig = flax.struct.field(pytree_node=False)

    def __post_init__(self):
        if self.images is not None and not self.config.support_images and not self.config.already_expanded:
            raise PromptError("Images are provided, but the model does not support vision.")

    def pad(self, length_with_mm: int) -> Input:
        """The same input, padded so that `length_with_mm` tokens result."""
        more = length_with_mm - self.length_with_mm
        if more < 0:
            raise ShapeError(f"Cannot pad sequence of length {self.length_with_mm}: it is longer than {length_with_mm}")
        return self.replace(text=jnp.pad(self.text, ((0, 0), (0, more)), constant_values=_PADDING_ID))

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.text)

    @property
    def max_num_images(self) -> int:
        """I, images of the row that has most."""
        return 0 if self.images is None else self.images.shape[1]

    @property
    def _expands(self) -> bool:
        return self.config.support_images and not self.config.already_expanded and self.max_num_images > 0

    @property
    def length_with_mm(self) -> int:
        """Tokens per row after the expansion."""
        more = 0
        if self._expands:
            more = _token_utils.get_num_mm_tokens(
                max_num_images=self.max_num_images, num_tokens_per_image=self.config.num_tokens_per_image
            )
        return self.text.shape[-1] + more

    @property
    @jax.jit
    def tokens_with_mm(self) -> Int[Array, "B T'"]:
        """Ids after the expansion."""
        if not self._expands:
            return self.text
        special = self.config.special_tokens
        return _token_utils.add_extra_tokens_for_images(
            self.text,
            max_num_images=self.max_num_images,
            num_tokens_per_image=self.config.num_tokens_per_image,
            start_of_image=int(getattr(special, "START_OF_IMAGE", _token_utils.START_OF_IMAGE)),
            end_of_image=int(getattr(special, "END_OF_IMAGE", _token_utils.END_OF_IMAGE)),
        )

    @property
    @jax.jit
    def inputs_mask(self) -> Bool[Array, "B T'"]:
        """True on tokens, False on padding."""
        return self.tokens_with_mm != _PADDING_ID

    @property
    @jax.jit
    def attention_mask(self) -> Bool[Array, "B T' T'"]:
        """Causal, and both ways inside an image."""
        images = None if self.images is None else self.tokens_with_mm == _token_utils.SOFT_TOKEN_PLACEHOLDER
        return _attention_mask.make_causal_bidirectional_attention_mask(self.inputs_mask, bidirectional_mask=images)

    @property
    @jax.jit
    def positions(self) -> Int[Array, "B T'"]:
        """0-based positions among a row's tokens."""
        return _pos_utils.build_positions_from_mask(self.inputs_mask)

    @property
    @jax.jit
    def last_token_pos(self) -> Int[Array, " B"]:
        """Index of the last token of each row, padded on the right."""
        return jnp.sum(self.inputs_mask, axis=-1, dtype=jnp.int32) - 1

    @property
    @jax.jit
    def last_token(self) -> Int[Array, " B"]:
        """The last token of each row, padded on the right."""
        return jnp.take_along_axis(self.tokens_with_mm, self.last_token_pos[:, None], axis=-1)[:, 0]
