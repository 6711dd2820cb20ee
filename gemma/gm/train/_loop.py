# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: the loop around the step, with evaluation, checkpoints, exact resumption and an orderly end.

    trainer = Trainer(Supervised(model), params, "lora", loader, steps=200, checkpoints=Checkpoints("run/checkpoints"))
    result = trainer.fit()                             # goes on where the newest whole checkpoint ends, if there is one

The step is `_step.py`, batches `_feed.py`, what is reported `_result.py`, files of metrics `_loggers.py`. From a file
of examples to exported weights in one call: `_run.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from gemma.errors import ConfigError, SaveError
from gemma.gm.train import _evaluate
from gemma.gm.train._checkpoints import Checkpoints
from gemma.gm.train._distributed import Placement
from gemma.gm.train._feed import Feed
from gemma.gm.train._loggers import Logger
from gemma.gm.train._objectives import Objective
from gemma.gm.train._optimizer import OptimizerConfig, make_optimizer, make_schedule
from gemma.gm.train._processes import process
from gemma.gm.train._result import Callback, EarlyStop, Result
from gemma.gm.train._session import Session
from gemma.gm.train._state import State, Trainable, cast, dtypes_of, init_state, merge_trainable, split_trainable
from gemma.gm.train._step import make_step
from gemma.gm.typing import DType, Params

_ADAMW = OptimizerConfig()


class Trainer:
    """One run. Everything that it does is decided when it is made; `fit` does it.

    Args:
      objective: what is minimized, with the model.
      params: the whole tree, adapters included. Frozen leaves are used in place. Trained ones are copied when the run
        starts; a caller that needs the memory keeps no name of its own for them.
      trainable: which leaves are trained: "lora", "all", regular expressions, ... (`split_trainable`).
      loader: batches, `gm.data.Loader` or any iterable of them. For checkpoints its iterator has `get_state()` and
        `set_state(state)`.
      optimizer: as data, whose `total_steps` is filled in; or a transformation of optax.
      steps: where the run ends; None: as many as the loader's epochs have.
      accumulate: batches of the loader whose gradient is taken together in one step.
      ema: decay of a moving average of the trained leaves, which is then evaluated, sampled and returned.
      master_dtype: in which trained leaves are kept; each step rounds them to what they were. None: kept as they are,
        and updates smaller than their precision are lost.
      remat: see `gm.nn.Transformer.remat`; None: as the model has it.
      eval_loader: is read from its beginning every time.
      eval_every: steps between evaluations; None: only at the end. Without `eval_loader`: between samples.
      eval_batches: of each evaluation at most; None: all.
      eval_first: evaluate before the first step, too.
      early_stop: when to end before `steps`.
      sample_prompts: are continued at each evaluation: texts, ids, or conversations (`gm.text.Sampler`).
      sample_chat: the texts among them are what a user says: the model answers in its chat template.
      sample_tokens: of each continuation at most.
      tokenizer: for the samples.
      checkpoints: where the run is saved, and resumed from. None: nothing is saved.
      save_every: steps between checkpoints; None: at each evaluation. One is always written at the end; with
        `early_stop` at each evaluation that is the best so far, too.
      loggers: `Csv`, `TensorBoard`, `Png`, ...
      callbacks: are told everything, see `Callback`.
      sharding: a strategy of `gm.sharding`: parameters are placed by it, the optimizer's state beside them, and batches
        are split over its `data` and `fsdp` axes.
      seed: of dropout. Batches have the loader's.
      max_skipped: that many steps in a row without a finite loss and gradient end the run with an error.

    Raises:
      ConfigError: (a ValueError) settings that contradict each other, or nothing to train.
    """

    def __init__(
        self,
        objective: Objective,
        params: Params,
        trainable: Trainable,
        loader: Iterable[Mapping[str, np.ndarray]],
        *,
        optimizer: OptimizerConfig | optax.GradientTransformation = _ADAMW,
        steps: int | None = None,
        accumulate: int = 1,
        ema: float | None = None,
        master_dtype: DType | None = "float32",
        remat: str | None = None,
        eval_loader: Iterable[Mapping[str, np.ndarray]] | None = None,
        eval_every: int | None = None,
        eval_batches: int | None = None,
        eval_first: bool = False,
        early_stop: EarlyStop | None = None,
        sample_prompts: Sequence[Any] = (),
        sample_chat: bool = False,
        sample_tokens: int = _evaluate.SAMPLE_TOKENS,
        tokenizer: Any = None,
        checkpoints: Checkpoints | None = None,
        save_every: int | None = None,
        loggers: Sequence[Logger] = (),
        callbacks: Sequence[Callback] = (),
        sharding: Any = None,
        seed: int = 0,
        max_skipped: int = 10,
    ):
        self.steps = _steps(steps, loader, accumulate)
        _check(accumulate, eval_every=eval_every, save_every=save_every, max_skipped=max_skipped)
        _check_reports(sample_prompts, tokenizer, early_stop, eval_loader)
        self.placement = _placement(sharding)
        self.objective = _fitted(objective, remat, self.placement)
        self.loader, self.accumulate, self.seed = loader, accumulate, seed
        self.eval_loader, self.eval_every, self.eval_batches = eval_loader, eval_every, eval_batches
        self.eval_first, self.early_stop, self.max_skipped = eval_first, early_stop, max_skipped
        self.sample_prompts, self.sample_tokens, self.tokenizer = tuple(sample_prompts), sample_tokens, tokenizer
        self.sample_ids = self._encoded(sample_chat)
        self.checkpoints, self.save_every = checkpoints, save_every or eval_every
        self.loggers, self.callbacks = tuple(loggers), tuple(callbacks)
        self.ema, self.master_dtype = ema, master_dtype
        self._split = split_trainable(params, trainable)
        self.dtypes = dtypes_of(self._split.trainable)
        self.schedule, self.optimizer = _rule(optimizer, self.steps)
        self._rescued: Result | None = None

    def _encoded(self, chat: bool) -> list[list[int]]:
        """The prompts of the samples as ids, now that nothing is lost if they cannot be."""
        if not self.sample_prompts:
            return []
        limit = self.objective.model.config.source.max_position_embeddings
        options = dict(tokens=self.sample_tokens, limit=limit, chat=chat)
        return _evaluate.encode_prompts(self.sample_prompts, self.tokenizer, **options)

    @property
    def compute_dtype(self) -> Any:
        """To what the trained leaves are rounded in a step: a tree of dtypes, or None for as they are."""
        return None if self.master_dtype is None else self.dtypes

    def fit(self) -> Result:
        """Trains. A run that was saved goes on exactly where it was; one that had ended returns at once.

        SIGTERM and Ctrl-C end it after the step that runs, with a checkpoint and a result.

        Returns:
          The last state, the parameters, the history, and why it ended.

        Raises:
          TrainingError: too many steps without a finite loss and gradient; or the saved run does not fit this one.
          SaveError: a checkpoint could not be written. What was saved before is whole, and `rescued` has the rest.
          ConfigError: (a ValueError) it was called before: the parameters are spent.
        """
        if self._split is None:
            raise ConfigError("Trainer.fit: a trainer is good for one run; make another one")
        split, self._split = self._split, None
        frozen, start = self._placed(split.frozen), self._placed(split.trainable)
        del split
        options = dict(seed=self.seed, ema=self.ema is not None, master_dtype=self.master_dtype)

        def make(leaves: Any) -> State:
            return init_state(leaves, self.optimizer, **options)

        like = jax.eval_shape(make, start)
        shardings = None
        if self.placement is not None:
            shardings = self.placement.state(like)
            like = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), like, shardings)
        feed = Feed(self.objective, start, self.placement, self.accumulate)
        step = make_step(
            self.objective,
            self.optimizer,
            accumulate=self.accumulate,
            ema=self.ema,
            compute_dtype=self.compute_dtype,
            schedule=self.schedule,
            shardings=shardings,
        )
        session = Session(self, frozen, feed, step)
        # Compiled, so that its arrays are new: they are donated to the first step.
        where = {} if shardings is None else dict(out_shardings=shardings)
        session.begin(like, lambda: jax.jit(make, **where)(start))
        del start
        try:
            return session.run()
        except SaveError:
            self._rescued = session.result("save_error")
            raise

    def rescued(self) -> Result:
        """What `fit` had in memory when a checkpoint could not be written: to be saved elsewhere.

        Raises:
          ConfigError: (a ValueError) `fit` did not end with a SaveError.
        """
        if self._rescued is None:
            raise ConfigError("Trainer.rescued: nothing was lost; it is for a `fit` that ended with a SaveError")
        return self._rescued

    def _placed(self, tree: Any) -> Any:
        if self.placement is None:
            return jax.tree.map(jax.numpy.asarray, tree)  # copied only if it is not on the device yet
        return self.placement.put(tree)

    def whole(self, state: State, frozen: Any) -> dict[str, Any]:
        """The tree of a state, the moving average in place of the trained leaves if there is one, in the dtypes given."""
        leaves = state.params if state.ema is None else state.ema
        return merge_trainable(frozen, cast(leaves, self.dtypes))


def _steps(steps: int | None, loader: Any, accumulate: int) -> int:
    if steps is None:
        batches = getattr(loader, "total_steps", None)
        if batches is None:
            raise ConfigError("steps: expected a number, since the loader does not say where its data end (epochs)")
        steps = -(-batches // max(accumulate, 1))
    if steps < 1:
        raise ConfigError(f"steps: expected 1 or more, got {steps}")
    return int(steps)


def _check(accumulate: int, **every: int | None) -> None:
    for name, value in {"accumulate": accumulate, **every}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected 1 or more, got {value}")


def _check_reports(sample_prompts: Sequence[Any], tokenizer: Any, early_stop: Any, eval_loader: Any) -> None:
    if sample_prompts and tokenizer is None:
        raise ConfigError("sample_prompts: samples need the tokenizer of the model, Trainer(tokenizer=...)")
    if early_stop is not None and eval_loader is None:
        raise ConfigError("early_stop: looks at evaluations; expected an eval_loader")


def _placement(sharding: Any) -> Placement | None:
    """Where arrays live; None: on one device."""
    if sharding is None:
        return Placement() if process()[1] > 1 else None
    return Placement(sharding)


def _fitted(objective: Objective, remat: str | None, placement: Placement | None) -> Objective:
    """The objective with this run's remat, and told over how many copies of the model the rows are spread."""
    if remat is not None:
        objective = dataclasses.replace(objective, model=objective.model.clone(remat=remat))
    if placement is None or all(field.name != "shards" for field in dataclasses.fields(objective)):
        return objective
    sizes = placement.mesh.shape
    return dataclasses.replace(objective, shards=sizes.get("data", 1) * sizes.get("fsdp", 1))


def _rule(
    optimizer: OptimizerConfig | optax.GradientTransformation, steps: int
) -> tuple[optax.Schedule | None, optax.GradientTransformation]:
    """The learning rate of each step as far as it is known, and the optimizer."""
    if not isinstance(optimizer, OptimizerConfig):
        return None, optimizer
    config = optimizer if optimizer.total_steps else dataclasses.replace(optimizer, total_steps=steps)
    return make_schedule(config), make_optimizer(config)
