# SPDX-License-Identifier: Apache-2.0
"""The native CPU backend behind generate and chat: when it is used, what its flags do, and that it needs no framework."""

import json
import subprocess
import sys

import pytest

from gemma.cli import _backend, _native
from gemma.config import preset
from gemma.errors import ConfigError
from gemma.kernels import _native as library
from gemma.testing import tiny_config, write_tiny_gguf

with_library = pytest.mark.skipif(library.library() is None, reason=f"native library: {library.why_missing()}")
HOT = ("-n", "12", "-t", "1", "--seed", "3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = tiny_config("gemma3", query_pre_attn_scalar=None, max_position_embeddings=256, vocab_size=330)
    return write_tiny_gguf(tmp_path_factory.mktemp("native") / "m.gguf", config)


@pytest.fixture
def jax_double(monkeypatch):
    """What would run on JAX is written down instead."""
    asked = []

    def opened(name, path, options):
        asked.append(options)
        raise ConfigError("the double of JAX")

    monkeypatch.setitem(_backend.BACKENDS, "jax", opened)
    return asked


@with_library
def test_a_run_loads_no_framework(tiny):
    """From the start of the program to its end."""
    line = ["generate", "hello", "-n", "4", "--stats", "--model", str(tiny)]
    script = (
        f"import sys\nfrom gemma.cli.__main__ import run\ncode = run({line!r})\n"
        "heavy = {'jax', 'jaxlib', 'torch', 'flax', 'tokenizers', 'huggingface_hub', 'PIL', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tokens of prompt" in done.stderr and "JAX" not in done.stderr


@with_library
def test_auto_is_the_native_backend(cli, tiny, jax_double):
    chosen = [cli("generate", "hello", "--model", tiny, *HOT, "--backend", name) for name in ("auto", "cpu")]
    assert chosen[0] == chosen[1] and chosen[0].code == 0 and chosen[0].err == ""
    assert not jax_double


@with_library
@pytest.mark.parametrize("flags", [("--threads", "1"), ("--speculate", "6"), ("--threads", "1", "--speculate", "2")])
def test_flags_that_change_no_text(cli, tiny, flags):
    for how in (HOT, ("-n", "40")):
        plain = cli("generate", "hello", "--model", tiny, *how)
        assert plain == cli("generate", "hello", "--model", tiny, *how, *flags)


@with_library
def test_cache_types(cli, tiny):
    for name in ("f32", "bf16", "int8"):
        assert cli("generate", "hello", "--model", tiny, "-n", "3", "--cache-type", name).code == 0
    wrong = cli("generate", "hello", "--model", tiny, "--cache-type", "q4")
    assert wrong.code == 2 and "--cache-type: expected one of f32, bf16, int8, got 'q4'" in wrong.err


@with_library
def test_guesses_are_reported(cli, tiny):
    data = json.loads(cli("generate", "abc abc abc", "--model", tiny, "-n", "150", "--speculate", "8", "--json").out)
    counts = data["speculation"]
    assert counts["drafted"] >= counts["accepted"] > 0
    noted = cli("generate", "abc abc abc", "--model", tiny, "-n", "150", "--speculate", "8", "--stats").err
    assert f"{counts['accepted']} of {counts['drafted']} guesses right" in noted
    assert "speculation" not in json.loads(cli("generate", "abc", "--model", tiny, "-n", "4", "--json").out)
    assert (
        "guesses"
        in cli("chat", "--model", tiny, "-n", "4", "--as", "tuned", "--stats", "--speculate", "3", stdin=b"Hi\n").err
    )


@with_library
def test_a_conversation_is_not_read_twice(tiny):
    opened = _backend.open_model(str(tiny), backend="cpu")
    opened.model.begin(200)
    from gemma.sampling import SamplingParams

    ids = [2, *range(270, 300)]
    made = list(opened.model.tokens(ids, SamplingParams(temperature=0, max_new_tokens=5), ()))
    list(opened.model.tokens([*ids, *made, 270], SamplingParams(temperature=0, max_new_tokens=1), ()))
    assert opened.model.request.reused == len(ids) + len(made) - 1


# ---- where it is not used


def test_without_the_library_jax_is_used_and_said(cli, tiny, jax_double, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(library, "why_missing", lambda: "not built: no compiler")
    result = cli("generate", "hello", "--model", tiny)
    told = "gemma: the native CPU backend is not used: its library is not built: no compiler; this runs on JAX\n"
    assert result.err == told + "gemma: error: the double of JAX\n" and len(jax_double) == 1
    refused = cli("generate", "hello", "--model", tiny, "--threads", "1")
    assert "--threads: JAX has no such setting, and the native CPU backend is not used" in refused.err
    assert len(jax_double) == 1


def test_models_that_only_jax_runs():
    for name in ("paligemma_3b_224", "t5gemma_s_s"):
        assert "beside a Gemma 1, 2 or 3 text decoder" in _native.why_not(preset(name))
    if library.library() is not None:
        assert _native.why_not(preset("gemma3_4b")) is None  # its text; the pictures are `gemma see`'s


def test_another_dtype_is_for_jax(cli, tiny, jax_double):
    assert cli("generate", "hello", "--model", tiny, "--dtype", "bfloat16").err == "gemma: error: the double of JAX\n"
    assert jax_double[0].dtype == "bfloat16"
    result = cli("generate", "hello", "--model", tiny, "--backend", "cpu", "--dtype", "bfloat16")
    assert result.code == 2 and "--dtype: --backend cpu computes in float32, got 'bfloat16'" in result.err


def test_an_accelerator_is_for_jax(cli, tiny, jax_double, monkeypatch):
    monkeypatch.setattr(_backend, "_accelerator", lambda: "JAX has an accelerator here (/dev/accel0)")
    assert "JAX has an accelerator here (/dev/accel0); this runs on JAX" in cli("generate", "x", "--model", tiny).err


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("flags", [("--threads", "2"), ("--cache-type", "f32"), ("--speculate", "4")])
def test_flags_of_another_backend(cli, tiny, backend, flags):
    result = cli("generate", "hello", "--model", tiny, "--backend", backend, *flags)
    assert result.code == 2 and f"{flags[0]}: --backend {backend} has no such setting" in result.err


def test_bad_values(cli):
    assert "--speculate: expected 0 (off) to 64 tokens, got 65" in cli("generate", "x", "--speculate", "65").err
    assert "--threads: expected at least 1, got -1" in cli("chat", "--threads", "-1").err
