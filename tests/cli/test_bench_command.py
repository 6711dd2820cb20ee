# SPDX-License-Identifier: Apache-2.0
"""`gemma bench` on a model of a few kilobytes, beside a double of llama.cpp in an environment of its own."""

import json
import venv

import pytest

from gemma import testing
from gemma.cli import _bench_measure as measure
from gemma.errors import GemmaError
from gemma.kernels import _native

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"native library: {_native.why_missing()}")

BINDING = """
import time
print("a library that talks on standard output")
class Llama:
    def __init__(self, path, **flags):
        assert path.endswith("m.gguf") and flags["n_threads"] == 1, (path, flags)
    def reset(self):
        pass
    def eval(self, ids):
        if len(ids) > 1 and {fault}:
            raise SystemExit(3)
        time.sleep(1e-5 * len(ids))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None, max_position_embeddings=600, vocab_size=330)
    return testing.write_tiny_gguf(tmp_path_factory.mktemp("bench") / "m.gguf", config)


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """environments(fault): a folder with one environment that holds a double of llama-cpp-python."""

    def make(fault=False):
        folder = tmp_path_factory.mktemp("peers")
        venv.create(folder / "llama", symlinks=True)
        [site] = (folder / "llama").glob("lib/python*/site-packages")
        (site / "llama_cpp").mkdir()
        (site / "llama_cpp/__init__.py").write_text(BINDING.replace("{fault}", str(fault)))
        (site / "llama_cpp_python-0.3.9.dist-info").mkdir()
        (site / "llama_cpp_python-0.3.9.dist-info/METADATA").write_text("Name: llama-cpp-python\nVersion: 0.3.9\n")
        (folder / "nothing").mkdir()
        return folder

    return make


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 16)


def test_the_table_and_the_line(cli, tiny, environments, monkeypatch):
    monkeypatch.setattr(measure, "cold_start", lambda model, threads, adapter: measure.ColdStart(0.5, 10**8))
    flags = ("--quick", "--rounds", "2", "--threads", "1", "--model", tiny, "--peers", environments())
    result = cli("bench", *flags)
    assert (result.code, result.err) == (0, "")
    table, line = result.out.rstrip().rsplit("\n", 1)
    data = json.loads(line)
    assert [row["name"] for row in data["rows"]] == ["prefill_512", "decode_16", "decode_512", "decode_batch_8"]
    assert all(row["rate"] > 0 for row in data["rows"])
    assert [len(row["peers"]) for row in data["rows"]] == [1, 1, 1, 0]
    peer = data["peers"][0]
    assert (peer["name"], peer["version"], peer["folder"]) == ("llama-cpp-python", "0.3.9", "llama")
    first = data["rows"][1]
    assert (
        data["ratios"]["decode_vs_llama_cpp"]
        == first["ratio"]
        == pytest.approx(first["rate"] / first["peers"][0], rel=0.01)
    )
    assert data["ratios"]["prefill_vs_best_peer"] is not None and data["threads"] == 1
    assert data["guessing"].keys() == {"repeating", "other"}
    for word in ("prefill 512", "decode 16", "llama-cpp-python 0.3.9", "guessing, repeating text", "cold start"):
        assert word in table


def test_alone_and_json_only(cli, tiny, monkeypatch):
    monkeypatch.setattr(measure, "cold_start", lambda model, threads, adapter: measure.ColdStart(0.5, 10**8))
    result = cli("bench", "--quick", "--rounds", "1", "--model", tiny, "--cache-type", "int8", "--json")
    data = json.loads(result.out)
    assert data["ratios"]["decode_vs_llama_cpp"] is None and data["peers"] == []
    assert data["cache_type"] == "int8" and data["ratios"]["batch_8_vs_1"] > 0


def test_a_cold_start(tiny):
    found = measure.cold_start(str(tiny), 1)
    assert 0 < found.seconds < 120 and found.memory > 10**7
    with pytest.raises(GemmaError, match="code 2.*no such file"):
        measure.cold_start(str(tiny.with_name("none.gguf")), 1)


def test_a_peer_that_dies(cli, tiny, environments):
    result = cli("bench", "--quick", "--rounds", "1", "--threads", "1", "--model", tiny, "--peers", environments(True))
    assert result.code == 2 and "llama: it ended with code 3 instead of answering 'prefill 512'" in result.err


def test_bad_flags(cli, tmp_path):
    assert "--rounds: expected 1 to 1000, got 0" in cli("bench", "--rounds", "0").err
    assert "--peers: expected a folder" in cli("bench", "--peers", tmp_path / "none").err
    assert "--threads: expected at least 1, got 0" in cli("bench", "--threads", "0").err
