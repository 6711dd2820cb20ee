# SPDX-License-Identifier: Apache-2.0
"""The calculator: values, formulas, and bombs of every kind."""

import builtins
import contextlib
import json
import math
import subprocess
import sys

import pytest

from gemma.errors import DependencyError, ToolError
from gemma.gm.tools import Calculator
from gemma.gm.tools._numbers import FUNCTIONS

CALCULATOR = Calculator()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("25 * 4 + 10", "110"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.3333333333333333"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2^10", "1024"),
        ("2 ** 10", "1024"),
        ("2^3^2", "512"),
        ("-2^2", "-4"),
        ("2^-2", "0.25"),
        ("(1/2)^2", "0.25"),
        ("10 - 4 - 3", "3"),
        ("100 / 10 / 5", "2"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("2(3 + 4)", "14"),
        ("2pi", repr(2 * math.pi)),
        ("--5", "5"),
        ("+5", "5"),
        ("5!", "120"),
        ("3!!", "720"),
        ("sqrt(16)", "4"),
        ("sqrt(2)", repr(math.sqrt(2))),
        ("sqrt(16/9)", repr(4 / 3)),
        ("math.sqrt(9)", "3"),
        ("cbrt(-27)", "-3"),
        ("log(8, 2)", "3"),
        ("ln(e)", "1"),
        ("log10(1000)", "3"),
        ("sin(pi/2)", "1"),
        ("atan2(1, 1)", repr(math.pi / 4)),
        ("max(3, 7, 5) - min(3, 7)", "4"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("comb(5, 2)", "10"),
        ("comb(1000000, 2)", "499999500000"),
        ("perm(5, 2)", "20"),
        ("round(2.675, 2)", "2.68"),
        ("round(1234, -2)", "1200"),
        ("mean(1, 2, 4)", repr(7 / 3)),
        ("sum(1, 2, 3)", "6"),
        ("floor(2.7) + ceil(2.1)", "5"),
        ("abs(-3.5)", "3.5"),
        ("1e3", "1000"),
        (".5 + 1.", "1.5"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("1e-400", "1E-400"),
        ("10^400 / 4", "25" + "0" * 398),
        ("1+" * 900 + "1", "901"),
        (" 2 \n * \t 3 ", "6"),
    ],
)
def test_numbers(expression, value):
    assert CALCULATOR.call(expression) == value


def test_powers_are_exact():
    assert CALCULATOR.call("2^1000") == str(2**1000)
    assert CALCULATOR.call("20! / 18!") == "380"


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("9**9**9", "3900 digits"),
        ("9^9^9^9^9", "3900 digits"),
        ("(10^3000)^2", "3900 digits"),
        ("0.5^99999999", "3900 digits"),
        ("1e999999999", "3900 digits"),
        ("1e-999999999", "3900 digits"),
        ("9" * 1990, None),
        ("*".join(["9" * 120] * 16), None),
        ("*".join(["10^400"] * 12), "3900 digits"),
        ("1000000!", "3900 digits"),
        ("5!!!!", "3900 digits"),
        ("(10^3000)!", "3900 digits"),
        ("comb(10^9, 5*10^8)", "3900 digits"),
        ("perm(10^9, 10^8)", "3900 digits"),
        ("exp(100000)", "3900 digits"),
        ("sinh(100000)", "3900 digits"),
        ("10.5^5000.5", "3900 digits"),
        ("round(1/3, 10^9)", "at most 100 digits"),
        ("(" * 100_000, "at most 2000 characters"),
        ("(" * 900 + "1" + ")" * 900, "nested deeper"),
        ("-" * 1999 + "1", "nested deeper"),
        ("2^" * 900 + "1", "nested deeper"),
        ("sqrt(" * 300 + "1" + ")" * 300, "nested deeper"),
        ("__import__('os').system('id')", "is no number, operator or name"),
        ("().__class__.__bases__", "is no number"),
        ("'a' * 10**9", "is no number"),
        ('f"{1}"', "is no number|unknown"),
        ("[1 for _ in 1]", "is no number"),
        ("lambda: 1", "is no number"),
        ("x := 5", "is no number"),
        ("open(1)", "unknown function 'open'"),
        ("exec(1)", "unknown function 'exec'"),
        ("eval(1)", "unknown function 'eval'"),
        ("print(1); 2", "is no number"),
        ("1 if 1 else 2", None),
        ("1/0", "division by zero"),
        ("1 // 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0^-1", "division by zero"),
        ("sqrt(-1)", "no real root"),
        ("(-8)^(1/3)", "no real power"),
        ("log(0)", "log: "),
        ("asin(2)", "asin: "),
        ("factorial(2.5)", "whole numbers"),
        ("(-3)!", "0 or more"),
        ("gcd(1.5, 2)", "whole numbers"),
        ("sqrt()", "sqrt: "),
        ("sqrt(1, 2, 3)", "sqrt: "),
        ("max()", "max: "),
        ("1,234 + 1", "write 1234"),
        ("2 +", "found 'the end'"),
        ("2 * / 3", "found '/'"),
        ("(2", r"expected '\)'"),
        ("2)", r"'\)' is not expected"),
        ("2 3", "'3' is not expected"),
        ("", "empty"),
        ("   ", "empty"),
        (None, "expected a text"),
        (25, "expected a text"),
        (["1"], "expected a text"),
        ("\0", "is no number"),
        ("１ + １", "is no number"),
    ],
)
def test_bombs_and_nonsense(expression, match, monkeypatch):
    monkeypatch.setattr(Calculator, "_formula", lambda self, text: "a formula")  # numbers alone must stop them
    if match is None:
        with contextlib.suppress(ToolError):
            assert len(CALCULATOR.call(expression)) < 4300
        return
    with pytest.raises(ToolError, match=match):
        CALCULATOR.call(expression)


def test_nothing_is_evaluated(monkeypatch):
    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr(builtins, name, lambda *a, **k: pytest.fail("evaluated"))
    assert CALCULATOR.call("2 + 2") == "4"
    with pytest.raises(ToolError):
        CALCULATOR.call("__import__('os')")


def test_every_function_survives_odd_arguments():
    odd = ["", "0", "-1", "0.5", "10^3000", "-10^3000", "1/7", "pi", "10^300, 10^300", "0, 0", "-5, 3", "1, 2, 3"]
    for name in FUNCTIONS:
        for arguments in odd:
            try:
                assert CALCULATOR.call(f"{name}({arguments})")
            except ToolError as error:
                assert str(error)


# --- formulas: sympy, in a process of its own

FORMULAS = [
    ("solve(x^2 = 4, x)", "x = -2; x = 2"),
    ("x^2 = 4", "x = -2; x = 2"),
    ("solve(x + y = 3, x - y = 1)", "x = 2, y = 1"),
    ("diff(x * sin(x), x)", "x*cos(x) + sin(x)"),
    ("diff(x^5, x, 3)", "60*x**2"),
    ("integrate(x^2, x, 0, 1)", "1/3 (about 0.333333333333333)"),
    ("integrate(1/x, x)", "log(x)"),
    ("factor(x^2 - 1)", "(x - 1)*(x + 1)"),
    ("expand((x + 1)^2)", "x**2 + 2*x + 1"),
    ("x^2 + 2x + x", "x*(x + 3)"),
    ("limit(sin(x)/x, x, 0)", "1"),
    ("sum(k, k, 1, 100)", "5050"),
    ("series(exp(x), x, 0, 3)", "1 + x + x**2/2 + O(x**3)"),
    ("N(pi)", "3.14159265358979"),
    ("sqrt(8) + 0x", "2*sqrt(2) (about 2.82842712474619)"),
]
FORMULA_BOMBS = [
    ("(x + 1)^(9^9^9)", "3900 digits"),
    ("x + 9^9^9", "3900 digits"),
    ("x + 1000000!", "3900 digits"),
    ("nan + 1", "nan"),
    ("x / 0", "division by zero"),
    ("0 * oo", "no value"),
    ("x = x", "every value"),
    ("x = 1 = 2", "not expected"),
    ("(x = 1) + 2", "cannot be calculated with"),
    ("diff(x, 5)", "expected a variable"),
    ("diff(x, x, 10^9)", "1..20"),
    ("integrate(x)", "integrate: "),
    ("nosuch(x)", "unknown function 'nosuch'"),
    ("solve(1 = 2)", "no unknown"),
]


def test_formulas_and_their_bombs():
    """One process for all: starting sympy is what takes time."""
    pytest.importorskip("sympy", reason="the extra [tools]")
    code = (
        "import json, sys\nfrom gemma.errors import ToolError\nfrom gemma.gm.tools._symbolic import compute\n"
        "def say(e):\n    try:\n        return compute(e)\n    except ToolError as error:\n        return '!' + str(error)\n"
        "print(json.dumps([say(e) for e in json.load(sys.stdin)]))"
    )
    asked = [expression for expression, _ in FORMULAS + FORMULA_BOMBS]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout)
    assert dict(zip(asked, found[: len(FORMULAS)])) == dict(FORMULAS)
    for (expression, match), said in zip(FORMULA_BOMBS, found[len(FORMULAS) :]):
        assert said.startswith("!") and match in said, (expression, said)


def test_a_formula_through_the_tool():
    pytest.importorskip("sympy", reason="the extra [tools]")
    assert CALCULATOR.call("solve(2x = 10, x)") == "x = 5"


def test_a_formula_that_takes_for_ever_is_stopped():
    pytest.importorskip("sympy", reason="the extra [tools]")
    with pytest.raises(ToolError, match="takes longer than 2 seconds|too large"):
        Calculator(timeout=2).call("expand((x + y + 1)^100000)")


def test_a_module_in_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    pytest.importorskip("sympy", reason="the extra [tools]")
    (tmp_path / "sympy.py").write_text("raise SystemExit('imported')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert CALCULATOR.call("x + x") == "2*x"


def test_without_sympy_numbers_work_and_formulas_name_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert CALCULATOR.call("6 * 7") == "42"
    with pytest.raises(DependencyError, match=r'sympy.*pip install "gemmakit\[tools\]"'):
        CALCULATOR.call("x + 1")


def test_the_timeout_is_checked():
    with pytest.raises(ToolError, match="timeout"):
        Calculator(timeout=0)
