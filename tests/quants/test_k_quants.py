# SPDX-License-Identifier: Apache-2.0
"""The types whose encoder searches, against ggml's own: the error is its error, with and without an importance matrix.

Sums run in another order than in C, so a block whose two best candidates are a rounding error apart may end with the
other one: bytes differ in a few blocks of a hundred, the error of a tensor by less than one part in a thousand.
"""

from __future__ import annotations

import gguf_oracle_probe as ggml
import numpy as np
import pytest

from gemma import hub
from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, ShapeError
from gemma.quants import QuantType, dequantize, quantization_error, quantize

K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SEARCHED = [*K_TYPES, "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # the last four only with an importance matrix
ALLOWED = 1.001


def rmse(x: np.ndarray, data: np.ndarray, name: str, weights=1.0) -> float:
    values = dequantize(np.ascontiguousarray(data), QuantType[name], x.shape).astype(np.float64)
    return float(np.sqrt((weights * (values - x) ** 2).mean()))


def importance_of(columns: int, seed: int = 3) -> np.ndarray:
    """A few inputs matter a thousand times more than others, as in real models."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, 2, columns)).astype(np.float32)


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((96, 512)).astype(np.float32)
    rows = np.exp2(rng.integers(-20, 6, (96, 1))).astype(np.float32)
    return {
        "normal": normal * np.float32(0.02),
        "heavy tails": (rng.standard_t(3, (96, 512)) * 0.02).astype(np.float32),
        "rows of very different size": normal * rows,
        "one sign": np.abs(normal) + np.float32(0.1),
        "negative": -np.abs(normal),
        "sparse": np.where(rng.random((96, 512)) < 0.03, normal, 0).astype(np.float32),
    }


@pytest.fixture(scope="module")
def real():
    """Matrices of the real Gemma 3 270M whose rows are whole super-blocks, dequantized."""
    with open_checkpoint(hub.demo_path()) as checkpoint:
        names = ["blk.0.attn_output.weight", "blk.9.ffn_down.weight", "blk.17.ffn_down.weight"]
        return [checkpoint.read(name, np.float32)[::5].copy() for name in names]


@pytest.mark.parametrize("name", K_TYPES)
def test_error_is_that_of_the_reference(name):
    for case, x in matrices().items():
        ours, theirs = quantize(x, QuantType[name]).data, ggml.ggml_quantize(x, name)
        assert rmse(x, ours, name) <= ALLOWED * rmse(x, theirs, name), case


@pytest.mark.parametrize("name", SEARCHED)
def test_weighted_error_is_that_of_the_reference(name):
    importance = importance_of(512)
    for case, x in matrices().items():
        ours = quantize(x, QuantType[name], importance=importance).data
        theirs = ggml.ggml_quantize(x, name, importance)
        # one or two values decide a sparse block, and many candidates are equally good: a few blocks weigh the tensor
        allowed = 1.03 if case == "sparse" else ALLOWED
        assert rmse(x, ours, name, importance) <= allowed * rmse(x, theirs, name, importance), case


@pytest.mark.parametrize("name", K_TYPES)
def test_error_on_real_weights(name, real):
    for x in real:
        importance = importance_of(x.shape[1])
        assert rmse(x, quantize(x, QuantType[name]).data, name) <= ALLOWED * rmse(x, ggml.ggml_quantize(x, name), name)
        ours = quantize(x, QuantType[name], importance=importance).data
        theirs = ggml.ggml_quantize(x, name, importance)
        assert rmse(x, ours, name, importance) <= ALLOWED * rmse(x, theirs, name, importance)


@pytest.mark.parametrize("name", K_TYPES)
def test_most_blocks_are_the_reference_s(name):
    x = matrices()["normal"]
    size = QuantType[name].block_bytes
    ours, theirs = quantize(x, QuantType[name]).data.reshape(-1, size), ggml.ggml_quantize(x, name).reshape(-1, size)
    assert (ours == theirs).all(axis=1).mean() > 0.7  # a wrong trial, weight or packing makes nearly all differ


@pytest.mark.parametrize("name", SEARCHED)
def test_an_importance_matrix_lowers_the_weighted_error(name):
    x, importance = matrices()["normal"], importance_of(512)
    plain = rmse(x, quantize(x, QuantType[name]).data, name, importance)
    assert rmse(x, quantize(x, QuantType[name], importance=importance).data, name, importance) < 0.95 * plain


@pytest.mark.parametrize("name", SEARCHED)
def test_blocks_of_zeros_constants_and_vanishing_values(name):
    x = np.zeros((6, 512), np.float32)
    x[1], x[2], x[3], x[4] = 0.3, -0.3, 1e-12, 1e-42
    x[5, ::256] = 1.0
    for importance in (None, importance_of(512), np.zeros(512, np.float32)):
        packed = quantize(x, QuantType[name], importance=importance)
        values = packed.dequantize()
        assert np.isfinite(values).all() and not values[0].any()
        step = {"Q2_K": 0.11, "Q3_K": 0.1}.get(name, 0.03)  # of 0.3: half a step of a scale with 4 or 6 bits and a code
        assert np.abs(values - x)[:5].max() <= step


@pytest.mark.parametrize("name", K_TYPES)
def test_the_result_does_not_depend_on_chunks_threads_or_layout(name):
    x = np.random.default_rng(1).standard_normal((2100, 512)).astype(np.float32)  # two chunks of rows
    one = quantize(x, QuantType[name], threads=1).data
    assert np.array_equal(one, quantize(x, QuantType[name], threads=3).data)
    assert np.array_equal(one[2000:], quantize(x[2000:], QuantType[name]).data)
    assert np.array_equal(one[:64], quantize(np.asfortranarray(x[:64]), QuantType[name]).data)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(name, bad):
    x = np.ones((3, 512), np.float32)
    x[2, 300] = bad
    with pytest.raises(CheckpointError, match=rf"{name}: expected finite float32 values, got .* at \[2, 300\]"):
        quantize(x, QuantType[name])


@pytest.mark.parametrize("name", K_TYPES)
def test_scales_that_no_half_holds_are_refused(name):
    x = np.random.default_rng(2).standard_normal((2, 512)).astype(np.float32) * np.float32(1e12)
    with pytest.raises(CheckpointError, match="65504"):
        quantize(x, QuantType[name])


@pytest.mark.parametrize("name", K_TYPES)
def test_rows_that_are_not_whole_super_blocks_are_refused(name):
    with pytest.raises(ShapeError, match="whole blocks of 256"):
        quantize(np.ones((2, 288), np.float32), QuantType[name])


@pytest.mark.parametrize(
    "importance",
    [np.ones(511, np.float32), np.ones((1, 512), np.float32), np.ones(512, np.int32), -np.ones(512, np.float32),
     np.full(512, np.nan, np.float32)],
)  # fmt: skip
def test_importance_must_fit(importance):
    with pytest.raises(ShapeError, match="importance"):
        quantize(np.ones((2, 512), np.float32), QuantType.Q4_K, importance=importance)


def test_types_without_a_search_do_not_look_at_the_importance():
    x = matrices()["normal"]
    for type in (QuantType.Q8_0, QuantType.BF16, QuantType.INT8, QuantType.SFP8):
        assert np.array_equal(quantize(x, type, importance=importance_of(512)).data, quantize(x, type).data)


def test_the_error_of_a_packed_matrix():
    x = np.random.default_rng(4).standard_normal((4100, 256)).astype(np.float32)
    for type in (QuantType.Q4_K, QuantType.INT8, QuantType.SFP8, QuantType.F16):
        packed = quantize(x, type)
        difference = packed.dequantize().astype(np.float64) - x
        worst, mean = quantization_error(x, packed)
        assert worst == pytest.approx(np.abs(difference).max(), rel=1e-6)
        assert mean == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    with pytest.raises(ShapeError, match="that was packed"):
        quantization_error(x[:5], packed)
