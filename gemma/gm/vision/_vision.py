# SPDX-License-Identifier: Apache-2.0
"""From pixels to the vectors that stand for an image inside a prompt, before the norm and the projection.

    uint8 [H, W, 3] ── resize, normalize ── patches ── SigLIP ── average pooling 64 x 64 -> 16 x 16 ── stop-gradient

The tower is `_vision_utils.py`; norm and projection are the embedder's (`gm/nn/_modules.py`), where the parameters of
published checkpoints put them. One image of 896 pixels costs 5.5 TFLOP. Axis letters: I images, P patches, Q soft
tokens of an image, E the tower's width.
"""

from __future__ import annotations

import dataclasses
import math

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.config import GemmaConfig, SiglipVisionConfig, preset
from gemma.errors import ConfigError, ShapeError
from gemma.gm.typing import Array, Bool, Float, Int, UInt8
from gemma.gm.vision import _preprocess, _token_utils
from gemma.gm.vision._vision_utils import ViTModel

_GEMMA = preset("gemma3_4b")  # every published model has its tower

BEGIN_IMAGE_TOKEN = _token_utils.START_OF_IMAGE
END_IMAGE_TOKEN = _token_utils.END_OF_IMAGE  # the official constant of this name is stale (it says 262144)
NEW_LINE_TOKEN = _token_utils.DOUBLE_NEW_LINE
TOKEN_PLACEHOLDER = _token_utils.SOFT_TOKEN_PLACEHOLDER
NUM_PLACEHOLDER_TOKENS_PER_IMAGE = _GEMMA.mm_tokens_per_image
NUM_TOKENS_PER_MEDIA = NUM_PLACEHOLDER_TOKENS_PER_IMAGE + 4


class VisionExit(nn.Module):
    """Average pooling of a square grid of patches to a smaller square grid.

    Attributes:
      output_length: Q, a square number whose root divides that of P.
    """

    output_length: int = NUM_PLACEHOLDER_TOKENS_PER_IMAGE

    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B Q E"]:
        B, P, E = x.shape
        if x.shape[1] == self.output_length:
            return x
        side, out = math.isqrt(P), math.isqrt(self.output_length)
        if side * side != P or out * out != self.output_length or side % out:
            raise ShapeError(
                f"VisionExit: cannot pool {P} patches to {self.output_length}: both must be square numbers, and the "
                f"side of the second must divide that of the first"
            )
        return x.reshape(B, out, side // out, out, side // out, E).mean(axis=(2, 4)).reshape(B, out * out, E)


class SigLiPFromPatches(nn.Module):
    """The vision encoder of Gemma 3.

    Attributes:
      siglip_encoder: the tower.
      siglip_exit: the pooling.
      num_mm_tokens_per_image_prepool: P.
      num_mm_tokens_per_image: Q.
      image_height: in pixels.
      image_width: in pixels.
      image_channels: C.
      apply_stop_gradient: training does not reach the tower.
    """

    siglip_encoder: ViTModel = dataclasses.field(default_factory=lambda: ViTModel(parent=None))
    siglip_exit: VisionExit = dataclasses.field(default_factory=lambda: VisionExit(parent=None))
    num_mm_tokens_per_image_prepool: int = _GEMMA.vision.num_patches
    num_mm_tokens_per_image: int = _GEMMA.mm_tokens_per_image
    image_height: int = _GEMMA.vision.image_size
    image_width: int = _GEMMA.vision.image_size
    image_channels: int = _GEMMA.vision.num_channels
    apply_stop_gradient: bool = True

    @classmethod
    def of(cls, config: GemmaConfig) -> SigLiPFromPatches:
        """The encoder of a configuration with a vision part; not bound to any module."""
        vision, tokens = config.vision, config.mm_tokens_per_image
        return cls(
            siglip_encoder=ViTModel.of(vision, parent=None),
            siglip_exit=VisionExit(tokens, parent=None),
            num_mm_tokens_per_image_prepool=vision.num_patches,
            num_mm_tokens_per_image=tokens,
            image_height=vision.image_size,
            image_width=vision.image_size,
            image_channels=vision.num_channels,
            parent=None,
        )

    @property
    def width(self) -> int:
        """E."""
        return self.siglip_encoder.width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures that the tower sees."""
        return self.image_height, self.image_width, self.image_channels

    @property
    def vision_config(self) -> SiglipVisionConfig:
        """The sizes as a configuration."""
        tower = self.siglip_encoder
        if self.image_height != self.image_width or tower.patch_size[0] != tower.patch_size[1]:
            raise ConfigError("SiglipVisionConfig describes square images and patches only")
        return SiglipVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.mlp_dim or 4 * tower.width,
            num_hidden_layers=tower.depth,
            num_attention_heads=tower.num_heads,
            num_channels=self.image_channels,
            image_size=self.image_height,
            patch_size=tower.patch_size[0],
            layer_norm_eps=tower.norm_eps,
            vision_use_head=tower.head,
        )

    @nn.compact
    def __call__(self, *, patches: Float[Array, "B I P D"], is_training: bool = False) -> Float[Array, "B I Q E"]:
        """Encodes patches of pixels, in the order of `patchify_images`: (row, column, channel) within a patch."""
        Y, X = self.siglip_encoder.patch_size
        C, rows, columns = self.image_channels, self.image_height // Y, self.image_width // X
        if patches.ndim != 4 or patches.shape[2:] != (rows * columns, Y * X * C):
            raise ShapeError(
                f"patches: expected [B, I, {rows * columns}, {Y * X * C}] (batch, images, patches, pixels of a patch), "
                f"got {tuple(patches.shape)}"
            )
        B, I = patches.shape[:2]
        pixels = patches.reshape(B * I, rows, columns, Y, X, C).transpose(0, 1, 3, 2, 4, 5)
        encoded = self.siglip_encoder(pixels.reshape(B * I, rows * Y, columns * X, C), is_training=is_training)
        encoded = self.siglip_exit(encoded)
        encoded = encoded.reshape(B, I, *encoded.shape[1:])
        return jax.lax.stop_gradient(encoded) if self.apply_stop_gradient else encoded

    def patchify_images(self, images: UInt8[Array, "*B H W C"] | Float[Array, "*B H W C"]) -> Float[Array, "*B P D"]:
        """Pictures to patches: uint8 ones are resized and normalized, float ones must be so already."""
        pixels = _preprocess.prepare(images, self.image_shape)
        lead = pixels.shape[:-3]
        patches = _preprocess.patchify_images(
            pixels.reshape(-1, *pixels.shape[-3:]), patch_size=tuple(self.siglip_encoder.patch_size)
        )
        return patches.reshape(*lead, *patches.shape[1:])


# ---- helpers of the first published sampler, kept for the programs that import them ---------------------------------


def check_mask(input_data: Int[Array, " T"]) -> tuple[Bool[Array, ""], Int[Array, " T"]]:
    """Whether every run of placeholders in a row has the length of an image and touches neither end.

    Returns:
      The answer, and where the runs start: as many numbers as tokens, the unused ones 0.
    """
    marked = jnp.asarray(input_data) == TOKEN_PLACEHOLDER
    before, after = jnp.pad(marked, (1, 0))[:-1], jnp.pad(marked, (0, 1))[1:]
    starts = jnp.nonzero(marked & ~before, size=marked.shape[0], fill_value=-1)[0]
    stops = jnp.nonzero(marked & ~after, size=marked.shape[0], fill_value=-1)[0] + 1
    whole = jnp.all((starts < 0) | (stops - starts == NUM_PLACEHOLDER_TOKENS_PER_IMAGE))
    return whole & ~marked[0] & ~marked[-1], jnp.maximum(starts, 0).astype(jnp.int32)


def check_special_vision_token(
    input_data: Int[Array, "B T"], *, start_positions: Int[Array, "B R"], special_token: int, position_offset: int
) -> Bool[Array, ""]:
    """Whether `special_token` stands at `position_offset` from every run that `check_mask` found (0: no run)."""
    tokens, starts = jnp.asarray(input_data), jnp.asarray(start_positions)
    found = jnp.take_along_axis(tokens, jnp.clip(starts + position_offset, 0, tokens.shape[1] - 1), axis=1)
    return jnp.all((starts == 0) | (found == special_token))


@flax.struct.dataclass
class VisionInitEmbeddings:
    """What `initialize_vision_tokens` returns."""

    patches: Float[Array, "B I P D"] | None
    token_buffer: Int[Array, "B T"]
    num_input_tokens: Int[Array, " B"]


def initialize_vision_tokens(
    patches: Float[Array, "B I P D"] | None, token_buffer: Int[Array, "B T"], num_input_tokens: Int[Array, " B"]
) -> VisionInitEmbeddings:
    """Inserts the tokens of all images after the first token of each row, which is <bos>."""
    if patches is None:
        return VisionInitEmbeddings(None, token_buffer, num_input_tokens)
    images = patches.shape[1]
    block = [NEW_LINE_TOKEN, BEGIN_IMAGE_TOKEN]
    block += [TOKEN_PLACEHOLDER] * NUM_PLACEHOLDER_TOKENS_PER_IMAGE + [END_IMAGE_TOKEN, NEW_LINE_TOKEN]
    inserted = jnp.broadcast_to(
        jnp.asarray(block * images, token_buffer.dtype), (len(token_buffer), images * len(block))
    )
    tokens = jnp.concatenate([token_buffer[:, :1], inserted, token_buffer[:, 1:]], axis=1)
    return VisionInitEmbeddings(patches, tokens, num_input_tokens + images * NUM_TOKENS_PER_MEDIA)
