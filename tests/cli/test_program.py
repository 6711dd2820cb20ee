# SPDX-License-Identifier: Apache-2.0
"""The program around the verbs: help and its page, imports at start, Ctrl-C, broken pipes, version."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gemma
from gemma.cli import _backend

ROOT = Path(__file__).parents[2]
VERBS = ("generate", "chat", "inspect", "tokenize", "fit", "doctor")


def test_docs_page_is_the_help():
    spec = importlib.util.spec_from_file_location("gen_cli_docs", ROOT / "scripts/gen_cli_docs.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PAGE.read_text() == generator.page(), "run python scripts/gen_cli_docs.py"
    assert all(f"## gemma {verb}\n" in generator.page() for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(cli, verb):
    for flag in ("--help", "-h"):
        result = cli(verb, flag)
        assert result.code == 0 and result.err == ""
        assert "Examples:" in result.out and f"gemma {verb}" in result.out


def test_overview(cli):
    assert cli() == cli("--help")
    assert cli().code == 0 and all(f"\n  {verb}" in cli().out for verb in VERBS)
    assert "Exit codes" in cli().out


def test_version(cli):
    assert cli("--version") == (0, f"gemmakit {gemma.__version__}\n", "")


def test_start_loads_no_framework(tmp_path):
    """All verbs that need none, in one process of their own: imports of a test session must not hide a fault."""
    from gemma.testing import tiny_config, write_tiny_gguf

    model = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3", query_pre_attn_scalar=None))
    code = f"""
import sys
from gemma.cli.__main__ import run
for line in (["--help"], ["generate", "--help"], ["inspect", {str(model)!r}], ["fit", {str(model)!r}, "-c", "64"],
             ["tokenize", "hello", "-m", {str(model)!r}]):
    assert run(line) == 0, line
loaded = {{"jax", "jaxlib", "flax", "torch", "transformers", "tensorflow"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_interrupt(cli, fake, monkeypatch):
    double = fake(" of computing")
    step, calls = double.runner.step, []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(double.runner, "step", interrupted)
    result = cli("generate", "The history")
    assert result == (130, "The history of c\n", "")


def test_interrupt_of_a_real_process():
    """SIGINT while it waits for standard input; it says when it does."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
from gemma.cli import __main__ as program, _common
read_text = _common.read_text
def announced(*arguments):
    print("up", flush=True)
    return read_text(*arguments)
_common.read_text = announced
program.main()
"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code, "generate", "-"], **pipes)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_broken_pipe():
    code = """
import sys
from gemma.cli import __main__ as program, _common
def endless():
    while True:
        _common.write("line\\n" * 1000)
program._run = lambda arguments: endless()
program.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_terminal_without_unicode(tmp_path):
    from gemma.testing import tiny_config, write_tiny_gguf

    model = write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma3", query_pre_attn_scalar=None))
    line = [sys.executable, "-m", "gemma.cli", "tokenize", " ", "--no-bos", "--model", str(model)]
    done = subprocess.run(line, capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"266  ?\n", b"")


def test_module_and_console_script_are_one():
    done = subprocess.run([sys.executable, "-m", "gemma.cli", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"gemmakit {gemma.__version__}\n"


def test_backends_are_named_in_the_help(cli):
    text = " ".join(cli("generate", "--help").out.split())
    told = text.partition("What computes:")[2].partition("--threads")[0]
    assert all(name in told for name in ("auto", *_backend.BACKENDS))
