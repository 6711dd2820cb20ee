# SPDX-License-Identifier: Apache-2.0
"""Memory arithmetic: windows counted exactly, the formula layer by layer, and what a machine or container allows."""

import dataclasses

import pytest

from gemma import fit
from gemma.config import PRESETS, preset
from gemma.errors import ConfigError
from gemma.testing import tiny_config


@pytest.mark.parametrize("context", [1, 511, 512, 513, 4096, 32_768])
def test_cache_of_the_270m_is_the_sum_over_layers(context):
    """18 layers, every sixth global, window 512, one K/V head of 256: written out by hand. 512 or a power of two."""
    length = {1: 512, 511: 512, 512: 512, 513: 1024}.get(context, context)
    expected = sum((length if (i + 1) % 6 == 0 else min(length, 512)) * 2 * 1 * 256 * 2 for i in range(18))
    assert fit.estimate(preset("gemma3_270m"), context).cache == expected


def test_batch_and_bytes_multiply():
    config = preset("gemma2_2b")
    one = fit.estimate(config, 1000)
    many = fit.estimate(config, 1000, batch=3, cache_bytes_per_value=4)
    assert many.cache == 6 * one.cache and many.activations == 3 * one.activations and many.weights == one.weights
    assert many.total == many.weights + many.cache + many.activations


def test_weights():
    config = preset("gemma3_1b")
    count = config.num_parameters
    assert fit.estimate(config, 1).weights == 2 * count
    assert fit.estimate(config, 1, weight_bytes="float32").weights == 4 * count
    assert fit.estimate(config, 1, weight_bytes=123).weights == 123


def test_packed_weights_by_hand():
    """270M, D = 640: not blocks of 256, so Q4_K becomes Q5_0 in all but `o` (1024 columns) and `down` (2048)."""
    norms = 18 * (4 * 640 + 2 * 256) + 640
    wide = 18 * (640 * 1024 + 640 * 2048)
    rest = preset("gemma3_270m").num_parameters - norms - wide
    assert fit.stored_bytes(preset("gemma3_270m"), "Q4_K") == wide * 144 // 256 + rest * 22 // 32 + 4 * norms
    assert fit.stored_bytes(preset("gemma3_270m"), "Q8_0") == (wide + rest) * 34 // 32 + 4 * norms
    tiny = tiny_config("gemma3")  # D = 72: no blocks at all
    assert fit.stored_bytes(tiny, "Q4_K") > 2 * tiny.vocab_size * 72


def test_what_generate_loads_is_what_is_counted():
    gemma = preset("gemma_2b")
    assert fit.stored_bytes(gemma, "bfloat16") == 2 * (gemma.num_parameters + 128 * 2048)  # the JAX table is padded
    images = preset("gemma3_4b")
    assert fit.loaded(images).vision is None
    assert fit.stored_bytes(images, "float32") == 4 * fit.loaded(images).num_parameters < 4 * images.num_parameters


def test_the_engine_reads_prompts_in_these_chunks():
    from gemma.gm.text import Sampler, _engine

    assert _engine.BUCKETS == fit.PREFILL_BUCKETS and _engine.cache_bucket is fit.cache_bucket
    lengths = {f.name: f.default for f in dataclasses.fields(Sampler)}["pad_length"]
    assert max(lengths) <= fit.PREFILL_CHUNK == fit.PREFILL_BUCKETS[-1]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_estimate_that_grows_with_the_context(name):
    config = PRESETS[name]
    most = fit.decoder(config).max_position_embeddings
    short, full = fit.estimate(config, 16), fit.estimate(config, most)
    assert 0 < short.total < full.total
    assert (short.cache == 0) == (name == "embeddinggemma_300m")


def test_cross_attention_is_counted():
    config = preset("t5gemma_b_b")
    own = config.decoder.cache_bytes(512, 2)  # the smallest that is allocated
    assert fit.estimate(config, 64).cache == own + 12 * 2 * 12 * 64 * 512 * 2


def test_refusals():
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"expected 1\.\.128 tokens.*got 129"):
        fit.estimate(config, 129)
    with pytest.raises(ConfigError, match="batch"):
        fit.estimate(config, 1, batch=0)
    with pytest.raises(ConfigError, match="unknown type 'q9'"):
        fit.estimate(config, 1, weight_bytes="q9")


def test_amounts():
    assert fit.parse_bytes("16GB") == fit.parse_bytes("16g") == 16 * 10**9
    assert fit.parse_bytes("1.5 GiB") == 3 * 2**29 and fit.parse_bytes("100") == 100
    assert fit.parse_context("32k") == 32_768 and fit.parse_context("4096") == 4096
    for bad in ("", "GB", "-1GB", "1 lot", "1ib", "nan"):
        with pytest.raises(ConfigError, match="such as 16GB"):
            fit.parse_bytes(bad)
    for bad in ("", "0", "-5", "1.5k", "k", "9" * 30):
        with pytest.raises(ConfigError, match="such as 4096"):
            fit.parse_context(bad)
    assert [fit.format_bytes(n) for n in (0, 999, 1000, 1_072_392_704, 99_950_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.07 GB",
        "100 MB",
    ]


def write_machine(root, total=16_000_000, available=8_000_000, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\nHuge: 0\n")
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return root


def test_machine_without_limits(tmp_path):
    root = write_machine(tmp_path, **{"proc/self/cgroup": "0::/user\n", "sys/fs/cgroup/user/memory.max": "max\n"})
    assert fit.machine_memory(root) == fit.Memory(16_384_000_000, 8_192_000_000, "machine")


def test_control_group_version_2_with_a_limit_above_the_process(tmp_path):
    group = {
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/memory.max": "4000000000\n",
        "sys/fs/cgroup/pod/memory.current": "3000000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 1000000000\n",
    }
    root = write_machine(tmp_path, **group)
    assert fit.machine_memory(root) == fit.Memory(4_000_000_000, 2_000_000_000, "control group")


def test_control_group_version_1_seen_from_inside(tmp_path):
    group = {
        "proc/self/cgroup": "5:cpu:/x\n3:memory:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000000\n",
    }
    root = write_machine(tmp_path, **group)
    assert fit.machine_memory(root) == fit.Memory(2_000_000_000, 1_500_000_000, "control group")


def test_this_machine():
    found = fit.machine_memory()
    assert found is not None and 0 < found.available <= found.total
