# SPDX-License-Identifier: Apache-2.0
"""Eight devices, or two processes, compute what one device does; a run moves from one number of devices to another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_run
import spread_run

from gemma.gm import train

MOVED = 16  # steps of the run that begins on eight devices


def started(script, devices: int, *arguments, **options) -> subprocess.Popen:
    """A script of this folder with so many simulated devices."""
    environment = dict(
        os.environ,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_PLATFORMS="cpu",
        OMP_NUM_THREADS="1",
    )
    command = [sys.executable, script.__file__, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, **pipes, **options)


def output(process: subprocess.Popen, seconds: int = 500) -> list[str]:
    out, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error[-3000:]
    return out.splitlines()


def check_losses(lines: list[str], names: list[str]) -> None:
    losses = {name: row for line in lines for name, row in json.loads(line).items()}
    assert set(losses) == {"single", *names}
    single = np.array(losses.pop("single"))
    assert len(single) == spread_run.STEPS and single[-1] < single[0] - 0.1  # else they could be equal for nothing
    for name, row in losses.items():
        np.testing.assert_allclose(row, single, rtol=1e-5, err_msg=name)


def check_same_run(result: train.Result, expected: train.Result) -> None:
    """The same data in the same order, exactly; the same numbers but for the order of sums."""
    assert len(result.history) == len(expected.history)
    for one, other in zip(result.history, expected.history):
        assert (one["step"], one["weight"], one["positions"]) == (other["step"], other["weight"], other["positions"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for one, other in zip(*(jax.tree.leaves(run.state.params) for run in (result, expected)), strict=True):
        # Adam divides by the root of a mean of squares, so a gradient that is nearly zero moves by its rounding.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_eight_devices_are_one_and_a_run_moves_from_eight_to_two_to_one(tmp_path):
    (tmp_path / "moved").mkdir(), (tmp_path / "whole").mkdir()
    process = started(spread_run, 8, "all three", f"move={tmp_path / 'moved'}")
    expected = small_run.trainer(tmp_path / "whole", keep=1.0).fit()  # meanwhile
    check_losses(output(process), ["all three"])
    assert train.Checkpoints(tmp_path / "moved/steps", read_only=True).steps() == [MOVED - 1, MOVED]
    check_same_run(small_run.trainer(tmp_path / "moved", keep=1.0).fit(), expected)


@pytest.mark.slow
def test_every_way_to_spread_is_one_device():
    names = ["fsdp", "tensor", "data"]
    check_losses(output(started(spread_run, 8, *names)), names)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Four devices each, FSDP over all eight; saved together halfway, resumed together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder, steps = tmp_path / "spread", 8
    folder.mkdir(), (tmp_path / "one").mkdir()
    pair = [started(small_run, 4, folder, steps, index, address) for index in (0, 1)]
    expected = small_run.trainer(
        tmp_path / "one", keep=1.0
    ).fit()  # the loader's batches do not depend on the processes
    for lines in map(output, pair):
        assert [line for line in lines if "peer ranks" not in line] == [
            "CheckpointNotFound",
            "CheckpointNotFound",
            "done",
        ]
    log = (folder / "log.csv").read_text().splitlines()
    assert len(log) == 1 + steps  # one process writes it
    alone = small_run.trainer(folder, keep=1.0).fit()  # goes on with what two have saved
    check_same_run(alone, expected)
    assert [row["tokens"] for row in alone.history] == [row["tokens"] for row in expected.history]
