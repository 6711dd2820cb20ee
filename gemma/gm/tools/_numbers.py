# SPDX-License-Identifier: Apache-2.0
"""The algebra of numbers: exact integers and fractions as long as possible, floats where there is no other way.

Every operation is bounded before it is carried out: nothing has more than MAX_BITS bits, so no expression that the
reader lets through takes long. `0.1 + 0.2` is 0.3. Formulas with unknowns are `_symbolic.py`.
"""

from __future__ import annotations

import decimal
import math
import statistics
from collections.abc import Callable
from fractions import Fraction

from gemma.errors import ToolError

MAX_BITS = 13_000  # about 3900 decimal digits, below Python's own limit for printing

Number = int | Fraction | float
CONSTANTS: dict[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}


def too_large() -> ToolError:
    return ToolError("a number on the way has more than 3900 digits, which is too large")


def check_power(base: Number, exponent: int) -> None:
    """Refuses an exact power that would be too large, without computing it."""
    size = max(Fraction(base).numerator.bit_length(), Fraction(base).denominator.bit_length())
    if size > 1 and size * abs(exponent) > 2 * MAX_BITS:
        raise too_large()


def check_factorial(n: int) -> None:
    if n < 0:
        raise ToolError("factorial: expected 0 or more")
    if n > MAX_BITS or math.lgamma(n + 1) > MAX_BITS * math.log(2):
        raise too_large()


def exact(text: str) -> int | Fraction:
    """A decimal literal as the number that it says."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_BITS // 4 or (exponent and (len(exponent) > 6 or abs(int(exponent)) > MAX_BITS // 4)):
        raise too_large()
    return tidy(Fraction(text))


def tidy(value: Number) -> Number:
    """The value, whole fractions as int, after checking that it is finite and not too large."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ToolError("the result is infinite or no number")
        return value
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise too_large()
    return int(value) if value.denominator == 1 else value


class Numbers:
    """See `_expression.Algebra`."""

    def number(self, text: str) -> Number:
        return exact(text)

    def name(self, name: str) -> Number:
        if name.lower() not in CONSTANTS:
            raise ToolError(f"unknown name {name[:40]!r}")
        return CONSTANTS[name.lower()]

    def negative(self, value: Number) -> Number:
        return -value

    def call(self, name: str, arguments: list[Number]) -> Number:
        if name not in FUNCTIONS:
            raise ToolError(f"unknown function {name[:40]!r}; the functions are: {', '.join(sorted(FUNCTIONS))}")
        return self._guarded(name, lambda: FUNCTIONS[name](*arguments))

    def binary(self, operator: str, left: Number, right: Number) -> Number:
        if operator == "=":
            raise ToolError("an equation needs an unknown, as in 2*x = 10")
        return self._guarded(operator, lambda: _OPERATORS[operator](left, right))

    def _guarded(self, what: str, work: Callable[[], Number]) -> Number:
        try:
            return tidy(work())
        except ZeroDivisionError as error:
            raise ToolError("division by zero") from error
        except OverflowError as error:
            raise too_large() from error
        except ToolError:
            raise
        except (ValueError, TypeError) as error:
            raise ToolError(f"{what}: {error}") from error


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, int) and not isinstance(base, float):
        check_power(base, exponent)
        return Fraction(base) ** exponent
    if base < 0 and not float(exponent).is_integer():
        raise ToolError("a negative number has no real power of that exponent")
    return float(base) ** float(exponent)


def _root(value: Number) -> Number:
    if value < 0:
        raise ToolError("sqrt: a negative number has no real root")
    if isinstance(value, float):
        return math.sqrt(value)
    up, down = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if up * up == value.numerator and down * down == value.denominator:
        return Fraction(up, down)
    return math.sqrt(value)


def _cube_root(value: Number) -> float:
    root = math.copysign(abs(float(value)) ** (1 / 3), value)
    return float(round(root)) if round(root) ** 3 == value else root


def _whole(what: str, *values: Number) -> list[int]:
    if not all(isinstance(v, int) or float(v).is_integer() for v in values):
        raise ToolError(f"{what}: expected whole numbers")
    return [int(v) for v in values]


def _factorial(n: Number) -> int:
    (n,) = _whole("factorial", n)
    check_factorial(n)
    return math.factorial(n)


def _choose(exact_count: Callable[[int, int], int], divided: bool) -> Callable[[Number, Number], int]:
    def count(n: Number, k: Number) -> int:
        n, k = _whole("combinations", n, k)
        if 0 <= k <= n:
            few = min(k, n - k) if divided else k
            if few * n.bit_length() > 2 * MAX_BITS:  # a product of `few` factors of at most n
                raise too_large()
        return exact_count(n, k)

    return count


def _round(value: Number, digits: Number = 0) -> Number:
    (digits,) = _whole("round", digits)
    if abs(digits) > 100:
        raise ToolError("round: at most 100 digits")
    return round(Fraction(value), digits)


def _log(value: Number, base: Number | None = None) -> float:
    return math.log(value) if base is None else math.log(value) / math.log(base)


def _mean(*values: Number) -> Number:
    return statistics.mean([Fraction(v) for v in values])


_OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if isinstance(a, float) or isinstance(b, float) else Fraction(a) / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": _power,
}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": _root,
    "cbrt": _cube_root,
    "pow": _power,
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "sum": lambda *values: sum(values),
    "mean": _mean,
    "mod": lambda a, b: a % b,
    "gcd": lambda *values: math.gcd(*_whole("gcd", *values)),
    "lcm": lambda *values: math.lcm(*_whole("lcm", *values[:100])),
    "factorial": _factorial,
    "comb": _choose(math.comb, divided=True),
    "perm": _choose(math.perm, divided=False),
    "exp": math.exp,
    "log": _log,
    "ln": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "hypot": math.hypot,
    "degrees": math.degrees,
    "radians": math.radians,
    **{
        name: getattr(math, name)
        for name in ["sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"]
    },
}


def show(value: Number) -> str:
    """A number as people write it: `3`, `0.25`, `1.41421356237`, `1.5e+500`."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if value.denominator == 1:
        return str(value)
    try:
        near = float(value)
    except OverflowError:
        near = 0.0
    if near:
        return repr(near)
    with decimal.localcontext(prec=17):
        return str(decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator))
