# SPDX-License-Identifier: Apache-2.0
"""Prompts and pictures to what Gemma 3 takes: numpy arrays, no framework.

    text  \\n\\n <start_of_image> <soft token> x S <end_of_image> \\n\\n  text

A prompt says `<start_of_image>` once where each image belongs; that one id becomes the run above, whose newlines are
one piece of their own and never merge with newlines of the text (as in the official package; Hugging Face's processor
works on the text and merges them). Turns are `chat.py`, pictures `image.py`, the network `modeling_gemma3.py`.

Axes: B prompts, T tokens, I images of the whole batch, S soft tokens per image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma import hub
from gemma.chat import GEMMA3, Turn, encode_chat
from gemma.config import GemmaConfig
from gemma.errors import CheckpointError, ConfigError, ContextFull, PromptError, TokenizerError
from gemma.image import normalize, read_image, resize
from gemma.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemma.image import ImageSource


class Gemma3Processor:
    """Makes the inputs of a Gemma 3 with images.

    Example:
      processor = Gemma3Processor.from_pretrained(folder)
      inputs = processor.chat([Turn("user", "What is this? <start_of_image>")], ["photo.jpg"])
    """

    def __init__(self, tokenizer: Tokenizer, config: GemmaConfig):
        """Checks that vocabulary and model belong together.

        Raises:
          ConfigError: the model has no image tower.
          TokenizerError: the marker of an image is missing, or has another id than in the model.
        """
        if not isinstance(config, GemmaConfig) or config.vision is None:
            raise ConfigError("Gemma3Processor needs the GemmaConfig of a model with a `vision` tower")
        self.tokenizer, self.config = tokenizer, config
        for name, wanted in (("start_of_image", config.boi_token_index), ("end_of_image", config.eoi_token_index)):
            found = getattr(tokenizer.special, name)
            if found != wanted:
                raise TokenizerError(
                    f"<{name}> is id {found} in the tokenizer, but {wanted} in the model; use the tokenizer that was "
                    f"published with the checkpoint"
                )
        blank = tokenizer.encode("\n\n", parse_special=False)
        soft = [config.image_token_index] * config.mm_tokens_per_image
        self._run = [*blank, config.boi_token_index, *soft, config.eoi_token_index, *blank]

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Gemma3Processor:
        """From a checkpoint that carries its configuration and its tokenizer."""
        from gemma.checkpoint import open_checkpoint

        path = hub.resolve(path)
        with open_checkpoint(path) as checkpoint:
            config, source = checkpoint.config(), checkpoint.tokenizer_source()
        if not isinstance(config, GemmaConfig) or config.vision is None:
            raise CheckpointError(
                f"{path}: expected a Gemma 3 with an image tower, got a {type(config).__name__} without"
            )
        if source is None:
            raise TokenizerError(f"{path}: no tokenizer.model or tokenizer.json beside the weights; put one there")
        return cls(Tokenizer.from_source(source), config)

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | None = None,
        *,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Raw prompts, in which special spellings are their tokens. A bos is put in front.

        Args:
          text: one prompt or a batch, each with `<start_of_image>` where an image belongs.
          images: of one prompt: a picture, or a list of them. Of a batch: for each prompt a picture, a list, or None.
          padding_side: "left" (to generate) or "right".
          max_length: the most tokens a prompt may have, soft tokens included.

        Returns:
          input_ids int64 [B, T], attention_mask int64 [B, T] (0 on padding), and, where there are images, pixel_values
          float32 [I, 3, H, W] in -1..1, prompt by prompt.

        Raises:
          PromptError: markers and images do not match in number, or a picture cannot be read.
          ContextFull: a prompt longer than `max_length`.
        """
        single = isinstance(text, str)
        texts, groups = ([text], [images]) if single else (list(text), images)
        groups = [None] * len(texts) if groups is None else groups
        if not texts or not isinstance(groups, (list, tuple)) or len(groups) != len(texts):
            raise PromptError(f"images: expected a picture, a list or None for each of {len(texts)} prompts")
        if padding_side not in ("left", "right"):
            raise PromptError(f'padding_side: expected "left" or "right", got {padding_side!r:.80}')
        rows, pixels = [], []
        for at, (prompt, group) in enumerate(zip(texts, groups)):
            name = "text" if single else f"text[{at}]"
            if not isinstance(prompt, str):
                raise PromptError(f"{name}: expected a prompt as str, got {type(prompt).__name__}")
            group = [] if group is None else list(group) if isinstance(group, (list, tuple)) else [group]
            rows.append(self.expand(self.tokenizer.encode(prompt, add_bos=True), len(group), name=name))
            if max_length is not None and len(rows[-1]) > max_length:
                raise ContextFull(len(rows[-1]), max_length, name)
            pixels += [self.pixels(image, name=f"images of {name}, number {n}") for n, image in enumerate(group)]
        return self._arrays(rows, pixels, padding_side)

    def chat(self, turns: Sequence[Turn], images: Sequence[ImageSource] = ()) -> dict[str, np.ndarray]:
        """A conversation, ready to be answered; only `<start_of_image>` in a user's turn is more than text.

        Returns:
          As for a call, B = 1.
        """
        images = list(images)
        encoded = encode_chat(self.tokenizer, turns, format=GEMMA3, images=len(images))
        pixels = [self.pixels(image, name=f"images[{n}]") for n, image in enumerate(images)]
        return self._arrays([self.expand(encoded.ids, len(images))], pixels, "left")

    def expand(self, ids: Sequence[int], images: int, *, name: str = "the prompt") -> list[int]:
        """Ids with one `<start_of_image>` per image to ids with its run of soft tokens.

        Raises:
          PromptError: another number of markers than of images, or soft tokens that are there already.
        """
        marker, soft = self.config.boi_token_index, self.config.image_token_index
        ids = list(ids)
        if soft in ids:
            raise PromptError(f"{name}: it holds soft tokens of its own; write <start_of_image> where an image belongs")
        if ids.count(marker) != images:
            raise PromptError(
                f"{name}: {images} images came with {ids.count(marker)} image markers; write <start_of_image> once "
                f"where each image belongs"
            )
        return [i for token in ids for i in (self._run if token == marker else (token,))]

    def pixels(self, image: ImageSource, *, name: str = "image") -> np.ndarray:
        """One picture of any mode as the tower wants it: float32 [3, H, W] in -1..1, squeezed to a square."""
        size = self.config.vision.image_size
        array = resize(read_image(image, name=name), size, size, method="bilinear")
        return np.ascontiguousarray(normalize(array).transpose(2, 0, 1))

    def _arrays(self, rows: Sequence[Sequence[int]], pixels: Sequence[np.ndarray], side: str) -> dict[str, np.ndarray]:
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.config.pad_token_id, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for at, row in enumerate(rows):
            part = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[at, part], mask[at, part] = row, 1
        arrays = dict(input_ids=ids, attention_mask=mask)
        return arrays | dict(pixel_values=np.stack(pixels)) if pixels else arrays
