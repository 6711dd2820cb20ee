# SPDX-License-Identifier: Apache-2.0
"""The model behind `gemma see`, in PyTorch: loads a PaliGemma, lets it answer, and says how sure it was of each token.

The command itself is `see.py`; the network `paligemma/modeling_paligemma.py`; boxes and masks are read by
`paligemma/detection.py` and `paligemma/segmentation.py`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from gemma.checkpoint import open_checkpoint
from gemma.config import PaliGemmaConfig
from gemma.errors import CheckpointError
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote: `ids` up to its end token, that one not included, and `logprobs`, natural, one for each.

    `complete` is False where it was stopped by the number of tokens. Times are in seconds.
    """

    processor: PaliGemmaProcessor
    ids: list[int]
    logprobs: list[float]
    complete: bool
    load_seconds: float
    answer_seconds: float

    @property
    def text(self) -> str:
        return self.processor.decode(self.ids)


def look(path: Path, image: np.ndarray, prompt: str, *, max_new_tokens: int, dtype: str) -> Answer:
    """The greedy answer of a checkpoint to a prompt about one picture, uint8 [H, W, 3].

    Raises:
      CheckpointError: no PaliGemma, or damaged; the message says what it is.
      PromptError: a prompt that holds image tokens.
    """
    begin = time.perf_counter()
    _check_kind(path)
    processor = PaliGemmaProcessor.from_pretrained(path)
    inputs = {name: torch.from_numpy(array) for name, array in processor(prompt, image).items()}
    model = PaliGemmaForConditionalGeneration.from_pretrained(path, dtype=_DTYPES[dtype])
    loaded = time.perf_counter()
    with torch.inference_mode():
        features = model.get_image_features(inputs.pop("pixel_values"))
        rows = model.generate(**inputs, image_features=features, max_new_tokens=max_new_tokens)
        ids = rows[0, inputs["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.special.eos
        kept = ids[: ids.index(end)] if end in ids else ids
        logprobs = _logprobs(model, inputs, features, kept)
    return Answer(processor, kept, logprobs, end in ids, loaded - begin, time.perf_counter() - loaded)


def _check_kind(path: Path) -> None:
    """Says what can be done about a checkpoint that has no eyes, before its weights are read."""
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config()
    if not isinstance(config, PaliGemmaConfig):
        kind = getattr(config, "model_type", type(config).__name__)
        raise CheckpointError(
            f"{path}: `gemma see` needs a PaliGemma, this is a {kind}; the model `digits`, which comes with gemmakit, "
            "is one, and so are the checkpoints google/paligemma-* and google/paligemma2-*"
        )


def _logprobs(
    model: PaliGemmaForConditionalGeneration, inputs: dict[str, torch.Tensor], features: torch.Tensor, ids: list[int]
) -> list[float]:
    """The log-probability of each id of an answer, from one pass over prompt and answer together."""
    if not ids:
        return []
    answer = torch.tensor([ids])
    whole = dict(
        input_ids=torch.cat([inputs["input_ids"], answer], 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1),
        token_type_ids=torch.cat([inputs["token_type_ids"], torch.ones_like(answer)], 1),
    )
    logits = model(**whole, image_features=features, logits_to_keep=len(ids) + 1)["logits"]
    table = torch.log_softmax(logits[0, :-1].float(), -1)
    return table.gather(1, answer.T)[:, 0].tolist()
