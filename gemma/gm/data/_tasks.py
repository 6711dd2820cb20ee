# SPDX-License-Identifier: Apache-2.0
"""`Seq2SeqTask` and `ContrastiveTask`: texts of a data set's element become the arrays of a training step.

Names, fields and results are the official package's. They are for its configurations and for pipelines of grain; the
readers, masks and packing of gemmakit's own trainer are `_examples.py`, `_encode.py` and `_loader.py`.

    PROMPT  <bos><start_of_turn>user\\n{prompt}<end_of_turn>\\n<start_of_turn>model\\n
    ANSWER  {response}<end_of_turn>                                                     here are the targets
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gemma import chat
from gemma.errors import DataError, TokenizerError
from gemma.gm.data import _functional, _paths
from gemma.gm.data._maps import MapTransform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqTask(MapTransform):
    """A prompt and its response as next-token training on the response.

      task = gm.data.Seq2SeqTask(in_prompt="src", in_response="dst", out_input="input", out_target="target",
                                 out_target_mask="loss_mask", tokenizer=gm.text.Gemma3Tokenizer(), max_length=200)
      task.map({"src": "Hello", "dst": "Bonjour"})      # {"input": [200], "target": [200, 1], "loss_mask": [200, 1]}

    Keys may be paths: "turns[0].text".

    Attributes:
      in_prompt, in_response: keys of the texts, str or bytes of UTF-8.
      out_input: key of what the model reads, int32 [max_length]; padding is 0.
      out_target: key of the next tokens, int32 [max_length, 1].
      out_target_mask: key of bool [max_length, 1], True for tokens of the response, its end token included.
      drop_inputs: leave the texts out of the result.
      tokenizer: of `gm.text`; it decides the turn markers, too.
      max_length: T.
      truncate: cut longer pairs at the end. False: they are an error.
      sampling: give the prompt and the response as formatted texts under `out_input` and `out_target`, and no mask; for
        `gm.evals.SamplerEvaluator`.
    """

    in_prompt: str
    in_response: str
    out_input: str
    out_target: str
    out_target_mask: str
    drop_inputs: bool = True
    tokenizer: Any
    max_length: int
    truncate: bool = False
    sampling: bool = False

    def map(self, element: Any) -> Any:
        """The element with the three arrays, or with the two texts.

        Raises:
          DataError: (a ValueError) a key that is not there, something else than a text, or a pair that is too long.
        """
        prompt, response = (text_at(element, key) for key in (self.in_prompt, self.in_response))
        head, answer = _turn_texts(self.tokenizer, prompt, response)
        if self.drop_inputs:
            element = _without(element, self.in_prompt, self.in_response)
        if self.sampling:
            element = _paths.with_value(element, self.out_input, head)
            return _paths.with_value(element, self.out_target, answer)
        fields = _encoded(self, head, answer)
        element = _paths.with_value(element, self.out_input, fields.input)
        element = _paths.with_value(element, self.out_target, fields.target[:, None])  # as the trainer's loss has it
        return _paths.with_value(element, self.out_target_mask, fields.target_mask[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveTask(MapTransform):
    """A prompt with a better and a worse answer, for `gm.losses.DpoLoss`: [chosen, rejected] on the first axis.

    Attributes:
      in_prompt, in_chosen, in_rejected: keys of the texts.
      out_tokens: key of what the model reads, int32 [2, max_length].
      out_targets: key of the next tokens, int32 [2, max_length].
      out_mask: key of bool [2, max_length], True for tokens of the answer.
      tokenizer, max_length, truncate, drop_inputs: as in `Seq2SeqTask`.
    """

    in_prompt: str
    in_chosen: str
    in_rejected: str
    out_tokens: str
    out_targets: str
    out_mask: str
    tokenizer: Any
    max_length: int
    truncate: bool = False
    drop_inputs: bool = True

    def map(self, element: Any) -> Any:
        """The element with the three arrays; errors are those of `Seq2SeqTask.map`."""
        keys = (self.in_prompt, self.in_chosen, self.in_rejected)
        prompt, *answers = (text_at(element, key) for key in keys)
        pair = [_encoded(self, *_turn_texts(self.tokenizer, prompt, answer)) for answer in answers]
        if self.drop_inputs:
            element = _without(element, *keys)
        for key, name in ((self.out_tokens, "input"), (self.out_targets, "target"), (self.out_mask, "target_mask")):
            element = _paths.with_value(element, key, np.stack([getattr(fields, name) for fields in pair]))
        return element


def text_at(element: Any, key: str) -> str:
    """The text at a key."""
    text = _decode_bytes(_paths.get(element, key), where=key)
    if isinstance(text, np.ndarray) and text.ndim == 0:  # a scalar of a numpy array of texts
        text = _decode_bytes(text.item(), where=key)
    if not isinstance(text, str):
        raise DataError(f"key {key!r}: expected a text (str, or bytes of UTF-8), got {type(text).__name__}")
    return str(text)


def _decode_bytes(element: Any, encoding: str = "utf-8", where: str | None = None) -> Any:
    """Bytes as text; anything else as it is."""
    if not isinstance(element, bytes):
        return element
    try:
        return element.decode(encoding)
    except UnicodeDecodeError as error:
        place = "" if where is None else f"key {where!r}: "
        raise DataError(f"{place}expected {encoding}, {error.reason} at byte {error.start}") from None


def _turn_texts(tokenizer: Any, prompt: str, response: str) -> tuple[str, str]:
    """The user's turn with the header of the model's, and the answer with its end, as spelled for this vocabulary."""
    try:
        style = chat.format_for(getattr(tokenizer, "core", tokenizer))
    except TokenizerError:
        style = chat.GEMMA3  # a vocabulary without turn markers has them as text
    start, end = style.start_of_turn, style.end_of_turn
    user, model = style.roles["user"], style.roles["model"]
    return f"{start}{user}\n{prompt}{end}\n{start}{model}\n", f"{response}{end}"


def _encoded(task: Seq2SeqTask | ContrastiveTask, head: str, answer: str) -> _functional.Seq2SeqFields:
    ids = task.tokenizer.encode(head, add_bos=True), task.tokenizer.encode(answer)
    fields = _functional.make_seq2seq_fields(*ids)
    return _functional.pad(fields, max_length=task.max_length, truncate=task.truncate)


def _without(element: Any, *keys: str) -> Any:
    for key in keys:
        element = _paths.without(element, key)
    return element
