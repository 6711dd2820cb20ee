# SPDX-License-Identifier: Apache-2.0
"""docs/training.md: its rows are read as what it says, its YAML and its commands are settings that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from gemma.cli import __main__ as program
from gemma.cli import finetune as verb
from gemma.finetuning import EXPORTS, METHODS, RunConfig
from gemma.gm.data import read_examples

PAGE = (Path(__file__).resolve().parents[2] / "docs/training.md").read_text(encoding="utf-8")
ROWS = re.findall(r"```json (\w+)\n(.*?)```", PAGE, re.DOTALL)
KINDS = {"preference": "preference", "kto": "kto", "labelled": "classification"}


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_rows_are_of_their_format(tmp_path, name, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(row)) + "\n")
    examples = read_examples(path)
    assert (examples.format, examples.kind, len(examples)) == (name, KINDS.get(name, "supervised"), 1)


def test_all_formats_are_there():
    from gemma.gm.data._formats import FORMATS

    assert [name for name, _ in ROWS] == sorted(FORMATS, key=[name for name, _ in ROWS].index)
    assert all(f"`{name}`" in PAGE for name in [*FORMATS, *METHODS])


def test_the_yaml_is_a_run(tmp_path):
    (tmp_path / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    run = RunConfig.from_yaml(tmp_path / "run.yaml").resolved()
    assert run.method == "qlora" and set(run.export) <= {*EXPORTS} and run.quantize == "keep"


def test_the_commands_are_commands(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(verb, "run", lambda config, **options: runs.append(config))
    lines = re.findall(r"^\$ gemma (finetune .*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert program.run(shlex.split(line)) == 0, capsys.readouterr().err
    assert runs[1].eval_split == 0.05 and runs[2].method == "classification"
    # Settings that the prose names.
    methods = {"labels": "classify", "tune": "dpo"}
    for name, value in re.findall(r"--set (\w+)=([^`]+)`", PAGE):
        verb.made(None, {"data": ["x"], "method": methods.get(name)}, [f"{name}={value}"])


def test_the_python_is_a_run():
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], found := {})
    assert found["run"].steps == 200
