# SPDX-License-Identifier: Apache-2.0
"""Mutated files by the thousand (scripts/fuzz.py): success or one GemmaError, nothing else, in bounded memory."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from guard import resident

COUNT = 2000
TARGETS = ["gguf", "safetensors", "tokenizer", "sbs", "ckpt", "npz"]


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("gemmakit_fuzz", Path(__file__).parents[2] / "scripts" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files(fuzz, target):
    with resident(256 << 20):  # the whole batch: single inputs are bounded by the named faults' tests
        failures, outcomes = fuzz.run(target, COUNT)
    assert not failures, "\n\n".join(map(str, failures[:5]))
    assert sum(outcomes.values()) == COUNT
    # the mutations must bite, and not only at the first check: some inputs pass, several kinds of error occur
    assert COUNT * 0.01 < outcomes["accepted"] < COUNT * 0.7, outcomes
    assert len(outcomes) >= 3 or target != "gguf", outcomes


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_at_length(fuzz, target):
    failures, _ = fuzz.run(target, 200_000, seed=COUNT)
    assert not failures, "\n\n".join(map(str, failures[:5]))


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_are_reproducible(fuzz, target):
    make = fuzz.TARGETS[target].make
    for seed in range(20):
        assert make(random.Random(f"{target} {seed}")) == make(random.Random(f"{target} {seed}"))
    assert len({make(random.Random(f"{target} {seed}")) for seed in range(50)}) > 40


def test_a_planted_defect_is_found(fuzz, monkeypatch):
    """The harness itself: an escaped KeyError must come out as a failure with its seed."""
    real = fuzz.TARGETS["safetensors"]

    def broken(path):
        if len(path.read_bytes()) % 5 == 0:
            raise KeyError("planted")
        real.use(path)

    monkeypatch.setitem(fuzz.TARGETS, "safetensors", fuzz.Target(real.name, real.make, broken))
    failures, outcomes = fuzz.run("safetensors", 60)
    assert failures and outcomes["FAILED"] == len(failures) and "planted" in str(failures[0])
