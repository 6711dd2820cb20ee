# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 with images in PyTorch (4B, 12B, 27B): a SigLIP tower, pooling to 256 soft tokens, and the Gemma 3 decoder.

    pictures -> tower [I, 4096, E] -> average 4 x 4 -> norm -> projection [I, 256, D] --+
                                                                                       +--> decoder -> logits
    text     -> scaled embeddings ------------------------------------------------------+

Only the join is here: the tower is `siglip/modeling_siglip.py`, the decoder `modeling_gemma.py`, pictures are read by
`image.py`. A prompt holds `<start_of_image>`, S soft tokens and `<end_of_image>` for each image. The mask is causal,
except that the soft tokens of one image see each other both ways; on local layers the window then cuts both. Soft
tokens enter as the projection makes them, neither multiplied nor divided by sqrt(D).

Axes: B prompts, T tokens, I images of the whole batch, S soft tokens per image, P patches, C channels, E the tower's
width, D the decoder's, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma._torch.linear import drop_tied_copy
from gemma.config import GemmaConfig
from gemma.errors import ConfigError
from gemma.modeling_gemma import GemmaLinear, GemmaModel, GemmaRMSNorm, KVCache
from siglip.modeling_join import ImageTextModel, pretrained
from siglip.modeling_siglip import SiglipVisionTransformer

__all__ = ["Gemma3ForConditionalGeneration", "Gemma3Model", "Gemma3MultiModalProjector", "GemmaConfig"]


class Gemma3MultiModalProjector(nn.Module):
    """Averages squares of patches, normalizes each soft token, and projects it without a bias."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.grid = math.isqrt(config.vision.num_patches)
        self.side = math.isqrt(config.mm_tokens_per_image)
        if self.side**2 != config.mm_tokens_per_image or self.grid % self.side:
            raise ConfigError(
                f"mm_tokens_per_image: expected the square of a divisor of {self.grid} (patches along a side), got "
                f"{config.mm_tokens_per_image}"
            )
        width = config.vision.hidden_size
        self.mm_soft_emb_norm = GemmaRMSNorm(width, config.vision.layer_norm_eps)
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(width, config.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        """[I, P, E] to [I, S, D], both row by row from the top left."""
        squares = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled = F.avg_pool2d(squares, self.grid // self.side).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


class Gemma3Model(nn.Module):
    """The three parts side by side, under the names that they have in checkpoints."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.vision_tower = SiglipVisionTransformer(config.vision)
        self.multi_modal_projector = Gemma3MultiModalProjector(config)
        self.language_model = GemmaModel(config)


class Gemma3ForConditionalGeneration(ImageTextModel):
    """Gemma 3 with images and its head, which shares the embedding's weight.

    Example:
      model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
      out = model(input_ids=ids, pixel_values=pixels, kv_cache=KVCache())      # `soft_token_ids` makes the ids
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        if config.vision is None:
            raise ConfigError(
                "Gemma3ForConditionalGeneration needs a `vision` tower; GemmaForCausalLM does without one"
            )
        if config.vision.vision_use_head:
            raise ConfigError(
                "vision_use_head: Gemma 3 reads the patches, its tower has no pooling head: set it to false"
            )
        self.config = config
        self.model = Gemma3Model(config)
        if config.tie_word_embeddings:  # other libraries' state dicts hold the shared weight twice
            self.register_load_state_dict_pre_hook(drop_tied_copy)
        else:
            self.lm_head = GemmaLinear(config.hidden_size, config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: GemmaConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Gemma3ForConditionalGeneration:
        """Loads a checkpoint that has an image tower, strictly.

        Args:
          path: a folder with `config.json`, or a file that `gemma.checkpoint.open_checkpoint` opens.
          config: None takes the checkpoint's own.
          dtype: of the parameters; None keeps the file's. float16 cannot hold the activations and is refused.
          device: where they are put.

        Raises:
          CheckpointError: another architecture, or tensors that do not fit: all are listed, nothing is half loaded.
        """
        return pretrained(cls, GemmaConfig, path, config=config, dtype=dtype, device=device)

    @property
    def text_config(self) -> GemmaConfig:
        return self.config

    @property
    def tokens_per_image(self) -> int:
        return self.config.mm_tokens_per_image

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        *,
        image_features: Tensor | None = None,
        token_groups: Tensor | None = None,
    ) -> dict[str, Any]:
        """Reads T tokens of each prompt; a later call on the same cache may bring more images.

        Args:
          input_ids: [B, T]; S consecutive `config.image_token_index` for each image, all of them in one call.
          pixel_values: [I, C, H, W] in -1..1, prompt by prompt. With a filled cache and no placeholder in `input_ids`
            they are ignored: a loop may pass them at every step, the tower runs once.
          attention_mask: [B, T], or [B, S] with the cached tokens; 0 is padding, on either side.
          position_ids: [B, T], 0-based; None counts the tokens that are not padding.
          kv_cache: filled in place; None keeps nothing.
          labels: [B, T], -100 where nothing is to be learnt; position t is compared with label t + 1. Then no logits
            come back unless `logits_to_keep` is set.
          logits_to_keep: logits of the last so many positions; 0: of all.
          image_features: [I, S, D], what `get_image_features` made of the pictures, instead of `pixel_values`.
          token_groups: the decoder's own, [B, T], instead of one group for each image.

        Returns:
          "logits" [B, T or logits_to_keep, V] or None, "kv_cache", and "loss" (float32 []) if labels came.

        Raises:
          PromptError: images and placeholders do not match.
          ShapeError: an argument has the wrong shape.
        """
        return self.read(
            input_ids,
            pixel_values,
            image_features,
            labels=labels,
            logits_to_keep=logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            kv_cache=kv_cache,
            token_groups=token_groups,
        )

    def groups(self, input_ids: Tensor, here: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """One number for each image of a row: 1, 2, ...; 0 elsewhere."""
        if input_ids.shape[1] == 1 or not bool(here.any()):
            return None
        number = (here.long().cumsum(1) - 1) // self.tokens_per_image + 1
        return number * here
