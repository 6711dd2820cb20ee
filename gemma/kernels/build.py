# SPDX-License-Identifier: Apache-2.0
"""Compiles the native library: `python -m gemma.kernels.build`, `setup.py`, the tests and their sanitizers call this.

It needs a C++20 compiler and the standard library of Python, nothing else, because pip's isolated builds have nothing
else. Only what changed is compiled again: objects are kept under a name that holds a hash of their sources, headers,
flags and compiler. What is compiled is in `native/`; loading the result is `_native.py`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import gemma
from gemma.errors import KernelError

SOURCES = Path(__file__).resolve().parent / "native"
LIBRARY = SOURCES / "libgemmakit.so"  # of that name on macOS, too: ctypes does not mind

# Contraction would give an output other bits on another instruction set's tail loop; fused steps are spelled instead.
COMMON = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
# Vectors never cross the border of a file (psabi); GCC 12's own AVX-512 header reads what it calls undefined.
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# What isa_<name>.cpp is compiled with, on the machine that has it; elsewhere those files compile to nothing.
ISA_FLAGS = {
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": (*_AVX512, "-mavx512bf16")},
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",)},
}
_MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++20 compiler: its command, what `--version` says, and what it compiles for."""

    command: tuple[str, ...]
    version: str
    machine: str  # a key of ISA_FLAGS, or whatever else the compiler says
    darwin: bool


def find_compiler(cxx: str | None = None) -> Compiler:
    """The first of `cxx`, $CXX, c++, g++, clang++ that compiles C++20; one that is named is the only one tried.

    Raises:
      KernelError: there is none; the message says what each one answered.
    """
    if sys.platform == "win32":
        raise KernelError("the native kernels need Linux or macOS; use Windows' Linux subsystem, or JAX or PyTorch")
    named = cxx or os.environ.get("CXX")
    reasons = []
    for name in [named] if named else ["c++", "g++", "clang++"]:
        command = tuple(shlex.split(name))
        if not command or not shutil.which(command[0]):
            reasons.append(f"{name}: not found")
            continue
        probe = _run([*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], "#include <bit>\n#include <atomic>\n")
        if probe.returncode:
            reasons.append(f"{name}: does not compile C++20 ({_last_line(probe.stderr)})")
            continue
        version = _run([*command, "--version"]).stdout
        target = _run([*command, "-dumpmachine"]).stdout.strip()
        machine = target.split("-")[0].lower()
        return Compiler(command, f"{version}\n{target}", _MACHINES.get(machine, machine), "darwin" in target)
    raise KernelError(
        f"expected a C++20 compiler (GCC 11, Clang 14 or newer), got: {'; '.join(reasons)}. "
        f"Install one (for example the package g++), or name it in CXX"
    )


def _run(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", check=False)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "error" in line] or text.strip().splitlines()[-1:]
    return lines[0][:200] if lines else "it said nothing"


def library_sources() -> list[Path]:
    """The sources of libgemmakit.so: every .cpp of native/ but the XLA shim's (ffi*.cpp), which needs jaxlib."""
    found = sorted(path for path in SOURCES.glob("*.cpp") if not path.name.startswith("ffi"))
    if not found:
        raise KernelError(f"expected C++ sources in {SOURCES}, found none: install gemmakit again")
    return found


def isa_flags(path: Path, machine: str) -> tuple[str, ...]:
    """The instruction set flags of a source file: those of `isa_<name>.cpp` on a machine that has them."""
    name = path.stem.removeprefix("isa_") if path.stem.startswith("isa_") else ""
    return ISA_FLAGS.get(machine, {}).get(name, ())


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One source file, how to compile it, and the object that comes of it, whose name holds the key."""

    source: Path
    command: tuple[str, ...]  # without the output
    compiler: Compiler
    folders: tuple[Path, ...]
    planned: str
    objects: Path

    def key(self) -> str:
        """A hash of compiler, command and every file that goes in, as they are now."""
        return _hash(self.compiler.version, *self.command, *_texts(self.source, self.folders, {}).values())

    @property
    def output(self) -> Path:
        """The object file."""
        return self.objects / f"{self.source.stem}-{self.planned[:16]}.o"


def compile(
    target: Path,
    *,
    sources: Iterable[Path] | None = None,
    include: Iterable[Path] = (),
    flags: Iterable[str] = (),
    link: Iterable[str] = (),
    optimize: str = "-O3",
    sanitize: str | None = None,
    unsanitized: Iterable[str] = (),
    shared: bool = True,
    isa: Iterable[str] | None = None,
    compiler: Compiler | None = None,
    objects: Path | None = None,
    jobs: int | None = None,
    force: bool = False,
) -> bool:
    """Compiles and links what is not up to date, and puts the result in place in one step.

    Args:
      sources: C++ files; None: those of libgemmakit.so. `include`: folders of headers beside `native/`.
      flags, link: further flags of the compiler for every file, and of the linker.
      sanitize: a list for -fsanitize, for example "address,undefined"; any finding then ends the program.
      unsanitized: names of sources that are compiled without it.
      shared: False: a program instead of a shared library.
      isa: the instruction sets of ISA_FLAGS to compile in, beside portable code; None: all of this machine.
      compiler: None: `find_compiler()`.
      objects: the folder where objects are kept; None: build/native of a checkout, else in the cache folder.
      jobs: compilers at a time; None: one for each processor of this process. `force`: compile everything again.

    Returns:
      True if anything was compiled or linked, False if the target was up to date.

    Raises:
      KernelError: no compiler, or it fails; the message holds the first errors. What was at `target` is unchanged.
    """
    compiler, target = compiler or find_compiler(), Path(target)
    sources = library_sources() if sources is None else [Path(path) for path in sources]
    folders, isa = [SOURCES, *map(Path, include)], None if isa is None else tuple(isa)
    common = [*COMMON, *WARNINGS, optimize, *flags, *(f"-I{path}" for path in folders)]
    linking = [*compiler.command, *(["-shared"] if shared else []), optimize, "-pthread", *link]
    linking += ["-Wl,-z,defs", "-Wl,--exclude-libs,ALL"] if shared and not compiler.darwin else []
    checks, unsanitized = [], frozenset(unsanitized)
    if sanitize:
        checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
        linking += checks[:1]
    objects = _variant(objects or _objects_folder(), compiler, [*common, *checks])
    units = [
        _unit(path, compiler, common + (checks if path.name not in unsanitized else []), isa, folders, objects)
        for path in sources
    ]
    key = _hash(*(unit.output.name for unit in units), *linking)
    if not force and target.is_file() and stamp_path(target).is_file() and stamp_path(target).read_text() == key:
        return False
    _compile_all([unit for unit in units if force or not unit.output.is_file()], jobs)
    _link(target, linking, [unit.output for unit in units], static=not sanitize and not compiler.darwin)
    _replace(stamp_path(target), lambda path: path.write_text(key))
    _forget_old(units, objects)
    return True


def _forget_old(units: list[_Unit], objects: Path) -> None:
    kept = {unit.output for unit in units}
    for stem in {unit.source.stem for unit in units}:
        for old in set(objects.glob(f"{stem}-{'?' * 16}.o")) - kept:
            old.unlink(missing_ok=True)


def _objects_folder() -> Path:
    root = SOURCES.parents[2]
    if (root / "pyproject.toml").is_file() and os.access(root, os.W_OK):
        return root / "build/native"
    from gemma import hub  # not there, nor needed, in pip's isolated builds

    return hub.cache_dir() / "native/objects"


def stamp_path(target: Path) -> Path:
    """The file beside a target that says what it was made of."""
    return target.with_name(target.name + ".stamp")


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _variant(objects: Path, compiler: Compiler, common: list[str]) -> Path:
    """One folder per compiler and set of flags, so that a sanitized build does not throw the plain one away."""
    return objects / _hash(compiler.version, *compiler.command, *common)[:8]


def _unit(path: Path, compiler: Compiler, common: list[str], isa, folders: list[Path], objects: Path) -> _Unit:
    held = isa is None or path.stem.removeprefix("isa_") in isa
    command = (*compiler.command, *common, *(isa_flags(path, compiler.machine) if held else ()), "-c", str(path))
    unit = _Unit(path, command, compiler, tuple(folders), "", objects)
    return dataclasses.replace(unit, planned=unit.key())


def _texts(path: Path, folders: Sequence[Path], seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The contents of a source and of every file that it includes between quotes, at any depth."""
    if path not in seen:
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[path], re.MULTILINE):
            places = (folder / os.fsdecode(name) for folder in (path.parent, *folders))
            found = next((place.resolve() for place in places if place.is_file()), None)
            if found:
                _texts(found, folders, seen)
    return seen


def _replace(target: Path, write) -> None:
    """Calls `write(temporary path)` and renames what it wrote to `target`; a failure leaves nothing behind."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise KernelError(f"{target} could not be written ({error.strerror or error}): check the folder") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone already, or its folder is none
            temporary.unlink()


def _checked(command: Sequence[str], what: str) -> None:
    done = _run(command)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if re.search("error|undefined|cannot find", line)][:8] or lines[-8:]
        raise KernelError(
            f"{what} failed with exit code {done.returncode}: {shlex.join(command)}\n" + "\n".join(errors)
        )
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")


def _compile_all(units: list[_Unit], jobs: int | None) -> None:
    units = sorted(units, key=lambda unit: not unit.source.stem.startswith("isa_"))  # the long ones first
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def write(unit: _Unit, path: Path) -> None:
        _checked([*unit.command, "-o", str(path)], f"compiling {unit.source.name}")
        if unit.key() != unit.planned:  # its name would promise what it does not hold
            raise KernelError(f"{unit.source.name} or its headers changed while it was compiled: run it again")

    def work(unit: _Unit) -> None:
        _replace(unit.output, lambda path: write(unit, path))

    with concurrent.futures.ThreadPoolExecutor(jobs or processors) as pool:
        waiting = [pool.submit(work, unit) for unit in units]
        try:
            for future in waiting:
                future.result()
        finally:
            for future in waiting:
                future.cancel()


def _link(target: Path, linking: list[str], objects: list[Path], static: bool) -> None:
    """With the C++ runtime inside where it can be: another package's older libstdc++ may be loaded already."""

    def write(path: Path, *runtime: str) -> None:
        _checked([*linking, *runtime, "-o", str(path), *map(str, objects)], f"linking {target.name}")

    if static:
        try:
            return _replace(target, lambda path: write(path, "-static-libstdc++", "-static-libgcc"))
        except KernelError as error:
            if "stdc++" not in str(error).split("\n", 1)[-1]:
                raise
    return _replace(target, write)


def cached_library() -> Path:
    """Where the library of this version goes if the package's own folder cannot be written."""
    from gemma import hub

    return hub.cache_dir() / f"native/libgemmakit-{gemma.__version__}.so"


def is_stale() -> bool:
    """True in a checkout whose sources are newer than its library."""
    if not (SOURCES.parents[2] / "pyproject.toml").is_file() or not LIBRARY.is_file():
        return False
    built = LIBRARY.stat().st_mtime
    return any(path.stat().st_mtime > built for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m gemma.kernels.build`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gemma.kernels.build", description="Compile gemmakit's native library, if it is not up to date."
    )
    parser.add_argument("--output", type=Path, help="where to put it; default: where gemmakit looks for it")
    parser.add_argument("--cxx", help="the compiler; default: $CXX, else c++, g++ or clang++")
    parser.add_argument("--jobs", type=int, help="compilers at a time; default: one for each processor")
    parser.add_argument("--force", action="store_true", help="compile everything again")
    parser.add_argument("--optional", action="store_true", help="exit with 0 where it cannot be built")
    given = parser.parse_args(arguments)
    target = given.output or (LIBRARY if os.access(SOURCES, os.W_OK) else cached_library())
    start = time.perf_counter()
    try:
        built = compile(target, compiler=find_compiler(given.cxx), jobs=given.jobs, force=given.force)
    except KernelError as error:
        print(f"native library not built: {error}", file=sys.stderr)
        return 0 if given.optional else 1
    print(f"{target}: {f'built in {time.perf_counter() - start:.0f} s' if built else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
