# SPDX-License-Identifier: Apache-2.0
"""--adapter on every backend, and the assistant that `gemma chat` takes for demo by itself."""

import dataclasses
import importlib.util
import shutil

import numpy as np
import pytest

from gemma import adapters, chat, hub, testing, weights
from gemma.adapters import AdapterFile, LowRank
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.cli import _assistant, _backend
from gemma.errors import ConfigError
from gemma.kernels import _native

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"native library: {_native.why_missing()}")
HOT = ("-n", "12", "-t", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a tiny model's GGUF, a PEFT folder with its checksum, an adapter that only JAX runs)."""
    folder = tmp_path_factory.mktemp("adapters")
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None, max_position_embeddings=1024, vocab_size=330)
    path = testing.write_tiny_gguf(folder / "m.gguf", config)
    rng, names = np.random.default_rng(0), {t.name: t.shape for t in weights.tensors(config)}
    lows = {
        name: LowRank(*(rng.normal(0, 1, shape).astype(np.float32) for shape in ((2, size[1]), (size[0], 2))))
        for name, size in names.items()
        if name.startswith("layers.") and len(size) == 2
    }
    with open_checkpoint(path) as checkpoint:
        base = {t.name: read(np.float32) for t, read in load_tensors(checkpoint)}
    adapter = AdapterFile(lows, base_checksum=adapters.checksum({name: base[name] for name in lows}), chat=True)
    adapters.save_adapter_file(folder / "peft", adapter, config)
    name, low = next(iter(lows.items()))
    dora = AdapterFile({name: dataclasses.replace(low, magnitude=np.ones(low.shape[0], np.float32))})
    adapters.save_adapter_file(folder / "dora", dora, config)
    adapters.save_adapter_file(folder / "other.gguf", dataclasses.replace(adapter, base_checksum="0" * 64), config)
    return path, folder / "peft", folder / "dora"


@pytest.fixture
def demo(monkeypatch, made, tmp_path):
    """The tiny model under the name of the real one, and where its assistant is looked for."""
    monkeypatch.setattr(hub, "demo_path", lambda: made[0])
    monkeypatch.setattr(_assistant, "FOLDER", tmp_path / "assistant")
    return tmp_path / "assistant"


def test_generate_runs_it_natively(cli, made, monkeypatch):
    monkeypatch.setitem(_backend.BACKENDS, "jax", None)
    path, peft, _ = made
    plain = cli("generate", "hello", "--model", path, *HOT)
    adapted = cli("generate", "hello", "--model", path, "--adapter", peft, *HOT)
    assert adapted.code == 0 and adapted.err == "" and adapted.out != plain.out
    assert cli("generate", "hello", "--model", path, "--adapter", peft, "--speculate", "4", *HOT) == adapted
    assert cli("generate", "hello", "--model", path, "--adapter", peft, "--backend", "cpu", *HOT) == adapted


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_torch_folds_it_in(cli, made):
    path, peft, _ = made
    native, torch = (
        cli("generate", "hello", "--model", path, "--adapter", peft, "--backend", b, *HOT) for b in ("cpu", "torch")
    )
    assert torch == native
    other = cli("generate", "x", "--model", path, "--adapter", peft.with_name("other.gguf"), "--backend", "torch")
    assert other.code == 2 and "was trained on a base with other weights" in other.err


def test_what_it_cannot_run_goes_to_jax_and_is_said(cli, made, monkeypatch):
    asked = []

    def opened(name, path, options):
        asked.append(options)
        raise ConfigError("the double of JAX")

    monkeypatch.setitem(_backend.BACKENDS, "jax", opened)
    path, _, dora = made
    told = cli("generate", "hello", "--model", path, "--adapter", dora)
    assert "is not used: the adapter rescales the rows of its weights (DoRA); this runs on JAX" in told.err
    assert asked[0].adapter == str(dora)
    refused = cli("generate", "hello", "--model", path, "--adapter", dora, "--backend", "cpu")
    assert refused.code == 2 and "not for the native CPU decoder" in refused.err and len(asked) == 1


def test_another_base_is_refused(cli, made):
    path, peft, _ = made
    result = cli("generate", "hello", "--model", path, "--adapter", peft.with_name("other.gguf"))
    assert result.code == 2 and "was trained on a base with other weights" in result.err
    missing = cli("chat", "--model", path, "--adapter", "nowhere", stdin=b"Hi\n")
    assert missing.code == 2 and "expected an adapter" in missing.err


def test_an_adapter_for_conversations_gets_the_template(cli, made, monkeypatch):
    path, peft, dora = made
    seen = []
    monkeypatch.setattr(chat, "few_shot", lambda turns: seen.append(turns) or "Person: Hi\nAssistant:")
    assert cli("chat", "--model", path, "--adapter", peft, "-n", "3", stdin=b"Hi\n").err == "" and not seen
    assert "few-shot" in cli("chat", "--model", path, "-n", "3", stdin=b"Hi\n").err and len(seen) == 1
    assert adapters.is_chat(peft) and not adapters.is_chat(dora)
    with open_checkpoint(path) as checkpoint:
        again = adapters.open_adapter(peft, checkpoint.config())
        adapters.save_adapter_file(peft.with_name("chat.gguf"), again, checkpoint.config(), replace=True)
    assert again.chat and adapters.is_chat(peft.with_name("chat.gguf"))


def test_the_assistant_of_demo(cli, made, demo):
    told = ("answers through the assistant adapter", "few-shot conversation")
    asked = [("chat", *HOT), ("chat", *HOT, "--no-adapter")]
    absent = cli(*asked[0], stdin=b"Hi\n")
    assert absent.code == 0 and told[0] not in absent.err and told[1] in absent.err
    shutil.copytree(made[1], demo)
    there, without = (cli(*line, stdin=b"Hi\n") for line in asked)
    assert told[0] in there.err and told[1] not in there.err and there.out != absent.out
    assert without == absent
    named = cli("chat", "--model", made[0], *HOT, stdin=b"Hi\n")  # the same weights, but not by that name
    assert named.out == absent.out and told[0] not in named.err
    generated = [cli("generate", "hello", "--model", model, *HOT) for model in ("demo", made[0])]
    assert generated[0] == generated[1] and generated[0].err == ""
    both = cli("chat", "--adapter", made[1], "--no-adapter", stdin=b"Hi\n")
    assert both.code == 2 and "expected one of the two" in both.err


def test_an_assistant_that_does_not_fit_is_left_out(cli, made, demo):
    absent = cli("chat", *HOT, stdin=b"Hi\n")
    with open_checkpoint(made[0]) as checkpoint:
        other = adapters.open_adapter(made[1].with_name("other.gguf"), checkpoint.config())
        adapters.save_adapter_file(demo, other, checkpoint.config())
    for damage in (lambda: None, (demo / "adapter_config.json").unlink, (demo / "adapter_model.safetensors").unlink):
        damage()
        result = cli("chat", *HOT, stdin=b"Hi\n")
        assert result.code == 0 and "the assistant of demo is left out: " in result.err and result.out == absent.out
