# SPDX-License-Identifier: Apache-2.0
"""The runner contract on the native decoder: packed weights, one cache, numpy for the little that is not native.

The contract is `runner.py`; the decoder `kernels/_model.py`; picking tokens `_pick.py`. Beyond the contract it can pick
after a prompt (`pick`), check guessed tokens in one pass (`verify`) and say what a copy costs (`can_copy_prefix`); the
engine uses these where a runner has them. The padding is never picked and cannot be fed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from gemma import fit
from gemma.adapters import AdapterFile
from gemma.errors import ConfigError, ContextFull, GemmaError, PromptError
from gemma.kernels._model import CACHE_SHORT, CACHE_TYPES, NativeModel
from gemma.serving import _pick
from gemma.serving.runner import RunnerInfo, StepIn, StepOut

PAD = 0  # padding in every Gemma vocabulary
_CHUNK = 512  # tokens of a prompt that are computed at a time
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def load_runner(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    slots: int = 1,
    max_len: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> CpuRunner:
    """A runner for a checkpoint: what `gemma.hub.resolve` takes, a file, a folder, or `demo`.

    `adapter` is a LoRA adapter to run beside the weights: a PEFT folder or a GGUF adapter, for this base.
    """
    from gemma import hub
    from gemma.adapters import open_adapter
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(hub.resolve(path)) as checkpoint:
        model = NativeModel(checkpoint, threads=threads)
    low = None if adapter is None else open_adapter(adapter, model.config)
    return CpuRunner(model, slots=slots, max_len=max_len, adapter=low)


class CpuRunner:
    """A `serving.runner.Runner` on native kernels. The bits of a sequence's logits depend on its ids only: not on the
    batch, the chunks, the slot or the threads. Misuse changes nothing.

    runner = load_runner("demo", threads=2)
    runner.open(slots=4, max_len=4096, cache_dtype="bfloat16")
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        slots: int = 1,
        max_len: int | None = None,
        top: int = 5,
        blocked: Collection[int] = (),
        adapter: AdapterFile | None = None,
    ):
        """Makes the runner; with `slots` 0 it has none until `open`.

        Args:
          model: it belongs to the runner from here on.
          slots, max_len: as in `open`; None: the model's own context, up to 4,096 tokens.
          top: how many (id, log-probability) pairs a StepOut carries.
          blocked: ids that are never picked, beside the padding.
          adapter: to run beside the weights, as in `set_adapter`.
        """
        self._model, self._top = model, top
        self._blocked = np.array(sorted({PAD, *(int(i) for i in blocked)}), np.int64)
        self._max_len, self._held = 0, []
        if adapter is not None:
            model.set_adapter(adapter)
        if slots:
            limit = model.config.max_position_embeddings
            self.open(slots, min(limit, 4096) if max_len is None else max_len, "float32")

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(self._model.config, self._max_len, len(self._held), "float32", "cpu")

    @property
    def model(self) -> NativeModel:
        """The decoder underneath; not part of the contract."""
        return self._model

    def open(self, slots: int, max_len: int, cache_dtype: str) -> None:
        """As the contract says.

        Args:
          slots, max_len: at least 1; `max_len` at most the model's context.
          cache_dtype: "float32", "bfloat16" or "int8"; also "f32", "bf16".

        Raises:
          ContextFull: beyond the model's context. ConfigError: an unknown type, or more than the memory that is free.
        """
        if slots < 1 or max_len < 1:
            raise GemmaError(f"open: expected at least 1 slot and 1 token, got {slots} slots of {max_len} tokens")
        limit = self._model.config.max_position_embeddings
        if max_len > limit:
            raise ContextFull(max_len, limit, "the slots")
        cache_dtype = CACHE_SHORT.get(cache_dtype, cache_dtype)
        if cache_dtype not in CACHE_TYPES:
            raise ConfigError(f"cache type: expected one of {', '.join(CACHE_TYPES)}, got {cache_dtype!r}")
        self._check_memory(slots, max_len, cache_dtype)
        self._model.open(slots, max_len, cache_dtype, min(_CHUNK, max_len))
        self._max_len = max_len
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def set_adapter(self, adapter: AdapterFile | None, *, scale: float = 1.0, check_base: bool = True) -> None:
        """Puts a LoRA adapter beside the weights, instead of the one that is there; None takes it away.

        Every slot is empty afterwards, as nothing that one adapter computed may serve another. Behind an engine use
        `Engine.set_adapter`, whose requests would lose their slots.

        Args:
          adapter, scale, check_base: as in `NativeModel.set_adapter`, likewise the errors.
        """
        if adapter is not None and adapter is self._model.adapter:
            self._model.scale_adapter(scale)
        else:
            self._model.set_adapter(adapter, scale=scale, check_base=check_base)
        self._held = [[] for _ in self._held]

    def _check_memory(self, slots: int, max_len: int, cache_dtype: str) -> None:
        config, memory = self._model.config, fit.machine_memory()
        need = slots * (config.cache_bytes(max_len, _VALUE_BYTES[cache_dtype]) + 4 * config.vocab_size)
        held = self._model.cache_bytes if self._held else 0
        if memory is not None and need > memory.available + held:
            raise ConfigError(
                f"open: {slots} slots of {max_len} tokens in {cache_dtype} need {fit.format_bytes(need)}, and "
                f"{fit.format_bytes(memory.available + held)} of memory are free: ask for a shorter context, fewer "
                f"slots or a smaller cache type"
            )

    def prefill(self, slot: int, ids: Sequence[int], start: int, images: Any = None) -> None:
        held = self._slot(slot)
        if images is not None:
            raise PromptError("prefill: the native CPU model reads text only; images need the JAX backend")
        if not len(ids):
            raise PromptError(f"prefill of slot {slot}: expected at least one id, got none")
        if start != len(held):
            raise GemmaError(f"prefill of slot {slot}: start must be the {len(held)} tokens that it holds, got {start}")
        self._check(slot, ids, len(held))
        self._read(slot, [int(i) for i in ids])

    def step(self, batch: list[StepIn]) -> list[StepOut]:
        slots = [s.slot for s in batch]
        if len(set(slots)) != len(slots):
            raise GemmaError(f"step: expected each slot once in a batch, got {slots}")
        for s in batch:
            if not self._slot(s.slot):
                raise GemmaError(f"step: slot {s.slot} is empty; prefill it first")
            self._check(s.slot, [s.token], len(self._held[s.slot]))
        if not batch:
            return []
        with _Whole(self, slots):
            self._model.step(slots, [s.token for s in batch])
        for s in batch:
            self._held[s.slot].append(int(s.token))
        return [_pick.pick(self._masked(s.slot), s, self._model.top_k, self._top) for s in batch]

    def pick(self, step: StepIn) -> StepOut:
        """Samples after what a slot holds, without feeding anything: the token after a prompt. `token` is not used."""
        if not self._slot(step.slot):
            raise GemmaError(f"pick: slot {step.slot} is empty; prefill it first")
        return _pick.pick(self._masked(step.slot), step, self._model.top_k, self._top)

    def verify(self, step: StepIn, guess: Sequence[int], rngs: Sequence[int]) -> list[StepOut]:
        """A step and the steps after it, in one pass, as long as what is sampled agrees with a guess.

        The outcome is that of single steps, token for token: each is drawn with its own random state from the logits
        after the ones before, and the first that differs from the guess is the last. So a guess x is taken with the
        probability p(x), and otherwise replaced by a draw from the rest, renormalized: rejection sampling of a
        proposal that puts all its weight on x.

        Args:
          step: as in `step`; its `rng` is not used.
          guess: ids that may follow `step.token`; at least one.
          rngs: the random states of the tokens: one more than ids.

        Returns:
          One to len(guess) + 1 results. The slot holds `step.token` and the guessed ids that came.
        """
        slot, ids = step.slot, [int(step.token), *(int(i) for i in guess)]
        if not self._slot(slot):
            raise GemmaError(f"verify: slot {slot} is empty; prefill it first")
        if not 2 <= len(ids) <= min(_CHUNK, self._max_len) or len(rngs) != len(ids):
            raise GemmaError(
                f"verify: expected 1 to {min(_CHUNK, self._max_len) - 1} guessed ids and one random state more, "
                f"got {len(ids) - 1} and {len(rngs)}"
            )
        self._check(slot, ids, len(self._held[slot]))
        penalty = step.params is not None and step.params.repetition_penalty != 1.0
        start, history, outs = len(self._held[slot]), list(step.history) if penalty else [], []
        with _Whole(self, [slot]):
            rows = self._model.score(slot, ids)
        self._held[slot] += ids
        try:
            for row, rng, following in zip(rows, rngs, [*ids[1:], None]):
                row[self._blocked] = -np.inf
                drawn = StepIn(slot, 0, step.params, rng, history)
                outs.append(_pick.pick(row, drawn, self._model.top_k, self._top))
                if outs[-1].token != following:
                    break
                history.append(following)
        finally:
            self._shorten(slot, start + max(len(outs), 1))
        return outs

    def logits(self, slot: int) -> np.ndarray:
        """As the contract says; -inf for the padding and other blocked ids, which are never picked."""
        if not self._slot(slot):
            raise GemmaError(f"logits: slot {slot} is empty; prefill it first")
        return self._masked(slot).copy()

    def can_copy_prefix(self, src: int, n: int) -> bool:
        """Whether `copy_prefix` copies, instead of reading the tokens anew because a ring has lost some of them."""
        held, ring = len(self._slot(src)), min(s.cache_length(self._max_len) for s in self._model.config.layers)
        return held - n <= 1 or held <= ring  # the newest token of a ring has replaced one that nobody needs any more

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        held = self._slot(src)
        self._slot(dst)
        if not 0 <= n <= len(held):
            raise GemmaError(f"copy_prefix: expected n in 0..{len(held)}, what slot {src} holds, got {n}")
        if src == dst:
            self._shorten(src, n)
        elif n == 0:
            self.free(dst)
        else:
            ids = held[:n]
            with _Whole(self, [dst]):
                copied = self._model.copy(src, dst, n)
            if copied:
                self._held[dst] = ids
            else:
                self.free(dst)
                self._read(dst, ids)

    def free(self, slot: int) -> None:
        self._slot(slot)
        self._model.truncate(slot, 0)
        self._held[slot] = []

    def _slot(self, slot: int) -> list[int]:
        if not 0 <= slot < len(self._held):
            raise GemmaError(f"slot: expected 0..{len(self._held) - 1}, got {slot}")
        return self._held[slot]

    def _check(self, slot: int, ids: Sequence[int], used: int) -> None:
        size = self._model.config.vocab_size
        outside = [i for i in ids if not 0 <= i < size]
        if outside:
            raise PromptError(f"slot {slot}: expected ids in 0..{size - 1}, got {outside[0]}")
        if PAD in ids:
            raise PromptError(f"slot {slot}: id {PAD} is padding and cannot be part of a prompt")
        if used + len(ids) > self._max_len:
            raise ContextFull(used + len(ids), self._max_len, f"slot {slot}")

    def _read(self, slot: int, ids: list[int]) -> None:
        with _Whole(self, [slot]):
            self._model.prefill(slot, ids)
        self._held[slot] += ids

    def _shorten(self, slot: int, n: int) -> None:
        """Forgets all but the first n tokens; read anew where a ring has lost what they need."""
        held = self._held[slot]
        if n == len(held):
            return
        if self._model.truncate(slot, n):
            self._held[slot] = held[:n]
            return
        self.free(slot)
        self._read(slot, held[:n])

    def _masked(self, slot: int) -> np.ndarray:
        """The slot's logits in place, -inf where an id is blocked; after a shortening its last token is read again."""
        logits = self._model.logits(slot)
        if logits is None:
            last = self._held[slot][-1]
            self._shorten(slot, len(self._held[slot]) - 1)
            self._read(slot, [last])
            logits = self._model.logits(slot)
        logits[self._blocked] = -np.inf
        return logits


class _Whole:
    """Around a native call: one that fails leaves its slots empty, never half written."""

    def __init__(self, runner: CpuRunner, slots: Sequence[int]):
        self._runner, self._slots = runner, slots

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            for slot in self._slots:
                self._runner.free(slot)
