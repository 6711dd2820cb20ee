# SPDX-License-Identifier: Apache-2.0
"""Where image features meet text: counting placeholders, putting features in their places, the shared face of models.

`ImageTextModel` is what PaliGemma and Gemma 3 have in common in PyTorch. Neither the tower (`modeling_siglip.py`) nor
the decoder (`gemma/modeling_gemma.py`) is here, and no mask: which tokens see each other is each model's own decision.

Axes: B prompts, T tokens, I images of the whole batch, S image tokens per image, C channels, D the text model's width,
V vocabulary.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma import hub
from gemma._torch.generate import generate, with_fields
from gemma._torch.linear import linear
from gemma._torch.load import load_weights, without_values
from gemma._torch.loss import next_token_loss
from gemma._torch.masks import check_inputs, check_tensors
from gemma.checkpoint import open_checkpoint
from gemma.config import GemmaConfig
from gemma.errors import CheckpointError, PromptError, ShapeError
from gemma.modeling_gemma import KVCache
from gemma.sampling import SamplingParams

IGNORE = -100  # labels that the loss passes over


class ImageTextModel(nn.Module, abc.ABC):
    """A decoder that also reads images. A subclass sets `config` and `model`, and says three things about itself.

    `model` holds `vision_tower`, `multi_modal_projector` and `language_model` (a GemmaModel), so that parameters have
    Hugging Face's names.
    """

    config: Any
    model: nn.Module

    # --- what a subclass says

    @property
    @abc.abstractmethod
    def text_config(self) -> GemmaConfig:
        """Of the decoder."""

    @property
    @abc.abstractmethod
    def tokens_per_image(self) -> int:
        """S."""

    @abc.abstractmethod
    def groups(self, input_ids: Tensor, here: Tensor, call: Mapping[str, Any]) -> Tensor | None:
        """`token_groups` of one call; `here` [B, T] marks the image tokens, `call` holds the arguments of `forward`."""

    # --- what they share

    def get_input_embeddings(self) -> nn.Module:
        """Ids to embeddings that are already scaled."""
        return self.model.language_model.embed_tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures [I, C, H, W] to what replaces their placeholders, [I, S, D]."""
        return self.model.multi_modal_projector(self.model.vision_tower(pixel_values))

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, D] of the head: the embedding's own, unless the configuration unties them."""
        return self.get_input_embeddings().weight if self.text_config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Activations [..., D] to logits [..., V] in their dtype; a soft-cap in float32."""
        logits, cap = linear(hidden, self.head_weight), self.text_config.final_logit_softcapping
        return logits if cap is None else (torch.tanh(logits.float() / cap) * cap).to(logits.dtype)

    def read(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        *,
        labels: Tensor | None,
        logits_to_keep: int,
        **call: Any,
    ) -> dict[str, Any]:
        """`forward` of both models, after its arguments; see there."""
        kv_cache = call["kv_cache"]
        check_tensors(input_ids=input_ids, pixel_values=pixel_values, image_features=image_features, labels=labels)
        if input_ids is None or input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
            got = None if input_ids is None else f"{input_ids.dtype} {list(input_ids.shape)}"
            raise ShapeError(f"input_ids: expected whole numbers [B, T], got {got}")
        if pixel_values is not None and pixel_values.ndim != 4:
            got = list(pixel_values.shape)
            raise ShapeError(f"pixel_values: expected [images of the batch, channels, height, width], got {got}")
        here = input_ids == self.config.image_token_index
        labels = self._labels(labels, here)
        given = pixel_values if image_features is None else image_features
        if given is not None and filled(kv_cache) and not bool(here.any()):
            given = None  # a loop that passes its pictures at every step: they were read with the prompt
        if not torch.compiler.is_compiling():
            images = None if given is None else len(given)
            check_image_tokens(here, self.config.image_token_index, self.tokens_per_image, images)
        ids = input_ids.masked_fill(here, 0)  # a placeholder's own id may have no row
        check_inputs(self.text_config, ids, None)
        embeds = self.get_input_embeddings()(ids)
        if given is not None:
            features = self.get_image_features(given) if image_features is None else given
            expected = (self.tokens_per_image, embeds.shape[-1])
            if features.ndim != 3 or tuple(features.shape[1:]) != expected:
                wanted = ", ".join(map(str, ("images of the batch", *expected)))
                raise ShapeError(f"image_features: expected [{wanted}], got {list(features.shape)}")
            embeds = join(embeds, here, features)
        groups = call.pop("token_groups")
        if groups is None:
            groups = self.groups(input_ids, here, dict(call, labels=labels))
        decoder = {name: call[name] for name in ("attention_mask", "position_ids", "kv_cache")}
        hidden = self.model.language_model(inputs_embeds=embeds, token_groups=groups, **decoder)["last_hidden_state"]
        result: dict[str, Any] = {"logits": None, "kv_cache": kv_cache}
        if labels is not None:
            cap = self.text_config.final_logit_softcapping
            result["loss"] = next_token_loss(hidden, self.head_weight, labels, softcap=cap)
        if labels is None or logits_to_keep:
            result["logits"] = self.logits(hidden[:, -logits_to_keep:])
        return result

    def _labels(self, labels: Tensor | None, here: Tensor) -> Tensor | None:
        """Labels [B, T] with -100 where they are to be passed over; `here` marks the image tokens."""
        if labels is None:
            return None
        if labels.shape != here.shape:
            raise ShapeError(f"labels: expected {list(here.shape)} like input_ids, got {list(labels.shape)}")
        labels = labels.masked_fill(labels == getattr(self.config, "ignore_index", IGNORE), IGNORE)
        if not torch.compiler.is_compiling() and bool((here & (labels != IGNORE)).any()):
            raise PromptError(
                f"labels: image tokens (id {self.config.image_token_index}) cannot be learnt: put {IGNORE} in their "
                f"places"
            )
        return labels

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        params: SamplingParams | None = None,
        blocked_ids: Sequence[int] = (),
        **options: Any,
    ) -> Tensor:
        """Continues prompts; greedy unless asked otherwise. The tower runs once, placeholders are never generated.

        Args:
          input_ids: [B, T], padded on either side.
          pixel_values: as in `forward`.
          params: how to sample. Its fields may be given by name instead, or on top of it: `max_new_tokens=40`.
          blocked_ids: more ids that are never picked.
          **options: `attention_mask`, `token_type_ids`, `image_features`, and those of `gemma._torch.generate.generate`
            (`end_ids`, `streamer`, `tokenizer`, `compile`).

        Returns:
          [B, T + new]: the rows as given, and what follows, the pad id after a row's end.
        """
        check_tensors(input_ids=input_ids)
        params = with_fields(SamplingParams(temperature=0.0) if params is None else params, options)
        first = {"pixel_values": pixel_values, **self.first_call(input_ids)}
        options = {name: value for name, value in (first | options).items() if value is not None}
        return generate(self, input_ids, params=params, blocked_ids=[*self.never_written(), *blocked_ids], **options)

    def first_call(self, input_ids: Tensor) -> dict[str, Any]:
        """What `generate` passes with the prompt where the caller does not."""
        return {}

    def never_written(self) -> Sequence[int]:
        """Ids that no answer holds: the placeholder, where it has a row."""
        token = self.config.image_token_index
        return [token] if token < self.text_config.vocab_size else []

    @torch.inference_mode()
    def score(
        self,
        ids: Tensor,
        prompt_length: int,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of what follows the prompts, for example for the scores of detections.

        Args:
          ids: [B, T + new], what `generate` returned.
          prompt_length: T.
          pixel_values, attention_mask, image_features: those of the prompts, as for `generate`.

        Returns:
          float32 [B, new], natural logarithms; at temperature 1 and without penalties, whatever was sampled with.
        """
        if not 0 < prompt_length < ids.shape[1]:
            raise ShapeError(f"score: expected a prompt_length in 1..{ids.shape[1] - 1}, got {prompt_length}")
        prompts, answers = ids[:, :prompt_length], ids[:, prompt_length:]
        back = torch.ones(len(ids), 1, dtype=torch.long, device=ids.device)  # columns from the end to the last token
        if attention_mask is not None:
            back = (attention_mask.to(ids.device) != 0).long().flip(1).argmax(1, keepdim=True) + 1
        keep, cache = int(back.max()), KVCache()  # the prompt as a prompt, then the answer on top of it
        images = dict(pixel_values=pixel_values, image_features=image_features)
        last = self(prompts, attention_mask=attention_mask, kv_cache=cache, logits_to_keep=keep, **images)["logits"]
        last = last.gather(1, (keep - back)[..., None].expand(-1, -1, last.shape[2]))
        rest = self(answers, kv_cache=cache)["logits"][:, :-1]
        chances = torch.cat([last, rest], 1).float().log_softmax(-1)
        return chances.gather(2, answers[..., None])[..., 0]


def filled(kv_cache: KVCache | None) -> bool:
    """Whether a cache holds tokens."""
    return kv_cache is not None and kv_cache.num_items() > 0


def check_image_tokens(here: Tensor, image_token: int, per_image: int, images: int | None) -> None:
    """Counts placeholders against images.

    Args:
      here: bool [B, T], the placeholders.
      image_token: their id, for errors.
      per_image: S, placeholders of one image; the tokens of an image are next to each other.
      images: how many images came with the prompts, or None where none did.

    Raises:
      PromptError: placeholders without an image, an image without placeholders, or an image that is cut.
    """
    counts = here.sum(dim=1).tolist()
    asked = sum(counts)
    if images is None:
        if asked:
            raise PromptError(
                f"the prompt has {asked} image tokens (id {image_token}), but no pixel_values came: pass the images"
            )
        return
    if asked != images * per_image or any(count % per_image for count in counts):
        found = ", ".join(map(str, counts[:8])) + (", ..." if len(counts) > 8 else "")
        raise PromptError(
            f"expected {per_image} image tokens (id {image_token}) for each image, but {images} images came with "
            f"{asked} image tokens ({found} by prompt); the processor writes the right number"
        )
    columns = here.nonzero()[:, 1].view(images, per_image)
    if bool((columns[:, 1:] - columns[:, :-1] != 1).any()):
        raise PromptError(f"the {per_image} image tokens of an image must be next to each other, but they are split")


def join(inputs_embeds: Tensor, here: Tensor, features: Tensor) -> Tensor:
    """Text embeddings [B, T, D] with the image features [I, S, D] in the places `here` [B, T], in reading order.

    The features replace the embeddings unscaled, in their dtype; nothing is matched by value.
    """
    if not features.shape[0]:
        return inputs_embeds
    features = features.to(inputs_embeds.dtype).reshape(-1, features.shape[-1])
    return inputs_embeds.masked_scatter(here[..., None], features)


def pretrained(
    cls: type[nn.Module],
    kind: type,
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Builds `cls` from a checkpoint, strictly, in evaluation mode.

    Args:
      cls: takes one argument, its configuration.
      kind: the class of that configuration.
      path: a folder, a file, or a name that `gemma.hub.resolve` knows.
      config: None takes the checkpoint's own.
      dtype: of the parameters; None keeps the file's.
      device: where they are put.

    Raises:
      CheckpointError: the checkpoint is of another architecture, or its tensors do not fit; nothing is half loaded.
    """
    path = hub.resolve(path)
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config() if config is None else config
        if not isinstance(config, kind):
            raise CheckpointError(
                f"{path}: {cls.__name__} needs a {kind.__name__}, but this checkpoint is of a "
                f"{type(config).__name__} ({getattr(config, 'model_type', 'another architecture')})"
            )
        if isinstance(config, GemmaConfig) and config.vision is None:
            raise CheckpointError(
                f"{path}: no image tower in this checkpoint; gemma.modeling_gemma.GemmaForCausalLM reads it"
            )
        with without_values():
            model = cls(config)
        load_weights(model, checkpoint, config, dtype=dtype, device=device)
    return model.eval()
