# SPDX-License-Identifier: Apache-2.0
"""The Python face of the native library: what it refuses before a pointer leaves Python, and life without the library."""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from gemma import kernels
from gemma.errors import CheckpointError, ConfigError, KernelError, ShapeError
from gemma.kernels import _native, build
from gemma.quants import PackedTensor, QuantType, quantize

needs_library = pytest.mark.skipif(kernels.library() is None, reason=f"native library: {kernels.why_missing()}")


@pytest.fixture(scope="module")
def context():
    with kernels.Context(threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def weight():
    return kernels.NativeWeight(quantize(np.linspace(-1, 1, 5 * 64, dtype=np.float32).reshape(5, 64), QuantType.Q8_0))


def test_the_numbers_of_the_header():
    header = (build.SOURCES / "gemmakit.h").read_text()
    assert f"GK_ABI_VERSION {_native.ABI_VERSION}\n" in header
    named = dict(re.findall(r"GK_(\w+) = (\d+)", header))
    assert {type.name: str(number) for type, number in _native.TYPE_IDS.items()}.items() <= named.items()


# ---- without the library ---------------------------------------------------------------------------------------------


@pytest.fixture
def reload(monkeypatch):
    """Loads the library anew inside the test, and again as it was afterwards."""
    monkeypatch.setattr(_native, "_loaded", _native._loaded.__wrapped__)


def test_turned_off(monkeypatch, reload):
    monkeypatch.setenv("GEMMA_NATIVE", "0")
    assert kernels.library() is None and kernels.why_missing() == "turned off by GEMMA_NATIVE=0"
    assert kernels.instruction_sets() == ()
    with pytest.raises(KernelError, match="needed here, but it is turned off by GEMMA_NATIVE=0; or use the JAX"):
        kernels.Context()


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "not built: .*compiler.*gemma.kernels.build"), (b"not a library", "cannot be loaded .*--force")],
)
def test_missing_and_broken_files(monkeypatch, reload, tmp_path, content, why):
    monkeypatch.delenv("GEMMA_NATIVE", raising=False)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libgemmakit.so")
    monkeypatch.setattr(build, "cached_library", lambda: tmp_path / "other.so")
    if content:
        build.LIBRARY.write_bytes(content)
    assert kernels.library() is None
    assert re.match(f".*{why}", kernels.why_missing())


@needs_library
def test_another_interface(monkeypatch, reload):
    monkeypatch.setattr(_native, "ABI_VERSION", 999)
    assert kernels.library() is None
    assert re.search(r"has interface \d+, this gemmakit needs 999: .*--force", kernels.why_missing())


def test_importing_the_face_loads_no_framework():
    code = "import sys; from gemma import kernels; kernels.library(); print({'jax', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- contexts --------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("threads", [0, -1, 10**6, 2.0, True, "2"])
def test_bad_threads(threads):
    with pytest.raises(ConfigError, match=f"threads: expected 1 to {_native.processors()}, the processors of this"):
        kernels.Context(threads)


@needs_library
def test_bad_instruction_set():
    with pytest.raises(ConfigError, match="isa: expected one of .*portable.* this CPU has, got 'avx9000'"):
        kernels.Context(1, isa="avx9000")


@needs_library
def test_contexts_close_and_say_what_they_use(weight):
    context = kernels.Context()
    assert context.threads == _native.processors() and context.isa == kernels.instruction_sets()[0]
    assert kernels.instruction_sets()[-1] == "portable"
    context.close()
    context.close()
    with pytest.raises(KernelError, match="closed: make a new one"):
        context.matmul(weight, np.zeros((1, 64), np.float32))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_alone(weight):
    script = """
import os, numpy as np
from gemma import kernels
weight = kernels.NativeWeight(np.ones((300, 64), np.float32))
context, x = kernels.Context(), np.ones((9, 64), np.float32)
context.matmul(weight, x)
child = os.fork()
if not child:
    os._exit(0 if (context.matmul(weight, x) == 64).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (context.matmul(weight, x) == 64).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_library
def test_threads_of_python_take_turns(context, weight):
    import concurrent.futures

    x = np.random.default_rng(0).standard_normal((12, 64), np.float32)
    expected = context.matmul(weight, x)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: context.matmul(weight, x), range(40)):
            np.testing.assert_array_equal(got, expected)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([[1.0]], "expected a PackedTensor or a numpy matrix, got list"),
        (np.zeros(8, np.float32), r"expected a matrix \[rows, cols\]"),
        (np.zeros((2, 8)), "float32, float16 or bfloat16, or a PackedTensor, got float64"),
        (np.zeros((2, 8), ">f4"), "expected a matrix"),
        (np.zeros((8, 4), np.float32).T, "contiguous bytes"),
        (np.zeros((4, 8), np.float32)[::-1], "contiguous bytes"),
        (np.broadcast_to(np.zeros(8, np.float32), (4, 8)), "contiguous bytes"),
        (np.zeros((0, 8), np.float32), "one or more rows"),
        (np.zeros((3, 0), np.float32), "whole blocks"),
    ],
)
def test_bad_weights(bad, words):
    with pytest.raises(ShapeError, match=words):
        kernels.NativeWeight(bad)


def test_weights_keep_their_bytes_alive_and_in_place():
    matrix = np.ones((3, 8), ml_dtypes.bfloat16)
    weight = kernels.NativeWeight(matrix)
    assert weight.struct.data == matrix.ctypes.data and weight.shape == (3, 8) and weight.type is QuantType.BF16
    assert repr(weight) == "NativeWeight(BF16 [3, 8])"
    packed = PackedTensor(QuantType.Q8_0, (2, 3, 32), np.zeros((6, 34), np.uint8))
    assert kernels.NativeWeight(packed).shape == (6, 32)
    scale = np.ones(12, np.float32)[::2]
    with pytest.raises(ShapeError, match="contiguous, aligned scale"):
        kernels.NativeWeight(PackedTensor(QuantType.INT8, (6, 4), np.zeros((6, 4), np.uint8), scale))


# ---- products --------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([[0.0] * 64], "expected a numpy array of float32 or bfloat16, got list"),
        (np.zeros((2, 64)), "float32 or bfloat16, got float64"),
        (np.zeros((2, 64), ">f4"), "expected a numpy array"),
        (np.zeros(64, np.float32), r"expected shape \[M, 64\], got \[64\]"),
        (np.zeros((2, 63), np.float32), r"expected shape \[M, 64\], got \[2, 63\]"),
        (np.zeros((64, 2), np.float32).T, "aligned rows of contiguous elements"),
        (np.zeros((4, 64), np.float32)[::-1], "aligned rows of contiguous elements"),
        (np.broadcast_to(np.zeros(64, np.float32), (4, 64)), "aligned rows of contiguous elements"),
        (np.zeros(4 * 64 + 1, np.uint8)[1:].view(np.float32).reshape(1, 64), "aligned rows of contiguous elements"),
    ],
)
def test_bad_activations(context, weight, bad, words):
    with pytest.raises(ShapeError, match=words):
        context.matmul(weight, bad)


@needs_library
def test_bad_outputs(context, weight):
    x = np.zeros((2, 64), np.float32)
    frozen = np.zeros((2, 5), np.float32)
    frozen.flags.writeable = False
    for out, words in [
        (np.zeros((2, 4), np.float32), r"out: expected shape \[2, 5\]"),
        (np.zeros((2, 5), ml_dtypes.bfloat16), "of float32, got bfloat16"),
        (frozen, "writable"),
        (x[:, :5], "x has no part in"),
        (np.zeros((5, 2), np.float32).T, "contiguous elements"),
    ]:
        with pytest.raises(ShapeError, match=words):
            context.matmul(weight, x, out=out)
    with pytest.raises(ShapeError, match="matmul_grad: x: expected a numpy array of float32, got bfloat16"):
        context.matmul_grad(weight, np.zeros((2, 5), ml_dtypes.bfloat16))


@needs_library
def test_an_empty_batch(context, weight):
    assert context.matmul(weight, np.zeros((0, 64), np.float32)).shape == (0, 5)
    assert context.matmul_grad(weight, np.zeros((0, 5), np.float32)).shape == (0, 64)
    assert context.rows(weight, []).shape == (0, 64)


@needs_library
@pytest.mark.parametrize("bad", [[-1], [5], [0, 2**40], np.zeros((1, 1), np.int32), [0.5], np.uint64([2**63])])
def test_bad_rows(context, weight, bad):
    with pytest.raises(ShapeError, match="rows: ids: expected"):
        context.rows(weight, bad)


@needs_library
def test_status_codes_become_errors(context, weight):
    """What slips past this face is refused by the library itself, in its words."""
    lib, one = kernels.library(), np.zeros((1, 64), np.float32)
    broken = _native.GkWeight.from_buffer_copy(weight.struct)
    broken.type = 9999
    status = lib.gk_matmul(context.handle, broken, one.ctypes.data, 1, 64, one.ctypes.data, 64)
    assert status == -1
    with pytest.raises(ShapeError, match="matmul: weight: unknown type 9999"):
        _native.check(status, "matmul")
    for code, error in [(-2, KernelError), (-3, KernelError), (-4, CheckpointError), (-77, KernelError)]:
        with pytest.raises(error, match="prefill: "):
            _native.check(code, "prefill")
    _native.check(0, "nothing")
