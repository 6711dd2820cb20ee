# SPDX-License-Identifier: Apache-2.0
"""How two checkpoints differ, whatever their formats: configuration, tensors that only one has, values of the others.

Tensors are compared under their canonical names and axes, in runs of rows, so a table of any size needs a few dozen
megabytes. Writing checkpoints is `saving.py`; what a difference means for the model's answers is not asked here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma.checkpoint import Checkpoint, TensorReader, load_tensors
from gemma.weights import Tensor

# Fields that say how a file is laid out or which tokens it names, not what the network computes.
_PER_LAYER = ("layer_pattern", "sliding_window", "query_pre_attn_scalar", "rope_local_base_freq", "rope_theta")
_BOOKKEEPING = ("flax_vocab_rows", "transpose_gating_einsum", "model_type")


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """One tensor in both checkpoints.

    Attributes:
      name: canonical.
      shape: canonical.
      dtypes: how each file stores it.
      max_abs: the largest |a - b|; inf where one is not a number and the other is.
      rmse: root of the mean of (a - b)^2.
      scale: root of the mean of a^2, to read the others against; 0 where both files hold the same bytes.
      unexpected: how many values of b are not what `expected` makes of those of a; None where nothing was expected.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    max_abs: float
    rmse: float
    scale: float
    unexpected: int | None = None

    @property
    def equal(self) -> bool:
        """Whether every value is the same number."""
        return self.max_abs == 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; `config` holds lines "field: a, b"."""

    config: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def same_values(self) -> bool:
        """Whether both hold the same tensors with the same numbers."""
        return not (self.only_a or self.only_b or self.shapes) and all(t.equal for t in self.tensors)

    @property
    def same_model(self) -> bool:
        """Whether the networks are the same as well; which ids are special is not asked."""
        return self.same_values and not network_changes(self.config)


def compare(
    a: Checkpoint | Sequence[tuple[Tensor, Any]],
    b: Checkpoint,
    *,
    config: Any = None,
    config_b: Any = None,
    expected: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    text_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares two open checkpoints.

    Args:
      a: the one to measure against; or (tensor, reader) pairs as `gemma.saving.save` takes them, with `config`.
      b: the other.
      config: of both, where a file does not carry its own.
      config_b: of `b`, where it is not `config`: a table with fewer rows is compared as far as it goes.
      expected: for some tensors, what float32 values of `a` should have become in `b`, bit for bit.
      text_only: leave vision towers out.
      progress: called with (values done, values in all).

    Raises:
      GemmaError: a checkpoint that does not fit its own configuration.
    """
    first = _readers(a, config, text_only)
    second = _readers(b, config if config_b is None else config_b, text_only)
    common = [name for name in first if name in second]
    shapes, tensors = [], []
    total, done = sum(math.prod(first[name][0].shape) for name in common), 0
    for name in common:
        (tensor, left), (other, right) = first[name], second[name]
        if tensor.shape != other.shape and not (tensor.axes[0] == "V" and tensor.shape[1:] == other.shape[1:]):
            shapes.append(f"{name}: {tensor.shape}, {other.shape}")
        else:
            tensors.append(_difference(tensor, left, right, (expected or {}).get(name)))
        done += math.prod(tensor.shape)
        if progress is not None:
            progress(done, total)
    only_a = tuple(name for name in first if name not in second)
    only_b = tuple(name for name in second if name not in first)
    changes = () if config is not None else config_changes(a.config(), b.config())
    return Comparison(changes, only_a, only_b, tuple(shapes), tuple(tensors))


def _readers(checkpoint: Any, config: Any, text_only: bool) -> dict[str, tuple[Tensor, Any]]:
    if not isinstance(checkpoint, Checkpoint):
        return {tensor.name: (tensor, reader) for tensor, reader in checkpoint}
    return {tensor.name: (tensor, reader) for tensor, reader in load_tensors(checkpoint, config, text_only=text_only)}


def _difference(
    tensor: Tensor, left: Any, right: TensorReader, expected: Callable[[np.ndarray], np.ndarray] | None
) -> TensorDifference:
    dtypes = (left.dtype, right.dtype)
    if isinstance(left, TensorReader) and left.same_bytes(right):
        return TensorDifference(tensor.name, tensor.shape, dtypes, 0.0, 0.0, 0.0, None if expected is None else 0)
    largest, squares, energy, count, unexpected = 0.0, 0.0, 0.0, 0, 0
    for one, two in _pairs(left, right):
        with np.errstate(invalid="ignore"):
            delta = np.abs(one.astype(np.float64) - two)
        delta[_same(one, two)] = 0.0
        largest = max(largest, math.inf if np.isnan(delta).any() else float(delta.max(initial=0.0)))
        squares += float(np.square(delta).sum())
        energy += float(np.square(one, dtype=np.float64).sum())
        count += one.size
        if expected is not None:
            unexpected += int(np.count_nonzero(~_same(expected(one), two)))
    n = max(1, count)
    odd = None if expected is None else unexpected
    rmse, scale = math.sqrt(squares / n), math.sqrt(energy / n)
    return TensorDifference(tensor.name, tensor.shape, dtypes, largest, rmse, scale, odd)


def _same(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Where both hold the same number: the same infinity and any two NaN are the same."""
    return (one == two) | (np.isnan(one) & np.isnan(two))


def _pairs(left: Any, right: TensorReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs of the same rows of both, float32; a table may have more padding rows in one of them."""
    ones, twos = _Rows(left), _Rows(right)
    while ones.more and twos.more:
        n = min(len(ones.part), len(twos.part))
        yield ones.take(n), twos.take(n)


class _Rows:
    """The rows of a tensor, to be taken in any number."""

    def __init__(self, reader: Any):
        parts = getattr(reader, "parts", None)
        self._parts = iter([(0, reader(np.float32))]) if parts is None else parts(np.float32)
        self.part = np.empty(0)
        self.more = self._fill()

    def _fill(self) -> bool:
        found = next(self._parts, None)
        if found is None:
            return False
        self.part = found[1]
        return len(self.part) > 0

    def take(self, n: int) -> np.ndarray:
        rows, self.part = self.part[:n], self.part[n:]
        if not len(self.part):
            self.more = self._fill()
        return rows


def _has_tower(*configs: Any) -> bool:
    return any(getattr(config, "vision", None) is not None for config in configs)


def network_changes(lines: Iterable[str]) -> list[str]:
    """Those lines of `config_changes` that are about what the network computes, not about special ids."""
    return [line for line in lines if not line.split(":")[0].endswith(("_token_id", "_index"))]


def config_changes(a: Any, b: Any) -> tuple[str, ...]:
    """Lines "field: a, b" for what two configurations say differently about the network."""
    if type(a) is not type(b):
        return (f"kind: {type(a).__name__}, {type(b).__name__}",)
    lines: list[str] = []
    for field in dataclasses.fields(a):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if one == two or field.name in _BOOKKEEPING or (field.name.startswith("mm_") and not _has_tower(a, b)):
            continue
        if dataclasses.is_dataclass(one) and type(one) is type(two):
            lines += [f"{field.name}.{line}" for line in config_changes(one, two)]
        elif field.name in _PER_LAYER and a.layers == b.layers:
            continue  # two spellings of the same layers
        else:
            lines.append(f"{field.name}: {one}, {two}")
    return tuple(lines)
