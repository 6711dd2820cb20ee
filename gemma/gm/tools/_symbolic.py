# SPDX-License-Identifier: Apache-2.0
"""The algebra of formulas, and the small program that computes with it: one JSON line in, one JSON line out.

`_calculator.py` runs this file as a process of its own, because an integral or a factorization may take for ever and
only a process can be stopped. Text is read by `_expression.py`; sympy only ever sees objects, never text.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import sympy

from gemma.errors import ToolError
from gemma.gm.tools import _expression, _numbers

_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "E": sympy.E, "I": sympy.I, "tau": 2 * sympy.pi}
_CONSTANTS |= {"oo": sympy.oo, "inf": sympy.oo, "infinity": sympy.oo}
_PLAIN = {
    "sqrt": sympy.sqrt,
    "cbrt": sympy.cbrt,
    "exp": sympy.exp,
    "ln": sympy.log,
    "abs": sympy.Abs,
    "log2": lambda x: sympy.log(x, 2),
    "log10": lambda x: sympy.log(x, 10),
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "min": sympy.Min,
    "max": sympy.Max,
    **{
        name: getattr(sympy, name)
        for name in ["log", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "gamma"]
    },
    **{name: getattr(sympy, name) for name in ["simplify", "expand", "factor"]},
}
_FORMS = ("expand", "factor", "series", "N")  # asked for, so the result stays in that form
_MAX_ORDER = 20  # of derivatives and series
_MAX_RESULT = 4000  # characters


class Formulas:
    """See `_expression.Algebra`."""

    def number(self, text: str) -> sympy.Expr:
        value = _numbers.exact(text)
        return sympy.Rational(value.numerator, value.denominator)

    def name(self, name: str) -> sympy.Expr:
        if name.lower() == "nan":
            raise ToolError("nan is not a number, and no name either")
        return _CONSTANTS[name] if name in _CONSTANTS else sympy.Symbol(name)

    def negative(self, value: Any) -> sympy.Expr:
        return -_term(value)

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        left, right = _term(left), _term(right)
        if operator == "=":
            return sympy.Eq(left, right, evaluate=False)
        if operator == "**":
            if left.is_Rational and right.is_Integer:
                _numbers.check_power(_fraction(left), int(right))
            return _checked(left**right)
        if operator in ("/", "//", "%") and right.is_zero:
            raise ToolError("division by zero")
        if operator == "%":
            return sympy.Mod(left, right)
        work = {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right}
        work |= {"/": lambda: left / right, "//": lambda: sympy.floor(left / right)}
        return _checked(work[operator]())

    def call(self, name: str, arguments: list[Any]) -> Any:
        try:
            if name == "solve":
                return _solve(arguments)
            arguments = [_term(a) for a in arguments]
            if name in _PLAIN:
                return _PLAIN[name](*arguments)
            if name in _WORK:
                return _WORK[name](*arguments)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from error
        raise ToolError(f"unknown function {name[:40]!r}; the functions are: {', '.join(sorted({*_PLAIN, *_WORK}))}")


def _fraction(value: sympy.Rational):
    return _numbers.Fraction(int(value.p), int(value.q))


def _term(value: Any) -> sympy.Expr:
    if not isinstance(value, sympy.Expr):
        raise ToolError("an equation or a list of solutions cannot be calculated with")
    return value


def _checked(value: sympy.Expr) -> sympy.Expr:
    if value.is_Rational:
        _numbers.tidy(_fraction(value))
    return value


def _variable(value: sympy.Expr, what: str) -> sympy.Symbol:
    if not isinstance(value, sympy.Symbol):
        raise ToolError(f"{what}: expected a variable such as x, got {str(value)[:40]}")
    return value


def _order(value: sympy.Expr, what: str) -> int:
    if not value.is_Integer or not 1 <= value <= _MAX_ORDER:
        raise ToolError(f"{what}: expected an order in 1..{_MAX_ORDER}, got {str(value)[:40]}")
    return int(value)


def _derive(term, variable, order=sympy.Integer(1)):  # noqa: B008 - an immutable constant
    return sympy.diff(term, _variable(variable, "diff"), _order(order, "diff"))


def _integrate(term, variable, *limits):
    if len(limits) not in (0, 2):
        raise ToolError("integrate: expected (term, x) or (term, x, from, to)")
    variable = _variable(variable, "integrate")
    return sympy.integrate(term, (variable, *limits) if limits else variable)


def _sum(term, variable, low, high):
    return sympy.summation(term, (_variable(variable, "sum"), low, high))


def _series(term, variable, at=sympy.Integer(0), order=sympy.Integer(6)):  # noqa: B008 - immutable constants
    return sympy.series(term, _variable(variable, "series"), at, _order(order, "series"))


def _factorial(n):
    if n.is_Integer:
        _numbers.check_factorial(int(n))
    return sympy.factorial(n)


_WORK = {
    "diff": _derive,
    "derivative": _derive,
    "integrate": _integrate,
    "integral": _integrate,
    "limit": lambda term, variable, at: sympy.limit(term, _variable(variable, "limit"), at),
    "series": _series,
    "sum": _sum,
    "factorial": _factorial,
    "N": lambda term: sympy.N(term, 15),
}


def _solve(arguments: list[Any]) -> list[dict[sympy.Symbol, sympy.Expr]]:
    equations = [a for a in arguments if not isinstance(a, sympy.Symbol)]
    wanted = [a for a in arguments if isinstance(a, sympy.Symbol)]
    if not equations or not all(isinstance(a, (sympy.Eq, sympy.Expr)) for a in equations):
        raise ToolError("solve: expected an equation, as in solve(x^2 = 4, x)")
    wanted = wanted or sorted(set().union(*(a.free_symbols for a in equations)), key=str)
    if not wanted:
        raise ToolError("solve: there is no unknown in it")
    if all(isinstance(a, sympy.Eq) and sympy.simplify(a.lhs - a.rhs) == 0 for a in equations):
        raise ToolError("solve: it holds for every value")
    # A single one by itself: for systems sympy leaves out roots that have no formula.
    return sympy.solve(equations if len(equations) > 1 else equations[0], wanted, dict=True)


def compute(text: str) -> str:
    """The value of an expression with unknowns, as text; an equation is solved."""
    tokens = _expression.tokenize(text)
    value = _expression.evaluate(tokens, Formulas())
    if isinstance(value, sympy.Eq):
        value = _solve([value])
    if isinstance(value, list):
        return (
            _cut("; ".join(", ".join(f"{k} = {_show(v)}" for k, v in found.items()) for found in value))
            or "no solution"
        )
    if value.has(sympy.nan, sympy.zoo):
        raise ToolError("it has no value")
    if not any(name in _FORMS for _, name in tokens):
        value = sympy.simplify(value)
    return _cut(_show(value))


def _show(value: sympy.Expr) -> str:
    plain = not value.is_number or value.is_Integer or value.is_Float or value.is_infinite
    return str(value) if plain else f"{value} (about {sympy.N(value, 15)})"


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= _MAX_RESULT
        else f"{text[:_MAX_RESULT]} [... {len(text) - _MAX_RESULT} characters left out]"
    )


def main() -> None:
    job = json.load(sys.stdin)
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"] + 1, job["seconds"] + 1))
    try:
        answer = {"text": compute(job["expression"])}
    except (ToolError, ArithmeticError, ValueError, NotImplementedError) as error:
        answer = {"error": str(error) or type(error).__name__}
    except (MemoryError, RecursionError):
        answer = {"error": "the expression is too large"}
    except Exception as error:  # whatever sympy meets inside: the parent process needs a sentence, not a traceback
        answer = {"error": f"it cannot be computed ({type(error).__name__})"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
