# SPDX-License-Identifier: Apache-2.0
"""`SamplerEvaluator`: samples an answer to each prompt of a `Seq2SeqTask`, for eyes and for metrics of texts.

This is the form that needs no trainer; the one with the same name for kauldron's trainer is `gm/_kauldron.py`, and asks
this module for the answers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma.errors import DataError
from gemma.gm._plain import PlainForm
from gemma.gm.data import _paths
from gemma.gm.data._tasks import Seq2SeqTask
from gemma.gm.text._sampler import Sampler
from gemma.gm.typing import Params

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What came out; `str()` of it shows prompt, answer and ground truth, one below the other.

    Attributes:
      prompt: the formatted prompts.
      answer: what the model said, its end token included.
      gt: what the data set has as the response, its end token included.
      metrics: name to number.
      step: of the training run.
    """

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    gt: tuple[str, ...]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step: int | None = None

    @property
    def summaries(self) -> dict[str, tuple[str, ...]]:
        """The texts under the names that they have in a log: "prompt", "answer" and "gt"."""
        return {"prompt": self.prompt, "answer": self.answer, "gt": self.gt}

    def __len__(self) -> int:
        return len(self.prompt)

    def __str__(self) -> str:
        head = [] if self.step is None else [f"step {self.step}"]
        head += [f"{name}: {value:.4g}" for name, value in self.metrics.items()]
        rows = [f"prompt  {p!r}\nanswer  {a!r}\ngt      {g!r}" for p, a, g in zip(self.prompt, self.answer, self.gt)]
        return "\n\n".join([*([", ".join(head)] if head else []), *rows])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SamplerEvaluator(PlainForm):
    """Samples an answer to each prompt of a data set.

      evaluator = gm.evals.SamplerEvaluator(ds=rows, task=task, model=model, max_new_tokens=50, num_batches=10)
      print(evaluator.evaluate(params))

    Attributes:
      ds: elements with the two texts that the task reads: a list, a grain data set, `gm.data.Parquet`. It may also be one
        that has the task in its `transforms`, or that applied it already (with `sampling=True`).
      task: how prompts are made. None: the `Seq2SeqTask` in `ds.transforms`.
      model: a network of `gm.nn`. Of its fields, `images` says under which key of an element pictures are
        ("batch.image").
      max_new_tokens: the most that an answer has.
      cache_length: as in `gm.text.Sampler`.
      pad_length: see there.
      batch_size: prompts that are sampled together.
      num_batches: how many of these; None: all.
      cache: keep the elements, so that they are read once; needs `num_batches`.
      metrics: functions of (prompts, answers, ground truths) that give a number.
      rng: for sampling methods that draw. The default picks the likeliest token.
      sampling: as in `gm.text.Sampler`; None: the likeliest token.
    """

    KAULDRON_FIELDS = frozenset({"base_cfg", "discard_opt", "losses", "name", "run", "summaries", "writer"})

    max_new_tokens: int
    ds: Any
    model: Any
    task: Seq2SeqTask | None = None
    cache_length: int = 4096
    pad_length: int | tuple[int, ...] | None = None
    batch_size: int = 1
    num_batches: int | None = None
    cache: bool = False
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    rng: Any = 0
    sampling: Any = None

    def __post_init__(self):
        check_cache(self.cache, self.num_batches)
        if self.batch_size < 1 or (self.num_batches is not None and self.num_batches < 1):
            raise DataError(
                f"SamplerEvaluator: expected at least 1 as batch_size and num_batches, got {self.batch_size} and "
                f"{self.num_batches}"
            )
        object.__setattr__(self, "_kept", [])

    def evaluate(self, state: Any, step: int | None = None) -> Samples:
        """Samples with these parameters.

        Args:
          state: parameters, or a trainer's state, which has them as `params`.
          step: of the run, for the log.

        Raises:
          DataError: (a ValueError) no task, no elements, or elements that the task cannot read.
        """
        task = self.task if self.task is not None else find_task(getattr(self.ds, "transforms", ()), self.ds)
        sampler = make_sampler(self, task, getattr(state, "params", state))
        prompts: list[str] = []
        answers: list[str] = []
        truths: list[str] = []
        for batch in self._batches(task):
            heads, images = zip(*(prompt_of(element, task, self.model) for element in batch))
            prompts += heads
            answers += answer(sampler, list(heads), list(images), self.max_new_tokens, rng=self.rng)
            truths += [str(_paths.get(element, task.out_target)) for element in batch]
        if not prompts:
            raise DataError("SamplerEvaluator: the data set has no elements")
        metrics = {name: float(function(prompts, answers, truths)) for name, function in self.metrics.items()}
        return Samples(tuple(prompts), tuple(answers), tuple(truths), metrics, step)

    def _batches(self, task: Seq2SeqTask) -> Iterator[list[Any]]:
        if self._kept:
            yield from self._kept
            return
        elements = iter(_ready(self.ds, task))
        batches = iter(lambda: list(itertools.islice(elements, self.batch_size)), [])
        for batch in itertools.islice(batches, self.num_batches):
            if self.cache:
                self._kept.append(batch)
            yield batch


# ---- shared with the trainer's evaluator ------------------------------------------------------------------------------


def check_cache(cache: bool, num_batches: int | None) -> None:
    """Refuses to keep a data set of unknown length."""
    if cache and num_batches is None:
        raise DataError("Can only cache if num_batches is set: cache=True came with num_batches=None")


def find_task(transforms: Any, ds: Any) -> Seq2SeqTask:
    """The first `Seq2SeqTask` of a data set's transforms.

    Raises:
      DataError: (a ValueError) there is none.
    """
    steps = list(transforms.values() if isinstance(transforms, Mapping) else transforms or ())
    for step in steps:
        if isinstance(step, Seq2SeqTask):
            return step
    has = ", ".join(type(step).__name__ for step in steps) or "no transforms"
    raise DataError(
        f"Could not find a `Seq2SeqTask` transform in the dataset, which SamplerEvaluator needs: {type(ds).__name__} has "
        f"{has}. Put one into its transforms, or pass task="
    )


def make_sampler(evaluator: Any, task: Seq2SeqTask, params: Params) -> Sampler:
    """The sampler of an evaluator's fields."""
    sampling = getattr(evaluator, "sampling", None)
    return Sampler(
        model=evaluator.model,
        params=params,
        tokenizer=task.tokenizer,
        cache_length=evaluator.cache_length,
        pad_length=evaluator.pad_length,
        **({} if sampling is None else dict(sampling=sampling)),
    )


def prompt_of(element: Any, task: Seq2SeqTask, model: Any) -> tuple[Any, Any]:
    """The formatted prompt of an element (or of a batch), and its pictures or None.

    Raises:
      DataError: there are ids instead of a text.
    """
    prompt = _paths.get(element, task.out_input)
    texts = prompt if isinstance(prompt, (list, tuple)) else np.asarray(prompt).reshape(-1).tolist()
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"key {task.out_input!r}: expected the prompt as text, got {type(prompt).__name__}; give the data set's "
            f"Seq2SeqTask sampling=True"
        )
    where = getattr(model, "images", None)
    return prompt, None if where is None else _paths.get({"batch": element}, where)


def answer(
    sampler: Sampler, prompts: Any, images: Any, max_new_tokens: int, *, rng: Any = 0, sharding: Any = None
) -> Any:
    """The texts that the model says, end tokens included: a str for one prompt, a list for several."""
    if isinstance(images, list) and all(image is None for image in images):
        images = None
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()  # a batch of texts; a str of an array without axes
    return sampler.sample(prompts, images=images, max_new_tokens=max_new_tokens, rng=rng, sharding=sharding)


def _ready(ds: Iterable[Any], task: Seq2SeqTask) -> Iterator[Any]:
    """Elements with formatted prompts, of a data set that applies the task itself or of one with raw texts."""
    applies = any(step is task or step == task for step in _steps(ds))
    raw = dataclasses.replace(task, sampling=True)
    for element in ds:
        # Raw texts that are still there make the same prompt again, so nothing is formatted twice.
        yield raw.map(element) if not applies and _has(element, task.in_prompt) else element


def _steps(ds: Any) -> list[Any]:
    found = getattr(ds, "transforms", None) or ()
    return list(found.values() if isinstance(found, Mapping) else found)


def _has(element: Any, key: str) -> bool:
    try:
        _paths.get(element, key)
    except DataError:
        return False
    return True
