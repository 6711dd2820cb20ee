# SPDX-License-Identifier: Apache-2.0
"""`gemma inspect A --diff B`: what is said and with which exit code, whatever the formats."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from test_convert import FORMATS, PALI, TEXT, VISION, WIDE, values_of, written

from gemma.testing import random_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model in every format, and relatives of it."""
    folder = tmp_path_factory.mktemp("m")
    made = {format: written(folder / format, TEXT, format) for format in FORMATS}
    changed = values_of(TEXT)
    changed["layers.1.mlp.up"] = changed["layers.1.mlp.up"] + np.float32(0.5)
    changed["final_norm"] = changed["final_norm"].copy()
    changed["final_norm"][3] += np.float32(0.25)
    made["changed"] = written(folder / "changed", TEXT, "safetensors", values=changed)
    deeper = dataclasses.replace(TEXT, num_hidden_layers=3)
    made["deeper"] = written(folder / "deeper", deeper, "safetensors")
    made["narrower"] = written(folder / "narrower", dataclasses.replace(TEXT, intermediate_size=60), "safetensors")
    longer = dataclasses.replace(TEXT, vocab_size=330)
    values = values_of(longer)
    values["embed"][:320] = values_of(TEXT)["embed"]
    made["more rows"] = written(folder / "longer", longer, "safetensors", values=values)
    made["other theta"] = written(folder / "theta", dataclasses.replace(TEXT, rope_theta=5e5), "safetensors")
    made["rounded"] = written(folder / "rounded", TEXT, "ckpt", quantize="int8")
    return made


@pytest.mark.parametrize("other", FORMATS)
def test_the_same_model_in_two_formats(other, models, cli):
    done = cli("inspect", models["safetensors"], "--diff", models[other])
    count = len(values_of(TEXT))
    assert done.code == 0 and done.err == "", done
    assert f"{count} of {count} tensors hold equal numbers" in done.out
    assert "largest changes" not in done.out and "only in" not in done.out and "shapes" not in done.out


def test_changed_values(models, cli):
    done = cli("inspect", models["gguf"], "--diff", models["changed"])
    assert done.code == 1 and done.err == ""
    count = len(values_of(TEXT))
    assert f"{count - 2} of {count}" in done.out
    [up] = [line.split() for line in done.out.splitlines() if "layers.1.mlp.up" in line]
    [norm] = [line.split() for line in done.out.splitlines() if "final_norm" in line]
    assert up[-2:] == ["5.00e-01", "5.00e-01"] and norm[-1] == "2.50e-01"
    assert norm[-2] == f"{0.25 / np.sqrt(72):.2e}"


def test_json(models, cli):
    done = cli("inspect", models["orbax"], "--diff", models["changed"], "--json")
    data = json.loads(done.out)
    assert done.code == 1 and data["same_values"] is False and data["a"] == str(models["orbax"])
    found = {t["name"]: t for t in data["tensors"]}
    assert found.keys() == values_of(TEXT).keys()
    assert [name for name, t in found.items() if t["max_abs"]] == ["layers.1.mlp.up", "final_norm"]
    assert found["layers.1.mlp.up"]["max_abs"] == 0.5
    same = cli("inspect", models["ckpt"], "--diff", models["sbs"], "--json")
    assert same.code == 0 and json.loads(same.out)["same_values"] is True


def test_both_ways(models, cli):
    """What only one has, under the right letter."""
    done = cli("inspect", models["ckpt"], "--diff", models["deeper"])
    assert done.code == 1 and "only in b" in done.out
    assert "only in a" not in done.out and "layers.2.attn.q" in done.out and "num_hidden_layers: 2, 3" in done.out
    done = cli("inspect", models["deeper"], "--diff", models["ckpt"])
    assert done.code == 1 and "only in a" in done.out and "only in b" not in done.out
    assert "num_hidden_layers: 3, 2" in done.out


def test_shapes(models, cli):
    done = cli("inspect", models["ckpt"], "--diff", models["narrower"])
    assert done.code == 1 and "layers.0.mlp.up: (100, 72), (60, 72)" in done.out
    assert "intermediate_size: 100, 60" in done.out


def test_more_rows_of_the_vocabulary(models, cli):
    """Not the same model, though the rows that both have are equal."""
    for a, b in (("ckpt", "more rows"), ("more rows", "ckpt")):
        done = cli("inspect", models[a], "--diff", models[b])
        assert "vocab_size" in done.out
        assert done.code == 1, done.out


def test_another_configuration_of_the_same_values(models, cli):
    """The numbers are equal, the networks are not: it is said, and it counts."""
    done = cli("inspect", models["safetensors"], "--diff", models["other theta"])
    assert "rope_theta: 1000000.0, 500000.0" in done.out
    assert done.code == 1, done.out


def test_quantized_against_its_source(models, cli):
    done = cli("inspect", models["safetensors"], "--diff", models["rounded"])
    assert done.code == 1
    lines = [line for line in done.out.splitlines() if " INT8 " in line]
    assert len(lines) == 10 and all("%" in line for line in lines), "the ten largest"
    every = cli("inspect", models["safetensors"], "--diff", models["rounded"], "--tensors")
    assert len([line for line in every.out.splitlines() if " INT8 " in line]) == 15


def test_different_kinds_of_model(models, cli, tmp_path):
    pali = written(tmp_path / "pali", PALI, "npz")
    done = cli("inspect", models["ckpt"], "--diff", pali)
    assert done.code == 1 and "kind: GemmaConfig, PaliGemmaConfig" in done.out and done.err == ""
    vision = written(tmp_path / "vision", VISION, "safetensors")
    done = cli("inspect", vision, "--diff", models["ckpt"])
    assert done.code == 1 and done.err == "" and "only in a" in done.out


def test_values_that_are_no_numbers(cli, tmp_path):
    """NaN in both at the same place is equal; in one of them it is the largest change there is."""
    values = values_of(TEXT)
    values["final_norm"][5] = np.nan
    for name in ("a", "b"):
        written(tmp_path / name, TEXT, "safetensors", values=values, allow_nonfinite=True)
    written(tmp_path / "c", TEXT, "safetensors")
    same = cli("inspect", tmp_path / "a", "--diff", tmp_path / "b")
    assert same.code == 0, same
    with pytest.warns(UserWarning, match="NaN"):
        other = cli("inspect", tmp_path / "c", "--diff", tmp_path / "a")
    assert other.code == 1 and "final_norm" in other.out and "inf" in other.out, other
    with pytest.warns(UserWarning, match="NaN"):
        data = cli("inspect", tmp_path / "c", "--diff", tmp_path / "a", "--json")
    assert data.code == 1

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads(data.out, parse_constant=refuse)


def test_what_cannot_be_compared(models, cli, tmp_path):
    (tmp_path / "text").write_text("hello")
    for other in (tmp_path / "text", tmp_path / "nowhere"):
        done = cli("inspect", models["ckpt"], "--diff", other)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
        assert cli("inspect", other, "--diff", models["ckpt"]).code == 2


def test_a_wide_model_needs_little_memory(cli, tmp_path):
    """Runs of rows: two models of 40 MB are compared in a fraction of that."""
    import tracemalloc

    big = dataclasses.replace(WIDE, vocab_size=40_000, num_hidden_layers=1)
    values = random_tensors(big)
    one = written(tmp_path / "a", big, "safetensors", values=values)
    other = written(tmp_path / "b", big, "gguf", values=values)
    del values
    tracemalloc.start()
    try:
        assert cli("inspect", one, "--diff", other).code in (0, 1)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
