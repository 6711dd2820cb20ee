# SPDX-License-Identifier: Apache-2.0
"""PaliGemma 1 and 2 in PyTorch: a SigLIP tower, one linear projection, and a Gemma decoder that reads both.

    pictures -> tower -> projector -> image tokens --+
                                                     +--> decoder -> logits
    text     -> scaled embeddings  -> text tokens  --+

Only the join is here: the tower is `siglip/modeling_siglip.py`, the decoder `gemma/modeling_gemma.py`, what feeds the
model `processing_paligemma.py`, what reads its answers `detection.py` and `segmentation.py`.

The mask is a prefix language model's: image and prompt see each other both ways, the suffix (what the model writes)
sees them and itself causally, and nothing sees padding. So the prompt is one of the decoder's `token_groups` and the
suffix is in none. Image features enter as the projector makes them, neither multiplied nor divided by sqrt(D).

Axes: B prompts, T tokens, I images of the whole batch, S image tokens per image, C channels, E the tower's width, D the
decoder's, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemma._torch.linear import drop_tied_copy
from gemma.config import GemmaConfig, PaliGemmaConfig
from gemma.errors import ConfigError, PromptError, ShapeError
from gemma.modeling_gemma import GemmaLinear, GemmaModel, KVCache
from siglip.modeling_join import IGNORE, ImageTextModel, filled, pretrained
from siglip.modeling_siglip import SiglipVisionTransformer

__all__ = ["PaliGemmaConfig", "PaliGemmaForConditionalGeneration", "PaliGemmaModel", "PaliGemmaMultiModalProjector"]


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear map with bias from the tower's width to the decoder's; no activation, no norm."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.projection_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """[I, S, E] to [I, S, D]."""
        return self.linear(patches)


class PaliGemmaModel(nn.Module):
    """The three parts side by side, under the names that they have in checkpoints."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.vision_tower = SiglipVisionTransformer(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaModel(config.text_config)


class PaliGemmaForConditionalGeneration(ImageTextModel):
    """PaliGemma with its head, which shares the embedding's weight.

    Example:
      model = PaliGemmaForConditionalGeneration.from_pretrained(folder)
      processor = PaliGemmaProcessor.from_pretrained(folder)
      inputs = {name: torch.from_numpy(array) for name, array in processor("caption en", "photo.jpg").items()}
      ids = model.generate(**inputs, max_new_tokens=40)
      print(processor.decode(ids[0, inputs["input_ids"].shape[1] :]))
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        text = config.text_config
        if config.projection_dim != text.hidden_size:
            raise ConfigError(
                f"projection_dim: the projector writes into the text model: expected {text.hidden_size} "
                f"(text_config.hidden_size), got {config.projection_dim}"
            )
        if config.vision_config.vision_use_head:
            raise ConfigError(
                "vision_use_head: PaliGemma reads the patches, its tower has no pooling head: set it to false"
            )
        self.config = config
        self.model = PaliGemmaModel(config)
        if text.tie_word_embeddings:  # other libraries' state dicts hold the shared weight twice
            self.register_load_state_dict_pre_hook(drop_tied_copy)
        else:
            self.lm_head = GemmaLinear(text.hidden_size, text.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: PaliGemmaConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> PaliGemmaForConditionalGeneration:
        """Loads a checkpoint, strictly: any of Hugging Face's three layouts of names, or big_vision's `.npz`.

        Args:
          path: a folder with `config.json`, or a file that `gemma.checkpoint.open_checkpoint` opens.
          config: None takes the checkpoint's own. PaliGemma 2 was trained without a sliding window and runs without
            one; `gemma.hf_config.read_config(path, paligemma_window=True)` keeps the window of its `config.json`.
          dtype: of the parameters; None keeps the file's.
          device: where they are put.

        Raises:
          CheckpointError: another architecture, or tensors that do not fit: all are listed, nothing is half loaded.
        """
        return pretrained(cls, PaliGemmaConfig, path, config=config, dtype=dtype, device=device)

    @property
    def text_config(self) -> GemmaConfig:
        return self.config.text_config

    @property
    def tokens_per_image(self) -> int:
        return self.config.vision_config.num_patches

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        *,
        image_features: Tensor | None = None,
        token_groups: Tensor | None = None,
    ) -> dict[str, Any]:
        """Reads T tokens of each prompt.

        Args:
          input_ids: [B, T], the placeholders of the images among them, all of a prompt's images first.
          pixel_values: [I, C, H, W] in -1..1, prompt by prompt. With a filled cache and no placeholder in `input_ids`
            they are ignored: a loop may pass them at every step, the tower runs once.
          attention_mask: [B, T], or [B, S] with the cached tokens; 0 is padding, on either side.
          token_type_ids: [B, T], 0 for image and prompt (seen both ways), 1 for the suffix (causal). None: the suffix
            begins at a row's first label; without labels, tokens are prompt until the cache is filled, and suffix then.
          position_ids: [B, T], 0-based; None counts the tokens that are not padding.
          kv_cache: filled in place; None keeps nothing.
          labels: [B, T], the ids of the suffix and `config.ignore_index` elsewhere; position t is compared with label
            t + 1. Then no logits come back unless `logits_to_keep` is set.
          logits_to_keep: logits of the last so many positions; 0: of all.
          image_features: [I, S, D], what `get_image_features` made of the pictures, instead of `pixel_values`.
          token_groups: the decoder's own, [B, T], instead of `token_type_ids`.

        Returns:
          "logits" [B, T or logits_to_keep, V] or None, "kv_cache", and "loss" (float32 []) if labels came.

        Raises:
          PromptError: images and placeholders do not match, or a label could be read off the prompt.
          ShapeError: an argument has the wrong shape.
        """
        return self.read(
            input_ids,
            pixel_values,
            image_features,
            labels=labels,
            logits_to_keep=logits_to_keep,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            kv_cache=kv_cache,
            token_groups=token_groups,
        )

    def groups(self, input_ids: Tensor, here: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """Group -1 is the prompt (no window cuts it, should the decoder have one), group 0 the suffix."""
        types, labels = call["token_type_ids"], call["labels"]
        labelled = None if labels is None else labels != IGNORE
        if types is None:
            if labelled is None and (input_ids.shape[1] == 1 or (filled(call["kv_cache"]) and not bool(here.any()))):
                return None
            types = torch.zeros_like(input_ids) if labelled is None else (labelled.cumsum(1) > 0).long()
        elif types.shape != input_ids.shape:
            raise ShapeError(
                f"token_type_ids: expected {list(input_ids.shape)} like input_ids, got {list(types.shape)}"
            )
        elif labelled is not None and bool((labelled & (types == 0)).any()):
            raise PromptError(
                "labels: a token with a label must be of the suffix (token_type_ids 1); prompt tokens see each other "
                "both ways, so the model would read the answer instead of predicting it"
            )
        return -(types == 0).long()

    def first_call(self, input_ids: Tensor) -> dict[str, Any]:
        """Given at all, it keeps `generate` from cutting a prompt, whose tokens see each other, into chunks."""
        return dict(token_type_ids=torch.zeros_like(input_ids))

    def never_written(self) -> list[int]:
        """The placeholder, and rows of the table that no token has."""
        unused = range(self.config.tokenizer_vocab_size, self.text_config.vocab_size)
        return sorted({*super().never_written(), *unused})
