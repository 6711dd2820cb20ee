# SPDX-License-Identifier: Apache-2.0
"""Two functions of numpy arrays: `pad` to one length, and `make_seq2seq_fields`, a prompt and its answer as next-token
training. The tasks that apply them to the elements of a data set are `_tasks.py` and `_transforms.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma.errors import DataError

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2SeqFields:
    """What a decoder reads and what it should say; a pytree of three arrays.

    Attributes:
      input: int32 [T], prompt and response without the last token.
      target: int32 [T], the same shifted by one: the next token at each place.
      target_mask: bool [T], True where the target is a token of the response.
    """

    input: np.ndarray
    target: np.ndarray
    target_mask: np.ndarray

    def __post_init__(self):
        _register_pytree()


def _register_pytree() -> None:
    """Makes JAX look into `Seq2SeqFields`, if a program uses JAX at all: nothing here imports it."""
    global _registered
    # A half-imported jax (another thread is at it) has no tree_util yet; the next instance will find it.
    util = getattr(sys.modules.get("jax"), "tree_util", None)
    if not _registered and hasattr(util, "register_dataclass"):
        util.register_dataclass(Seq2SeqFields, ["input", "target", "target_mask"], [])
        _registered = True


_registered = False


def make_seq2seq_fields(prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> Seq2SeqFields:
    """Next-token training on a response, given its prompt.

        prompt 10 11 12, response 20 1    input        10 11 12 20
                                          target       11 12 20  1
                                          target_mask   -  -  x  x

    Args:
      prompt: ids, [P]; normally with a bos in front, so that the first token of the response has something before it.
      response: ids, [R], normally with an end token last.

    Returns:
      Arrays of P + R - 1 places.

    Raises:
      DataError: (a ValueError) one of them is no flat sequence of whole numbers, or both are empty.
    """
    prompt, response = ids_of(prompt, "prompt"), ids_of(response, "response")
    ids = np.concatenate([prompt, response])
    if not ids.size:
        raise DataError("make_seq2seq_fields: the prompt and the response are both empty; expected at least one token")
    return Seq2SeqFields(ids[:-1], ids[1:], np.arange(1, ids.size) >= prompt.size)


def ids_of(values: Any, name: str) -> np.ndarray:
    """Token ids as int32 [n]; int64 where a number needs it."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"{name}: expected a flat sequence of token ids, got {_described(values)}")
    return _small(array) if array.size else np.zeros(0, np.int32)


def pad(element: Any, max_length: int, *, truncate: bool = False, fill_value: float = 0, axis: int = -1) -> Any:
    """Appends a value to every array of a tree until it has one length.

    Args:
      element: an array, a list of numbers, or dictionaries, tuples, lists and dataclasses of them.
      max_length: the length that every array has afterwards.
      truncate: cut what is longer, at its end. False: that is an error.
      fill_value: what is appended.
      axis: along which.

    Returns:
      The same tree; numpy arrays for lists and numpy arrays, JAX arrays for JAX arrays. Whole numbers in lists become
      int32.

    Raises:
      DataError: (a ValueError) an array is longer than `max_length`, or a leaf is no array of numbers; the message names
        its path.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < 0:
        raise DataError(f"pad: expected a whole number as max_length, 0 or more, got {max_length!r}")

    def padded(leaf: Any, path: str) -> Any:
        return _pad_leaf(leaf, path, int(max_length), truncate, fill_value, axis)

    return _map_tree(padded, element, "")


def _pad_leaf(leaf: Any, path: str, max_length: int, truncate: bool, fill_value: float, axis: int) -> Any:
    where = f" ({path})" if path else ""
    array = leaf if hasattr(leaf, "__array_namespace__") else np.asarray(leaf)
    if array.dtype.kind in "OSUMm":
        raise DataError(f"pad{where}: expected an array or a list of numbers, got {_described(leaf)}")
    if not -array.ndim <= axis < array.ndim:
        raise DataError(f"pad{where}: axis {axis} of an array of {array.ndim} dimensions; expected one that it has")
    if isinstance(leaf, list):
        array = np.zeros(0, np.int32) if not leaf else _small(array)
    axis %= array.ndim
    length = array.shape[axis]
    if length > max_length and not truncate:
        raise DataError(
            f"Cannot pad sequence of length {length} to max_length {max_length}{where}: raise max_length, or pass "
            f"truncate=True to cut it"
        )
    array = array[(slice(None),) * axis + (slice(max_length),)]
    widths = [(0, max(0, max_length - length) if i == axis else 0) for i in range(array.ndim)]
    xp = np if isinstance(array, np.ndarray) else array.__array_namespace__()
    return xp.pad(array, widths, constant_values=fill_value)


def _small(array: np.ndarray) -> np.ndarray:
    """Whole numbers as int32, if they are in its range."""
    if array.dtype.kind not in "iu" or not array.size or array.min() < _INT32.min or array.max() > _INT32.max:
        return array
    return array.astype(np.int32)


def _map_tree(function: Callable[[Any, str], Any], node: Any, path: str) -> Any:
    if node is None:
        return None
    if isinstance(node, Mapping):
        return {key: _map_tree(function, value, _below(path, key)) for key, value in node.items()}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        return dataclasses.replace(
            node, **{name: _map_tree(function, getattr(node, name), _below(path, name)) for name in names}
        )
    if isinstance(node, tuple) or (isinstance(node, list) and not _is_numbers(node)):
        done = [_map_tree(function, value, f"{path}[{i}]") for i, value in enumerate(node)]
        return done if isinstance(node, list) else type(node)(*done) if hasattr(node, "_fields") else tuple(done)
    return function(node, path)


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_numbers(node: list) -> bool:
    return all(isinstance(value, (bool, int, float, np.generic)) for value in node)


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"an array of {value.dtype} and shape {tuple(shape)}"
    return f"{type(value).__name__} {value!r:.60}"
