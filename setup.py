# SPDX-License-Identifier: Apache-2.0
"""The part of the build that pyproject.toml cannot say: the native library, compiled if a compiler is there.

Where it cannot be built the installation succeeds without it, and `gemma doctor` says what is lost;
GEMMAKIT_REQUIRE_NATIVE=1 (`make wheel`) makes that an error. How to compile is gemma/kernels/build.py.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # isolated builds do not have the project on their path

from gemma.errors import KernelError  # noqa: E402
from gemma.kernels import build  # noqa: E402

WITHIN = build.LIBRARY.relative_to(ROOT)


class BuildNative(build_ext):
    """Compiles libgemmakit.so into the wheel, or beside its sources for an editable install."""

    def target(self) -> Path:
        return build.LIBRARY if self.inplace else Path(self.build_lib) / WITHIN

    def run(self):
        try:
            build.compile(self.target())
            if not self.inplace:
                build.stamp_path(self.target()).unlink(missing_ok=True)  # of use to a checkout only
        except KernelError as error:
            if os.environ.get("GEMMAKIT_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            self.warn(f"gemmakit is installed without its native library, models run slower without it: {error}")

    def get_outputs(self):
        return [str(self.target())] if self.target().is_file() and not self.inplace else []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """A wheel for any Python 3 of this platform, since ctypes loads the library; for any platform without it."""

    def get_tag(self):
        platform = super().get_tag()[2]
        build_command = self.get_finalized_command("build_ext")
        held = build_command.target().is_file() or bool(build_command.inplace)
        return "py3", "none", platform if held else "any"


setup(
    ext_modules=[Extension("gemma.kernels.native.libgemmakit", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
