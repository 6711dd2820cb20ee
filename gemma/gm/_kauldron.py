# SPDX-License-Identifier: Apache-2.0
"""The classes that have to be kauldron's own: losses, the sampling evaluator and the parquet data set of `gm`.

    gm.losses.DpoLoss, gm.losses.NpoLoss    kd.losses.Loss
    gm.evals.SamplerEvaluator               kd.evals.EvaluatorBase
    gm.data.Parquet                         kd.data.py.DataSourceBase

This is the only module that imports kauldron, and nothing imports it but the first use of one of these names, where
kauldron is installed. What the classes compute is in the packages that they are names of. Everything else that a
configuration of kauldron holds needs nothing of it: networks say where their inputs are with `__kontext_keys__`, loaders
have `transform`, tasks have `map`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from gemma.errors import DependencyError

try:
    import jax
    from kauldron import kd
    from kauldron.utils import config_util, immutabledict
except Exception as error:  # whatever fails in there: it is not this package's, and a configuration cannot go on
    raise DependencyError("kauldron", "kauldron", f"this name (importing kauldron failed: {error!r:.200})") from error

from gemma.errors import DataError
from gemma.gm.data import _parquet
from gemma.gm.data._tasks import Seq2SeqTask
from gemma.gm.evals import _sample
from gemma.gm.losses import _official
from gemma.gm.typing import Array, Bool, Float, Int

# ---- losses ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class DpoLoss(kd.losses.Loss):
    """`gemma.gm.losses._official.DpoLoss` as a loss of kauldron.

    Attributes:
      tau: see there, likewise `label_smoothing`.
      tokens: where in the trainer's context the targets are, "batch.targets"; likewise the next three.
    """

    tau: float = 0.1
    label_smoothing: float = 0.0
    tokens: kd.kontext.Key = kd.kontext.REQUIRED
    sequence_mask: kd.kontext.Key = kd.kontext.REQUIRED
    policy_logits: kd.kontext.Key = kd.kontext.REQUIRED
    anchor_logits: kd.kontext.Key = kd.kontext.REQUIRED

    def get_values(
        self,
        *,
        tokens: Int[Array, "*B 2 T"],
        sequence_mask: Bool[Array, "*B 2 T"],
        policy_logits: Float[Array, "*B 2 T V"],
        anchor_logits: Float[Array, "*B 2 T V"],
    ) -> Float[Array, "*B 1"]:
        """A loss for each pair."""
        plain = _official.DpoLoss(tau=self.tau, label_smoothing=self.label_smoothing)
        return plain.get_values(
            tokens=tokens, sequence_mask=sequence_mask, policy_logits=policy_logits, anchor_logits=anchor_logits
        )


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class NpoLoss(kd.losses.Loss):
    """`gemma.gm.losses._official.NpoLoss` as a loss of kauldron.

    Attributes:
      tau: see there.
      tokens: where in the trainer's context the targets are; likewise the next three.
    """

    tau: float = 1.0
    tokens: kd.kontext.Key = kd.kontext.REQUIRED
    sequence_mask: kd.kontext.Key = kd.kontext.REQUIRED
    policy_logits: kd.kontext.Key = kd.kontext.REQUIRED
    anchor_logits: kd.kontext.Key = kd.kontext.REQUIRED

    def get_values(
        self,
        *,
        tokens: Int[Array, "*B T 1"],
        sequence_mask: Bool[Array, "*B T 1"],
        policy_logits: Float[Array, "*B T V"],
        anchor_logits: Float[Array, "*B T V"],
    ) -> Float[Array, "*B 1"]:
        """A loss for each row."""
        return _official.NpoLoss(tau=self.tau).get_values(
            tokens=tokens, sequence_mask=sequence_mask, policy_logits=policy_logits, anchor_logits=anchor_logits
        )


# ---- data --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parquet(kd.data.py.DataSourceBase):
    """The rows of parquet files as a data set of kauldron, with its `batch_size`, `shuffle`, `transforms` and so on.

    Attributes:
      path: a file, several files, or a folder; see `gemma.gm.data._parquet.Parquet`.
      columns: names of the columns to read; None: all.
    """

    path: Any
    _: dataclasses.KW_ONLY
    columns: Any = None

    @functools.cached_property
    def data_source(self) -> _parquet.Parquet:
        """The rows."""
        return _parquet.Parquet(self.path, self.columns)


# ---- evaluation by sampling --------------------------------------------------------------------------------------------


class SamplerEvaluator(kd.evals.EvaluatorBase):
    """Samples an answer to each prompt of a data set that has a `gm.data.Seq2SeqTask` with `sampling=True`.

    Losses, metrics and summaries find the answers under `preds.text`; the texts of prompt, answer and ground truth are
    always written as summaries.

    Attributes:
      max_new_tokens: the most that an answer has.
      cache_length, pad_length: as in `gm.text.Sampler`.
      num_batches: how many batches (elements, where the data set has no batches) are sampled; None: all.
      cache: keep them, so that they are read once; needs `num_batches`.
      ds: the data set, a `kd.data.py` one.
      model: the network.
      losses, metrics, summaries: of kauldron.
    """

    max_new_tokens: int
    cache_length: int = 4096
    pad_length: int | tuple[int, ...] | None = None
    num_batches: int | None = None
    cache: bool = False
    ds: kd.data.Pipeline = config_util.ROOT_CFG_REF.eval_ds
    model: Any = config_util.ROOT_CFG_REF.model
    losses: Mapping[str, kd.losses.Loss] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, kd.metrics.Metric] = dataclasses.field(default_factory=dict)
    summaries: Mapping[str, kd.metrics.Metric] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        immutabledict.freeze_dict_attrs(self, ["losses", "metrics", "summaries"])
        _sample.check_cache(self.cache, self.num_batches)

    def evaluate(self, state: Any, step: int) -> Any:
        """Samples with the parameters of a state, writes and returns what came out."""
        self._assert_root_cfg_resolved()
        task = self._task
        sampler = _sample.make_sampler(self, task, state.params)
        sharding = kd.sharding.REPLICATED if self.ds.batch_size is None else kd.sharding.FIRST_DIM
        aux = self._auxiliaries(task)
        collected = kd.train.AuxiliariesState()
        with jax.transfer_guard("allow"):  # the training loop forbids transfers; prompts are made here
            for element in self.ds_iter:
                prompt, images = _sample.prompt_of(element, task, self.model)
                text = _sample.answer(sampler, prompt, images, self.max_new_tokens, sharding=sharding)
                context = kd.train.Context(step=step, batch=element, preds={"text": text})
                context = aux.update_context(context)
                collected |= context.get_aux_state(return_losses=True, return_metrics=True, return_summaries=True)
        self.writer.write_step_metrics(step=step, aux=collected, schedules={}, log_summaries=True)
        return collected

    @functools.cached_property
    def ds_iter(self) -> Any:
        """The elements that are sampled."""
        found = self.ds if self.num_batches is None else self.ds.take(self.num_batches)
        return found.cache() if self.cache else found

    def _auxiliaries(self, task: Seq2SeqTask) -> Any:
        texts = {"prompt": f"batch.{task.out_input}", "answer": "preds.text"}
        if task.out_target:
            texts["gt"] = f"batch.{task.out_target}"
        shown = {name: kd.summaries.ShowTexts(texts=key) for name, key in texts.items()}
        return kd.train.Auxiliaries(losses=self.losses, metrics=self.metrics, summaries=shown | dict(self.summaries))

    @functools.cached_property
    def _task(self) -> Seq2SeqTask:
        if not isinstance(self.ds, kd.data.py.PyGrainPipeline):
            raise DataError(
                f"SamplerEvaluator only supports `PyGrainPipeline` datasets (those of kd.data.py), got "
                f"{type(self.ds).__name__}"
            )
        return _sample.find_task(self.ds.transforms, self.ds)

    @functools.cached_property
    def __dashboards__(self) -> Any:
        return kd.kdash.NoopDashboard()  # texts only
