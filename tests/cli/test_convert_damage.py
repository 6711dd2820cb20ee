# SPDX-License-Identifier: Apache-2.0
"""`gemma convert` with a writer that lies: every planted fault makes it fail loudly, and leaves nothing behind.

The faults are planted between writing and checking: in what the writer is given, in the files it wrote, in what it says
about them. A proof that cannot fail proves nothing.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from test_convert import FORMATS, TEXT, WIDE, files_under, values_of, written

from gemma import saving
from gemma.checkpoint import open_checkpoint
from gemma.gm import _prompt_logits
from gemma.gm.ckpts import _save
from gemma.saving import ArrayReader
from gemma.testing import random_tensors, write_tiny_gguf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_tiny_gguf(tmp_path_factory.mktemp("t") / "t.gguf", TEXT)
    with open_checkpoint(path) as opened:
        yield opened.tokenizer_source()


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    return written(tmp_path_factory.mktemp("s") / "source", TEXT, "safetensors", tokenizer)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return written(tmp_path_factory.mktemp("s") / "wide", WIDE, "safetensors", values=random_tensors(WIDE, 3))


@pytest.fixture
def writer(monkeypatch):
    """writer(before=..., after=...): what happens to the tensors before, and to the files and the report afterwards."""

    def install(before=lambda pairs: pairs, after=lambda path, report: report):
        for module, name in ((saving, "save"), (_save, "save_tensors")):
            original = getattr(module, name)

            def call(path, tensors, *args, original=original, **kwargs):
                return after(Path(path), original(path, before(list(tensors)), *args, **kwargs))

            monkeypatch.setattr(module, name, call)

    return install


def fails(cli, folder, *arguments, text=""):
    """The command says so, on standard error only, and leaves the folder as it was."""
    before = files_under(folder)
    done = cli("convert", *arguments)
    assert done.code in (1, 2) and done.out == "", done
    assert done.err.startswith("gemma: error: ") and "Traceback" not in done.err
    assert text in done.err, done.err
    assert files_under(folder) == before, "something is left"
    return done


# ---- in the numbers -----------------------------------------------------------------------------------------------------


def _one_value(array):
    array = array.copy()
    array.flat[17] = np.nextafter(np.float32(array.flat[17]), np.float32(9), dtype=np.float32)
    return array


def _rows_exchanged(array):
    array = array.copy()
    array[[1, 2]] = array[[2, 1]]
    return array


def _changed(name, change):
    def before(pairs):
        done = []
        for tensor, reader in pairs:
            if tensor.name == name:
                reader = ArrayReader(change(np.array(reader(np.float32))))
            done.append((tensor, reader))
        return done

    return before


def _exchanged(one, two):
    def before(pairs):
        readers = {tensor.name: reader for tensor, reader in pairs}
        names = {one: two, two: one}
        return [(tensor, readers[names.get(tensor.name, tensor.name)]) for tensor, _ in pairs]

    return before


NUMBERS = {
    "one value, one bit": ("layers.1.mlp.down", _changed("layers.1.mlp.down", _one_value)),
    "two rows of the embedding": ("embed", _changed("embed", _rows_exchanged)),
    "a norm one too large": ("final_norm", _changed("final_norm", lambda a: a + 1)),
    "zeros": ("layers.0.attn.o", _changed("layers.0.attn.o", np.zeros_like)),
    "gate and up exchanged": ("layers.0.mlp.gate", _exchanged("layers.0.mlp.gate", "layers.0.mlp.up")),
    "norms exchanged": ("layers.1.norm.pre_mlp", _exchanged("layers.1.norm.pre_mlp", "layers.1.norm.post_mlp")),
    "layers exchanged": ("layers.1.attn.q", _exchanged("layers.0.attn.q", "layers.1.attn.q")),
    "heads exchanged": ("layers.0.attn.k", _changed("layers.0.attn.k", lambda a: np.roll(a, 24, axis=0))),
}


CASES = [(fault, "gguf") for fault in NUMBERS]
CASES += [("one value, one bit", to) for to in FORMATS if to != "gguf"]
CASES += [("gate and up exchanged", "orbax"), ("heads exchanged", "ckpt"), ("layers exchanged", "sbs")]


@pytest.mark.parametrize(("fault", "to"), CASES)
def test_a_wrong_number_is_found(fault, to, source, writer, cli, tmp_path):
    name, before = NUMBERS[fault]
    writer(before)
    done = fails(cli, tmp_path, source, tmp_path / "out", "--to", to, "--no-logits", text=name)
    assert done.code == 1 and "NOT converted" in done.err and "values are not the source's" in done.err


@pytest.mark.parametrize(("to", "mix"), [("gguf", "q8_0"), ("gguf", "q4_k_m"), ("ckpt", "int8"), ("sbs", "sfp8")])
@pytest.mark.parametrize("fault", ["two rows of the embedding", "norms exchanged", "layers exchanged"])
def test_a_wrong_number_is_found_among_quantized_ones(fault, to, mix, wide, writer, cli, tmp_path):
    name, before = NUMBERS[fault]
    writer(before)
    done = fails(cli, tmp_path, wide, tmp_path / "out", "--to", to, "-q", mix, "--no-logits")
    assert done.code == 1 and "NOT converted" in done.err


def _flip(path, name, at, bit=1):
    """Changes a byte of a tensor in the file."""
    with open_checkpoint(path) as opened:
        info = opened.info(name)
        data = bytearray(opened.raw(name).tobytes())
    data[at] ^= bit
    with open(info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(data)


@pytest.mark.parametrize("mix", ["q8_0", "q4_k_m", "q4_0"])
def test_one_code_of_a_quantized_tensor(mix, wide, writer, cli, tmp_path):
    """Off by one step: far from the largest error of the tensor, so only the mean can tell."""

    def after(path, report):
        _flip(path, "blk.0.ffn_up.weight", {"q8_0": 34 * 5 + 9, "q4_k_m": 144 * 3 + 40, "q4_0": 18 * 5 + 9}[mix])
        return report

    writer(after=after)
    done = fails(cli, tmp_path, wide, tmp_path / "out.gguf", "--to", "gguf", "-q", mix, "--no-logits")
    assert done.code == 1 and "blk.0.ffn_up.weight" in done.err and "mean error" in done.err


@pytest.mark.parametrize("to", ["safetensors", "gguf", "ckpt"])
def test_a_damaged_byte_of_a_file(to, source, writer, cli, tmp_path):
    names = {"gguf": "blk.1.attn_k.weight", "ckpt": "model.layers.1.self_attn.qkv_proj.weight"}

    def after(path, report):
        _flip(path, names.get(to, "model.layers.1.self_attn.k_proj.weight"), 1234)
        return report

    writer(after=after)
    fails(cli, tmp_path, source, tmp_path / "out", "--to", to, "--no-logits")


@pytest.mark.parametrize("field", ["max_error", "rmse"])
@pytest.mark.parametrize("factor", [0.999, 1.001, 0.0, None])
def test_an_error_that_is_announced_wrongly(field, factor, wide, writer, cli, tmp_path):
    def after(path, report):
        def changed(tensor):
            old = getattr(tensor, field)
            return tensor if old is None else dataclasses.replace(tensor, **{field: factor and old * factor})

        return dataclasses.replace(report, tensors=tuple(map(changed, report.tensors)))

    writer(after=after)
    done = fails(cli, tmp_path, wide, tmp_path / "out", "--to", "gguf", "-q", "q4_0", "--no-logits", text="announced")
    assert done.code == 1 and len(done.err.splitlines()) < 25, "a page, not a flood"


def test_a_type_that_is_announced_wrongly(source, writer, cli, tmp_path):
    """bfloat16 numbers in float32 arrays: the values agree, the announcement does not."""

    def after(path, report):
        changed = tuple(dataclasses.replace(tensor, type="BF16") for tensor in report.tensors)
        return dataclasses.replace(report, tensors=changed)

    writer(after=after)
    fails(cli, tmp_path, source, tmp_path / "out", "--to", "safetensors", "--no-logits", text="announced")
    fails(cli, tmp_path, source, tmp_path / "out", "--to", "ckpt", "--no-logits", text="announced")


# ---- in what is there ---------------------------------------------------------------------------------------------------


def _rewritten(path, change):
    """A safetensors file with its dictionary of tensors changed."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.update({"model.extra.weight": np.ones(3, np.float32)}),
        lambda t: t.update({"model.norm.weight": np.ones(71, np.float32)}),
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
    ],
    ids=["missing", "extra", "shape", "another head"],
)
def test_another_set_of_tensors(change, source, writer, cli, tmp_path):
    def after(path, report):
        _rewritten(path / "model.safetensors", change)
        return report

    writer(after=after)
    fails(cli, tmp_path, source, tmp_path / "out", "--to", "safetensors", "--no-logits")


def test_half_a_file(source, writer, cli, tmp_path):
    def after(path, report):
        file = (
            path if path.is_file() else next(f for f in report.files if f.suffix in (".safetensors", ".ckpt", ".sbs"))
        )
        file.write_bytes(file.read_bytes()[:-1000])
        return report

    writer(after=after)
    for to in ("gguf", "safetensors", "ckpt", "sbs"):
        fails(cli, tmp_path, source, tmp_path / "out", "--to", to, "--no-logits")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", 12345.0),
        ("sliding_window", 9),
        ("head_dim", 12),
        ("rms_norm_eps", 0.1),
        ("hidden_activation", "silu"),
    ],
)
@pytest.mark.parametrize("to", ["safetensors", "ckpt"])
def test_another_configuration_beside_the_weights(field, value, to, source, writer, cli, tmp_path):
    """The tensors are all right; the network would be another one."""

    def after(path, report):
        values = json.loads((path / "config.json").read_text())
        assert field in values
        values[field] = value
        if field == "rope_theta" and isinstance(values.get("rope_parameters"), dict):
            values["rope_parameters"]["full_attention"]["rope_theta"] = value
        (path / "config.json").write_text(json.dumps(values))
        return report

    writer(after=after)
    fails(cli, tmp_path, source, tmp_path / "out", "--to", to, "--no-logits")


@pytest.mark.parametrize("to", ["safetensors", "gguf", "orbax", "ckpt"])
def test_a_tokenizer_that_is_left_out(to, source, writer, cli, tmp_path, monkeypatch):
    """A model without its vocabulary is of little use; nobody would notice until the first prompt."""
    original = (saving.save, _save.save_tensors)
    for module, name, call in zip((saving, _save), ("save", "save_tensors"), original):
        monkeypatch.setattr(module, name, lambda *a, call=call, **k: call(*a, **(k | {"tokenizer": None})))
    done = fails(cli, tmp_path, source, tmp_path / "out", "--to", to, "--no-logits", text="tokenizer")
    assert done.code == 1


def test_another_tokenizer(source, writer, cli, tmp_path, tokenizer, monkeypatch):
    """Two pieces exchanged: as many, other ids."""
    pieces = list(tokenizer.pieces)
    at = pieces.index("<0x54>")  # T, in the texts that are encoded
    pieces[at], pieces[at + 1] = pieces[at + 1], pieces[at]
    other, original = dataclasses.replace(tokenizer, pieces=pieces), saving.save
    monkeypatch.setattr(saving, "save", lambda *a, **k: original(*a, **(k | {"tokenizer": other})))
    done = fails(cli, tmp_path, source, tmp_path / "out", "--to", "gguf", "--no-logits")
    assert "tokenizer" in done.err


# ---- in the answers, and around -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1e-3, np.nan], ids=["other", "nan"])
def test_other_logits_of_the_same_weights(change, source, cli, tmp_path, monkeypatch):
    """What loads the files for running could differ from what compares them."""
    calls = []

    def fake(path, config, ids):
        calls.append(path)
        return np.full((len(ids), config.vocab_size), change if len(calls) == 2 else 0.0, np.float32)

    monkeypatch.setattr(_prompt_logits, "prompt_logits", fake)
    done = fails(cli, tmp_path, source, tmp_path / "out", "--to", "gguf", text="logits")
    assert done.code == 1 and len(calls) == 2 and calls[0] != calls[1]


def test_what_was_there_before_stays(source, writer, cli, tmp_path):
    """--force replaces with something proven, or with nothing."""
    old = written(tmp_path / "out", TEXT, "ckpt", values=values_of(TEXT, seed=9))
    data = (old / "model.ckpt").read_bytes()
    writer(NUMBERS["zeros"][1])
    fails(cli, tmp_path, source, old, "--to", "ckpt", "--no-logits", "--force", text="NOT converted")
    assert (old / "model.ckpt").read_bytes() == data
    (tmp_path / "x.gguf").write_bytes(b"precious")
    fails(cli, tmp_path, source, tmp_path / "x.gguf", "--to", "gguf", "--no-logits", "--force")
    assert (tmp_path / "x.gguf").read_bytes() == b"precious"


def test_json_asks_for_the_same(source, writer, cli, tmp_path):
    writer(NUMBERS["zeros"][1])
    fails(cli, tmp_path, source, tmp_path / "out", "--to", "ckpt", "--no-logits", "--json", text="NOT converted")


def test_every_tensor_wrong_is_a_page(source, writer, cli, tmp_path):
    def before(pairs):
        return [(tensor, ArrayReader(np.array(reader(np.float32)) + 1)) for tensor, reader in pairs]

    writer(before)
    done = fails(cli, tmp_path, source, tmp_path / "out", "--to", "ckpt", "--no-logits", text="and 8 more")
    assert len(done.err.splitlines()) < 25


def test_a_writer_that_dies(source, cli, tmp_path, monkeypatch):
    def die(path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save", die)
    fails(cli, tmp_path, source, tmp_path / "out", "--to", "gguf", "--no-logits")
