# SPDX-License-Identifier: Apache-2.0
"""Prompts and pictures to what PaliGemma takes, and back: numpy arrays, no framework.

    <image> x N  <bos>  prompt  \\n  | suffix  <eos>      (the bar: what a model is trained to write)

All images stand first, the bos comes after them, and the newline that ends the prompt is tokenized on its own, as in
training: it never merges with a newline of the prompt. Boxes and masks in the answer are read by `detection.py` and
`segmentation.py`; pictures by `gemma.image`; the network is `modeling_paligemma.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma import hub
from gemma.config import PaliGemmaConfig
from gemma.errors import CheckpointError, ConfigError, ContextFull, PromptError, TokenizerError
from gemma.image import normalize, read_image, resize
from gemma.tokenizer import Tokenizer
from paligemma.detection import LOC_BINS, SEG_CODES, Detection, parse_detections

if TYPE_CHECKING:
    from gemma.image import ImageSource

IMAGE = "<image>"
_MARKS = re.compile(r"(<loc\d{4}>|<seg\d{3}>)")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-zA-Z]{2,4})?")

# What each task's prompt looks like; {0} is the argument. The last three are of the pretrained models, not of "mix".
TASKS = {
    "caption": "caption {lang}",
    "answer": "answer {lang} {0}",
    "ocr": "ocr",
    "detect": "detect {0}",
    "segment": "segment {0}",
    "cap": "cap {lang}",
    "describe": "describe {lang}",
    "question": "question {lang} {0}",
}


def task_prompt(task: str, *arguments: str, language: str = "en") -> str:
    """The prompt of a task the models were trained on.

    Args:
      task: "caption", "answer" (a question), "ocr", "detect" and "segment" (one or more objects), "cap" (short, noisy),
        "describe" (long), "question" (an answer, to get its question).
      arguments: the question, or the objects: `task_prompt("detect", "cat", "dog") == "detect cat ; dog"`.
      language: a code such as "en" or "de"; used by the tasks that name one.

    Raises:
      PromptError: no such task, a missing or superfluous argument, or no language code.
    """
    if task not in TASKS:
        raise PromptError(f"task: expected one of {', '.join(TASKS)}, got {task!r:.80}")
    several, wanted = task in ("detect", "segment"), "{0}" in TASKS[task]
    arguments = tuple(argument.strip() for argument in arguments)
    if bool(arguments) != wanted or not all(arguments) or (len(arguments) > 1 and not several):
        need = "no argument" if not wanted else "one or more objects" if several else "one argument"
        raise PromptError(f"task {task!r} takes {need}, got {arguments!r:.200}")
    if not _LANGUAGE.fullmatch(language):
        raise PromptError(f'language: expected a code such as "en", got {language!r:.80}')
    return TASKS[task].format(" ; ".join(arguments), lang=language)


@dataclasses.dataclass(frozen=True, eq=False)
class Shot:
    """One example of a few-shot prompt: what a good answer to `prompt` about `image` is."""

    image: ImageSource
    prompt: str
    answer: str


class PaliGemmaProcessor:
    """Makes a model's inputs of texts and pictures.

    Example:
      processor = PaliGemmaProcessor.from_pretrained(folder)
      inputs = processor("detect cat", "photo.jpg")
      ids = model.generate(**inputs_as_tensors)
      objects = processor.detections(ids[0], width, height)
    """

    def __init__(self, tokenizer: Tokenizer, config: PaliGemmaConfig, *, resample: str = "bicubic"):
        """Checks that vocabulary and model belong together.

        Args:
          tokenizer: with pieces for `<image>`, and for `<loc0000>`.. and `<seg000>`.. where the model uses them.
          config: of the model.
          resample: "bicubic", as Hugging Face's processor resizes, or "bilinear", as in training.

        Raises:
          TokenizerError: a piece is missing, or stands at another id than the model was trained with.
        """
        if not isinstance(config, PaliGemmaConfig):
            raise ConfigError(f"PaliGemmaProcessor needs a PaliGemmaConfig, got {type(config).__name__}")
        if resample not in ("bicubic", "bilinear"):
            raise ConfigError(f'resample: expected "bicubic" or "bilinear", got {resample!r:.80}')
        self.tokenizer, self.config, self.resample = tokenizer, config, resample
        self._marks = _checked_marks(tokenizer, config)
        self._newline = tokenizer.encode("\n", parse_special=False)
        self._bos, self._eos = tokenizer.special.bos, tokenizer.special.eos

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, resample: str = "bicubic") -> PaliGemmaProcessor:
        """From a checkpoint that carries its configuration and its tokenizer."""
        from gemma.checkpoint import open_checkpoint

        path = hub.resolve(path)
        with open_checkpoint(path) as checkpoint:
            config, source = checkpoint.config(), checkpoint.tokenizer_source()
        if not isinstance(config, PaliGemmaConfig):
            raise CheckpointError(f"{path}: expected a PaliGemma checkpoint, got one of a {type(config).__name__}")
        if source is None:
            raise TokenizerError(f"{path}: no tokenizer.model or tokenizer.json beside the weights; put one there")
        return cls(Tokenizer.from_source(source), config, resample=resample)

    @property
    def image_tokens(self) -> int:
        """S, placeholders per image: the patches of the tower."""
        return self.config.vision_config.num_patches

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]],
        *,
        suffix: str | Sequence[str] | None = None,
        shots: Sequence[Shot] = (),
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """One prompt, or a batch of them.

        Args:
          text: the prompt, without the newline that ends it. It may begin with `<image>` once per image; without any
            it is put there. `<loc0123>` and `<seg012>` become their tokens; other special spellings stay text.
          images: of one prompt: a picture, or a list of them. Of a batch: for each text a picture or a list.
          suffix: the answer to train on, one for each text; the eos is added.
          shots: examples for every prompt of the batch; their images stand before its own.
          padding_side: "left" (to generate) or "right".
          max_length: the most tokens a sequence may have, images included.

        Returns:
          input_ids int64 [B, T]; attention_mask int64 [B, T], 0 on padding; token_type_ids int64 [B, T], 0 on image
          and prompt, 1 on the suffix; pixel_values float32 [images of the batch, 3, H, W] in -1..1, prompt by prompt;
          with a suffix also labels int64 [B, T], `config.ignore_index` outside of it.

        Raises:
          PromptError: image tokens inside a text, more or fewer images than it says, or a picture that cannot be read.
          ContextFull: a sequence longer than `max_length`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise PromptError("text: expected at least one prompt, got an empty list")
        groups = _groups(images, len(texts), single=isinstance(text, str))
        suffixes = _suffixes(suffix, len(texts), single=isinstance(text, str))
        if padding_side not in ("left", "right"):
            raise PromptError(f'padding_side: expected "left" or "right", got {padding_side!r:.80}')
        rows, pixels = [], []
        for at, (prompt, group, answer) in enumerate(zip(texts, groups, suffixes)):
            name = "text" if isinstance(text, str) else f"text[{at}]"
            group = [shot.image for shot in shots] + list(group)
            prefix = self._prefix(prompt, len(group), shots, name)
            tail = [] if answer is None else [*self._encode(answer, f"suffix of {name}"), self._eos]
            if max_length is not None and len(prefix) + len(tail) > max_length:
                raise ContextFull(len(prefix) + len(tail), max_length, name)
            rows.append((prefix, tail))
            pixels += [self.pixels(image, name=f"images of {name}, number {n}") for n, image in enumerate(group)]
        arrays = self._pad(rows, padding_side)
        if suffix is None:
            del arrays["labels"]
        size = self.config.vision_config.image_size
        empty = np.zeros((0, self.config.vision_config.num_channels, size, size), np.float32)
        return arrays | dict(pixel_values=np.stack(pixels) if pixels else empty)

    def pixels(self, image: ImageSource, *, name: str = "image") -> np.ndarray:
        """One picture of any mode as the tower wants it: float32 [3, H, W] in -1..1, squeezed to a square."""
        size = self.config.vision_config.image_size
        array = resize(read_image(image, name=name), size, size, method=self.resample)
        return np.ascontiguousarray(normalize(array).transpose(2, 0, 1))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the eos; locations and segments are spelled, padding left out."""
        kept = self._until_eos(ids)
        return self.tokenizer.decode(kept)

    def detections(
        self, ids: Iterable[int], width: int, height: int, *, logprobs: Sequence[float] | None = None
    ) -> list[Detection]:
        """The objects in generated ids, in pixels of a picture of this size; scores where log-probabilities are given.

        Args:
          ids: as generated, without the prompt.
          width, height: of the original picture.
          logprobs: natural log-probability of each id.
        """
        ids = [int(i) for i in ids]
        kept = self._until_eos(ids)
        if logprobs is None:
            return parse_detections(self.tokenizer.decode(kept), width, height)
        if len(logprobs) != len(ids):
            raise PromptError(f"logprobs: expected one for each of the {len(ids)} ids, got {len(logprobs)}")
        chances = [chance for token, chance in zip(ids, logprobs) if token != self.config.pad_token_id][: len(kept)]
        stream = self.tokenizer.stream()
        pieces = [stream.push(token) for token in kept]
        if pieces:
            pieces[-1] += stream.flush()
        return parse_detections("".join(pieces), width, height, pieces=pieces, logprobs=chances)

    # --- parts

    def _prefix(self, prompt: str, images: int, shots: Sequence[Shot], name: str) -> list[int]:
        """Image tokens, bos, the shots, the prompt, newline."""
        if not isinstance(prompt, str):
            raise PromptError(f"{name}: expected a prompt as str, got {type(prompt).__name__}")
        said = 0
        while prompt.startswith(IMAGE):
            prompt, said = prompt[len(IMAGE) :].lstrip(" "), said + 1
        if said and said != images:
            raise PromptError(f"{name}: it says {IMAGE} {said} times, but {images} images came with it")
        ids = [self.config.image_token_index] * (images * self.image_tokens) + [self._bos]
        for shot in shots:
            for part in (shot.prompt, shot.answer):
                ids += self._encode(part, f"a shot of {name}") + self._newline
        return ids + self._encode(prompt, name) + self._newline

    def _encode(self, text: str, name: str) -> list[int]:
        """Ids of a text in which locations and segments are tokens and nothing else is."""
        if IMAGE in text:
            raise PromptError(
                f"{name}: {IMAGE} may only stand at the very beginning of a prompt, once for each image; "
                f"take it out of {text[:60]!r}"
            )
        ids: list[int] = []
        for part in _MARKS.split(text):
            if part in self._marks:
                ids.append(self._marks[part])
            elif part:
                ids += self.tokenizer.encode(part, parse_special=False)
        return ids

    def _pad(self, rows: Sequence[tuple[list[int], list[int]]], side: str) -> dict[str, np.ndarray]:
        length = max(len(prefix) + len(tail) for prefix, tail in rows)
        shape = (len(rows), length)
        ids = np.full(shape, self.config.pad_token_id, np.int64)
        labels = np.full(shape, self.config.ignore_index, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for at, (prefix, tail) in enumerate(rows):
            count = len(prefix) + len(tail)
            start = length - count if side == "left" else 0
            ids[at, start : start + count] = prefix + tail
            mask[at, start : start + count] = 1
            answer = slice(start + len(prefix), start + count)
            types[at, answer], labels[at, answer] = 1, tail
        return dict(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels)

    def _until_eos(self, ids: Iterable[int]) -> list[int]:
        kept = []
        for token in map(int, ids):
            if token == self._eos:
                break
            if token != self.config.pad_token_id:
                kept.append(token)
        return kept


def _groups(images, count: int, *, single: bool) -> list[list]:
    """The images of each prompt."""
    if single:
        return [list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]]
    if not isinstance(images, (list, tuple)) or len(images) != count:
        got = f"{len(images)} entries" if isinstance(images, (list, tuple)) else type(images).__name__
        raise PromptError(
            f"images: expected a list with a picture or a list of pictures for each of {count} prompts, got {got}"
        )
    return [list(group) if isinstance(group, (list, tuple)) else [group] for group in images]


def _suffixes(suffix, count: int, *, single: bool) -> list[str | None]:
    if suffix is None:
        return [None] * count
    found = [suffix] if isinstance(suffix, str) else list(suffix)
    if len(found) != count or isinstance(suffix, str) != single or not all(isinstance(s, str) for s in found):
        raise PromptError(f"suffix: expected one str for each of {count} prompts, got {suffix!r:.80}")
    return found


def _checked_marks(tokenizer: Tokenizer, config: PaliGemmaConfig) -> dict[str, int]:
    """Ids of the location and segment pieces, after comparing the vocabulary with the model.

    Adding the pieces to a plain Gemma vocabulary puts `<image>` first and everything else one id too high; the model
    would read every location as its neighbor.
    """
    advice = "use the tokenizer that was published with the checkpoint, and add no tokens to it"
    wanted, rows = config.image_token_index, config.text_config.vocab_size
    try:
        image = tokenizer.id_of(IMAGE)
    except TokenizerError:
        raise TokenizerError(f"the tokenizer has no piece {IMAGE}: it is not PaliGemma's; {advice}") from None
    if image != wanted:
        raise TokenizerError(
            f"{IMAGE} is id {image} in the tokenizer, but {wanted} in the model (image_token_index); {advice}"
        )
    if image >= rows:
        raise TokenizerError(f"{IMAGE} is id {image}, but the model has {rows} rows; {advice}")
    marks: dict[str, int] = {}
    for name, digits, count in (("loc", 4, LOC_BINS), ("seg", 3, SEG_CODES)):
        found = _consecutive(tokenizer, [f"<{name}{n:0{digits}d}>" for n in range(count)], rows, advice)
        marks |= found
    first = config.tokenizer_vocab_size - LOC_BINS - SEG_CODES
    published = config.tokenizer_vocab_size <= rows and len(marks) == LOC_BINS + SEG_CODES
    if published and (marks["<loc0000>"] != first or marks["<seg000>"] != first + LOC_BINS):
        raise TokenizerError(
            f"<loc0000> is id {marks['<loc0000>']} and <seg000> is id {marks['<seg000>']} in the tokenizer, but "
            f"{first} and {first + LOC_BINS} in the model; {advice}"
        )
    return marks


def _consecutive(tokenizer: Tokenizer, names: Sequence[str], rows: int, advice: str) -> dict[str, int]:
    """Ids of numbered pieces, which stand in a row; none at all is fine for a model that has no such task."""
    try:
        first = tokenizer.id_of(names[0])
    except TokenizerError:
        return {}
    for at, name in enumerate(names):
        try:
            found = tokenizer.id_of(name)
        except TokenizerError:
            raise TokenizerError(f"the tokenizer has {names[0]}, but no {name}; {advice}") from None
        if found != first + at or found >= rows:
            raise TokenizerError(
                f"{name} is id {found}: expected {first + at} (pieces in a row from {names[0]}) below {rows}; {advice}"
            )
    return {name: first + at for at, name in enumerate(names)}
