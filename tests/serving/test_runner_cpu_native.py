# SPDX-License-Identifier: Apache-2.0
"""The CPU runner on the native decoder: the contract to the bit, on every family, layout and cache type."""

import numpy as np
import pytest
from runner_contract import LONG, SLOTS, RunnerContract

from gemma import testing
from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, ConfigError, KernelError, SamplingError, UnsupportedError
from gemma.kernels import _native
from gemma.kernels._model import GkLayer, GkModelConfig, NativeModel, unserved
from gemma.sampling import SamplingParams
from gemma.serving._runner_cpu import CpuRunner
from gemma.serving.engine import Engine
from gemma.serving.runner import StepIn

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"native library: {_native.why_missing()}")


def tiny(family):
    return testing.tiny_config(family, query_pre_attn_scalar=24.0)  # what a GGUF can say


def runner_of(path, **flags) -> CpuRunner:
    with open_checkpoint(path) as checkpoint:
        return CpuRunner(NativeModel(checkpoint, **flags), slots=SLOTS, max_len=24)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """tiny_file("gemma3"): a GGUF of random float weights."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(family):
        path = folder / f"{family}.gguf"
        return path if path.exists() else testing.write_tiny_gguf(path, tiny(family))

    return make


class TestGemma3(RunnerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tiny_file):
        return runner_of(tiny_file("gemma3"), threads=1)


class TestGemma2InBfloat16(RunnerContract):
    cache_dtype = "bfloat16"

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tiny_file):
        return runner_of(tiny_file("gemma2"), threads=1)


class TestGemma1InInt8(RunnerContract):
    cache_dtype = "int8"

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tiny_file):
        return runner_of(tiny_file("gemma"))


def logits_of(path, **flags):
    runner = runner_of(path, **flags)
    runner.prefill(0, LONG, 0)
    runner.step([StepIn(0, 50)])
    return runner.logits(0)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_layout_of_a_file_gives_the_same_bits(tiny_file, tmp_path, family):
    """A GGUF and a Hugging Face folder are read in place, fused or transposed files are copied: one model."""
    want = logits_of(tiny_file(family))
    folder = testing.write_tiny_safetensors(tmp_path / "hf", tiny(family))
    np.testing.assert_array_equal(logits_of(folder), want)


def test_threads_change_no_bit(tiny_file):
    most = _native.processors()
    np.testing.assert_array_equal(
        logits_of(tiny_file("gemma3"), threads=1), logits_of(tiny_file("gemma3"), threads=most)
    )


def test_weights_stay_in_the_file(tiny_file):
    with open_checkpoint(tiny_file("gemma3")) as checkpoint:
        model = NativeModel(checkpoint)
        name = next(name for name in checkpoint.tensors if "ffn_gate" in name)
        file = checkpoint.raw(name)
        addresses = {weight.struct.data for weight in model._keep if isinstance(weight, _native.NativeWeight)}
        assert file.ctypes.data in addresses
    model.open(1, 8)
    model.prefill(0, [2, 3])  # the file is closed, its pages are not
    assert np.isfinite(model.logits(0)).all()


def test_structs_have_the_size_that_c_gives_them():
    """7 weights of 48 bytes, 6 pointers, 4 ints and 4 floats; a config of 2 weights."""
    import ctypes

    assert ctypes.sizeof(_native.GkWeight) == 48
    assert ctypes.sizeof(GkLayer) == 6 * 8 + 7 * 48 + 4 * 4 + 4 * 4
    assert ctypes.sizeof(GkModelConfig) == 2 * 8 + 4 * 4 + 2 * 48 + 8


def test_engine_and_guesses_on_the_real_code(tiny_file):
    """Greedy text of a tiny model loops soon: guesses come true, and the ids are those without them."""
    ids = []
    for speculate in (0, 6):
        engine = Engine(runner_of(tiny_file("gemma3")), slots=2, max_len=100, speculate=speculate)
        params = SamplingParams(temperature=0, max_new_tokens=80)
        ids.append([engine.submit([2, 9, 30], params)])
        engine.run()
        ids[-1].append(engine.submit([2, 9, 31], SamplingParams(temperature=0.5, top_k=3, seed=1, max_new_tokens=60)))
        engine.run()
    assert [r.ids for r in ids[0]] == [r.ids for r in ids[1]]
    assert sum(r.accepted for r in ids[1]) > 10


# ---- what is refused


def test_damaged_weights(tmp_path):
    config = tiny("gemma")
    tensors = testing.random_tensors(config)
    tensors["layers.0.norm.pre_attn"][3] = np.nan
    with pytest.raises(CheckpointError, match="blk.0.attn_norm.weight holds 1 NaN"):
        runner_of(testing.write_tiny_gguf(tmp_path / "norm.gguf", config, tensors=tensors))
    tensors = testing.random_tensors(config)
    tensors["layers.1.mlp.down"][0, 0] = np.inf
    runner = runner_of(testing.write_tiny_gguf(tmp_path / "matrix.gguf", config, tensors=tensors))
    runner.prefill(0, LONG, 0)
    with pytest.raises(SamplingError, match="not finite"):
        runner.pick(StepIn(0, -1))


def test_models_that_it_does_not_run(tiny_file):
    from gemma import config as configs

    for name in ("paligemma_3b_224", "t5gemma_s_s", "embeddinggemma_300m"):
        assert unserved(configs.preset(name)), name
    for name in ("gemma_2b", "gemma2_9b", "gemma3_270m", "gemma3_4b"):
        assert unserved(configs.preset(name)) is None, name
    refused = pytest.raises(UnsupportedError, match="beside a Gemma 1, 2 or 3 text decoder; use JAX or PyTorch")
    with open_checkpoint(tiny_file("gemma")) as checkpoint, refused:
        NativeModel(checkpoint, config=configs.preset("t5gemma_s_s"))


def test_threads_and_closing(tiny_file):
    for threads in (0, 10**4):
        with pytest.raises(ConfigError, match=f"expected 1 to .*got {threads}"):
            runner_of(tiny_file("gemma"), threads=threads)
    with open_checkpoint(tiny_file("gemma")) as checkpoint:
        model = NativeModel(checkpoint)
    model.close()
    model.close()
    with pytest.raises(KernelError, match="closed"):
        model.open(1, 8)
    with pytest.raises(ConfigError, match="cache type"):
        runner_of(tiny_file("gemma")).model.open(1, 8, "float64")
