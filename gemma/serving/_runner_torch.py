# SPDX-License-Identifier: Apache-2.0
"""The runner of `serving/runner.py` in PyTorch: one model, one preallocated cache, a row of it per slot.

A step reads the rows from the first to the last slot of its batch; those in between that were not asked for count as
padding, which is neither stored nor looked at. The cache is `gemma/_torch/cache.py`, sampling `gemma/_torch/sampling.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma import hub
from gemma._torch import sampling
from gemma._torch.cache import WindowedKVCache
from gemma._torch.load import fuse_adapter
from gemma.adapters import open_adapter
from gemma.errors import ConfigError, ContextFull, GemmaError, PromptError
from gemma.modeling_gemma import GemmaForCausalLM
from gemma.sampling import SamplingParams, uniform
from gemma.serving.runner import RunnerInfo, StepIn, StepOut

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GREEDY = SamplingParams(temperature=0)
_PREFILL = 1024  # tokens read at once


def load_runner(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    adapter: str | os.PathLike[str] | None = None,
) -> TorchRunner:
    """A runner for a checkpoint; `path` and errors as in `GemmaForCausalLM.from_pretrained`.

    Args:
      dtype: "float32", "bfloat16" or "float16".
      adapter: a LoRA adapter of this base to fold into the weights: a PEFT folder or a GGUF adapter.
    """
    path = hub.resolve(path)
    model = GemmaForCausalLM.from_pretrained(path, dtype=_dtype(dtype, "dtype"), device=device)
    if adapter is not None:
        fuse_adapter(model, path, open_adapter(Path(adapter).expanduser(), model.config))
    return TorchRunner(model)


def _dtype(name: str, field: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"{field}: expected one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


class TorchRunner:
    """A `serving.runner.Runner` for a GemmaForCausalLM. Any prompt may be read in any chunks; misuse changes nothing.

    runner = TorchRunner(GemmaForCausalLM.from_pretrained("demo"))
    runner.open(slots=4, max_len=4096, cache_dtype="float32")
    """

    def __init__(self, model: GemmaForCausalLM, *, slots: int = 1, max_len: int | None = None, top: int = 5):
        """Opens the slots.

        Args:
          model: on its device, in its dtype.
          slots, max_len: as in `open`; None is the model's own context, of which only what is used costs memory.
          top: how many (id, log-probability) pairs a StepOut carries.
        """
        self._model, self._top = model, top
        weight = model.get_input_embeddings().weight
        self._dtype, self._device = weight.dtype, weight.device
        self.open(slots, max_len or model.config.max_position_embeddings, str(weight.dtype).removeprefix("torch."))

    @property
    def info(self) -> RunnerInfo:
        dtype = str(self._dtype).removeprefix("torch.")
        return RunnerInfo(self._model.config, self._max_len, len(self._ids), dtype, str(self._device))

    def open(self, slots: int, max_len: int, cache_dtype: str) -> None:
        if slots < 1 or max_len < 1:
            raise GemmaError(f"open: expected at least 1 slot and 1 token, got {slots} slots of {max_len} tokens")
        limit = self._model.config.max_position_embeddings
        if max_len > limit:
            raise ContextFull(max_len, limit, "the slots")
        layers, dtype = self._model.config.layers, _dtype(cache_dtype, "cache_dtype")
        self._cache = WindowedKVCache(layers, slots, max_len, dtype=dtype, device=self._device)
        self._max_len = max_len
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._logits: list[Tensor | None] = [None] * slots  # float32 [V], after the slot's last token

    def prefill(self, slot: int, ids: Sequence[int], start: int, images: Any = None) -> None:
        held = self._slot(slot)
        if images is not None:
            raise PromptError("prefill: this runner's model reads text only; images need a model with a vision tower")
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
            self._check(s.slot, [s.token], len(self._ids[s.slot]))
        if not batch:
            return []
        first, stop = min(slots), max(slots) + 1
        tokens = torch.zeros((stop - first, 1), dtype=torch.long)
        named = torch.zeros((stop - first, 1), dtype=torch.bool)
        for s in batch:
            tokens[s.slot - first], named[s.slot - first] = s.token, True
        logits = self._forward(first, stop, tokens, None if bool(named.all()) else named)
        outs = []
        for s in batch:
            row = logits[s.slot - first].clone()
            outs.append(self._picked(row, s))
            self._ids[s.slot].append(int(s.token))
            self._logits[s.slot] = row
        return outs

    def logits(self, slot: int) -> np.ndarray:
        if not self._slot(slot):
            raise GemmaError(f"logits: slot {slot} is empty; prefill it first")
        return self._logits[slot].cpu().numpy().copy()

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        held = list(self._slot(src))
        self._slot(dst)
        if not 0 <= n <= len(held):
            raise GemmaError(f"copy_prefix: expected n in 0..{len(held)}, what slot {src} holds, got {n}")
        if n == len(held):
            self._take(src, dst, n)
            self._ids[dst], self._logits[dst] = held, self._logits[src]
        elif n == 0:
            self.free(dst)
        else:  # the last token is read anew, for the logits after it; or all, where a ring has lost the beginning
            kept = n - 1 if self._take(src, dst, n - 1) else 0
            if not kept:
                self.free(dst)
            self._ids[dst] = held[:kept]
            self._read(dst, held[kept:n])

    def free(self, slot: int) -> None:
        self._slot(slot)
        self._cache.rows(slot, slot + 1).clear()
        self._ids[slot], self._logits[slot] = [], None

    def _slot(self, slot: int) -> list[int]:
        if not 0 <= slot < len(self._ids):
            raise GemmaError(f"slot: expected 0..{len(self._ids) - 1}, got {slot}")
        return self._ids[slot]

    def _check(self, slot: int, ids: Sequence[int], used: int) -> None:
        rows = self._model.config.vocab_size
        outside = [i for i in ids if not 0 <= i < rows]
        if outside:
            raise PromptError(f"slot {slot}: expected ids in 0..{rows - 1}, got {outside[0]}")
        if used + len(ids) > self._max_len:
            raise ContextFull(used + len(ids), self._max_len, f"slot {slot}")

    @torch.inference_mode()
    def _take(self, src: int, dst: int, n: int) -> bool:
        if src == dst and n == len(self._ids[src]):
            return True
        return self._cache.rows(dst, dst + 1).copy_prefix(self._cache.rows(src, src + 1), n)

    def _read(self, slot: int, ids: list[int]) -> None:
        for start in range(0, len(ids), _PREFILL):
            part = ids[start : start + _PREFILL]
            logits = self._forward(slot, slot + 1, torch.tensor([part]), None)
            self._ids[slot] += part
            self._logits[slot] = logits[0].clone()

    @torch.inference_mode()
    def _forward(self, first: int, stop: int, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Reads tokens [rows, T] into the slots first..stop-1: the logits after the last, float32 [rows, V]."""
        out = self._model(
            input_ids=tokens.to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
            kv_cache=self._cache.rows(first, stop),
            logits_to_keep=1,
        )
        return out["logits"][:, -1].float()

    @torch.inference_mode()
    def _picked(self, logits: Tensor, s: StepIn) -> StepOut:
        token = sampling.pick(logits, s.params or _GREEDY, s.history, uniform(s.rng))
        norm = torch.logsumexp(logits.double(), 0)
        shown: list[tuple[int, float]] = []
        if self._top:
            ids = (logits >= logits.topk(self._top).values[-1]).nonzero()[:, 0]
            ids = ids[torch.sort(logits[ids], descending=True, stable=True).indices][: self._top]
            shown = [(int(i), float(logits[i].double() - norm)) for i in ids]
        return StepOut(token, float(logits[token].double() - norm), tuple(shown))
