# SPDX-License-Identifier: Apache-2.0
"""Runs the C++ driver of tests/kernels over the native kernels in ways that this machine may not offer by itself.

    python scripts/native_cross_check.py sanitize   address and undefined-behaviour sanitizers, all kernels of this CPU
    python scripts/native_cross_check.py quick      the cheaper checks, its best instruction set; in `make test`
    python scripts/native_cross_check.py thread     the thread sanitizer, its best instruction set
    python scripts/native_cross_check.py avx512     the AVX-512 text through SIMDe's portable intrinsics, on any x86-64
    python scripts/native_cross_check.py neon       the NEON text under QEMU, with an aarch64 cross compiler

Without a name it runs all but `quick`. Where a tool is missing it says which one (Debian: libsimde-dev, g++-aarch64-linux-gnu,
qemu-user-static). The driver compares every product with float64 numbers of `gemma.quants`, float kernels with plain
loops, a tiny decoder with itself in other chunks, batches and threads. Programs stay in build/native until a source
changes. Exit code 0: every run passed; 1: one failed; 3: one could not be run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels")]

import native_cases  # noqa: E402

from gemma.errors import KernelError  # noqa: E402
from gemma.kernels import _native, build  # noqa: E402

DRIVER = ROOT / "tests/kernels/native_driver"
PROGRAMS = ROOT / "build/native"
MODES = ("sanitize", "thread", "avx512", "neon")
# What can go wrong in arithmetic and indices; the checks of every pointer, which take longest to compile, are what the
# address sanitizer sees anyway. `sanitize` has them all.
QUICK = "address,bounds,shift,signed-integer-overflow,float-cast-overflow,integer-divide-by-zero,bool"
_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Missing(Exception):
    """A tool that a mode needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to build the driver and how to start it."""

    options: dict  # of build.compile
    command: tuple[str, ...] = ()  # what runs the program, if not the machine itself
    isa: str | None = None  # None: every instruction set that the program finds


def own_sets() -> list[str]:
    """Instruction sets beside portable code that the library holds and this CPU has, best first."""
    return [name for name in _native.instruction_sets() if name != "portable"]


def plan(mode: str) -> Plan:
    """What a mode needs, or Missing."""
    if mode in ("quick", "sanitize", "thread") and _native.library() is None:
        raise Missing(f"the native library: {_native.why_missing()}")
    best = _native.instruction_sets()[:1]  # heap buffers are watched whoever fills them: the driver needs no checks
    plain = ["isa_portable.cpp", *(path.name for path in DRIVER.glob("*.cpp"))]
    if mode == "sanitize":
        return Plan(dict(sanitize="address,undefined", optimize="-O1", isa=own_sets()))
    if mode in ("quick", "thread"):
        checks = QUICK if mode == "quick" else "thread"
        return Plan(dict(sanitize=checks, unsanitized=plain, optimize="-O0", isa=own_sets()[:1]), isa=best[0])
    if mode == "avx512":
        compiler = build.find_compiler()
        if compiler.machine != "x86_64":
            raise Missing("the AVX-512 text holds 256-bit intrinsics: an x86-64 compiler")
        probe = [*compiler.command, "-fsyntax-only", "-x", "c++", "-include", "simde/x86/avx512.h", "/dev/null"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            raise Missing("the header simde/x86/avx512.h (Debian: libsimde-dev)")
        return Plan(
            dict(
                flags=["-DGK_EMULATE", "-w", "-include", str(DRIVER / "emulate.h")],
                optimize="-O0",
                isa=(),
                compiler=compiler,
            ),
            isa="avx512",
        )
    try:
        compiler = build.find_compiler("aarch64-linux-gnu-g++")
    except KernelError as error:
        raise Missing("aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)") from error
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not emulator:
        raise Missing("qemu-aarch64-static (Debian: qemu-user-static)")
    return Plan(dict(optimize="-O0", link=["-static"], compiler=compiler), (emulator,))


def run(mode: str) -> subprocess.CompletedProcess[str]:
    """Builds the driver for a mode, if its sources changed, and runs it; Missing or KernelError where that fails."""
    how = plan(mode)
    program = PROGRAMS / f"driver-{mode}"
    sources = [*build.library_sources(), *sorted(DRIVER.glob("*.cpp"))]
    build.compile(program, sources=sources, include=[DRIVER], shared=False, objects=PROGRAMS / "objects", **how.options)
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder, "cases")
        native_cases.write_cases(cases)
        command = [*how.command, str(program), str(cases), *([how.isa] if how.isa else [])]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | _ENVIRONMENT, timeout=1800, check=False
        )


def main(modes: list[str]) -> int:
    """The command; returns its exit code."""
    code = 0
    for mode in modes or MODES:
        if mode not in (*MODES, "quick"):
            print(f"expected some of {', '.join((*MODES, 'quick'))}, got {mode}", file=sys.stderr)
            return 2
        try:
            done = run(mode)
        except Missing as error:
            print(f"{mode}: not run, this machine lacks {error}")
            code = code or 3
            continue
        except KernelError as error:
            print(f"{mode}: FAILED, {error}")
            code = 1
            continue
        print(f"{mode}: {'passed' if done.returncode == 0 else 'FAILED'}\n{done.stdout}{done.stderr[-6000:]}")
        code = 1 if done.returncode else code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
