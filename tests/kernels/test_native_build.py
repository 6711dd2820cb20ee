# SPDX-License-Identifier: Apache-2.0
"""Building the native library: only what changed, in one step, with words where it fails, and optional throughout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gemma.errors import KernelError
from gemma.kernels import _native, build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiler():
    try:
        return build.find_compiler()
    except KernelError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(os.environ.get("GEMMA_NATIVE", "") == "0", reason="GEMMA_NATIVE=0: asked to do without")
def test_where_a_compiler_is_the_library_is_too(compiler):
    """The tests of native code are skipped without it: a source that does not compile must not turn them all off."""
    assert _native.library() is not None, f"{compiler.command} is here, but the library is {_native.why_missing()}"


@pytest.fixture
def project(tmp_path, compiler):
    """A library of two files and a header; returns a function that builds it."""
    (tmp_path / "a.h").write_text("int answer();\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint answer() { return 42; }\n')
    (tmp_path / "b.cpp").write_text("int other() { return 1; }\n")

    def make(**options):
        sources = [tmp_path / "a.cpp", tmp_path / "b.cpp"]
        return build.compile(
            tmp_path / "lib.so", sources=sources, objects=tmp_path / "o", optimize="-O0", compiler=compiler, **options
        )

    return make


def objects(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("o/*/*.o")}


def test_only_what_changed_is_compiled(project, tmp_path):
    assert project() is True
    first = objects(tmp_path)
    assert len(first) == 2 and project() is False
    (tmp_path / "a.h").write_text("int answer();  // of everything\n")
    assert project() is True
    second = objects(tmp_path)
    assert len(second) == 2, "the old object is gone"
    assert {name for name in first if name.startswith("b-")} == {name for name in second if name.startswith("b-")}
    assert {name for name in first if name.startswith("a-")} != {name for name in second if name.startswith("a-")}
    (tmp_path / "lib.so").unlink()
    assert project() is True and project() is False
    assert project(flags=["-DOTHER"]) is True, "other flags, another library"


def test_a_failing_compiler_leaves_what_was_there(project, tmp_path):
    project()
    before = (tmp_path / "lib.so").read_bytes()
    (tmp_path / "b.cpp").write_text("int other() { return missing; }\n")
    with pytest.raises(KernelError, match=r"compiling b.cpp failed with exit code 1: (?s:.*)missing"):
        project()
    (tmp_path / "b.cpp").write_text("int undefined(); int other() { return undefined(); }\n")
    with pytest.raises(KernelError, match=r"linking lib.so failed (?s:.*)undefined"):
        project()
    assert (tmp_path / "lib.so").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written(project, tmp_path):
    (tmp_path / "o").write_text("a file where a folder should be")
    with pytest.raises(KernelError, match="could not be written"):
        project()


def test_no_compiler(monkeypatch, tmp_path):
    with pytest.raises(KernelError, match=r"expected a C\+\+20 compiler.*no-such-compiler: not found.*name it in CXX"):
        build.find_compiler("no-such-compiler")
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(KernelError, match=r"old-c\+\+: does not compile C\+\+20 .*unrecognized option"):
        build.find_compiler()
    assert build.main(["--output", str(tmp_path / "lib.so"), "--optional"]) == 0
    assert build.main(["--output", str(tmp_path / "lib.so")]) == 1


def test_flags_of_an_instruction_set_reach_only_its_file():
    assert "-mavx512vnni" in build.isa_flags(Path("isa_avx512.cpp"), "x86_64")
    for name, machine in [
        ("isa_portable", "x86_64"),
        ("matmul", "x86_64"),
        ("isa_avx2", "aarch64"),
        ("avx2", "x86_64"),
    ]:
        assert build.isa_flags(Path(f"{name}.cpp"), machine) == ()
    held = {path.stem.removeprefix("isa_") for path in build.SOURCES.glob("isa_*.cpp")}
    assert {"portable", "avx2", "avx512", "neon"} <= held
    assert not [path for path in build.library_sources() if path.name.startswith("ffi")]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm reads object files")
def test_wide_instructions_cannot_leak_into_portable_code(compiler, tmp_path):
    """A function that linkers merge (weak) must be in the namespace of its instruction set: else the copy compiled for
    AVX could be the one that every CPU runs. Unoptimized code keeps every function that any optimization might."""
    if compiler.machine != "x86_64":
        pytest.skip("a rule of files with more than the machine's basic instructions")
    command = [*compiler.command, "-std=c++20", "-O0", "-w", "-ffp-contract=off", *build.ISA_FLAGS["x86_64"]["avx2"]]
    target = tmp_path / "isa.o"
    subprocess.run([*command, "-c", str(build.SOURCES / "isa_avx2.cpp"), "-o", str(target)], check=True)
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split(maxsplit=2) for line in listing.splitlines()]
    weak = [name for _, kind, name in lines if kind in "WwVvu" and "gk::avx2::" not in name and "DW.ref" not in name]
    assert not weak
    assert [name for _, kind, name in lines if kind == "T"] == ["gk::avx2_kernels()"]


@pytest.mark.slow
@pytest.mark.parametrize("works", [False, True])
def test_wheels(tmp_path, works, compiler):
    """Without a compiler a pure wheel; with one, a wheel of this platform with the library inside."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(
        "build", ".git", ".venv*", "tests", "*.so", "*.stamp", "__pycache__", "*.egg-info", "dist"
    )
    shutil.copytree(ROOT, tree, ignore=skip)
    environment = os.environ | {"CXX": shutil.which(compiler.command[0]) if works else "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as m; print(m.build_wheel('.'))"],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tree.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    library = [name for name in names if name.endswith(".so")]
    assert wheel.name.endswith("-py3-none-any.whl") is not works
    assert library == (["gemma/kernels/native/libgemmakit.so"] if works else [])
    assert {f"gemma/kernels/native/{path.name}" for path in build.SOURCES.glob("*.[ch]*")} <= set(names)
    assert not [name for name in names if name.endswith((".o", ".stamp"))]
    if not works:
        assert "without its native library" in done.stdout + done.stderr
