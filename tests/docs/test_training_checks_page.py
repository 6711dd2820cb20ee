# SPDX-License-Identifier: Apache-2.0
"""docs/training_checks.md names tests that exist, marks the slow ones, and has all twenty rows."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/training_checks.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \(slow\))?")

LEFT_OUT = re.compile(r"pytest\.mark\.(slow|nightly|gpu|kauldron)")


@functools.cache
def functions(path: str) -> dict[str, bool]:
    """Name of every test of a file, and whether the default run leaves all of it out."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: any(LEFT_OUT.match(ast.unparse(mark)) for mark in node.decorator_list) for node in found}


def test_every_test_that_is_named_exists_and_is_marked_as_it_is():
    named = NAMED.findall(PAGE)
    assert len(named) > 60 and PAGE.count("::") == len(named)
    for path, name, mark in named:
        assert (ROOT / path).is_file(), path
        assert name in functions(path), f"{path} has no {name}"
        assert functions(path)[name] == bool(mark), f"{path}::{name}: the page and its marker disagree"


def test_every_row_has_a_test_of_the_default_run():
    rows = {int(number): line for number, line in re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, re.MULTILINE)}
    assert list(rows) == list(range(1, 21))
    for number, line in rows.items():
        assert any(not mark for *_, mark in NAMED.findall(line)), f"{number} is proven by slow tests alone"
