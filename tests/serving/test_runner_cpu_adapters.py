# SPDX-License-Identifier: Apache-2.0
"""LoRA beside the weights of the native decoder: what the adapted weights give, and no token of one adapter serves another.

Beside the JAX layers and llama.cpp it is compared in tests/peft and tests/real.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from runner_contract import LONG

from gemma import adapters, testing, weights
from gemma.adapters import AdapterFile, LowRank
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import CheckpointError, ConfigError, GemmaError, UnsupportedError, WeightsMismatch
from gemma.kernels import _adapter, _native
from gemma.kernels._model import NativeModel
from gemma.sampling import SamplingParams
from gemma.serving._runner_cpu import CpuRunner, load_runner
from gemma.serving.engine import Engine
from gemma.serving.runner import StepIn

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"native library: {_native.why_missing()}")

EPSILON = float(np.finfo(np.float32).eps)


def random_adapter(config, seed=0, *, dtype=np.float32, size=0.3, only="") -> AdapterFile:
    """Changes of every layer's matrices, ranks 1 to 7."""
    rng, lows = np.random.default_rng(seed), {}
    for tensor in weights.tensors(config):
        if len(tensor.shape) == 2 and tensor.name.startswith("layers.") and only in tensor.name:
            rank = int(rng.integers(1, 8))
            a = rng.normal(0, size, (rank, tensor.shape[1])).astype(dtype)
            lows[tensor.name] = LowRank(a, rng.normal(0, size, (tensor.shape[0], rank)).astype(dtype), 0.7)
    return AdapterFile(lows)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files("gemma3") -> (path of a GGUF of random float weights, its configuration)."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def make(family):
        if family not in made:
            config = testing.tiny_config(family, query_pre_attn_scalar=24.0)
            made[family] = testing.write_tiny_gguf(folder / f"{family}.gguf", config), config
        return made[family]

    return make


def runner_of(path, adapter=None, **flags) -> CpuRunner:
    with open_checkpoint(path) as checkpoint:
        return CpuRunner(NativeModel(checkpoint, threads=1, **flags), slots=2, max_len=40, adapter=adapter)


def logits_of(runner, ids=LONG) -> np.ndarray:
    runner.free(0)
    runner.prefill(0, ids[:-1], 0)
    runner.step([StepIn(0, ids[-1])])
    return runner.logits(0)[1:]  # id 0 is blocked


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_beside_the_weights_is_in_the_weights(files, tmp_path, family, dtype):
    """y + b a x against a file whose weights are W + b a. In float32 they differ by the order of sums."""
    path, config = files(family)
    adapter = random_adapter(config, dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        changed = {t.name: read(np.float32) for t, read in adapters.fused(load_tensors(checkpoint), adapter)}
    fused = logits_of(runner_of(testing.write_tiny_gguf(tmp_path / "fused.gguf", config, tensors=changed)))
    runner = runner_of(path, adapter)
    beside, plain = logits_of(runner), logits_of(runner_of(path))
    assert np.abs(fused - plain).max() > 0.1 * np.abs(plain).max()
    assert np.abs(beside - fused).max() < 200 * EPSILON * np.abs(fused).max()  # measured up to 40
    half = runner.model.adapter_bytes < 3 * sum(low.a.size + low.b.size for low in adapter.tensors.values())
    assert half == (dtype != np.float32)  # bfloat16 stays two bytes, and so it does in float32's clothes:
    clothed = {n: dataclasses.replace(v, a=v.a.astype("f4"), b=v.b.astype("f4")) for n, v in adapter.tensors.items()}
    np.testing.assert_array_equal(logits_of(runner_of(path, AdapterFile(clothed))), beside)


def test_no_bit_depends_on_the_company(files):
    """One by one, in chunks, scored, beside a neighbour, copied, on more threads."""
    path, config = files("gemma3")
    adapter = random_adapter(config, 3)
    alone = logits_of(runner_of(path, adapter))
    with open_checkpoint(path) as checkpoint:
        model = NativeModel(checkpoint, threads=_native.processors())
    model.set_adapter(adapter)
    for chunk in (1, 3, 40):
        model.open(2, 40, chunk=chunk)
        model.prefill(1, LONG)
        np.testing.assert_array_equal(model.logits(1)[1:], alone)
    rows = model.score(0, LONG)
    np.testing.assert_array_equal(rows[-1][1:], alone)
    model.open(3, 40)
    model.prefill(0, LONG[:-2])
    model.prefill(2, LONG[:4])
    for i in (2, 1):
        model.step([2, 0], [LONG[6 - i], LONG[-i]])
    np.testing.assert_array_equal(model.logits(0)[1:], alone)


def test_scales_and_changes(files):
    """Off is the plain model to the bit; twice the scale is twice the factors; a slot never outlives its adapter."""
    path, config = files("gemma3")
    one, two = random_adapter(config, 1), random_adapter(config, 2)
    runner = runner_of(path)
    plain, first = logits_of(runner), logits_of(runner_of(path, one))
    runner.set_adapter(one)
    assert runner.model.length(0) == 0
    with pytest.raises(GemmaError, match="empty"):
        runner.logits(0)
    np.testing.assert_array_equal(logits_of(runner), first)
    runner.set_adapter(one, scale=0.0)
    np.testing.assert_array_equal(logits_of(runner), plain)
    runner.set_adapter(one, scale=2.0)
    doubled = {name: dataclasses.replace(low, scale=2 * low.scale) for name, low in one.tensors.items()}
    np.testing.assert_array_equal(logits_of(runner), logits_of(runner_of(path, AdapterFile(doubled))))
    runner.set_adapter(two)
    np.testing.assert_array_equal(logits_of(runner), logits_of(runner_of(path, two)))
    runner.model.scale_adapter(1)
    runner.set_adapter(None)
    assert runner.model.adapter is None and runner.model.adapter_bytes == 0
    np.testing.assert_array_equal(logits_of(runner), plain)
    with pytest.raises(ConfigError, match="no adapter"):
        runner.model.scale_adapter(1)
    some = random_adapter(config, 5, only="attn.k")  # most layers' parts are missing
    runner.set_adapter(some)
    moved = np.abs(logits_of(runner) - plain).max()
    assert moved > 0


def test_the_engine_forgets_what_another_adapter_read(files):
    path, config = files("gemma")  # without windows, so that any beginning can be used again
    one = random_adapter(config, 1)
    prompt, params = [2, *range(20, 34)], SamplingParams(temperature=0, max_new_tokens=8)

    def ids_of(engine):
        request = engine.submit(prompt, params)
        engine.run()
        return request.ids, request.reused

    engine = Engine(runner_of(path), slots=2, max_len=40)
    plain, _ = ids_of(engine)
    assert ids_of(engine) == (plain, 15)
    engine.set_adapter(one)
    adapted, reused = ids_of(engine)
    assert adapted != plain and reused == 0
    assert adapted == ids_of(Engine(runner_of(path, one), slots=1, max_len=40))[0]
    guessing = Engine(runner_of(path, one), slots=1, max_len=40, speculate=4)
    assert adapted == ids_of(guessing)[0]
    running = engine.submit(prompt, params)
    engine.step()
    with pytest.raises(GemmaError, match="1 requests are running"):
        engine.set_adapter(None)
    engine.run()
    assert running.ids == adapted
    engine.set_adapter(None)
    assert ids_of(engine) == (plain, 0)
    with pytest.raises(GemmaError, match="FakeRunner takes no adapter"):
        Engine(testing.FakeRunner(config)).set_adapter(one)


def test_what_is_refused(files, tmp_path):
    path, config = files("gemma3")
    adapter = random_adapter(config, 1)
    runner = runner_of(path, adapter)
    before = logits_of(runner)
    name, low = next(iter(adapter.tensors.items()))

    def refused(error, match, changed, **flags):
        with pytest.raises(error, match=match):
            runner.set_adapter(changed, **flags)

    magnitude = dataclasses.replace(low, magnitude=np.ones(low.shape[0], np.float32))
    refused(UnsupportedError, "DoRA.*use JAX", AdapterFile({name: magnitude}))
    embed = LowRank(np.ones((2, config.hidden_size), "f4"), np.ones((config.vocab_size, 2), "f4"))
    refused(UnsupportedError, "changes embed, and it runs", AdapterFile({"embed": embed}))
    refused(WeightsMismatch, r"layers\.9\.attn\.q", AdapterFile({"layers.9.attn.q": low}))
    refused(WeightsMismatch, "expected", AdapterFile({name: dataclasses.replace(low, a=low.a[:, 1:])}))
    refused(CheckpointError, "NaN", AdapterFile({name: dataclasses.replace(low, b=low.b * np.nan)}))
    refused(ConfigError, "finite", adapter, scale=float("inf"))
    np.testing.assert_array_equal(runner.logits(0)[1:], before)  # nothing has changed

    # another base: the checksum is that of the file's own weights, read row by row
    with open_checkpoint(path) as checkpoint:
        base = {t.name: read(np.float32) for t, read in load_tensors(checkpoint)}
    right = dataclasses.replace(adapter, base_checksum=adapters.checksum({n: base[n] for n in adapter.tensors}))
    runner.set_adapter(right)
    np.testing.assert_array_equal(logits_of(runner), before)
    wrong = dataclasses.replace(adapter, base_checksum="0" * 64)
    refused(CheckpointError, "was trained on a base with other weights", wrong)
    runner.set_adapter(wrong, check_base=False)

    adapters.save_adapter_file(tmp_path / "peft", right, config)
    loaded = load_runner(path, threads=1, adapter=tmp_path / "peft")
    np.testing.assert_array_equal(logits_of(loaded), before)
    assert _adapter.unserved(right) is None
