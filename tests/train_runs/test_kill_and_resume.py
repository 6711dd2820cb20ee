# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment, as often as it likes: the resumed run is the one that was never killed, byte for byte."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from gemma.gm import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, and every batch that was used."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, small_run.trainer(folder).fit()


def run_and_kill(folder: Path, steps_seen: int, wait: float) -> None:
    """Starts or resumes a run, and kills it some time after so many checkpoints."""
    process = subprocess.Popen(
        [sys.executable, str(Path(small_run.__file__)), str(folder), str(small_run.STEPS)], stdout=subprocess.PIPE
    )
    for _ in range(steps_seen):
        line = process.stdout.readline()
        assert line.strip().isdigit(), "the run ended before it was killed"
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def check_equal(folder: Path, whole) -> None:
    other, expected = whole
    result = small_run.trainer(folder).fit()
    for one, two in zip(jax.tree.leaves(result.state), jax.tree.leaves(expected.state), strict=True):
        assert one.dtype == two.dtype and np.asarray(one).tobytes() == np.asarray(two).tobytes()
    assert (folder / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    assert result.history == expected.history and len(expected.history) >= small_run.STEPS
    saved = [train.Checkpoints(f / "steps", read_only=True).restore() for f in (folder, other)]
    leaves = [jax.tree.leaves(state) for state, _ in saved]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    assert saved[0][1]["loader"] == saved[1][1]["loader"]
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["step_23", "step_24"]


def test_killed_once_is_as_never_killed(tmp_path, whole):
    wait = random.random() * 0.05
    run_and_kill(tmp_path, 4, wait)
    last = max(train.Checkpoints(tmp_path / "steps", read_only=True).steps())
    assert 4 <= last < small_run.STEPS, f"not killed in time, after {wait} s"
    check_equal(tmp_path, whole)


@pytest.mark.slow
def test_killed_many_times(tmp_path, whole):
    numbers = random.Random(5)
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for _ in range(3):  # a run that was resumed is killed as well
            run_and_kill(folder, numbers.randint(1, 5), numbers.random() * 0.05)
        check_equal(folder, whole)


def test_the_order_of_the_data_is_that_of_the_run(whole):
    """Not by luck: every batch differs from the others, so a batch lost or seen twice would show in the log."""
    losses = [row["weight"] + row["positions"] for row in whole[1].history]
    assert len(set(losses)) > small_run.STEPS * 0.9
