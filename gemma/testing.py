# SPDX-License-Identifier: Apache-2.0
"""Public doubles: a runner without a model, a tokenizer without a vocabulary, tiny models and files of every format.

For the tests of this project and of programs that use it; numpy only. Nothing here is fast or approximates a real
model. The runner's contract is `serving/runner.py`; the tokenizer doubled here is `tokenizer.py`; file writing is in
`_testing_files.py`.

  runner = FakeRunner(slots=2)
  runner.prefill(0, [2, 40, 41], start=0)
  [out] = runner.step([StepIn(slot=0, token=42)])     # the same history gives the same token, in any slot and batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gemma._testing_files import tiny_pieces, write_gguf, write_tiny_gguf, write_tiny_safetensors
from gemma._testing_tokenizer import ByteTokenizer
from gemma.config import GemmaConfig
from gemma.errors import ConfigError, ContextFull, GemmaError, PromptError
from gemma.sampling import SamplingParams, logprobs, sample, top_logprobs

# The contract's data types carry no behaviour and import nothing above layer 0.
from gemma.serving.runner import RunnerInfo, StepIn, StepOut

__all__ = [
    "FakeRunner",
    "ByteTokenizer",
    "tiny_config",
    "random_tensors",
    "tiny_pieces",
    "write_gguf",
    "write_tiny_gguf",
    "write_tiny_safetensors",
]

# D = 72 is no perfect square, so a wrong sqrt(D) shows; N * H = 96 differs from D, so a transposed output projection
# shows; the window is shorter than any sensible test sequence, and the caps are small enough to bite.
_TINY = dict(
    vocab_size=320,
    hidden_size=72,
    intermediate_size=100,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=128,
)
_TINY_CAPS = dict(query_pre_attn_scalar=18.0, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
_TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": dict(model_type="gemma", num_key_value_heads=1),
    "gemma2": dict(model_type="gemma2", layer_pattern="LG", sliding_window=5, use_post_norms=True) | _TINY_CAPS,
    "gemma3": dict(
        model_type="gemma3_text",
        num_hidden_layers=7,
        layer_pattern="LLLLLG",
        sliding_window=5,
        query_pre_attn_scalar=18.0,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling_factor=8.0,
        use_post_norms=True,
        use_qk_norm=True,
        transpose_gating_einsum=True,
    ),
}


def tiny_config(family: str = "gemma3", **changes: Any) -> GemmaConfig:
    """A decoder of a few hundred kilobytes with every trait of its family, for tests.

    Args:
      family: "gemma", "gemma2" or "gemma3".
      **changes: fields of GemmaConfig to replace.
    """
    if family not in _TINY_FAMILIES:
        raise ConfigError(f"tiny_config: expected one of {', '.join(_TINY_FAMILIES)}, got {family!r}")
    return GemmaConfig.from_dict(_TINY | _TINY_FAMILIES[family] | changes)


def random_tensors(config: Any, seed: int = 0, std: float = 0.08) -> dict[str, np.ndarray]:
    """Every tensor of a model, random: canonical name (`gemma.weights`) to float32 in canonical axes.

    Norm weights are random too, around 0 as they are stored: a parity test with constant norms cannot see that two of
    them were exchanged. A tensor's values depend on its name, its shape and the seed, not on the other tensors.
    """
    from gemma import weights  # the table is built on import: only who needs weights waits for it

    return {t.name: _normal(f"{seed}/{t.name}", t.shape) * np.float32(std) for t in weights.tensors(config)}


def _normal(key: str, shape: Sequence[int]) -> np.ndarray:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(shape, dtype=np.float32)


class FakeRunner:
    """A `serving.runner.Runner` that computes nothing: the logits after a history are a hash of that history.

    They depend on the ids of the slot, in order, and on nothing else: not on the slot, its neighbours or how the
    history was cut into chunks. Hence any engine fault (a token lost, a slot mixed up, a prefix copied wrongly) changes
    the text. Misuse raises at the call that does it, and leaves every slot as it was.
    """

    def __init__(
        self,
        config: GemmaConfig | None = None,
        *,
        slots: int = 4,
        max_len: int = 128,
        seed: int = 0,
        choose: Callable[[tuple[int, ...]], int] | None = None,
        alphabet: Iterable[int] | None = None,
        top: int = 5,
    ):
        """Creates the runner with its slots open.

        Args:
          config: only `vocab_size` matters; the default has the ids of ByteTokenizer.
          slots, max_len: as in `open`.
          seed: another seed is another "model".
          choose: the arg-max after a history (the ids of one slot), to script a reply; None: one of `alphabet` by hash.
          alphabet: the ids that the hash picks the arg-max from; default: the printable ASCII of ByteTokenizer.
          top: how many (id, log-probability) pairs a StepOut carries.
        """
        self._config = tiny_config(vocab_size=ByteTokenizer.FIRST_BYTE + 256) if config is None else config
        printable = [ByteTokenizer.FIRST_BYTE + byte for byte in range(32, 127)]
        self._alphabet = list(printable if alphabet is None else alphabet)
        self._seed, self._choose, self._top = seed, choose, top
        self.calls: list[str] = []  # "prefill 0 3@0", "step 0 1": what an engine asked for, in order
        self.open(slots, max_len, "float32")

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(self._config, self._max_len, len(self._held), "float32", "fake")

    def open(self, slots: int, max_len: int, cache_dtype: str) -> None:
        if slots < 1 or max_len < 1:
            raise GemmaError(f"open: expected at least 1 slot and 1 token, got {slots} slots of {max_len} tokens")
        self._max_len, self.cache_dtype = max_len, cache_dtype
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def prefill(self, slot: int, ids: Sequence[int], start: int, images: Any = None) -> None:
        held = self._slot(slot)
        if not len(ids):
            raise PromptError(f"prefill of slot {slot}: expected at least one id, got none")
        if start != len(held):
            raise GemmaError(f"prefill of slot {slot}: start must be the {len(held)} tokens that it holds, got {start}")
        self._check(slot, ids, len(held))
        # An image changes what its ids mean; the low 32 bits of an entry stay the id.
        mark = 0 if images is None else int.from_bytes(_digest(np.asarray(images))[:3], "little") << 32
        self.calls.append(f"prefill {slot} {len(ids)}@{start}")
        held.extend(int(i) | mark for i in ids)

    def step(self, batch: list[StepIn]) -> list[StepOut]:
        slots = [s.slot for s in batch]
        if len(set(slots)) != len(slots):
            raise GemmaError(f"step: expected each slot once in a batch, got {slots}")
        for s in batch:
            if not self._slot(s.slot):
                raise GemmaError(f"step: slot {s.slot} is empty; prefill it first")
            self._check(s.slot, [s.token], len(self._held[s.slot]))
        self.calls.append("step " + " ".join(map(str, slots)))
        return [self._advance(s) for s in batch]

    def logits(self, slot: int) -> np.ndarray:
        held = self._slot(slot)
        if not held:
            raise GemmaError(f"logits: slot {slot} is empty; prefill it first")
        key = _digest(np.array([self._seed, *held], np.int64))
        number = int.from_bytes(key, "little")
        values = np.random.default_rng(number).standard_normal(self._config.vocab_size, dtype=np.float32)
        history = tuple(entry & 0xFFFFFFFF for entry in held)
        best = self._alphabet[number % len(self._alphabet)] if self._choose is None else self._choose(history)
        values[best] = values.max() + 1
        return values

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        held = self._slot(src)
        self._slot(dst)
        if not 0 <= n <= len(held):
            raise GemmaError(f"copy_prefix: expected n in 0..{len(held)}, what slot {src} holds, got {n}")
        self._held[dst] = held[:n]

    def free(self, slot: int) -> None:
        self._slot(slot)
        self._held[slot] = []

    def history(self, slot: int) -> tuple[int, ...]:
        """The ids a slot holds; not part of the contract."""
        return tuple(entry & 0xFFFFFFFF for entry in self._slot(slot))

    def _slot(self, slot: int) -> list[int]:
        if not 0 <= slot < len(self._held):
            raise GemmaError(f"slot: expected 0..{len(self._held) - 1}, got {slot}")
        return self._held[slot]

    def _check(self, slot: int, ids: Sequence[int], used: int) -> None:
        outside = [i for i in ids if not 0 <= i < self._config.vocab_size]
        if outside:
            raise PromptError(f"slot {slot}: expected ids in 0..{self._config.vocab_size - 1}, got {outside[0]}")
        if used + len(ids) > self._max_len:
            raise ContextFull(used + len(ids), self._max_len, f"slot {slot}")

    def _advance(self, s: StepIn) -> StepOut:
        self._held[s.slot].append(int(s.token))
        logits = self.logits(s.slot)
        params = SamplingParams(temperature=0) if s.params is None else s.params
        token = sample(logits, params, s.history, s.rng)
        return StepOut(token, float(logprobs(logits)[token]), top_logprobs(logits, self._top))


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).digest()
