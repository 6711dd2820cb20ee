# SPDX-License-Identifier: Apache-2.0
"""Reads a mathematical expression and hands each operation to an algebra. Never `eval`, and no tree is built.

`_numbers.py` is the algebra of numbers, `_symbolic.py` that of formulas. Length and nesting are bounded; the reader is
linear in the length. `^` means power, as `**` does, and a number before a name or a bracket multiplies it.

    equation: sum ['=' sum]
    sum:      product (('+' | '-') product)*
    product:  signed (('*' | '/' | '//' | '%' | nothing) signed)*
    signed:   ('+' | '-') signed | factor [('^' | '**') signed]
    factor:   (number | name | name '(' equation (',' equation)* ')' | '(' equation ')') '!'*
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from gemma.errors import ToolError

MAX_LENGTH = 2000  # characters
MAX_NESTING = 60  # brackets, signs and powers inside each other

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?:math\.)?(?P<name>[A-Za-z][A-Za-z0-9_]*)|(?P<mark>\*\*|//|[-+*/%^!(),=]))"
)
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "π": " pi ", "∞": " oo "})

Token = tuple[str, str]  # (kind, text)


class Algebra(Protocol):
    """What the reader computes with."""

    def number(self, text: str) -> Any: ...
    def name(self, name: str) -> Any: ...
    def call(self, name: str, arguments: list[Any]) -> Any: ...
    def binary(self, operator: str, left: Any, right: Any) -> Any: ...  # + - * / // % ** =
    def negative(self, value: Any) -> Any: ...


def tokenize(text: str) -> list[Token]:
    """The tokens of an expression; raises ToolError with the place of what is none."""
    if not isinstance(text, str):
        raise ToolError(f"expression: expected a text such as '25 * 4 + 10', got {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ToolError(f"expression: at most {MAX_LENGTH} characters, got {len(text)}")
    text = text.translate(_SPELLINGS).strip()
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            rest = text[at:].lstrip()
            raise ToolError(
                f"expression: {rest[:20]!r} is no number, operator or name; it may hold numbers, + - * / // % ^ ! ( ) "
                f"and functions such as sqrt"
            )
        tokens.append((match.lastgroup, match.group(match.lastgroup)))
        at = match.end()
    if not tokens:
        raise ToolError("expression: it is empty; expected something like '25 * 4 + 10'")
    return tokens


def evaluate(tokens: list[Token], algebra: Algebra) -> Any:
    """The value of an expression in an algebra."""
    reader = _Reader(tokens, algebra)
    value = reader.equation(0)
    if reader.peek() != ("end", ""):
        raise ToolError(f"expression: {reader.peek()[1]!r} is not expected there" + reader.comma_hint())
    return value


class _Reader:
    def __init__(self, tokens: list[Token], algebra: Algebra):
        self._tokens, self._algebra, self._at = tokens, algebra, 0

    def peek(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def comma_hint(self) -> str:
        return "; write 1234 instead of 1,234" if self.peek() == ("mark", ",") else ""

    def _take(self, *marks: str) -> str | None:
        kind, text = self.peek()
        if kind != "mark" or text not in marks:
            return None
        self._at += 1
        return text

    def _expect(self, mark: str) -> None:
        if self._take(mark) is None:
            found = self.peek()[1] or "the end"
            raise ToolError(f"expression: expected {mark!r}, found {found!r}")

    def equation(self, depth: int):
        left = self._sum(depth)
        return self._algebra.binary("=", left, self._sum(depth)) if self._take("=") else left

    def _sum(self, depth: int):
        value = self._product(depth)
        while operator := self._take("+", "-"):
            value = self._algebra.binary(operator, value, self._product(depth))
        return value

    def _product(self, depth: int):
        value = self._signed(depth)
        while True:
            operator = self._take("*", "/", "//", "%")
            if operator is None:
                if self.peek()[0] != "name" and self.peek() != ("mark", "("):
                    return value
                operator = "*"  # 2x, 2(3 + 4)
            value = self._algebra.binary(operator, value, self._signed(depth))

    def _signed(self, depth: int):
        if depth > MAX_NESTING:
            raise ToolError(f"expression: nested deeper than {MAX_NESTING} levels")
        if sign := self._take("+", "-"):
            value = self._signed(depth + 1)
            return self._algebra.negative(value) if sign == "-" else value
        value = self._factor(depth)
        if self._take("^", "**"):
            value = self._algebra.binary("**", value, self._signed(depth + 1))
        return value

    def _factor(self, depth: int):
        kind, text = self.peek()
        if kind == "number":
            self._at += 1
            value = self._algebra.number(text)
        elif kind == "name":
            self._at += 1
            value = self._call(text, depth) if self._take("(") else self._algebra.name(text)
        elif self._take("("):
            value = self.equation(depth + 1)
            self._expect(")")
        else:
            raise ToolError(f"expression: expected a number, a name or '(', found {text or 'the end'!r}")
        while self._take("!"):
            value = self._algebra.call("factorial", [value])
        return value

    def _call(self, name: str, depth: int):
        arguments = []
        if not self._take(")"):
            arguments.append(self.equation(depth + 1))
            while self._take(","):
                arguments.append(self.equation(depth + 1))
            self._expect(")")
        return self._algebra.call(name, arguments)
