# SPDX-License-Identifier: Apache-2.0
"""Einsum strings of low-rank products: how the axes of a weight are shared out to the two factors `a` and `b`.

`a` takes the axes that are summed over, in the order of the weight, and the rank; `b` the rank and the axes that the
result has. The modules that hold the factors are `_lora.py`.

    BTD,NDH->BTNH        a [D, r]      b [r, N, H]      BTD,Dr,rNH->BTNH
    BTNH,NHD->BTD        a [N, H, r]   b [r, D]         BTNH,NHr,rD->BTD
"""

from __future__ import annotations

import functools
import string
from typing import NamedTuple

from gemma.errors import ConfigError


class Equation(NamedTuple):
    """An einsum of activations with a weight, with the letters of each operand.

    Attributes:
      x: of the activations, perhaps with an ellipsis.
      w: of the weight.
      out: of the result.
      a: of the first factor, the rank last.
      b: of the second factor, the rank first.
      rank: the letter of the rank.
    """

    x: str
    w: str
    out: str
    a: str
    b: str
    rank: str

    @property
    def down(self) -> str:
        """The equation of activations with `a`."""
        summed = self.summed
        mid = "".join(axis for axis in self.x if axis not in summed) + self.rank
        return f"{self.x},{self.a}->{mid}"

    @property
    def up(self) -> str:
        """The equation of that result with `b`."""
        return f"{self.down.partition('->')[2]},{self.b}->{self.out}"

    @property
    def whole(self) -> str:
        """The equation of all three operands."""
        return f"{self.x},{self.a},{self.b}->{self.out}"

    @property
    def delta(self) -> str:
        """The equation of the two factors that gives an array in the layout of the weight."""
        return f"{self.a},{self.b}->{self.w}"

    @property
    def summed(self) -> str:
        """The axes of the weight that are summed over."""
        return "".join(axis for axis in self.w if axis not in self.out)

    @property
    def kept(self) -> str:
        """The axes of the weight that the result has."""
        return "".join(axis for axis in self.w if axis in self.out)


@functools.lru_cache(maxsize=256)
def parse(einsum_str: str) -> Equation:
    """Reads `"BTD,NDH->BTNH"`.

    Raises:
      ConfigError: (a ValueError) not two operands and a result, an ellipsis in the weight, or nothing to sum over.
    """
    left, arrow, out = einsum_str.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2 or not all(operands):
        raise ConfigError(f"`einsum_str` should be of two operands, such as 'BTD,NDH->BTNH', got {einsum_str!r}")
    x, w = operands
    if "." in w:
        raise ConfigError(f"einsum_str {einsum_str!r}: the weight (second operand) should not contain ellipsis")
    taken = {axis for axis in einsum_str if axis.isalpha()}
    rank = next(letter for letter in "r" + string.ascii_uppercase + string.ascii_lowercase if letter not in taken)
    summed = [axis for axis in w if axis not in out]
    if not summed or any(axis not in x for axis in summed):
        raise ConfigError(f"einsum_str {einsum_str!r}: expected an axis of the weight that is summed with one of x")
    first = [axis for axis in w if axis in summed or axis in x]  # an axis that all operands have stays with `a`
    second = [axis for axis in w if axis not in first]
    return Equation(x, w, out, "".join(first) + rank, rank + "".join(second), rank)


def get_lora_einsum_str_and_shapes(
    *, einsum_str: str, weights_shape: tuple[int, ...], rank: int
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The einsum of three operands, and the shapes of `a` and `b`.

    Args:
      einsum_str: of activations and weight: "BTD,NDH->BTNH".
      weights_shape: of the weight.
      rank: of the factors.

    Returns:
      ("BTD,Dr,rNH->BTNH", (D, rank), (rank, N, H)). The letter of the rank is r, or the first free one.

    Raises:
      ConfigError: (a ValueError) see `parse`; or a shape with another number of axes than the string.
    """
    eqn = parse(einsum_str)
    if len(eqn.w) != len(weights_shape):
        raise ConfigError(
            f"einsum_str {einsum_str!r}: the weight has {len(eqn.w)} axes there, but shape {weights_shape}"
        )
    sizes = dict(zip(eqn.w, weights_shape)) | {eqn.rank: rank}
    return eqn.whole, tuple(sizes[axis] for axis in eqn.a), tuple(sizes[axis] for axis in eqn.b)
