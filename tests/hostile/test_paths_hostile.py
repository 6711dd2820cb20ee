# SPDX-License-Identifier: Apache-2.0
"""Paths that lead nowhere or to no file: each reader says so in one error, without waiting and without a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guard import refused

from gemma.checkpoint import open_checkpoint
from gemma.errors import GemmaError
from gemma.hf_config import read_config
from gemma.tokenizer import Tokenizer

READERS = [open_checkpoint, Tokenizer.from_file, read_config]


@pytest.mark.parametrize("reader", READERS, ids=["checkpoint", "tokenizer", "config"])
@pytest.mark.parametrize("name", ["absent", "x" * 5000, "a\0b", "absent/deeper", "\n", "\udcff"], ids=repr)
def test_names_that_no_file_has(tmp_path, reader, name):
    error = refused(os.path.join(tmp_path, name), GemmaError, act=reader, names="", longest=8000)
    assert isinstance(error, FileNotFoundError)


@pytest.mark.parametrize("reader", READERS, ids=["checkpoint", "tokenizer", "config"])
def test_things_that_are_no_files(tmp_path, reader):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"")
    names = ["loop", "file/below"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        names.append("pipe")
    for path in [tmp_path / name for name in names] + [Path("/dev/zero")] * os.path.exists("/dev/zero"):
        refused(path, GemmaError, act=reader)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("reader", READERS, ids=["checkpoint", "tokenizer", "config"])
def test_files_that_may_not_be_read(tmp_path, reader):
    path = tmp_path / "secret"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    refused(path, GemmaError, match="denied", act=reader)
