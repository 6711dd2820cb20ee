# SPDX-License-Identifier: Apache-2.0
"""`save_params` is killed, fails and races: afterwards the old parameters or the new, never a mixture."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import failing_disk as fd
import numpy as np
import pytest

from gemma._atomic import latest_valid, verify_manifest
from gemma.errors import SaveError
from gemma.gm import ckpts


def tree(value: float):
    return {"a": {"b": np.full((40, 30), value, np.float32)}, "c": np.full((7,), value, np.float32)}


def value_of(path: Path) -> float | None:
    """The one number that all leaves hold; None if nothing is there."""
    if not path.exists():
        return None
    verify_manifest(path)
    loaded = ckpts.load_params(path)
    values = {float(v) for leaf in (loaded["a"]["b"], loaded["c"]) for v in np.unique(np.asarray(leaf))}
    assert len(values) == 1, f"a mixture: {values}"
    return values.pop()


@pytest.mark.parametrize("fresh", [True, False])
def test_killed_at_every_effect(tmp_path, fresh):
    with fd.on(fd.Counting()) as counting:
        ckpts.save_params(tree(2), tmp_path / "count")
    seen = []
    for at in range(1, counting.count + 3):
        path = tmp_path / str(at) / "x"
        path.parent.mkdir()
        if not fresh:
            ckpts.save_params(tree(1), path)
        with fd.on(fd.Dying(at)):
            ckpts.save_params(tree(2), path, replace=True)
        seen.append(value_of(path))
    old = None if fresh else 1.0
    assert set(seen) == {old, 2.0} and seen == sorted(seen, key=lambda v: v == 2.0) and seen[-1] == 2.0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk(tmp_path, code):
    ckpts.save_params(tree(1), tmp_path / "x")
    with fd.on(fd.Counting()) as counting:
        ckpts.save_params(tree(1), tmp_path / "x", replace=True)
    for at in range(1, counting.count + 1, 2):
        with fd.on(fd.Failing(at, code)):
            try:
                ckpts.save_params(tree(2), tmp_path / "x", replace=True)
            except SaveError as error:
                assert error.errno == code
        assert value_of(tmp_path / "x") in (1.0, 2.0)
        ckpts.save_params(tree(1), tmp_path / "x", replace=True)


SAVER = """
import sys
import numpy as np
from gemma.gm import ckpts
value, path = np.float32(sys.argv[2]), sys.argv[1]
tree = {"a": {"b": np.full((40, 30), value)}, "c": np.full((7,), value)}
print("ready", flush=True)
while True:
    ckpts.save_params(tree, path, replace=True)
"""


def start(path, value):
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(path), str(value)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_two_processes_and_real_kills(tmp_path):
    path = tmp_path / "x"
    processes = [start(path, value) for value in (1.0, 2.0)]
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert value_of(path) in (1.0, 2.0)
    ckpts.save_params(tree(3), path, replace=True)
    assert value_of(path) == 3.0 and not fd.temporaries(tmp_path)


def test_the_newest_whole_step(tmp_path):
    for number in (1, 2, 3):
        ckpts.save_params(tree(number), tmp_path / f"step_{number}", layout="kauldron", step=number)
    damaged = next(p for p in (tmp_path / "step_3" / "default").rglob("*") if p.is_file() and p.parent.name == "d")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="step 3 is not usable"):
        found = latest_valid(tmp_path)
    assert found == tmp_path / "step_2"
    assert float(np.asarray(ckpts.load_params(found)["c"])[0]) == 2.0
