# SPDX-License-Identifier: Apache-2.0
"""`gemma convert` on the real Gemma 3 270M: each step compared with the one before it, and with the file it came from.

The comparison is the command's own and, independently, one made here on the arrays as they are read. A short walk runs
always; the long one in float32 (a gigabyte each step) is marked slow.
"""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from real_harness import PROMPT_IDS, gguf_to_hf

from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.cli.__main__ import run
from gemma.gm._proof import open_any

pytestmark = pytest.mark.real
BF16 = np.dtype(ml_dtypes.bfloat16)
LOOKED_AT = ("layers.0.attn.q", "layers.5.mlp.down", "layers.17.attn.v", "layers.9.norm.post_mlp", "final_norm")
FAMILY = "Gemma 3 270M, real weights"


def convert(capsys, source, destination, to, *options) -> dict:
    code = run(["convert", str(source), str(destination), "--to", to, "--json", *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def some(path) -> dict[str, np.ndarray]:
    """A few tensors, as float32."""
    with open_any(path) as opened:
        readers = {tensor.name: reader for tensor, reader in load_tensors(opened)}
        return {name: np.array(readers[name](np.float32)) for name in LOOKED_AT}


def exact(data: dict) -> bool:
    return len(data["tensors"]) == 236 and all(t["max_abs"] == 0.0 for t in data["tensors"])


def check_equal(one, other) -> None:
    assert all(np.array_equal(one[name], other[name]) for name in LOOKED_AT)


@pytest.mark.converts(FAMILY, "GGUF", "round trip")
@pytest.mark.converts(FAMILY, "safetensors", "round trip")
@pytest.mark.converts(FAMILY, "Orbax", "round trip")
def test_a_short_walk(demo, capsys, tmp_path):
    """GGUF -> the same GGUF (every byte) -> bfloat16 safetensors (rounded once) -> Orbax (exact)."""
    data = convert(capsys, demo, tmp_path / "same.gguf", "gguf", "--no-logits")
    assert exact(data)
    with open_checkpoint(demo) as one, open_checkpoint(tmp_path / "same.gguf") as two:
        assert set(one.tensors) == set(two.tensors) == set(gguf_to_hf())
        for name, info in one.tensors.items():
            assert two.info(name).dtype == info.dtype and np.array_equal(one.raw(name), two.raw(name)), name
        assert one.config() == two.config()
        assert one.tokenizer_source().pieces == two.tokenizer_source().pieces
    data = convert(capsys, tmp_path / "same.gguf", tmp_path / "st", "safetensors", "--dtype", "bfloat16", "--no-logits")
    assert len(data["tensors"]) == 236 and all(t["unexpected"] == 0 for t in data["tensors"])
    first, rounded = some(demo), some(tmp_path / "st")
    check_equal({name: a.astype(BF16).astype(np.float32) for name, a in first.items()}, rounded)
    (tmp_path / "same.gguf").unlink()
    data = convert(capsys, tmp_path / "st", tmp_path / "orbax", "orbax", "--layout", "flat", "--no-logits")
    assert exact(data)
    check_equal(rounded, some(tmp_path / "orbax"))


@pytest.mark.slow
def test_the_long_walk(demo, capsys, tmp_path):
    """GGUF -> safetensors -> Q8_0 -> Orbax flat -> nested -> safetensors -> .ckpt -> .sbs, in float32 from end to end."""
    steps = [demo]

    def step(name, to, *options) -> dict:
        data = convert(capsys, steps[-1], tmp_path / name, to, *options)
        if len(steps) > 1 and len(steps) != 3:
            old = steps[-1]
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        steps.append(tmp_path / name)
        return data

    original = some(demo)
    assert exact(step("st", "safetensors", "--dtype", "float32", "--no-logits"))
    check_equal(original, some(tmp_path / "st"))
    data = step("q8.gguf", "gguf", "-q", "q8_0")
    kept = {name: some(tmp_path / "q8.gguf")[name] for name in LOOKED_AT}
    assert data["types"].keys() == {"Q8_0", "F32"} and data["logits"]["max_abs"] > 0
    assert data["logits"]["kl"] < 0.05 and data["logits"]["tokens"] == len(PROMPT_IDS)
    for name in LOOKED_AT:
        if kept[name].ndim > 1:  # half a step of 1/127 of the largest in 32, and the rounding of the step to 11 bits
            error = np.abs(kept[name] - original[name]).reshape(-1, 32).max(1)
            largest = np.abs(original[name]).reshape(-1, 32).max(1)
            assert (error <= largest * (0.5 / 127 + 2**-11) + 1e-9).all(), name
    assert exact(step("flat", "orbax", "--layout", "flat", "--no-logits"))
    assert exact(step("nested", "orbax", "--layout", "nested", "--no-logits"))
    assert exact(step("back", "safetensors", "--no-logits"))
    check_equal(kept, some(tmp_path / "back"))
    assert exact(step("ckpt", "ckpt", "--no-logits"))
    data = step("sbs", "sbs")
    assert exact(data) and data["logits"]["max_abs"] == 0.0
    check_equal(kept, some(tmp_path / "sbs"))
