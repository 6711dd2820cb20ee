"""The shape of the code: sizes of files and functions, opening paragraphs, and facts that are stated once."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from gemma.config import PRESETS

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(p for top in ("gemma", "siglip", "paligemma") for p in (ROOT / top).rglob("*.py"))
TRACKED = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if name
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{name(path)} has more than 400 lines: split it by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{name(path)}: {node.name} has {lines} lines, more than 60"


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_modules_open_with_a_paragraph(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), f"{name(path)}: the SPDX line is missing"
    assert ast.get_docstring(ast.parse(text)), f"{name(path)}: the opening paragraph is missing"


def preset_numbers():
    """Widths and vocabularies that can only mean a preset's number (small and round ones can mean anything)."""
    numbers = set()
    for config in PRESETS.values():
        for part in (getattr(config, side, None) for side in ("encoder", "decoder", "text_config")):
            numbers |= {part.hidden_size, part.intermediate_size, part.vocab_size} if part else set()
        if hasattr(config, "hidden_size") and hasattr(config, "intermediate_size"):
            numbers |= {config.hidden_size, config.intermediate_size, config.vocab_size}
    return {n for n in numbers if n > 1100 and n & (n - 1)}


@pytest.mark.parametrize(
    "path", [p for p in PRODUCT if name(p) not in ("gemma/config.py", "gemma/_config_gemma.py")], ids=name
)
def test_sizes_are_stated_once(path):
    found = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value in preset_numbers()
    }
    assert not found, f"{name(path)} restates {sorted(found)}: sizes belong in gemma/config.py"


def test_every_configuration_field_is_read():
    fields = {f for config in ("GemmaConfig", "SiglipVisionConfig") for f in _fields(config)}
    sources = "\n".join(p.read_text() for p in PRODUCT)
    unread = {f for f in fields if len(re.findall(rf"\b{f}\b", sources)) < 2}
    assert not unread


def _fields(cls: str):
    import gemma.config

    return getattr(gemma.config, cls).__dataclass_fields__


def test_no_path_or_host_of_a_machine():
    pattern = re.compile(r"/work/|/root/|/home/\w+/|pypi\.org/simple|files\.pythonhosted")
    own = Path(__file__).name
    bad = [
        name(p)
        for p in TRACKED
        if p.is_file()
        and p.name != own
        and p.suffix in {".py", ".md", ".toml", ".txt", ".json", ""}
        and pattern.search(p.read_text(errors="replace"))
    ]
    assert not bad
