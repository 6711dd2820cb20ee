# SPDX-License-Identifier: Apache-2.0
"""The likeliest token, the k likeliest, and log sum exp: kernels of every instruction set, and the public functions over
the pool, which must not depend on the number of threads."""

import ctypes

import float_kernels as fk
import numpy as np
import pytest
from float_kernels import EPS, SIZES, Kernels

from gemma.kernels import _native

VOCABULARIES = (1, 9, 8191, 8193, 40001)


@pytest.fixture(scope="module", params=(*fk.instruction_sets(), "reference"))
def kernels(request):
    return Kernels(request.param)


@pytest.fixture(scope="module")
def contexts():
    fk.hooks()
    found = [
        _native.Context(threads=threads, isa=isa)
        for isa in _native.instruction_sets()
        for threads in sorted({1, min(2, _native.processors()), _native.processors()})
    ]
    yield found
    for context in found:
        context.close()


def logits(n, seed=0, ties=True):
    """Rounded, so that many are equal."""
    x = np.random.default_rng([seed, n]).standard_normal(n, np.float32) * 4
    return np.round(x, 1) if ties else x


def ranked(x, k):
    ids = np.lexsort((np.arange(x.size), -x))[:k]
    return ids, x[ids]


@pytest.mark.parametrize("n", (*SIZES, 5000))
def test_argmax_kernel(kernels, n):
    x = logits(n)
    assert kernels.argmax(x) == x.argmax()
    for at in {0, n // 2, n - 1}:
        y = x.copy()
        y[at] = 99
        assert kernels.argmax(y) == at
        y[at] = np.nan
        assert kernels.argmax(y) == -1
    assert kernels.argmax(np.full(n, -np.inf, np.float32)) == -1
    assert kernels.argmax(np.full(n, np.inf, np.float32)) == -1
    assert kernels.argmax(np.full(n, -3, np.float32)) == 0


def test_argmax_kernel_beside_infinities(kernels):
    x = np.full(100, -np.inf, np.float32)
    x[77] = -1e30
    assert kernels.argmax(x) == 77
    x[90] = np.inf
    assert kernels.argmax(x) == 90


@pytest.mark.parametrize("n", (*SIZES, 5000))
def test_top_k_kernel(kernels, n):
    x = logits(n)
    for k in sorted({1, min(5, n), n // 2 + 1, n}):
        for pieces in {1, min(3, n)}:
            ids, values = kernels.top_k(x, k, pieces)
            expected = ranked(x, k)
            assert np.array_equal(ids, expected[0]) and np.array_equal(values, expected[1])


@pytest.mark.parametrize("n", (*SIZES, 5000))
def test_sum_exp_kernel(kernels, n):
    x = logits(n, ties=False)
    exact = np.exp(x.astype(np.float64) - x.max()).sum()
    # x - shift is off by EPS of up to 40, exp by 3 EPS, and 64 floats are added up before doubles take over.
    assert abs(kernels.sum_exp(x, float(x.max())) - exact) <= (40 + 3 + 64) * EPS * exact
    x[n // 2] = -np.inf
    assert kernels.sum_exp(x, 0.0) == pytest.approx(np.exp(x.astype(np.float64)).sum(), rel=64 * EPS * 2, abs=1e-300)


def pick(context, x, k):
    lib = fk.hooks()
    x = fk.misaligned(x)
    ids, values, total = np.full(k, -7, np.int32), np.empty(k, np.float32), ctypes.c_double()
    held = lib.gk_top_k(
        context.handle, x.ctypes.data, x.size, k, ids.ctypes.data, values.ctypes.data, ctypes.byref(total)
    )
    return lib.gk_argmax(context.handle, x.ctypes.data, x.size), held, ids, values, total.value


@pytest.mark.parametrize("n", VOCABULARIES)
def test_public_functions_on_any_number_of_threads(contexts, n):
    x = logits(n)
    exact = np.log(np.exp(x.astype(np.float64) - x.max()).sum()) + x.max()
    sums = {}
    for context in contexts:
        for k in (1, 40, 600):
            best, held, ids, values, total = pick(context, x, k)
            expected = ranked(x, k)
            assert best == x.argmax() and held == min(k, n)
            assert np.array_equal(ids[:held], expected[0]) and np.array_equal(values[:held], expected[1])
            assert total == pytest.approx(exact, abs=120 * EPS)
            assert sums.setdefault(context.isa, total) == total
    assert np.array_equal(x, logits(n))


def test_public_functions_where_most_are_masked(contexts):
    for at in (0, 8192, 39999):
        x = np.full(40000, -np.inf, np.float32)
        x[at] = -2.5
        for context in contexts:
            best, held, ids, values, total = pick(context, x, 2)
            assert (best, held, ids[0], values[0], total) == (at, 2, at, -2.5, -2.5)


def test_public_functions_refuse_what_is_not_finite(contexts):
    x = logits(20000)
    x[12345] = np.nan
    for context in contexts:
        assert pick(context, x, 3)[:2] == (-1, -4)  # GK_NOT_FINITE
        assert pick(context, np.full(20000, -np.inf, np.float32), 3)[:2] == (-1, -4)
        assert pick(context, x[:0], 3)[:2] == (-1, -1)  # GK_BAD_ARGUMENT
        assert b"expected 1.." in _native.library().gk_last_error()


def test_log_sum_exp_alone(contexts):
    x, total = logits(9000), ctypes.c_double()
    held = fk.hooks().gk_top_k(contexts[0].handle, x.ctypes.data, x.size, 0, None, None, ctypes.byref(total))
    assert held == 0 and total.value == pytest.approx(np.log(np.exp(x.astype(np.float64)).sum()), abs=1e-5)
