# SPDX-License-Identifier: Apache-2.0
"""The C++ driver over every kernel and a whole decoder: under sanitizers, and on instruction sets of other machines."""

import native_cross_check
import pytest

from gemma import kernels
from gemma.errors import KernelError
from gemma.kernels import build


def run(mode: str):
    try:
        done = native_cross_check.run(mode)
    except native_cross_check.Missing as error:
        pytest.skip(f"this machine lacks {error}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    assert " 0 failed" in done.stdout
    return done.stdout


@pytest.fixture(autouse=True)
def _compiler():
    try:
        build.find_compiler()
    except KernelError as error:
        pytest.skip(str(error))
    if kernels.library() is None:
        pytest.skip(f"native library: {kernels.why_missing()}")


def test_no_kernel_reads_past_its_input():
    assert f"{kernels.instruction_sets()[0]}: ok" in run("quick")


@pytest.mark.slow
def test_every_instruction_set_of_this_cpu():
    said = run("sanitize")
    assert all(f"{isa}: ok" in said for isa in kernels.instruction_sets())


@pytest.mark.slow
def test_threads_do_not_race():
    run("thread")


@pytest.mark.slow
def test_the_avx512_text_through_portable_intrinsics():
    assert "avx512: ok" in run("avx512")


@pytest.mark.slow
def test_the_neon_text_under_an_emulator():
    assert "neon: ok" in run("neon")
