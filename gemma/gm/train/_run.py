# SPDX-License-Identifier: Apache-2.0
"""`finetune`: a whole run, from a file of examples to weights that other programs read.

    result = gm.train.finetune(RunConfig(data="chats.jsonl", model="demo", method="lora", steps=100))

It checks the output folder and the memory before weights are read, goes on from the newest checkpoint, and proves what
it exports. The loop is `Trainer` (`_loop.py`), settings are `gemma/finetuning.py`, the folder `_run_folder.py`, the
model `_run_model.py`, exports `_run_exports.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from gemma.errors import TrainingError
from gemma.finetuning import RunConfig
from gemma.gm.data import DataReport
from gemma.gm.train import _objectives, _run_folder, _run_model
from gemma.gm.train._checkpoints import Checkpoints
from gemma.gm.train._loggers import Csv, Png, Samples, TensorBoard
from gemma.gm.train._loop import Trainer
from gemma.gm.train._memory import MemoryEstimate, estimate_memory
from gemma.gm.train._optimizer import OptimizerConfig
from gemma.gm.train._result import Callback, EarlyStop, Result
from gemma.gm.train._run_exports import Export, export
from gemma.gm.train._state import merge_trainable
from gemma.gm.typing import Params

Event = Callable[[str, Mapping[str, Any]], Any]
_WARMUP = 0.03  # of all steps, where nothing else is said


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
      config: with every default filled in.
      folder: of the run.
      report: what became of the examples.
      memory: the estimate from before the weights were read.
      steps: where the run ends.
      training: of `Trainer.fit`; None for a dry run.
      exports: in the order of `config.export`; none for a run that was interrupted.
    """

    config: RunConfig
    folder: Path
    report: DataReport
    memory: MemoryEstimate
    steps: int
    training: Result | None = None
    exports: tuple[Export, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; an interrupted one goes on when it is started again."""
        return self.training is not None and self.training.stopped_by not in ("signal", "callback")


def finetune(config: RunConfig, *, on_event: Event | None = None, dry_run: bool = False) -> RunResult:
    """Fine-tunes a model.

    The folder of the run holds config.yaml, metrics.csv, curves.png, samples.jsonl, tensorboard/, checkpoints/, the
    exports and a README. Started again with the same settings, a run goes on exactly where it was.

    Args:
      config: the settings.
      on_event: called with a name and what belongs to it: "data" (report, steps), "memory" (estimate), "loading"
        (model), "start", "step", "eval" (numbers), "samples" (step, samples), "save" (step), "progress" (what, done,
        total), "export" (export), "end" (result). A true value in return for a step or evaluation ends the run.
      dry_run: stop before the weights are read; nothing is written.

    Raises:
      SaveError: the folder cannot be written, or a disk is full. DataError: the examples cannot be used.
      TrainingError: the folder holds another run, or this one diverges. GemmaError: a model or adapter that does not fit.
    """
    tell = on_event or _silent
    run = config.resolved()
    folder = _run_folder.check(run)
    base = _run_model.look(run)
    data = _run_model.read(run, base)
    steps = _steps(run, data.training.steps_per_epoch)
    tell("data", {"report": data.training.report, "steps": steps, "problems": data.training.examples.problems})
    memory = estimate_memory(run, images=data.images)
    tell("memory", {"estimate": memory})
    result = RunResult(run, folder, data.training.report, memory, steps)
    if dry_run:
        return result
    _run_folder.begin(run, folder)
    network, params, training = _train(run, base, data, steps, folder, tell)
    result = dataclasses.replace(result, training=training)
    if result.finished and jax.process_index() == 0:
        done = _exported(run, base, network, params, folder, tell)
        result = dataclasses.replace(result, exports=done)
        _run_folder.card(run, base, result.report, training, done, folder)
    tell("end", {"result": result})
    return result


def _train(run: RunConfig, base: Any, data: Any, steps: int, folder: Path, tell: Event) -> tuple[Any, Params, Result]:
    """The network without parameters, the trained ones, and what the trainer says."""
    store = Checkpoints(
        folder / "checkpoints",
        keep=run.keep,
        keep_best=("eval_loss", "min") if data.evaluation is not None else None,
        fingerprint=run.fingerprint(),
    )
    with store:
        tell("loading", {"model": str(base.path)})
        network = _run_model.build(run, base, images=data.images, chat=data.chat)
        trainer = Trainer(
            _objective(run, network.model, data.training),
            network.params,
            network.trainable,
            data.training,
            **_trainer_options(run, base, data, steps, folder, store, tell),
        )
        # The trainer has the parameters now.
        network = dataclasses.replace(network, params=None, classification=data.classification)
        training = trainer.fit()
        return network, _chosen(run, store, training), training


def _exported(run: RunConfig, base: Any, network: Any, params: Params, folder: Path, tell: Event) -> tuple[Export, ...]:
    def progress(what: str, done: int, total: int) -> None:
        tell("progress", {"what": what, "done": done, "total": total})

    written = []
    for done in export(run, base, network, params, folder, progress):
        written.append(done)
        tell("export", {"export": done})
    return tuple(written)


def _silent(name: str, values: Mapping[str, Any]) -> None:
    del name, values


def _steps(run: RunConfig, batches: int) -> int:
    """Where the run ends."""
    return run.steps or max(1, math.ceil(run.epochs * batches / run.accumulate - 1e-9))


def _objective(run: RunConfig, model: Any, loader: Any) -> Any:
    if run.objective == "classification":
        return _objectives.Classification(model, loader.label_ids)
    if run.objective == "supervised":
        return _objectives.Supervised(model)
    from gemma.gm.train import _preference as preferences

    if run.objective == "kto":
        return preferences.Kto(model, beta=run.beta)
    kind = run.preference if run.method == "dpo" else run.method
    return preferences.Preference(model, kind=kind, beta=run.beta, gamma=run.gamma, label_smoothing=run.label_smoothing)


def _trainer_options(run: RunConfig, base: Any, data: Any, steps: int, folder: Path, store: Any, tell: Event) -> dict:
    warmup = math.ceil(_WARMUP * steps) if run.warmup_steps is None else run.warmup_steps
    optimizer = OptimizerConfig(
        learning_rate=run.learning_rate,
        schedule=run.schedule,
        warmup_steps=min(warmup, steps - 1),
        total_steps=steps,
        weight_decay=run.weight_decay,
        clip_norm=run.clip_norm,
    )
    loggers = [Csv(folder / "metrics.csv"), Png(folder / "curves.png")]
    loggers += [Samples(folder / "samples.jsonl")] if run.sample_prompts else []
    loggers += [TensorBoard(folder / "tensorboard")] if run.tensorboard else []
    return dict(
        optimizer=optimizer,
        steps=steps,
        accumulate=run.accumulate,
        ema=run.ema or None,
        remat=None if run.remat == "none" else run.remat,
        eval_loader=data.evaluation,
        eval_every=run.eval_every if data.evaluation is not None or run.sample_prompts else None,
        early_stop=None if run.early_stop is None else EarlyStop(run.early_stop),
        sample_prompts=run.sample_prompts,
        sample_chat=data.chat,
        tokenizer=base.tokenizer,
        checkpoints=store,
        save_every=run.save_every,
        loggers=loggers,
        callbacks=[_Tell(tell)],
        sharding=_run_model.strategy(run, base),
        seed=run.seed,
    )


class _Tell(Callback):
    """Hands on what the loop reports."""

    def __init__(self, tell: Event):
        self._tell = tell

    def on_start(self, info: Mapping[str, Any]) -> None:
        self._tell("start", info)

    def on_step(self, metrics: Mapping[str, float]) -> Any:
        return self._tell("step", metrics)

    def on_eval(self, metrics: Mapping[str, float]) -> Any:
        return self._tell("eval", metrics)

    def on_samples(self, step: int, samples: Any) -> None:
        self._tell("samples", {"step": step, "samples": samples})

    def on_save(self, step: int) -> None:
        self._tell("save", {"step": step})


def _chosen(run: RunConfig, store: Checkpoints, training: Result) -> Params:
    """The parameters to export: the last ones; of a run that was to stop early, those that evaluated best."""
    best = store.best() if run.early_stop is not None else None
    if best is None or best == int(training.state.step):
        return training.params
    state, _ = store.restore(best, like=training.state)
    leaves = state.params if state.ema is None else state.ema
    whole = training.params

    def cast(leaf: jax.Array, like: jax.Array) -> jax.Array:
        return leaf.astype(like.dtype)

    return merge_trainable(whole, jax.tree.map(cast, leaves, _part(whole, leaves)))


def _part(tree: Any, like: Any) -> Any:
    """The branches of a tree that another one has."""
    if not isinstance(like, Mapping):
        return tree
    if not isinstance(tree, Mapping):
        raise TrainingError("the best checkpoint has other leaves than the run")
    return {name: _part(tree[name], value) for name, value in like.items()}
