# SPDX-License-Identifier: Apache-2.0
"""What every test run shares: one thread per worker, no network, a throw-away home, strict JAX promotion.

Nothing here imports jax or torch: threads and devices are chosen through the environment, before either is loaded. The
home folder and `$GEMMA_CACHE_DIR` are one temporary folder per run; its xdist workers share it, so that the assembled
demo model and the XLA compile cache are made once. Tests marked `supports(family, framework, verb)` are the cells of
docs/support.md; `--support-json FILE` writes their results for scripts/support_table.py.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
STRICT_FOLDERS = ("gm", "parity", "mutations", "kernels")

_owns_root = "GEMMAKIT_TEST_ROOT" not in os.environ  # an xdist worker inherits it from the process that made it
if _owns_root:
    os.environ["GEMMAKIT_TEST_ROOT"] = tempfile.mkdtemp(prefix="gemmakit-tests-")
ROOT = pathlib.Path(os.environ["GEMMAKIT_TEST_ROOT"])


def _xla_flags() -> list[str]:
    """One thread; and loops of XLA's classic emitter, which compile in half the time and mean the same.

    XLA ends the process at a flag that it does not know, so the second is for the releases known to have it. With
    `XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` the tests run on the emitters that users have.
    """
    quick = importlib.metadata.version("jaxlib").startswith("0.10.")
    return ["--xla_cpu_multi_thread_eigen=false", *["--xla_cpu_use_fusion_emitters=false"] * quick]


def _isolate() -> None:
    """Sets the environment of this process and of every subprocess that a test starts."""
    for name in ("home", "cache"):
        (ROOT / name).mkdir(parents=True, exist_ok=True)
    os.environ.update(HOME=str(ROOT / "home"), XDG_CACHE_HOME=str(ROOT / "home/.cache"))
    os.environ.update(GEMMA_CACHE_DIR=str(ROOT / "cache"), HF_HOME=str(ROOT / "home/huggingface"))
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = "1"  # two workers on two cores: more threads only fight (torch reads OMP_NUM_THREADS)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests marked gpu are started with another value
    for flag in _xla_flags():
        if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        os.environ.pop(name, None)
    # helpers that several folders import
    for folder in ("tests/oracles", "tests/parity", "tests/real", "tests/serving", "scripts"):
        sys.path.insert(0, str(TESTS.parent / folder))


_isolate()


class NetworkBlocked(RuntimeError):
    """A test tried to reach another machine. Not an OSError: code must not mistake it for an ordinary refusal."""


def _is_local(address) -> bool:
    if not isinstance(address, tuple):
        return True  # a unix socket's path
    host = address[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _guarded(function, where):
    """`function`, refusing addresses of other machines; `where` picks the address out of its arguments."""

    def guard(*args, **kwargs):
        address = where(args)
        if not _is_local(address):
            raise NetworkBlocked(f"tests have no network; something asked for {address!r}")
        return function(*args, **kwargs)

    return guard


def _block_network() -> None:
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name), lambda args: args[1]))
    socket.socket.sendto = _guarded(socket.socket.sendto, lambda args: args[-1])
    socket.getaddrinfo = _guarded(socket.getaddrinfo, lambda args: (args[0],))


_block_network()


# ---- strictness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def strict_jax():
    """Implicit dtype and rank promotion are errors, matrix products are float32 where the operands are."""
    import jax

    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("highest"),
    ):
        yield


@pytest.fixture
def standard_promotion(request):
    """Opts one test out of the strict promotion of its folder; for calls into libraries that need it (optax)."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _strict_by_folder(request):
    """Asks for `strict_jax` in every test of the JAX, parity and kernel folders."""
    if set(STRICT_FOLDERS) & set(request.path.relative_to(TESTS).parts[:-1]):
        request.getfixturevalue("strict_jax")


# ---- workers --------------------------------------------------------------------------------------------------------

# Folders whose tests share something slow to make (the real model; oracles and compiled models), the longest first.
TOGETHER = {"tests/real/": "real", "tests/parity/test_hf.py": "oracles", "tests/mutations/": "oracles"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One unit of work is a file, or the files of one value of TOGETHER; those start first, the rest by size.

    (`--dist loadgroup` groups nothing with pytest 9.2 and xdist 3.8, and would start the longest tests last.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.split("::")[0]
            return next((group for prefix, group in TOGETHER.items() if name.startswith(prefix)), name)

        def _assign_work_unit(self, node):
            for group in reversed(TOGETHER.values()):
                if group in self.workqueue:
                    self.workqueue.move_to_end(group, last=False)
            super()._assign_work_unit(node)

    return ByFile(config, log)


# ---- the support table's results ------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--support-json", metavar="FILE", help="write the results of tests marked `supports` here")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "supports(family, framework, verb): a cell of docs/support.md rests on this test"
    )
    config.addinivalue_line("markers", "converts(family, format, verb): a cell of docs/formats.md rests on this test")
    if config.getoption("--support-json") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportRecorder(pathlib.Path(config.getoption("--support-json"))))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for page, name in (("support", "supports"), ("formats", "converts")):
        for mark in item.iter_markers(name):
            report.user_properties.append(("cell", [page, *mark.args]))  # travels from an xdist worker to its master
    return report


class SupportRecorder:
    """Collects {cell: {test: outcome}}; a parametrized test counts as passed only if all of its cases did."""

    def __init__(self, target: pathlib.Path):
        self.target, self.cells = target, {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        for name, cell in report.user_properties:
            if name == "cell":
                tests = self.cells.setdefault(tuple(cell), {})
                test = report.nodeid.split("[")[0]
                order = ("passed", "skipped", "failed")
                tests[test] = max(tests.get(test, "passed"), report.outcome, key=order.index)

    def pytest_sessionfinish(self):
        rows = [dict(cell=list(cell), tests=dict(sorted(tests.items()))) for cell, tests in sorted(self.cells.items())]
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(rows, indent=1) + "\n")


def pytest_unconfigure(config):
    if _owns_root and not hasattr(config, "workerinput"):
        shutil.rmtree(ROOT, ignore_errors=True)
