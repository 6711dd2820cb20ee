# SPDX-License-Identifier: Apache-2.0
"""`gemma doctor`: every topic is reported, secrets are not, and problems decide the exit code."""

import importlib.metadata
import json

import pytest

from gemma.cli import doctor


@pytest.fixture
def probe(monkeypatch):
    """Without the two processes that import frameworks."""
    monkeypatch.setattr(doctor, "_PROBES", {"json": "print('a device')"})


@pytest.fixture
def quick(probe, monkeypatch):
    """Nor the walk over the metadata of everything installed."""
    owners = {"gemma": ["gemmakit"], "siglip": ["gemmakit"], "paligemma": ["gemmakit"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)


def findings(result):
    return {f["topic"]: f for f in json.loads(result.out)}


def test_a_sound_installation(cli, probe):
    result = cli("doctor", "--json")
    found = findings(result)
    assert result.code == 0 and not [f for f in found.values() if f["state"] == "problem"]
    topics = ("gemmakit", "python", "jax", "torch", "package gemma", "json devices", "native code", "c++ compiler")
    assert set(topics) | {"cache folder", "hub token", "memory"} <= set(found)
    assert found["json devices"] == {"topic": "json devices", "state": "ok", "text": "a device"}
    plain = cli("doctor")
    assert plain.code == 0 and plain.out.endswith("\nno problems found\n") and "\x1b" not in plain.out


def test_the_token_is_never_shown(cli, quick, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert findings(cli("doctor", "--json"))["hub token"]["state"] == "note"
    (tmp_path / "token").write_text("hf_secret")
    stored = cli("doctor", "--json").out
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    given = cli("doctor", "--json").out
    for out in (stored, given):
        assert "hf_secret" not in out and '"present (' in out


def test_another_owner_of_the_name(cli, quick, monkeypatch):
    owners = {"gemma": ["gemmakit", "gemma"], "siglip": ["gemmakit"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    result = cli("doctor", "--json")
    text = findings(result)["package gemma"]["text"]
    assert result.code == 1 and "pip uninstall gemma," in text
    assert "1 problem found" in cli("doctor").out


def test_a_missing_package(cli, quick, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("flax", "torch"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = cli("doctor", "--json")
    assert result.code == 1
    assert findings(result)["flax"]["state"] == "problem"
    assert findings(result)["torch"] == {
        "topic": "torch",
        "state": "note",
        "text": 'not installed (optional): pip install "gemmakit[torch]"',
    }


@pytest.mark.parametrize(
    ("code", "text"),
    [("raise SystemExit('no driver')", "exit code 1: no driver"), ("import os; os.abort()", "exit code -6")],
)
def test_a_framework_that_fails(cli, monkeypatch, code, text):
    monkeypatch.setattr(doctor, "_PROBES", {"json": code})
    result = cli("doctor", "--json")
    assert result.code == 1 and text in findings(result)["json devices"]["text"]


def test_a_cache_folder_that_cannot_be(cli, quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "file/cache"))
    result = cli("doctor", "--json")
    assert result.code == 1 and "set GEMMA_CACHE_DIR" in findings(result)["cache folder"]["text"]
