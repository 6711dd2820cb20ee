# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a JAX tree are matrices that quantize, and which of their axes a product sums over.

A packed weight has outputs as rows and what is summed over as columns. Both follow from the table: the last axis of a
tensor's canonical form is what Hugging Face's and GGUF's matrices sum over. Types are chosen in `_quants_mixes.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from gemma import config as configs
from gemma.errors import ConfigError
from gemma.weights._axes import parse
from gemma.weights._table import AnyConfig, Tensor, tensors

_PARTS = ("embed", "text", "head")  # images keep their floats: published quantized models do the same


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One leaf of the JAX tree that can be packed.

    Attributes:
      name: of the leaf, with slashes.
      shape: of the leaf.
      summed: (first, count) of the axes that are summed over; the others, in their order, are the rows.
      tensors: the canonical tensors in it, in the order of its rows.
    """

    name: str
    shape: tuple[int, ...]
    summed: tuple[int, int]
    tensors: tuple[Tensor, ...]

    @property
    def columns(self) -> int:
        """Values that are summed over."""
        return math.prod(self.shape[self.summed[0] :][: self.summed[1]])

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of the leaf, those that are summed over last."""
        first, count = self.summed
        axes = tuple(range(len(self.shape)))
        return axes[:first] + axes[first + count :] + axes[first : first + count]

    def rows_of(self, leaf: Any) -> Any:
        """The leaf, of numpy or JAX, as [rows, columns]: a view where numpy can make one."""
        return leaf.transpose(self._order).reshape(-1, self.columns)

    def leaf_of(self, rows: Any) -> Any:
        """The inverse of `rows_of`."""
        order = self._order
        loose = rows.reshape([self.shape[axis] for axis in order])
        return loose.transpose([order.index(axis) for axis in range(len(order))])

    def canonical(self, rows: Any) -> list[tuple[Tensor, Any]]:
        """Each tensor with its share of [rows, columns]: (out, in), but a padded table keeps all of its rows."""
        if len(self.tensors) == 1:
            return [(self.tensors[0], rows)]
        found, start = [], 0
        for tensor in self.tensors:
            found.append((tensor, rows[start : start + tensor.shape[0]]))
            start += tensor.shape[0]
        return found


def summed_of(tensor: Tensor) -> tuple[int, int]:
    """(first, count) of the axes of its leaf that a matrix sums over."""
    slot = tensor.slots["flax"]
    letters = parse(tensor.axes)[-1]
    places = [i for i, group in enumerate(parse(slot.axes)) if group and group[0] in letters]
    first = places[0]
    order = [parse(slot.axes)[i] for i in places]
    # The rows of a leaf must be those of its tensors, one after the other.
    assert order == [(letter,) for letter in letters] and places == list(range(first, first + len(places))), tensor.name
    return len(slot.index) + first, len(places)


def is_matrix(tensor: Tensor) -> bool:
    """Whether it is a weight of the decoder that quantizes: two canonical axes, not of the images."""
    return tensor.part in _PARTS and len(tensor.shape) == 2


@functools.lru_cache(maxsize=64)
def matrices(config: AnyConfig) -> Mapping[str, Matrix]:
    """Leaf name to `Matrix`, for every leaf of the JAX tree of a model that can be packed."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors(config):
        if is_matrix(tensor) and "flax" in tensor.slots:
            groups.setdefault(tensor.slots["flax"].name, []).append(tensor)
    found = {}
    for name, members in groups.items():
        members.sort(key=lambda tensor: tensor.slots["flax"].index)
        found[name] = Matrix(name, members[0].slots["flax"].shape, summed_of(members[0]), tuple(members))
    return found


# Members that between them have every layout that a leaf can have in a JAX tree.
_LAYOUTS = ("gemma_2b", "gemma_7b", "gemma2_2b", "gemma3_4b", "t5gemma_s_s")


@functools.lru_cache(maxsize=1)
def _known() -> dict[str, set[tuple[str, tuple[int, int]]]]:
    """End of a leaf's name to the layouts (axes of the leaf, summed) that members have for it."""
    known: dict[str, set[tuple[str, tuple[int, int]]]] = {}
    for preset in _LAYOUTS:
        for tensor in tensors(configs.PRESETS[preset]):
            slot = tensor.slots.get("flax")
            if slot is not None and len(tensor.shape) == 2 and tensor.part in (*_PARTS, "mm"):
                axes = " ".join([*("C" * len(slot.index)), slot.axes])
                summed = summed_of(tensor) if tensor.part != "mm" else (0, 1)
                known.setdefault(re.sub(r".*layer_\d+/", "", slot.name), set()).add((axes, summed))
    return known


def summed_axes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """(first, count) of the summed axes of every weight in a JAX tree whose configuration is not known.

    Args:
      shapes: leaf name, with slashes, to shape.

    Raises:
      ConfigError: a weight could be of two layouts (the MLP is as wide as the model).
    """
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("input_embedding")), None)
    found = {}
    for name, shape in shapes.items():
        ends = [end for end in _known() if name == end or name.endswith("/" + end)]
        layouts = {layout for end in ends for layout in _known()[end] if len(layout[0].split()) == len(shape)}
        if len(layouts) > 1 and width is not None:  # the width of the model is the axis D
            layouts = {layout for layout in layouts if shape[layout[0].split().index("D")] == width}
        if len({summed for _, summed in layouts}) > 1:
            raise ConfigError(f"{name} {shape}: its axes cannot be told apart; pass the model's configuration")
        if layouts:
            found[name] = layouts.pop()[1]
    return found


__all__ = ["Matrix", "is_matrix", "matrices", "summed_axes", "summed_of"]
