# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: defaults by method, YAML there and back, flags before files, and what is refused."""

import pytest

from gemma import finetuning
from gemma.errors import ConfigError
from gemma.finetuning import METHODS, RunConfig


def test_defaults_depend_on_the_method():
    lora = RunConfig(data="a/chats.jsonl").resolved()
    assert lora.data == ("a/chats.jsonl",) and lora.tuned == "lora" and lora.objective == "supervised"
    assert str(lora.folder) == "finetuned/chats-lora" and lora.alpha == 32 and lora.export[0] == "adapter"
    full = RunConfig(data="x", method="full").resolved()
    assert full.learning_rate < lora.learning_rate / 5 and full.weight_decay > 0 and full.export == ("merged", "gguf")
    assert RunConfig(data="x", method="qat").resolved().quantize == "q4_0"
    assert RunConfig(data="x", method="qlora").resolved().quantize == "keep"
    assert RunConfig(data="x", method="DPO", tune="full").tuned == "full"
    assert RunConfig(data="x", method="classify").objective == "classification"
    for method in METHODS:
        run = RunConfig(data="x", method=method).resolved()
        unset = {name for name, value in run.to_dict().items() if value is None}
        assert unset <= {
            *("limit", "steps", "warmup_steps", "ema", "adapter", "eval_every", "early_stop", "save_every"),
            *("quantize", "template"),
        }
        assert run.resolved() == run


def test_yaml_there_and_back(tmp_path):
    run = RunConfig(data=["a.jsonl", "b.jsonl"], method="classify", labels={"good": "P", "bad": "N"}, steps=7)
    path = tmp_path / "run.yaml"
    path.write_text(run.to_yaml())
    assert RunConfig.from_yaml(path) == run
    path.write_text("data: a.jsonl\nlearning-rate: 2e-4\nlabels: [yes1, no1]\nmethod: classify\nsteps: 3\n")
    read = RunConfig.from_flags(path, steps=9, rank=None)
    assert read.learning_rate == 2e-4 and read.steps == 9 and read.labels == (("yes1", "yes1"), ("no1", "no1"))


def test_what_makes_two_runs_the_same():
    one = RunConfig(data="x", steps=5)
    assert one.fingerprint() == RunConfig(data="y", steps=9, output="o", export="merged").fingerprint()
    assert one.fingerprint() == RunConfig(data="x", remat="block", sharding="fsdp").fingerprint()
    assert one.fingerprint() != RunConfig(data="x", rank=4).fingerprint()
    assert one.fingerprint() != RunConfig(data="x", max_length=64).fingerprint()
    known = {*one.to_dict()}
    assert known >= finetuning._MAY_CHANGE and not {"method", "seed", "template"} & finetuning._MAY_CHANGE


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (dict(rnak=3), "unknown setting 'rnak'; did you mean 'rank'?"),
        (dict(method="lroa"), "method: expected one of lora,"),
        (dict(method="lroa"), "did you mean 'lora'?"),
        (dict(rank=0), "rank: expected a number in 1..16384"),
        (dict(rank=1.5), "rank: expected a whole number"),
        (dict(steps="many"), "steps: expected a number, got 'many'"),
        (dict(learning_rate=float("nan")), "learning_rate: expected a number"),
        (dict(packing="yes"), "packing: expected true or false"),
        (dict(export="onnx"), "export: expected one of adapter,"),
        (dict(gguf="int4"), "gguf: expected one of"),
        (dict(columns="prompt"), "columns: expected name=value"),
        (dict(method="full", export="adapter"), "full makes no adapter"),
        (dict(method="full", adapter="a"), "trains the weights themselves"),
        (dict(method="lora", tune="full"), "the method lora trains lora"),
        (dict(quantize="q4_0"), "is for qlora and qat"),
        (dict(method="qat", quantize="q4_k_m"), "quantize: expected one of q4_0, int4, int8, sfp8"),
        (dict(export="quantized"), "quantized is the file that qat trains for"),
        (dict(early_stop=2), "early_stop: needs eval_data or eval_split"),
        (dict(eval_split=0.1, eval_data="e"), "got both"),
        (dict(labels=["a"]), "are for the method classification"),
        (dict(tensor=2), "need sharding: tensor"),
        (dict(data=[]), "data: expected at least one file"),
    ],
    ids=str,
)
def test_refused(values, text):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"data": "x", **values})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1, 2]", "expected lines `name: value`, got list"),
        ("data: [", "line 1: expected YAML"),
        ("data: x\nmodle: y", "did you mean 'model'?"),
        ("model: demo", "expected `data`"),
        (b"data: \xff", "cannot be read"),
        ("data: !!python/object/apply:os.getcwd []", "expected YAML"),
    ],
)
def test_refused_files(tmp_path, content, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert text in str(caught.value) and "run.yaml" in str(caught.value)
