# SPDX-License-Identifier: Apache-2.0
"""`gemma inspect` and `gemma fit` on files and sizes: the numbers, the JSON, the exit codes."""

import json

import pytest

from gemma import fit
from gemma.config import preset
from gemma.testing import tiny_config, write_tiny_gguf, write_tiny_safetensors


@pytest.fixture
def gguf(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3", query_pre_attn_scalar=None))


def rows(text):
    """Lines as lists of cells: cells are at least two spaces apart."""
    return [[cell for cell in line.strip().split("  ") if cell.strip()] for line in text.splitlines()]


def test_inspect_gguf(cli, gguf):
    config = tiny_config("gemma3", query_pre_attn_scalar=None)
    result = cli("inspect", gguf, "--context", "100")
    assert result.code == 0 and result.err == ""
    cells = {row[0].strip(): [c.strip() for c in row[1:]] for row in rows(result.out) if row}
    assert cells["parameters"] == [f"{config.num_parameters:,}"]
    assert cells["format"] == ["GGUF"] and cells["sizes of"] == ["no preset"]
    assert cells["tokenizer"] == ["inside the file, 320 pieces"]
    assert cells["layer_pattern"] == ["LLLLLG"] and cells["hidden_size"] == ["72"]
    assert cells["F32"] == ["93", f"{config.num_parameters:,}", fit.format_bytes(4 * config.num_parameters), "32.00"]
    assert "memory for 100 tokens" in result.out
    assert cells["float32"][1] == fit.format_bytes(config.cache_bytes(128, 4))  # the model's limit is allocated
    assert "blk.0" not in result.out


def test_inspect_lists_tensors(cli, gguf):
    lines = rows(cli("inspect", gguf, "--tensors").out)
    [row] = [r for r in lines if r and r[0] == "blk.6.ffn_down.weight"]
    assert [c.strip() for c in row[1:4]] == ["F32", "72 x 100", "28800"]
    assert sum(r[0].startswith("blk.") for r in lines if r) == 7 * 13


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_inspect_json_of_a_folder(cli, tmp_path, family):
    config = tiny_config(family)
    folder = write_tiny_safetensors(tmp_path / "m", config, shards=2)
    data = json.loads(cli("inspect", folder, "--json", "--context", "64").out)
    assert data["format"] == "hf" and len(data["files"]) == 2 and data["tokenizer"] is None
    assert data["parameters"] == config.num_parameters == sum(row["values"] for row in data["types"].values())
    assert data["bytes"] == 4 * config.num_parameters == data["types"]["F32"]["bytes"]
    assert data["config"]["class"] == "GemmaConfig" and data["config"]["head_dim"] == 24
    assert data["memory"]["context"] == 64
    assert data["memory"]["bfloat16"]["cache"] == config.cache_bytes(128, 2)
    assert set(data["memory"]) == {"context", "bfloat16", "float32"}
    assert {t["name"]: t["shape"] for t in data["tensors"]}["model.layers.0.self_attn.q_proj.weight"] == [96, 72]


def test_inspect_never_asks_for_more_context_than_the_model_has(cli, gguf):
    assert "memory for 128 tokens" in cli("inspect", gguf).out
    for verb in ("inspect", "fit"):
        result = cli(verb, gguf, "--context", "1000k")
        assert result.code == 2 and result.out == ""
        assert "--context: expected 1..128 tokens, the length this model was made for, got 1024000" in result.err


@pytest.mark.real
def test_inspect_demo(cli):
    data = json.loads(cli("inspect", "demo", "--json").out)
    assert data["shape_of"] == ["gemma3_270m"] and data["parameters"] == preset("gemma3_270m").num_parameters
    assert {name: row["tensors"] for name, row in data["types"].items()} == {
        "F32": 109,
        "Q8_0": 10,
        "Q5_0": 81,
        "Q4_K": 27,
        "Q6_K": 9,
    }
    assert data["tokenizer"]["pieces"] == 262_144


def test_fit_says_yes_and_no(cli):
    need = fit.estimate(preset("gemma3_1b"), 4096, weight_bytes="float32", cache_bytes_per_value=4).total
    enough, short = cli("fit", "gemma3_1b", "--memory", need), cli("fit", "gemma3_1b", "--memory", need - 1)
    assert enough.code == 0 and "F32 fits" in enough.out
    assert short.code == 1 and "F32 does not fit" in short.out and "BF16 would fit" in short.out
    assert short.err == ""


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--batch", "3"], ["--context", "32k"]])
def test_fit_json(cli, flags):
    data = json.loads(cli("fit", "Gemma-3-1B", "--json", "--memory", "16GB", *flags).out)
    asked = {"bfloat16": "BF16"}.get(flags[1], "F32")
    batch, context = (3 if flags[0] == "--batch" else 1), (32_768 if flags[0] == "--context" else 4096)
    expected = fit.estimate(
        preset("gemma3_1b"), context, weight_bytes=asked, cache_bytes_per_value=4 if asked == "F32" else 2, batch=batch
    )
    assert data["model"] == "gemma3_1b" and data["asked"] == asked and data["context"] == context
    assert data["types"][asked] == {
        "weights": expected.weights,
        "cache": expected.cache,
        "activations": expected.activations,
        "total": expected.total,
    }
    assert data["fits"] == (expected.total <= 16e9) and data["memory"]["available"] == 16_000_000_000


def test_fit_marks_the_row_that_decides(cli):
    result = cli("fit", "gemma2_2b", "--memory", "7GB", "--dtype", "bfloat16")
    [marked] = [line for line in result.out.splitlines() if line.startswith(">")]
    assert result.code == 0 and "BF16" in marked and marked.endswith("yes")


def test_fit_gives_packed_types_as_sizes_only(cli):
    """Nothing computes on packed weights today: the answer is about the type that they are unpacked to."""
    result = cli("fit", "gemma2_2b", "--memory", "7GB", "--quant", "q6_k")
    assert result.code == 1 and "F32 does not fit" in result.out and "BF16 would fit" in result.out
    lines = [line.split() for line in result.out.splitlines() if line.endswith("size only")]
    assert [line[0] for line in lines] == ["Q8_0", "Q5_0", "Q4_K", "Q6_K"]
    assert all(line[3:6] == ["-", "-", "-"] for line in lines)
    data = json.loads(cli("fit", "gemma2_2b", "--memory", "7GB", "--quant", "q6_k", "--json").out)
    assert set(data["types"]) == {"F32", "BF16"}
    assert data["stored"]["Q6_K"] == fit.stored_bytes(preset("gemma2_2b"), "Q6_K")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["t5gemma_b_b"], "cannot run this kind of model"),
        (["gemma3_1b", "--dtype", "float16"], "cannot run Gemma 3 in float16"),
        (["gemma3_4b"], "the vision tower is not loaded"),
    ],
    ids=str,
)
def test_fit_says_what_generate_cannot_do(cli, arguments, text):
    assert text in cli("fit", *arguments, "--memory", "64GB").out
    assert text not in cli("fit", "gemma3_1b", "--memory", "64GB").out


def test_fit_reads_checkpoints(cli, gguf):
    result = cli("fit", gguf, "--context", "64")
    assert result.code == 0 and f"{tiny_config('gemma3').num_parameters:,} parameters, 64 tokens" in result.out


def test_fit_without_knowledge_of_this_machine(cli, monkeypatch):
    monkeypatch.setattr(fit, "machine_memory", lambda: None)
    result = cli("fit", "gemma3_1b")
    assert result.code == 2 and "give it as --memory 16GB" in result.err
