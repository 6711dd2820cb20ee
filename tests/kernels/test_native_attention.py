# SPDX-License-Identifier: Apache-2.0
"""Attention of every instruction set: against a plain softmax in float64, and bit for bit against itself. The same token
has the same bits in a chunk, as one step, after its ring has wrapped, in pieces, in a batch and on any threads.

Tolerance. A score is a sum of H products, off by EPS (H / lanes + log lanes + 3) of the sum of magnitudes; the softmax
turns that into a relative error of each weight, twice (numerator and denominator); exp adds 3 EPS, and sums over S keys
in blocks of 128 add at most 128 + S / 128 roundings, each relative to the magnitudes that are added.
"""

import ctypes
import dataclasses

import float_kernels as fk
import ml_dtypes
import numpy as np
import pytest
from float_kernels import CACHE_TYPES, EPS, AttendArgs

from gemma.kernels import _native


@dataclasses.dataclass
class Sequence:
    """Random queries, keys and values of one sequence; keys and values as a cache of the type keeps them."""

    length: int
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    window: int = 0
    softcap: float = 0.0
    type: str = "bfloat16"
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng([self.seed, self.length, self.head_dim])
        shape = (self.kv_heads, self.length, self.head_dim)
        self.q = rng.standard_normal((self.length, self.heads, self.head_dim), np.float32) * 2 / self.head_dim**0.5
        self.k, self.v = (rng.standard_normal(shape, np.float32) for _ in "kv")
        self.k_stored, self.k_scale = self.stored(self.k)
        self.v_stored, self.v_scale = self.stored(self.v)

    def stored(self, x):
        if self.type == "int8":
            scale = np.abs(x).max(-1) / np.float32(127)
            return np.rint(x / scale[..., None]).astype(np.int8), scale
        return x.astype(np.float32 if self.type == "float32" else ml_dtypes.bfloat16), None

    def values(self, stored, scale):
        return stored.astype(np.float64) * (1 if scale is None else scale[..., None].astype(np.float64))

    def exact(self):
        """([T, N, H] in float64, how far float32 may be from it)."""
        group = self.heads // self.kv_heads
        k = np.repeat(self.values(self.k_stored, self.k_scale), group, 0)
        v = np.repeat(self.values(self.v_stored, self.v_scale), group, 0)
        q = self.q.astype(np.float64).swapaxes(0, 1)  # [N, T, H]
        scores, sizes = q @ k.swapaxes(1, 2), np.abs(q) @ np.abs(k).swapaxes(1, 2)
        if self.softcap:
            scores = np.tanh(scores / self.softcap) * self.softcap
        pos = np.arange(self.length)
        seen = pos[None] <= pos[:, None]
        if self.window:
            seen &= pos[None] > pos[:, None] - self.window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        # 4 lanes at least; the soft-cap's 6 EPS and the subtraction of the maximum are relative to the score.
        score_error = EPS * ((self.head_dim / 4 + 5 + 8) * sizes + 3)
        worst = np.where(seen, score_error, 0).max(-1, keepdims=True)
        bound = (2 * worst + EPS * (2 * 128 + 2 * self.length / 128 + 8)) * (weights @ np.abs(v))
        return (weights @ v).swapaxes(0, 1), bound.swapaxes(0, 1)

    def args(self, first, tokens, capacity, slack=0):
        """(AttendArgs, output [tokens, N, H], what must stay alive): a ring with all before `first`, and the chunk."""
        out = np.full((tokens, self.heads + 1, self.head_dim), np.nan, np.float32)
        q = fk.misaligned(np.concatenate([self.q, np.full_like(self.q[:, :1], np.nan)], 1)[first : first + tokens])
        fields = {"q": q, "out": out}
        chunk = slice(first, first + tokens)
        for name in ("k", "v", "k_scale", "v_scale"):
            source = getattr(self, name if "scale" in name else f"{name}_stored")
            if source is None:
                continue
            # What no token sees is NaN (or the int8 that is the same bits): it may not matter.
            ring = np.frombuffer(b"\xff" * (self.kv_heads * capacity * (source[0, 0].nbytes)), source.dtype)
            ring = ring.reshape(self.kv_heads, capacity, *source.shape[2:]).copy()
            if capacity:
                for pos in range(max(0, first - capacity), first):
                    ring[:, pos % capacity] = source[:, pos]
            own = np.concatenate(
                [source[:, chunk], np.broadcast_to(ring.dtype.type(-1), (*source[:, :slack].shape,))], 1
            )
            fields[name], fields[f"c{name}"] = fk.misaligned(ring), fk.misaligned(own)
        values = {name: array.ctypes.data for name, array in fields.items()}
        stride = (self.heads + 1) * self.head_dim
        return (
            AttendArgs(
                **values,
                q_stride=stride,
                out_stride=stride,
                tokens=tokens,
                first_pos=first,
                capacity=capacity,
                chunk_capacity=tokens + slack,
                cache_type=CACHE_TYPES[self.type],
                num_heads=self.heads,
                num_kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                window=self.window,
                softcap=self.softcap,
            ),
            out,
            fields,
        )


def run(kernels, sequence, first, tokens, capacity, **options):
    """Output [tokens, N, H] of `attend`."""
    args, out, _keep = sequence.args(first, tokens, capacity, **options)
    assert kernels.lib.gk_test_attend(kernels.table, ctypes.byref(args), 0, tokens, 0, sequence.kv_heads) == 0
    assert np.isnan(out[:, -1]).all()  # beyond the heads nothing is written
    return out[:, :-1]


def same(a, b):
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@pytest.fixture(scope="module", params=fk.instruction_sets())
def kernels(request):
    return fk.Kernels(request.param)


@pytest.fixture(scope="module")
def reference():
    return fk.Kernels("reference")


def test_the_struct_is_that_of_the_library(kernels):
    assert kernels.lib.gk_test_attend_args_bytes() == ctypes.sizeof(AttendArgs)


SHAPES = [
    *((4, 2, head_dim, 33) for head_dim in (4, 8, 12, 64, 80, 128, 256)),
    *((group * 2, 2, 16, 41) for group in range(1, 9)),
    *((2, 1, 16, length) for length in (1, 3, 7, 8, 9, 31, 255, 257, 640)),
    (60, 1, 8, 20),
    (130, 1, 4, 3),  # more heads than a tile has rows
]


@pytest.mark.parametrize("heads, kv_heads, head_dim, length", SHAPES)
def test_attention_of_a_prompt(kernels, reference, heads, kv_heads, head_dim, length):
    for i, type in enumerate(CACHE_TYPES):
        sequence = Sequence(
            length, heads, kv_heads, head_dim, window=(0, length // 3 + 1, 1)[i], softcap=(0.0, 2.0, 1.0)[i], type=type
        )
        exact, bound = sequence.exact()
        whole = run(kernels, sequence, 0, length, 0)
        assert np.all(np.abs(whole - exact) <= bound)
        last = run(kernels, sequence, length - 1, 1, length)
        assert same(last[0], whole[-1])
        plain = run(reference, sequence, length - 1, 1, length)
        assert np.all(np.abs(plain[0] - exact[-1]) <= 2 * EPS * np.abs(exact[-1]) + 1e-9)


@pytest.mark.parametrize("type", CACHE_TYPES)
@pytest.mark.parametrize("head_dim", (4, 64, 80))
def test_chunk_step_and_ring_give_the_same_bits(kernels, type, head_dim):
    length, window = 420, 100
    for window, capacity in ((0, length), (100, 100), (100, 99), (100, 173), (100, length), (1000, length)):
        sequence = Sequence(length, 6, 2, head_dim, window=window, softcap=3.0 if window == 100 else 0.0, type=type)
        whole = run(kernels, sequence, 0, length, 0)
        for first, tokens in ((1, 1), (127, 1), (128, 1), (99, 2), (130, 3), (250, 40), (255, 130), (419, 1), (3, 417)):
            assert same(run(kernels, sequence, first, tokens, capacity, slack=5), whole[first : first + tokens])


def test_a_ring_shorter_than_the_window_is_all_there_is(kernels):
    short = Sequence(300, window=150)
    seen = dataclasses.replace(short, window=61)  # 60 kept, and the token itself
    assert same(run(kernels, short, 200, 1, 60), run(kernels, seen, 200, 1, 60))


@pytest.mark.parametrize("type", CACHE_TYPES)
def test_pieces_give_the_same_bits(kernels, type):
    sequence = Sequence(700, 4, 2, 64, window=450, type=type)
    for first, tokens in ((699, 1), (640, 5), (300, 9)):
        whole = run(kernels, sequence, first, tokens, 512)
        args, out, _keep = sequence.args(first, tokens, 512)
        for head in range(2):
            assert kernels.lib.gk_test_attend_blocks(kernels.table, ctypes.byref(args), 0, tokens, head) == 0
        assert same(out[:, :-1], whole)
        args, out, _keep = sequence.args(first, tokens, 512)
        for t in range(tokens):  # one token and one kv head at a time
            for head in range(2):
                kernels.lib.gk_test_attend(kernels.table, ctypes.byref(args), t, t + 1, head, head + 1)
        assert same(out[:, :-1], whole)


@pytest.mark.parametrize("isa", fk.instruction_sets())
def test_threads_and_batches_give_the_same_bits(isa):
    kernels = fk.Kernels(isa)
    shapes = [(511, 1), (0, 40), (699, 1), (12, 8), (650, 1)]
    for threads in sorted({1, min(2, _native.processors()), _native.processors()}):
        context = _native.Context(threads=threads, isa=isa)
        for kv_heads, window in ((1, 0), (2, 300)):
            sequences = [Sequence(700, 4, kv_heads, 64, window=window, seed=i) for i in range(len(shapes))]
            made = [s.args(first, tokens, 700) for s, (first, tokens) in zip(sequences, shapes, strict=True)]
            expected = [run(kernels, s, first, n, 700) for s, (first, n) in zip(sequences, shapes, strict=True)]
            for chosen in ([0], [1], [2, 4, 0], [0, 2], [3], [0, 1, 2, 3, 4]):
                items = (AttendArgs * len(chosen))(*(made[i][0] for i in chosen))
                for i in chosen:
                    made[i][1][...] = np.nan
                assert kernels.lib.gk_test_attend_parallel(context.handle, items, len(chosen), 700) == 0
                for i in chosen:
                    assert same(made[i][1][:, :-1], expected[i])
        context.close()


@pytest.mark.parametrize("type", ("float32", "bfloat16"))
def test_what_is_not_finite_stays_where_it_is_seen(kernels, type):
    for bad in (np.inf, np.nan):
        for at in (150, 151, 152):  # rows that see it share a tile with rows that do not
            sequence = Sequence(200, 4, 1, 64, type=type)
            clean = run(kernels, sequence, 0, 200, 0)
            sequence.v_stored[0, at, 3] = bad
            sequence.k_stored[0, 170] = np.nan
            whole = run(kernels, sequence, 0, 200, 0)
            assert same(whole[:at], clean[:at])
            assert not np.isfinite(whole[at:170, :, 3]).any() and np.isfinite(whole[at:170, :, 4:]).all()
            assert np.isnan(whole[170:]).all()
            assert same(run(kernels, sequence, at, 1, 200)[0], whole[at])


def test_int8_vectors_that_are_zero_or_not_finite(kernels):
    sequence = Sequence(200, 4, 1, 64, type="int8")
    for scale, stored in ((sequence.k_scale, sequence.k_stored), (sequence.v_scale, sequence.v_stored)):
        scale[0, 40], stored[0, 40] = 0, 0
    exact, bound = sequence.exact()
    clean = run(kernels, sequence, 0, 200, 0)
    assert np.all(np.abs(clean - exact) <= bound)
    sequence.v_scale[0, 150] = np.nan
    whole = run(kernels, sequence, 0, 200, 0)
    assert same(whole[:150], clean[:150]) and np.isnan(whole[150:]).all()


def test_scores_of_minus_infinity_have_no_weight(kernels):
    sequence = Sequence(140, 1, 1, 8, type="float32")
    sequence.q[...] = np.abs(sequence.q)
    short = Sequence(140, 1, 1, 8, type="float32", window=12)
    short.q, short.k_stored, short.v_stored = sequence.q, sequence.k_stored, sequence.v_stored
    expected = run(kernels, short, 139, 1, 140)  # positions 128..139 are one block alone
    sequence.k_stored[0, :128] = -np.inf
    assert same(run(kernels, sequence, 139, 1, 140), expected)


def test_large_scores_do_not_overflow(kernels):
    sequence = Sequence(150, 2, 1, 16, type="float32")
    sequence.q *= 1000
    out = run(kernels, sequence, 0, 150, 0)
    exact, _ = sequence.exact()
    assert np.isfinite(out).all()
    assert np.median(np.abs(out - exact)) < 1e-3
