# SPDX-License-Identifier: Apache-2.0
"""Files that change, shrink or vanish while they are open, mapped or not."""

from __future__ import annotations

import os

import numpy as np
import pytest

from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointNotFound, FormatError
from gemma.formats._source import Source
from gemma.formats.safetensors import write_safetensors


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_views_and_reads(file, mmap):
    source = Source(file, mmap=mmap)
    assert source.size == 256 * 64 and source.mapped is mmap
    np.testing.assert_array_equal(source.view(300, 500), source.read(300, 500))
    assert source.view(300, 500)[0] == 300 % 256
    assert not source.view(0, 4).flags.writeable
    assert source.view(source.size, 0).size == 0
    source.release(0, source.size)
    assert source.view(5, 1)[0] == 5
    source.close()
    source.close()
    with pytest.raises(ValueError, match="after close"):
        source.read(0, 1)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_shrank_is_an_error(file, mmap):
    source = Source(file, mmap=mmap)
    os.truncate(file, 1000)
    with pytest.raises(FormatError, match="ends here") as caught:
        source.view(0, 2000)
    assert caught.value.offset == 1000
    with pytest.raises(FormatError, match="ends here"):
        source.read(900, 200)
    source.close()


@pytest.mark.parametrize("mmap", [True, False])
def test_replacing_by_rename_is_safe(tmp_path, mmap):
    path = tmp_path / "model.safetensors"
    old, new = np.arange(5000, dtype=np.float32), np.zeros(3, np.float32)
    write_safetensors(path, {"x": old})
    with open_checkpoint(path, mmap=mmap) as checkpoint:
        view = checkpoint.read("x")
        write_safetensors(path, {"x": new})
        np.testing.assert_array_equal(view, old)
        np.testing.assert_array_equal(checkpoint.read("x"), old)
        path.unlink()
        np.testing.assert_array_equal(checkpoint.read("x"), old)


def test_views_outlive_the_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": np.arange(9, dtype=np.int32)})
    with open_checkpoint(path) as checkpoint:
        view = checkpoint.read("x")
    np.testing.assert_array_equal(view, np.arange(9))


def test_not_a_regular_file(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no such file"):
        Source(tmp_path / "absent")
    with pytest.raises(FormatError, match="regular file, got a directory"):
        Source(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file, got a pipe"):
        Source(tmp_path / "pipe")


def test_many_files_leave_no_descriptor(file):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(50):
        with pytest.raises(FormatError):
            open_checkpoint(file)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
