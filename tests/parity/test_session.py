# SPDX-License-Identifier: Apache-2.0
"""The session's own promises: strict promotion, one thread, no network, a home that is thrown away."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest
import support_table as support


def test_dtype_promotion_is_strict():
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_standard_promotion_can_be_asked_for(standard_promotion):
    assert (jnp.ones((2, 2), jnp.float32) + jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1),  # an address kept for documentation
        lambda: socket.getaddrinfo("example.com", 80),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    ],
    ids=["connect", "resolve", "send"],
)
def test_the_network_is_blocked(reach):
    with pytest.raises(RuntimeError, match="no network"):
        reach()


def test_loopback_is_not_blocked():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_home_and_cache_belong_to_the_session():
    root = pathlib.Path(os.environ["GEMMAKIT_TEST_ROOT"])
    for name in ("HOME", "GEMMA_CACHE_DIR", "HF_HOME"):
        assert root in pathlib.Path(os.environ[name]).parents
    said = subprocess.run([sys.executable, "-c", "import os; print(os.path.expanduser('~'))"], capture_output=True)
    assert said.stdout.decode().strip() == os.environ["HOME"]


def test_one_thread():
    import torch

    assert torch.get_num_threads() == 1


# ---- the support table ----------------------------------------------------------------------------------------------


def test_a_cell_says_yes_only_if_all_its_tests_passed():
    assert support.supported({"a": "passed", "b": "passed"})
    for tests in ({}, {"a": "skipped"}, {"a": "passed", "b": "failed"}, {"a": "passed", "b": "skipped"}):
        assert not support.supported(tests)


def test_the_table_is_rendered_from_results(tmp_path):
    results = tmp_path / "results.json"
    results.write_text('[{"cell": ["support", "Gemma 2", "JAX", "run"], "tests": {"tests/x.py::test_y": "passed"}}]')
    page = support.render(support.read(results)["support"])
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    assert rows["| Gemma 2"].count("yes") == 1 and rows["| Gemma 2"].startswith("| Gemma 2 | yes | - |")
    assert "yes" not in rows["| Gemma 1"] and "`tests/x.py::test_y`" in page


def test_the_formats_are_rendered_from_results(tmp_path):
    results = tmp_path / "results.json"
    results.write_text(
        '[{"cell": ["formats", "Gemma 2", "GGUF", "proven"], "tests": {"tests/x.py::test_y": "passed"}},'
        ' {"cell": ["formats", "Gemma 2", "GGUF", "JAX"], "tests": {"tests/x.py::test_z": "failed"}}]'
    )
    page = support.render_formats(support.read(results)["formats"])
    assert "| Gemma 2 | - | proven | - | - | - | - |" in page and "test_y" in page and "test_z" not in page


@pytest.mark.parametrize(
    "cell",
    [
        ["support", "Gemma 9", "JAX", "run"],
        ["support", "Gemma 2", "Jax", "run"],
        ["support", "Gemma 2", "JAX", "runs"],
        ["formats", "Gemma 2", "gguf", "JAX"],
    ],
)
def test_a_misspelt_cell_is_an_error(tmp_path, cell):
    import json

    results = tmp_path / "results.json"
    results.write_text(json.dumps([dict(cell=cell, tests={})]))
    with pytest.raises(support.Mismatch, match=cell[1]):
        support.read(results)
