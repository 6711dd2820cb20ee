# SPDX-License-Identifier: Apache-2.0
"""The contract between an engine and the hardware that runs a model; no framework is named here.

A runner owns the weights and the cache slots of one model. An engine (the scheduler's side) never sees a tensor: it
opens slots, feeds token ids and receives token ids. Sequences in a batch may stand at different positions. Runners are
`_runner_jax.py`, `_runner_torch.py` and `_runner_cpu.py`; `gemma.testing.FakeRunner` is one without a model.

A slot lives through open, prefill (once or in chunks), any number of steps, and free:

    slot cache      0 1 2 3 4 5 6 7 . . .
    prefill ids     a b c d                  start = 0; caches a b c d, logits(slot) are those after d
    step token e            e                caches e at position 4, returns the token sampled after it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gemma.config import GemmaConfig
from gemma.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class RunnerInfo:
    """What a runner runs and where."""

    config: GemmaConfig
    max_len: int  # tokens per slot
    slots: int
    dtype: str  # of the activations: "float32", "bfloat16", ...
    device: str  # "cpu", "cuda:0", ...


@dataclasses.dataclass(frozen=True)
class StepIn:
    """One sequence's part of a decode step: cache `token`, then sample the next one.

    `params` None asks for the arg-max. `rng` is the sequence's own 64-bit random state, so that a sequence's tokens do
    not depend on what it is batched with. `history` holds the ids that penalties look at.
    """

    slot: int
    token: int
    params: SamplingParams | None = None
    rng: int = 0
    history: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class StepOut:
    """The sampled token, its log-probability (natural log, before penalties), and the likeliest (id, logprob) pairs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@runtime_checkable
class Runner(Protocol):
    """Runs one model for a fixed number of cache slots."""

    @property
    def info(self) -> RunnerInfo: ...

    def open(self, slots: int, max_len: int, cache_dtype: str) -> None:
        """Allocates `slots` caches of `max_len` tokens each; may be called again, which empties every slot."""

    def prefill(self, slot: int, ids: Sequence[int], start: int, images: Any = None) -> None:
        """Caches `ids` at positions start..start+len(ids)-1. `start` must be what the slot holds.

        Raises ContextFull past `max_len`.
        """

    def step(self, batch: list[StepIn]) -> list[StepOut]:
        """Advances every sequence of the batch by one token; the order is kept."""

    def logits(self, slot: int) -> np.ndarray:
        """The logits after the slot's last token: float32 [V]."""

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        """Makes slot `dst` hold the first `n` tokens of slot `src`."""

    def free(self, slot: int) -> None:
        """Empties a slot."""
