# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line on standard error that says what to do, nothing on standard output, a non-zero exit code."""

import os
import subprocess
import sys

import pytest

from gemma.cli import _backend
from gemma.errors import WeightsMismatch
from gemma.testing import write_gguf


@pytest.fixture
def files(tmp_path):
    """Names usable in the table as {name}."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a model\n" * 100)
    whole = write_gguf(tmp_path / "whole.gguf", {"general.architecture": "gemma3"}, {})
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:40])
    (tmp_path / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "blank.txt").write_bytes(b"\n")
    return {path.name.replace(".", "_"): str(path) for path in tmp_path.iterdir()} | {"here": str(tmp_path)}


# command line, what the message must hold, standard input
REAL = [
    ("generate hello --model gemma9_2b", "gemma9_2b: no such file or folder", b""),
    ("generate hello --model {here}/missing.gguf", "missing.gguf: no such file or folder", b""),
    ("generate hello --model {empty}", "empty: ", b""),
    ("generate hello --model {cut_gguf}", "cut.gguf", b""),
    ("generate hello --model {empty_gguf}", "empty.gguf", b""),
    ("generate hello --model {notes_txt}", "notes.txt", b""),
    ("generate hello --model ", "expected a model, got an empty name", b""),
    ("generate hello --backend cuda", "--backend: expected one of auto, cpu, jax, torch, got 'cuda'", b""),
    ("generate hello --dtype int3", "--dtype: expected one of float32, bfloat16, float16, got 'int3'", b""),
    ("chat --model {here}/missing", "missing: no such file or folder", b"hi\n"),
    ("inspect {here}/missing.gguf", "missing.gguf: no such file or folder", b""),
    ("inspect {cut_gguf}", "cut.gguf", b""),
    ("inspect {empty}", "empty: ", b""),
    ("inspect {notes_txt}", "notes.txt", b""),
    (
        "inspect {notes_txt} --context lots",
        "--context: expected a number of tokens such as 4096 or 32k, got 'lots'",
        b"",
    ),
    ("inspect", "Missing argument 'FILE'; see `gemma inspect --help`", b""),
    ("tokenize hello --model {here}/missing", "missing: no such file or folder", b""),
    ("tokenize hello --model {notes_txt}", "notes.txt", b""),
    ("fit gemma9_2b", "gemma9_2b: no such file or folder", b""),
    ("fit gemma3_1b --context 33k", "--context: expected 1..32768 tokens", b""),
    ("fit gemma3_1b --context 0", "such as 4096 or 32k, got '0'", b""),
    ("fit gemma3_1b --batch 0", "batch: expected at least 1", b""),
    ("fit gemma3_1b --quant float32", "--quant: expected a packed type", b""),
    ("fit gemma3_1b --quant Q9", "unknown type 'Q9': expected one of", b""),
    ("fit gemma3_1b --dtype Q4_0", "packed types are given as --quant", b""),
    ("fit gemma3_1b --memory lots", "such as 16GB", b""),
    ("nonsense", "No such command 'nonsense'; see `gemma --help`", b""),
    ("generate --nonsense", "No such option: --nonsense", b""),
]
FAKE = [
    ("generate ", "the prompt is empty: give", b""),
    ("generate -", "the prompt is empty: give", b""),
    ("generate -", "the prompt is empty: give", b"\n"),
    ("generate a<pad>b", "the prompt spells <pad>, the padding", b""),
    ("generate", "the prompt is empty: give", b""),
    ("generate --prompt-file {blank_txt}", "the prompt is empty: give", b""),
    ("generate --prompt-file {here}/none.txt", "none.txt: cannot be read (No such file or directory); give", b""),
    ("generate --prompt-file {here}", "cannot be read (Is a directory)", b""),
    ("generate --prompt-file {latin1_txt}", "expected UTF-8, got the byte 0xe9 at 1; convert", b""),
    ("generate -", "standard input: expected UTF-8, got the byte 0xff at 3; convert", b"abc\xff"),
    ("generate hello --prompt-file {notes_txt}", "either PROMPT or --prompt-file, got both", b""),
    ("generate hello --max-new-tokens 0", "--max-new-tokens: expected a whole number, 1 or more, got 0", b""),
    ("generate hello --max-new-tokens -3", "--max-new-tokens: expected a whole number, 1 or more, got -3", b""),
    ("generate hello --max-new-tokens many", "--max-new-tokens", b""),
    ("generate hello --max-new-tokens 123", "need 129 tokens, but the context holds 128: shorten", b""),
    ("generate " + "x" * 128, "need 130 tokens, but the context holds 128: shorten", b""),
    ("generate hello --context 20 -n 15", "need 21 tokens, but the context holds 20", b""),
    ("generate hello --context 129", "--context: expected 1..128 tokens", b""),
    ("generate hello --context 0", "such as 4096 or 32k, got '0'", b""),
    ("generate hello --temperature -1", "--temperature: expected 0 (greedy) or a number in 0.0001..10000, got -1", b""),
    ("generate hello --temperature nan", "--temperature: expected 0", b""),
    ("generate hello --temperature hot", "--temperature", b""),
    ("generate hello --top-k 0", "--top-k: expected a whole number, 1 or more, got 0", b""),
    ("generate hello --top-p 1.5", "--top-p: expected a number in 0..1, got 1.5", b""),
    ("generate hello --min-p -1", "--min-p: expected a number in 0..1, got -1", b""),
    ("generate hello --repetition-penalty 0", "--repetition-penalty: expected a number in 0.01..100, got 0", b""),
    ("generate hello --seed -1", "--seed: expected a whole number", b""),
    ("generate hello --stop ", "--stop: expected strings of 1..1024 characters", b""),
    ("chat", "standard input, line 2: expected UTF-8, got the byte 0xff", b"hi\n\xff\n"),
    ("chat --as poet", "--as: expected auto, tuned or base, got 'poet'", b"hi\n"),
    ("chat", "/save: expected the name of a file", b"/save\n"),
    ("chat --context 40", "the conversation is full", b"x" * 60),
]


def check(result, text):
    assert result.code == 2, result
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("gemma: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], result.err
    assert text in errors[0], result.err
    assert "Traceback" not in result.err


def split(line, files):
    """The words of a line; a trailing space is an empty last word."""
    return [word.format(**files) for word in line.split(" ")]


@pytest.mark.parametrize(("line", "text", "stdin"), REAL, ids=[line for line, _, _ in REAL])
def test_bad_input(cli, files, line, text, stdin):
    result = cli(*split(line, files), stdin=stdin)
    check(result, text)
    assert result.out == "" and len(result.err.splitlines()) == 1


@pytest.mark.parametrize(("line", "text", "stdin"), FAKE, ids=[f"{line} {stdin[:9]}" for line, _, stdin in FAKE])
def test_bad_input_with_a_model(cli, fake, files, line, text, stdin):
    fake("ok")
    check(cli(*split(line, files), stdin=stdin), text)


def test_a_prompt_that_is_no_text(cli, fake):
    fake("ok")
    check(cli("generate", os.fsdecode(b"abc\xff")), "not valid UTF-8 at character 3")


def test_no_prompt_on_a_terminal(cli, fake):
    fake("ok")
    check(cli("generate", terminal=True), "expected PROMPT, for example")


def test_long_errors_stay_one_line(cli, monkeypatch):
    def broken(*args, **kwargs):
        raise WeightsMismatch("x\n\x1b[2J.gguf", missing=[f"layers.{i}.attn.q" for i in range(500)], hint="Do this.")

    monkeypatch.setattr(_backend, "open_model", broken)
    result = cli("generate", "a")
    check(result, "missing (500): layers.0.attn.q")
    assert "\x1b" not in result.err and len(result.err) < 1100


def test_unexpected_errors_are_one_line_and_code_1(cli, fake, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr(_backend, "open_model", broken)
    result = cli("generate", "a")
    assert result.code == 1
    assert result.err == "gemma: error: unexpected RuntimeError: the disk; is on fire (GEMMA_DEBUG=1 shows where)\n"
    monkeypatch.setenv("GEMMA_DEBUG", "1")
    assert "Traceback" in cli("generate", "a").err


def test_memory_error(cli, monkeypatch):
    monkeypatch.setattr(_backend, "open_model", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    result = cli("generate", "a")
    assert result.code == 1 and "out of memory; `gemma fit`" in result.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "text"),
    [
        (["generate", "hello", "--model", "no/such/model.gguf"], b"", "no such file or folder"),
        (["generate", "-", "-n", "0"], b"x", "--max-new-tokens"),
        (["generate", b"abc\xff"], b"", "not valid UTF-8"),
    ],
    ids=str,
)
def test_as_a_real_process(arguments, stdin, text):
    done = subprocess.run([sys.executable, "-m", "gemma.cli", *arguments], input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("gemma: error: ") and text in line
