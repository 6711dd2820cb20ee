# SPDX-License-Identifier: Apache-2.0
"""Leaves that arrive in runs of rows are written as if they had come whole, whatever the runs and the chunks are."""

from __future__ import annotations

import numpy as np
import pytest

from gemma.gm import ckpts
from gemma.gm.ckpts import _orbax_write
from gemma.gm.ckpts._orbax import OrbaxCheckpoint
from gemma.gm.ckpts._orbax_write import Rows, write_orbax


@pytest.mark.parametrize("cuts", [[], [1], [7], [3, 4, 5, 20], list(range(1, 29))])
@pytest.mark.parametrize("rows", [1, 4, 7, 29, 100])
def test_runs_become_chunks(cuts, rows):
    array = np.arange(29 * 3, dtype=np.float32).reshape(29, 3)
    leaf = Rows(array.shape, array.dtype, lambda: np.split(array, cuts))
    found = list(_orbax_write._chunked(leaf, rows))
    assert [len(run) for run in found] == [min(rows, 29 - start) for start in range(0, 29, rows)]
    assert np.array_equal(np.concatenate(found), array)


def test_many_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(_orbax_write, "_CHUNK", 40)
    monkeypatch.setattr(_orbax_write, "_BATCH", 100)
    values = {
        "a/w": np.arange(70, dtype=np.float32).reshape(7, 10),
        "b": np.float32(3.5),
        "c": np.ones((0, 4), np.int8),
    }
    write_orbax(tmp_path, {name: Rows.of(np.asarray(value)) for name, value in values.items()})
    found = OrbaxCheckpoint(tmp_path)
    assert all(np.array_equal(found.read(name), value) for name, value in values.items())


def test_the_newest_step_is_found_from_here(tmp_path):
    for step in (1, 2):
        ckpts.save_params({"w": np.ones(step, np.float32)}, tmp_path / f"step_{step}")
    assert ckpts.latest_valid(tmp_path) == tmp_path / "step_2"
    assert ckpts.verify_manifest(tmp_path / "step_2").size > 0
