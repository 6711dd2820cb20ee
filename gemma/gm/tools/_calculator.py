# SPDX-License-Identifier: Apache-2.0
"""`Calculator`: numbers exactly and at once, formulas through sympy in a process that can be stopped. Never `eval`.

Text is read by `_expression.py`; what it computes with is `_numbers.py` here and `_symbolic.py` there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from gemma.errors import DependencyError, ToolError
from gemma.gm.tools import _expression, _numbers
from gemma.gm.tools._tools import Example, Tool

# Functions that only formulas have, and what only they make of the numeric functions' names.
_SYMBOLIC = frozenset(
    [
        "simplify",
        "expand",
        "factor",
        "diff",
        "derivative",
        "integrate",
        "integral",
        "limit",
        "series",
        "solve",
        "gamma",
        "N",
    ]
)
_MEMORY = 1 << 30  # bytes of address space for sympy
_PACKAGES = str(Path(__file__).resolve().parents[3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calculator(Tool):
    """Calculates: `25 * 4 + 10`, `2^100`, `sqrt(2)`, `20!`, and with sympy `solve(x^2 = 4, x)`, `diff(sin(x), x)`.

    Numbers stay exact as long as they can, and no number on the way may have more than 3900 digits. `^` is a power.
    Formulas need the extra `[tools]`.

    Attributes:
      timeout: seconds that a formula may take; its process is killed after that.
    """

    timeout: float = 20.0

    DESCRIPTION = (
        "Calculates exactly with + - * / // % ^ ! and functions such as sqrt, sin, log, round, gcd. With unknowns it "
        "can simplify, expand, factor, diff, integrate, limit and solve."
    )
    EXAMPLE = Example(
        query="What is 25 times 4 plus 10?",
        thought="The calculator knows.",
        tool_kwargs={"expression": "25 * 4 + 10"},
        tool_kwargs_doc={"expression": "<EXPRESSION>"},
        result="110",
        answer="25 times 4 plus 10 is 110.",
    )
    KEYWORDS = ("math", "calculator", "operation", "equation", "number")

    def __post_init__(self):
        if not self.timeout > 0:
            raise ToolError(f"timeout: expected seconds above 0, got {self.timeout}")

    def call(self, expression: str) -> str:
        """The value of an expression, as text.

        Raises:
          ToolError: (a ValueError) it cannot be read, is too large, takes too long, or has no value.
          DependencyError: it has unknowns, and sympy is not installed.
        """
        tokens = _expression.tokenize(expression)
        if not _is_formula(tokens):
            return _numbers.show(_expression.evaluate(tokens, _numbers.Numbers()))
        if importlib.util.find_spec("sympy") is None:
            raise DependencyError("sympy", "tools", "calculating with unknowns")
        return self._formula(expression)

    def _formula(self, expression: str) -> str:
        job = json.dumps({"expression": expression, "memory": _MEMORY, "seconds": int(self.timeout) + 1})
        path = os.pathsep.join(filter(None, [_PACKAGES, os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                # -P: nothing in the working directory can pass itself off as sympy
                [sys.executable, "-P", "-m", "gemma.gm.tools._symbolic"],
                input=job,
                capture_output=True,
                text=True,
                timeout=self.timeout,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"it takes longer than {self.timeout:g} seconds; try something simpler") from error
        if done.returncode != 0:
            raise ToolError("the expression is too large for the calculator")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise ToolError(answer["error"])
        return answer["text"]


def _is_formula(tokens: list[_expression.Token]) -> bool:
    """Whether numbers alone will not do: an unknown, an equation, or a function of formulas."""
    for n, (kind, text) in enumerate(tokens):
        if (kind, text) == ("mark", "="):
            return True
        if kind == "name":
            called = tokens[n + 1 : n + 2] == [("mark", "(")]
            if (called and text in _SYMBOLIC) or (not called and text.lower() not in _numbers.CONSTANTS):
                return True
    return False
