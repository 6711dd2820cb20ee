# SPDX-License-Identifier: Apache-2.0
"""docs/checkpoints.md does what it says: its commands and Python run in order, on a tiny model from a hub of our own."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
for helpers in ("hub", "saving"):
    sys.path.insert(0, str(ROOT / "tests" / helpers))

from hub_server import Repository, serving  # noqa: E402
from saving_models import text_config, tiny_source  # noqa: E402

from gemma.checkpoint import open_checkpoint  # noqa: E402
from gemma.cli.__main__ import run  # noqa: E402
from gemma.saving import from_arrays, save, verify_manifest  # noqa: E402
from gemma.testing import random_tensors  # noqa: E402

PAGE = ROOT / "docs/checkpoints.md"


@pytest.fixture(scope="module", autouse=True)
def quick():
    old = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", old)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """google/gemma-3-1b-it on a hub of this machine: a Gemma 3 of two layers."""
    from huggingface_hub import constants

    config = text_config("gemma3", num_hidden_layers=2, layer_pattern="LG", rope_scaling_factor=1.0)
    tensors = from_arrays(random_tensors(config), config)
    save(tmp_path / "made", tensors, config, format="safetensors", dtype="bfloat16", tokenizer=tiny_source())
    files = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    with serving(Repository(files)) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield config


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_block_runs(published, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names: dict = {}
    found = blocks()
    assert {language for language, _ in found} == {"bash", "python"}
    for language, text in found:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)  # one namespace: later blocks use what earlier ones made
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "gemma"
            code = run(arguments)
            assert code == 0, f"{line}: {code}: {capsys.readouterr().err}"
    printed = capsys.readouterr().out
    assert "not proven by gemma.cpp" in printed and "kept: no head/w in the checkpoint" in printed
    with open_checkpoint("gemma-hf") as opened:
        assert opened.config() == published
    for folder in ("gemma-hf", "gemma-orbax", "gemma-ckpt", "gemma-sbs", "gemma-bf16", "run/step_1"):
        verify_manifest(folder)


def test_the_links_lead_somewhere():
    """formats.md is generated after a whole run of the tests, so it need not be there yet."""
    for target in re.findall(r"\]\(([\w./-]+\.md)\)", PAGE.read_text()):
        assert target == "formats.md" or (PAGE.parent / target).is_file(), target
