# SPDX-License-Identifier: Apache-2.0
"""`gemma finetune` and `gemma eval --data`, on a tiny model: what a run leaves, how it goes on, what is refused."""

import collections
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from gemma import chat, testing
from gemma.adapters import Classification, classification_of, open_adapter, read_classification
from gemma.cli import __main__ as program
from gemma.cli import _accuracy, _assistant, _backend
from gemma.cli import finetune as verb
from gemma.cli._finetune_display import duration
from gemma.errors import FormatError

# Of one length: one width of batches, and one program for the step.
ROWS = [
    ("What is?", "A cat."),
    ("And now?", "A dog."),
    ("Who was?", "I was."),
    ("Where ?", "Here .."),
    ("Why so?", "Soso .."),
]

FITS = ("--max-length", "64")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GEMMA_COMPILE_CACHE", "0")


def chats(path, rows=ROWS):
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(**changes):
    sizes = dict(num_hidden_layers=1, layer_pattern="G", max_position_embeddings=128)
    return testing.tiny_config("gemma3", query_pre_attn_scalar=None, rope_local_base_freq=1e4, **(sizes | changes))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("finetune")
    testing.write_tiny_gguf(folder / "tiny.gguf", config())
    chats(folder / "chats.jsonl")
    pair = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (folder / "labelled.csv").write_text("text,label\nGood.,P\nBad.,N\nFine.,P\n")
    (folder / "other.csv").write_text("text,label\nGood.,P\nBad.,Q\n")
    chats(folder / "long.jsonl", [("What is?", "A cat. " * 40)])
    (folder / "bad.jsonl").write_text((folder / "chats.jsonl").read_text() + '{"messages": 3}\n{"mess\n')
    return folder


@pytest.fixture(scope="module")
def finished(here):
    """A run of two steps, with everything that it can write."""
    kinds = "adapter,adapter-gguf,merged,gguf"
    arguments = f"finetune {here}/chats.jsonl -m {here}/tiny.gguf -o {here}/run --steps 2 --rank 2 --max-length 64"
    more = "--gguf f32 --eval-split 0.2 --set merged_dtype=float32 --set targets=[attention] --lr 0.01 --batch-size 2"
    assert program.run([*arguments.split(), *more.split(), "--export", kinds]) == 0
    return here / "run"


def test_what_a_run_leaves(finished, here):
    assert {p.name for p in finished.iterdir()} >= {
        *("README.md", "adapter", "adapter.gguf", "checkpoints", "config.yaml", "curves.png", "merged", "metrics.csv"),
        *("model-f32.gguf", "tensorboard"),
    }
    assert not [p for p in finished.iterdir() if p.name.startswith(".gemma-export")]
    card = (finished / "README.md").read_text()
    assert "Gemma Terms of Use" in card and "rows kept" in card and "2 steps" in card
    # Both files of the adapter are the same adapter, and it learnt something: turns, so it is spoken to in turns.
    one, two = (open_adapter(finished / name, config()) for name in ("adapter", "adapter.gguf"))
    for name, low in one.tensors.items():
        np.testing.assert_array_equal(low.b, two.tensors[name].b)
    assert all(np.abs(low.b).max() > 0 for low in one.tensors.values())
    assert one.chat and two.chat and _assistant._speaks_turns(finished / "adapter")
    # So are the merged files, which the base was not.
    assert not _backend.is_tuned(here / "tiny.gguf")
    assert _backend.is_tuned(finished / "merged") and _backend.is_tuned(finished / "model-f32.gguf")
    # The command that is printed at the end is the one that fits.
    assert (
        verb._how_to_use("m", finished / "adapter", None) == f"\n  gemma chat --model m --adapter {finished}/adapter\n"
    )
    assert "gemma chat --model" in verb._how_to_use("m", None, finished / "model-f32.gguf")
    assert 'gemma generate "..." --model' in verb._how_to_use("m", None, here / "tiny.gguf")
    # Other programs stop where the configuration says.
    ends = json.loads((finished / "merged" / "config.json").read_text())["eos_token_id"]
    assert set(ends) == chat.end_token_ids(_backend.open_model(str(finished / "merged")).tokenizer) and len(ends) == 2
    # The merged files are base plus adapter, in float32 to the last bit.
    from gemma.checkpoint import load_tensors, open_checkpoint

    def values(path):
        with open_checkpoint(path) as checkpoint:
            return {tensor.name: reader(np.float32) for tensor, reader in load_tensors(checkpoint)}

    before, after, again = map(values, (here / "tiny.gguf", finished / "merged", finished / "model-f32.gguf"))
    for name, value in before.items():
        expected = one.tensors[name].apply(value) if name in one.tensors else value
        np.testing.assert_array_equal(after[name], expected)
        np.testing.assert_allclose(again[name], expected, atol=2e-7, rtol=2e-7)  # a GGUF stores norms plus one
    proof = re.search(r"`model-f32.gguf`.* logits at most (\S+) apart", card)
    assert float(proof[1]) < 1e-4  # adapter beside the weights, and folded into them, in float32


def run_again(cli, here, *more):
    arguments = (
        f"finetune {here}/chats.jsonl -m {here}/tiny.gguf -o {here}/run --rank 2 --max-length 64 --eval-split 0.2"
    )
    return cli(
        *[*arguments.split(), "--set", "targets=[attention]", "--lr", "0.01", "--batch-size", "2", *map(str, more)]
    )


def test_a_run_goes_on_and_is_not_mixed_up(cli, finished, here):
    done = run_again(cli, here, "--steps", 2, "--export", "none", "--json")
    assert done.code == 0 and "going on after step 2 of 2" in done.err
    data = json.loads(done.out)
    assert data["stopped_by"] == "steps" and [row["step"] for row in data["history"] if "loss" in row] == [1, 2]
    other = run_again(cli, here, "--steps", 2, "--seed", 1)
    assert other.code == 2 and "holds a run with other settings (seed: saved 0, this run has 1" in other.err
    refused = run_again(cli, here, "--steps", 2, "--no-resume")
    assert refused.code == 2 and "holds a run already; leave out --no-resume" in refused.err
    assert (finished / "adapter").is_dir()


def test_samples_of_a_run_on_chats_are_answers(cli, finished, here, monkeypatch):
    import gemma.gm.train._run as orchestration

    seen, real = [], orchestration.Trainer.fit
    monkeypatch.setattr(orchestration.Trainer, "fit", lambda self: (seen.extend(self.sample_ids), real(self))[1])
    done = run_again(cli, here, "--steps", 2, "--export", "none", "--sample", "Hello")
    assert done.code == 0, done.err
    tokenizer = _backend.open_model(str(here / "tiny.gguf")).tokenizer
    assert seen == [chat.encode_chat(tokenizer, [chat.Turn("user", "Hello")]).ids]


def test_an_interrupted_run_exports_nothing_and_goes_on(cli, here, finished, monkeypatch):
    """What Ctrl-C does to the loop is the trainer's; here what the command makes of it."""
    import gemma.gm.train._run as orchestration

    real = orchestration.Trainer.fit
    monkeypatch.setattr(orchestration.Trainer, "fit", lambda self: dataclasses.replace(real(self), stopped_by="signal"))
    shutil.copytree(finished, here / "stopped", ignore=shutil.ignore_patterns("adapter"))
    done = run_again(cli, here, "--steps", 2, "-o", here / "stopped")
    assert done.code == 130 and "stopped after step 2; the same command goes on from there" in done.err
    assert not (here / "stopped" / "adapter").exists()


def test_a_proof_that_fails_leaves_nothing(cli, here, finished, monkeypatch):
    from gemma import saving

    written = saving.save

    def damaged(path, tensors, *rest, **options):
        tensors = [(t, saving.ArrayReader(np.float32(r(np.float32) * 1.001))) for t, r in tensors]
        return written(path, tensors, *rest, **options)

    monkeypatch.setattr(saving, "save", damaged)
    shutil.rmtree(finished / "merged")
    done = run_again(cli, here, "--steps", 2, "--export", "merged", "--set", "proof_logits=false")
    assert done.code == 2 and "merged: NOT exported" in done.err and "checkpoints are intact" in done.err
    assert not (finished / "merged").exists()
    assert not [p for p in finished.iterdir() if p.name.startswith(".gemma-export")]


BAD = [
    ("", "expected DATA, a file of examples, or --config"),
    ("{here}/none.jsonl", "there is no such file of examples"),
    ("{here}/bad.jsonl", "2 of 7 rows cannot be used"),
    ("{here}/chats.jsonl --max-length 8", "chats.jsonl:1: "),
    ("{here}/chats.jsonl --max-length 4096", "max_length: 4096 tokens, but tiny.gguf was made for 128"),
    ("{here}/chats.jsonl --eval-data {here}/long.jsonl", "long.jsonl:1: "),
    ("{here}/labelled.csv --method classify --eval-data {here}/other.csv", "label 'Q' is not among the labels"),
    (f"{{here}}/chats.jsonl --sample Hello --sample {'1234' * 50}", "sample_prompts[1]: "),
    ("{here}/chats.jsonl --method dpo", "dpo learns from rows with a chosen and a rejected answer"),
    ("{here}/pairs.jsonl", "use the method dpo"),
    ("{here}/labelled.csv --method classify --set labels=P", "labels"),
    ("{here}/chats.jsonl --set rnak=2", "did you mean 'rank'?"),
    ("{here}/chats.jsonl --set rank", "--set: expected NAME=VALUE"),
    ("{here}/chats.jsonl --config {here}/none.yaml", "none.yaml: cannot be read"),
    ("{here}/chats.jsonl -o {here}", "exists and is no run"),
    ("{here}/chats.jsonl -o {here}/chats.jsonl", "expected a folder"),
    ("{here}/chats.jsonl -o {here}/a\nb", "printable characters"),
    ("{here}/chats.jsonl -m {here}/none.gguf", "no such file or folder"),
    ("{here}/chats.jsonl -m {here}/chats.jsonl", "chats.jsonl"),
]


@pytest.mark.parametrize(("line", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_bad_input(cli, here, line, text):
    before = {p.name for p in here.iterdir()}
    words = [word.format(here=here) for word in line.split(" ") if word]
    model = [] if "-m" in words else ["-m", f"{here}/tiny.gguf"]
    output = [] if "-o" in words else ["-o", f"{here}/never"]
    length = [] if "--max-length" in words else ["--max-length", "64"]
    done = cli("finetune", *words, *model, *output, *length, "--dry-run")
    assert done.code == 2 and done.err.splitlines()[-1].startswith("gemma: error: ") and text in done.err
    assert "Traceback" not in done.err and {p.name for p in here.iterdir()} == before


def test_bad_rows_are_left_out_and_listed(cli, here):
    done = cli(
        "finetune",
        f"{here}/bad.jsonl",
        "-m",
        f"{here}/tiny.gguf",
        "-o",
        f"{here}/never",
        "--skip-bad",
        "--dry-run",
        *FITS,
    )
    assert done.code == 0 and re.search(r"malformed, left out +2 ", done.out) and "bad.jsonl:6:" in done.out
    assert not (here / "never").exists()


def test_a_dry_run_says_what_does_not_fit(cli, here, monkeypatch):
    monkeypatch.setattr(verb, "fits", lambda memory: False)
    done = cli("finetune", f"{here}/chats.jsonl", "-m", f"{here}/tiny.gguf", "-o", f"{here}/never", "--dry-run", *FITS)
    assert done.code == 1 and "activations" in done.out and "may not fit" in done.err


def test_the_estimate_counts_the_tower_where_there_are_pictures(cli, here, monkeypatch):
    import gemma.gm.train._run as orchestration

    seen, read, estimate = [], orchestration._run_model.read, orchestration.estimate_memory
    monkeypatch.setattr(orchestration._run_model, "read", lambda *a: dataclasses.replace(read(*a), images=True))
    monkeypatch.setattr(orchestration, "estimate_memory", lambda run, **kw: (seen.append(kw), estimate(run, **kw))[1])
    line = f"finetune {here}/chats.jsonl -m {here}/tiny.gguf -o {here}/never --dry-run"
    assert cli(*line.split(), *FITS).code == 0 and seen == [{"images": True}]


def test_an_adapter_of_another_model(cli, here, finished, tmp_path):
    testing.write_tiny_gguf(tmp_path / "other.gguf", config(hidden_size=64))
    testing.write_tiny_gguf(tmp_path / "twin.gguf", config(), seed=5)
    other = "the adapter belongs to another model than other.gguf: 4 of its tensors"
    for model, text in (("other", other), ("twin", "was trained on a base")):
        line = f"finetune {here}/chats.jsonl -m {tmp_path}/{model}.gguf -o {tmp_path}/{model}"
        done = cli(*line.split(), *FITS, "--steps", "1", "--adapter", f"{finished}/adapter")
        assert done.code == 2 and text in done.err, done.err


def test_a_full_disk(cli, here, finished, monkeypatch):
    """The run is refused before its first step, and what was there is unchanged."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    done = run_again(cli, here, "--steps", 3)
    assert done.code == 2 and "the disk has 0 B left" in done.err and (finished / "adapter.gguf").is_file()


def test_exact_match(cli, here, finished):
    test = chats(here / "test.jsonl", ROWS[:2])
    line = f"eval {here}/tiny.gguf --data {test} --adapter {finished}/adapter -n 4 --json"
    done = cli(*line.split())
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["metric"] == "exact_match" and data["examples"] == 2 and data["exact_match"] == 0
    assert data["wrong"][0]["expected"] == "A cat." and data["wrong"][0]["row"].endswith("test.jsonl:1")


def test_accuracy(cli, here):
    done = cli(*f"eval {here}/tiny.gguf --data {here}/labelled.csv --label P --label N --context 64".split())
    assert done.code == 0, done.err
    assert re.search(r"accuracy +\d+\.\d % \(\d+\.\d to \d+\.\d %\), \d of 3", done.out)
    assert "'P' would be right at 66.7 %" in done.out and "'P', 'N', of --label" in done.out
    wrong = cli(*f"eval {here}/tiny.gguf --data {here}/labelled.csv --metric exact_match".split())
    assert wrong.code == 2 and "--metric: exact_match needs prompts with answers" in wrong.err


def test_an_adapter_is_measured_on_its_own_labels(cli, here):
    line = f"finetune {here}/labelled.csv -m {here}/tiny.gguf -o {here}/told --method classify --steps 1 --rank 1"
    more = ["--set", "labels=[P=A,N=B]", "--set", "template='{text} ='", "--set", "proof_logits=false"]
    done = cli(*line.split(), *more, "--batch-size", "4", "--export", "adapter,adapter-gguf", *FITS)
    assert done.code == 0, done.err
    for name in ("adapter", "adapter.gguf"):
        told = open_adapter(here / "told" / name, config()).classification
        assert told == Classification((("P", "A"), ("N", "B")), "{text} =")
        assert classification_of(here / "told" / name) == told
    (here / "one.csv").write_text("text,label\nGood.,N\nBad.,N\n")  # one class: the other is still a rival
    line = f"eval {here}/tiny.gguf --context 64 --adapter {here}/told/adapter --json --data"
    done = cli(*line.split(), here / "one.csv")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["labels"] == {"P": 0, "N": 2} and data["labels_from"] == "the adapter"
    (here / "other.csv").write_text("text,label\nGood.,P\nBad.,neutral\n")
    done = cli(*line.split(), here / "other.csv")
    assert done.code == 2 and "other.csv:3: label 'neutral' is not among the labels ('P', 'N')" in done.err


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": {"P": 1, "N": "B"}}', '{"labels": {"P": "A"}}', "[" * 10**5])
def test_damaged_labels_of_an_adapter(text):
    with pytest.raises(FormatError, match="adapter: gemmakit.classification: expected JSON"):
        read_classification({"gemmakit.classification": text}, "adapter")


def test_an_interval_of_few_rows():
    assert _accuracy.wilson(4, 6) == pytest.approx((0.29999, 0.90323), abs=1e-5)
    low, high = _accuracy.wilson(6, 6)
    assert low == pytest.approx(0.60966, abs=1e-5) and high == 1


def test_questions_longer_than_the_context(cli, here):
    test = chats(here / "long.jsonl", [ROWS[0], ("W" * 40, "A."), ("W" * 50, "A.")])
    done = cli(*f"eval {here}/tiny.gguf --data {test} -n 4 --context 32".split())
    assert done.code == 2 and re.search(
        r"long.jsonl:2: \d+ tokens, .* room for 32; 2 of 3 rows are too long, the longest has (\d+): "
        r"raise --context to \1, or leave such rows out",
        done.err,
    )
    done = cli(*f"eval {here}/tiny.gguf --data {test} -n 120 --context 32".split())
    assert done.code == 2 and "long.jsonl:1: " in done.err and "the model has 128 positions, 120 of them" in done.err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3723, "1:02:03"), (-1, "0:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text
