# SPDX-License-Identifier: Apache-2.0
"""How the next token is picked: the parameters as data, and the readable numpy sampler that defines what they mean.

Every backend has its own fast sampler; this one is what they are compared with. It knows one sequence and no model:
batching is `serving/`, the JAX samplers are `gm/text/_sampling.py`, end-of-text ids come from `chat.end_token_ids`.

The order of operations, on float32 logits [V]:

  1. repetition_penalty   a seen id's logit is divided by it where positive, multiplied where negative; once per id
  2. logit_bias           added; -inf forbids an id
  3. temperature          logits are divided by it; 0 takes the arg-max here (lowest id of equals) and ends
  4. top_k                ids below the k-th largest logit go; equals of the k-th stay, so ties may keep more than k
  5. top_p                the smallest set whose probability reaches p stays, the id that crosses p included;
                          of equal ids the lower go in first
  6. min_p                ids less than min_p times as likely as the likeliest go; equals of that bound stay
  7. draw                 from the softmax of what is left

Steps 1 and 3 to 6 equal the logits processors of Hugging Face, in its order; step 5 sees the renormalized result of
step 4. At least one id always stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gemma.errors import SamplingError, ShapeError

_MAX_STOPS, _MAX_STOP_LENGTH = 64, 1024  # bounds the work per token of StopChecker
_MASK64 = 2**64 - 1


class LogitBias(Mapping[int, float]):
    """An immutable, hashable `{id: bias}`, so that SamplingParams can be a dictionary key or a static jit argument."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[int, float] | Sequence[tuple[int, float]] = ()):
        self._items = tuple(sorted(dict(items).items()))

    def __getitem__(self, token: int) -> float:
        return dict(self._items)[token]

    def __iter__(self) -> Iterator[int]:
        return (token for token, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))

    def __reduce__(self):
        return type(self), (self._items,)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of a sampler. Out-of-range values raise SamplingError; the module docstring has the order.

    Attributes:
      temperature: 0 is greedy, else 0.0001..10000.
      top_k: at least 1; None is off.
      top_p: 0..1; None and 1 are off, 0 keeps the likeliest id only.
      min_p: 0..1; None and 0 are off.
      repetition_penalty: 0.01..100; 1 is off. It looks at the prompt and at what was generated.
      logit_bias: id to a number added to its logit; -inf forbids the id.
      stop: strings that end the text; the text ends before them (`StopChecker`).
      seed: 0..2**64-1; the same seed gives the same tokens, whatever the sequence is batched with. None: unpredictable.
      max_new_tokens: at least 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = LogitBias()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    max_new_tokens: int = 128

    def __post_init__(self):
        if self.temperature != 0:
            _check_number("temperature", self.temperature, 1e-4, 1e4, "0 (greedy) or a number in 0.0001..10000")
        _check_int("top_k", self.top_k, 1, 2**31, optional=True)
        _check_number("top_p", self.top_p, 0.0, 1.0, "a number in 0..1", optional=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, "a number in 0..1", optional=True)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number in 0.01..100")
        _check_int("seed", self.seed, 0, _MASK64, optional=True)
        _check_int("max_new_tokens", self.max_new_tokens, 1, 2**31)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stops(self.stop))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def process_logits(logits: np.ndarray, params: SamplingParams, history: Sequence[int] = ()) -> np.ndarray:
    """Steps 1 to 6 of the module docstring; a forbidden id comes back as -inf.

    With temperature 0 only steps 1 and 2 are done: the others cannot change the arg-max.

    Args:
      logits: float32 [V], of one sequence; not changed.
      params: what was asked for.
      history: ids of the prompt and of what was generated, for the repetition penalty.

    Returns:
      float32 [V]; its softmax is the distribution that `sample` draws from.

    Raises:
      ShapeError: not [V]. SamplingError: NaN or +inf logits, nothing left to pick, or an id past V.
    """
    scores = _checked_logits(logits)
    if params.repetition_penalty != 1.0 and len(history):
        seen = _ids(np.unique(np.asarray(history, np.int64)), scores.size, "history")
        picked = scores[seen]
        penalty = np.float32(params.repetition_penalty)
        scores[seen] = np.where(picked < 0, picked * penalty, picked / penalty)
    if params.logit_bias:
        ids = _ids(np.fromiter(params.logit_bias, np.int64), scores.size, "logit_bias")
        scores[ids] += np.fromiter(params.logit_bias.values(), np.float32)
    if not np.isfinite(scores.max()):
        raise SamplingError("logits: expected at least one finite logit to pick from, got -inf for every token")
    if params.greedy:
        return scores
    scores /= np.float32(params.temperature)
    if params.top_k is not None and params.top_k < scores.size:
        scores[scores < np.partition(scores, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p is not None and params.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")  # stable: of equals the lower id first
        before = np.cumsum(_softmax(scores)[order])
        before = np.concatenate([[0.0], before[:-1]])  # probability of everything likelier
        scores[order[1:][before[1:] >= params.top_p]] = -np.inf
    if params.min_p:
        probabilities = _softmax(scores)
        scores[probabilities < params.min_p * probabilities.max()] = -np.inf
    return scores


def sample(
    logits: np.ndarray, params: SamplingParams, history: Sequence[int] = (), rng: np.random.Generator | int = 0
) -> int:
    """Picks the next id: the arg-max when greedy, else a draw by inverse distribution function.

    One uniform number u in [0, 1) is used: the result is the first id, in id order, at which the probabilities summed
    in float64 exceed u. A backend that does the same with the same u picks the same id.

    Args:
      logits: float32 [V].
      params: what was asked for; its seed is not read here, `step_seed` turns it into `rng`.
      history: as in `process_logits`.
      rng: a numpy generator, or a 64-bit state as in `serving.runner.StepIn.rng`.
    """
    scores = process_logits(logits, params, history)
    if params.greedy:
        return int(scores.argmax())
    cumulative = np.cumsum(_softmax(scores))
    u = uniform(rng) if isinstance(rng, int) else rng.random()
    token = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # Rounding may leave u * total equal to the total: then the last possible id is meant, not one past the end.
    return min(token, int(np.flatnonzero(np.isfinite(scores))[-1]))


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities of raw logits: float32 [V] to float32 [V], summed in float64; -inf stays -inf."""
    scores = _checked_logits(logits).astype(np.float64)
    if not np.isfinite(scores.max()):
        raise SamplingError("logits: expected at least one finite logit, got -inf for every token")
    scores -= scores.max()
    return (scores - np.log(np.exp(scores).sum())).astype(np.float32)


def top_logprobs(logits: np.ndarray, n: int) -> tuple[tuple[int, float], ...]:
    """The `n` likeliest (id, log-probability) pairs, likeliest first, of equals the lower id first."""
    values = logprobs(logits)
    order = np.argsort(-values, kind="stable")[:n]
    return tuple((int(i), float(values[i])) for i in order)


def step_seed(seed: int, index: int) -> int:
    """The 64-bit random state of a sequence's `index`-th generated token (0-based): `StepIn.rng`.

    It depends on the sequence's seed and the token's index alone, hence neither on the batch nor on the backend.
    """
    return _mix64(_mix64(seed & _MASK64) + index)


def uniform(state: int) -> float:
    """The number in [0, 1) that a 64-bit state stands for: 53 bits of its SplitMix64 output."""
    return (_mix64(state) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """An unpredictable seed, for `seed=None`; report it, and the run can be repeated."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) >> 32  # 32 bits: short enough to type


class StopChecker:
    """Ends streamed text before a stop string, however the text is cut into pieces.

    Text that could still become a stop string is held back; everything else is passed on at once. The stop string that
    is complete first wins; of several complete at the same character, the longest.

      checker = StopChecker(["\\n\\n"])
      checker.push("one\\n")   # "one", holds "\\n"
      checker.push("two")      # "\\ntwo"
      checker.push("\\n\\nx")  # "", checker.stopped == "\\n\\n"
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._stops = _checked_stops(stop)
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """Takes the next piece of text; returns what may be shown now. After a stop: always ""."""
        if self.stopped is not None or not text:
            return ""
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.stopped = min(hits)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, once no more can come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _softmax(scores: np.ndarray) -> np.ndarray:
    values = np.exp(scores.astype(np.float64) - scores.max())
    return values / values.sum()


def _mix64(value: int) -> int:
    """One SplitMix64 step (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _checked_logits(logits: np.ndarray) -> np.ndarray:
    scores = np.array(logits, dtype=np.float32)  # a copy: callers keep theirs
    if scores.ndim != 1 or not scores.size:
        raise ShapeError(f"logits: expected the axes [V] of one sequence, got the shape {scores.shape}")
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any():
        raise SamplingError(
            f"logits: expected finite numbers or -inf, got {scores[bad][0]} at id {int(bad.argmax())} ({bad.sum()} in "
            f"all): the weights are damaged, or the dtype is too small for this model; try float32"
        )
    return scores


def _ids(ids: np.ndarray, vocab_size: int, field: str) -> np.ndarray:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise SamplingError(f"{field}: expected token ids in 0..{vocab_size - 1}, got {int(outside[0])}")
    return ids


def _check_number(field: str, value, low: float, high: float, expected: str, optional: bool = False) -> None:
    if value is None and optional:
        return
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN fails the comparison too
        raise SamplingError(f"{field}: expected {expected}{' or None' if optional else ''}, got {value!r}")


def _check_int(field: str, value, low: int, high: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        bound = f"{low}..{high}" if high < 2**31 or low == 0 else f"{low} or more"
        raise SamplingError(
            f"{field}: expected a whole number, {bound}{', or None' if optional else ''}, got {value!r}"
        )


def _checked_bias(bias: Mapping[int, float]) -> LogitBias:
    if not isinstance(bias, Mapping):
        raise SamplingError(f"logit_bias: expected a mapping of token ids to numbers, got {type(bias).__name__}")
    for token, value in bias.items():
        _check_int("logit_bias", token, 0, 2**31 - 1)
        number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
        if not number or math.isnan(value) or value == math.inf or (abs(value) > 1e9 and value != -math.inf):
            raise SamplingError(f"logit_bias[{token}]: expected a number up to 1e9 in size or -inf, got {value!r}")
    return bias if isinstance(bias, LogitBias) else LogitBias({int(k): float(v) for k, v in bias.items()})


def _checked_stops(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise SamplingError(f"stop: expected a list of strings, got {stop!r}")
    if len(stop) > _MAX_STOPS:
        raise SamplingError(f"stop: expected at most {_MAX_STOPS} strings, got {len(stop)}")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_STOP_LENGTH:
            shown = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise SamplingError(f"stop: expected strings of 1..{_MAX_STOP_LENGTH} characters, got {shown}")
    return tuple(dict.fromkeys(stop))
