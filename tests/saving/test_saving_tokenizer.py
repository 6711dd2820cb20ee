# SPDX-License-Identifier: Apache-2.0
"""A tokenizer carried from any kind of checkpoint to any other gives the same ids, templates and special tokens."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny_vocabularies as vocabularies
from saving_models import text_config

from gemma import hub
from gemma._tokenizer_write import MAX_TEMPLATE, chat_template, gguf_fields, read_vocabulary, write_hf_files
from gemma.checkpoint import TokenizerSource, open_checkpoint
from gemma.errors import TokenizerError
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors
from gemma.tokenizer import Tokenizer

TEXTS = [
    "The history of computing began", "Hello  world", "a\n\n\nb   c", "<start_of_turn>user\nhi<end_of_turn>\n",
    "  leading", "naïve 漢字 🙂 é\t\ttabs \x00", "def f(x):\n    return x  # ok\n\n\n\n", "<table><tr>x</tr></table>",
    "1234567 [multimodal] <unused5>", "     a", "\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK} x", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def real():
    with open_checkpoint(hub.demo_path()) as checkpoint:
        return checkpoint.tokenizer_source()


@pytest.fixture(scope="module")
def folder(real, tmp_path_factory):
    """The real vocabulary as the files of a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    files = write_hf_files(real, folder, len(real.pieces))
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    return folder


def test_the_real_vocabulary_as_files_gives_the_same_ids(real, folder):
    ours = Tokenizer.from_source(real)
    for name in ("tokenizer.model", "tokenizer.json"):
        theirs = Tokenizer.from_file(folder / name)
        assert theirs.special == ours.special and theirs.vocab_size == ours.vocab_size
        for text in TEXTS:
            for parse in (True, False):
                assert theirs.encode(text, parse_special=parse) == ours.encode(text, parse_special=parse), (name, text)


def test_transformers_reads_the_files(real, folder):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_source(real), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__.startswith("Gemma") and len(theirs) == ours.vocab_size
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, add_bos=True), text
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert special == (ours.special.bos, ours.special.eos, ours.special.pad, ours.special.unk)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_back_into_a_gguf(kind, real, folder):
    file = folder / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
    fields = gguf_fields(TokenizerSource(kind, file), len(real.pieces))
    pieces, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    assert pieces == real.pieces
    normal = np.flatnonzero(real.types == 1)
    assert np.array_equal(np.argsort(-scores[normal], kind="stable"), np.argsort(-real.scores[normal], kind="stable"))
    if kind == "sentencepiece":
        assert np.array_equal(scores, real.scores)
    differ = np.flatnonzero(fields["tokenizer.ggml.token_type"] != real.types)
    # the unknown piece is called unknown, and markers that a text must not become are control pieces
    assert {real.pieces[i] for i in differ} <= {"<unk>", "<start_of_image>", "<end_of_image>"}
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert ids == dict(bos=2, eos=1, unknown=3, padding=0)
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_space_prefix"] is False


def test_a_gguf_s_arrays_go_over_as_they_are(real):
    fields = gguf_fields(real, len(real.pieces))
    assert fields["tokenizer.ggml.tokens"] == real.pieces
    assert np.array_equal(fields["tokenizer.ggml.scores"], real.scores)
    assert np.array_equal(fields["tokenizer.ggml.token_type"], real.types)
    assert "tokenizer.ggml.eot_token_id" not in fields and "tokenizer.chat_template" not in fields


# --- small vocabularies


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A trained `.model` and the `tokenizer.json` that Hugging Face's converters make of it."""
    folder = tmp_path_factory.mktemp("small")
    data = vocabularies.trained()
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "json").mkdir()
    vocabularies.write_json(folder / "json/tokenizer.json", vocabularies.as_json(*vocabularies.parsed(data)))
    return folder


def sources(small):
    return {
        "sentencepiece": TokenizerSource("sentencepiece", small / "tokenizer.model"),
        "embedded": TokenizerSource("sentencepiece", model=(small / "tokenizer.model").read_bytes()),
        "tokenizer.json": TokenizerSource("tokenizer.json", small / "json/tokenizer.json"),
    }


def strings():
    rng = random.Random(5)
    return ["", " ", "\t", *(vocabularies.string(rng) for _ in range(150))]


@pytest.mark.parametrize("kind", ["sentencepiece", "embedded", "tokenizer.json"])
def test_small_vocabularies_travel_through_a_gguf_and_a_folder(kind, small, tmp_path):
    source = sources(small)[kind]
    ours = Tokenizer.from_source(source)
    config = text_config("gemma3", num_hidden_layers=1, vocab_size=ours.vocab_size)
    tensors = from_arrays(random_tensors(config), config)
    save(tmp_path / "x.gguf", tensors, config, format="gguf", tokenizer=source)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        middle = checkpoint.tokenizer_source()
        save(tmp_path / "st", tensors, config, format="safetensors", tokenizer=middle)
    found = [Tokenizer.from_source(middle)]
    found += [Tokenizer.from_file(tmp_path / "st" / name) for name in ("tokenizer.model", "tokenizer.json")]
    for text in strings():
        for parse in (True, False):
            want = ours.encode(text, parse_special=parse)
            assert [other.encode(text, parse_special=parse) for other in found] == [want] * 3, text
    assert all(other.special == ours.special for other in found)


def test_a_folder_s_own_files_are_copied(small, tmp_path):
    beside = small / "copied"
    beside.mkdir(exist_ok=True)
    for file in (small / "tokenizer.model", small / "json/tokenizer.json"):
        (beside / file.name).write_bytes(file.read_bytes())
    (beside / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}", "mine": 1}))
    (beside / "model.safetensors").write_bytes(b"not a tokenizer file")
    source = TokenizerSource("sentencepiece", beside / "tokenizer.model")
    files = write_hf_files(source, tmp_path, 10_000)
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert [file.name for file in files] == names
    assert all((tmp_path / name).read_bytes() == (beside / name).read_bytes() for name in names)
    assert gguf_fields(source, 10_000)["tokenizer.chat_template"] == "{{ x }}"


def test_templates_are_carried_as_text(small, tmp_path):
    template = "{% for m in messages %}{{ m }}{% endfor %}"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    source = TokenizerSource("sentencepiece", folder / "tokenizer.model")
    assert chat_template(source) is None
    (folder / "chat_template.jinja").write_text(template)
    assert chat_template(source) == template
    config = text_config("gemma3", num_hidden_layers=1, vocab_size=700)
    tensors = from_arrays(random_tensors(config), config)
    save(tmp_path / "x.gguf", tensors, config, format="gguf", tokenizer=source)
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.metadata["tokenizer.chat_template"] == template
        assert checkpoint.config().vocab_size == len(checkpoint.tokenizer_source().pieces) < 700
        write_hf_files(checkpoint.tokenizer_source(), tmp_path, 700)
    assert (tmp_path / "chat_template.jinja").read_text() == template


def test_bad_tokenizer_files_are_named(small, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes((small / "tokenizer.model").read_bytes())
    source = TokenizerSource("sentencepiece", file)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: expected JSON"):
        gguf_fields(source, 1000)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x" * (MAX_TEMPLATE + 1)}))
    assert "tokenizer.chat_template" not in gguf_fields(source, 1000)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: expected UTF-8"):
        gguf_fields(source, 1000)
    with pytest.raises(TokenizerError, match="needs a path"):
        read_vocabulary(TokenizerSource("sentencepiece"))
    file.write_bytes(b"\x0a\xff")
    with pytest.raises(TokenizerError, match=r"tokenizer.model at byte"):
        read_vocabulary(source)


def test_merges_that_no_scores_give_are_refused(small, tmp_path):
    values = json.loads((small / "json/tokenizer.json").read_text())
    merges = values["model"]["merges"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    wholes = ["".join(pair) for pair in pairs]
    twice = next(i for i in reversed(range(1, len(wholes))) if wholes[i] == wholes[i - 1])
    merges.insert(len(merges) // 2, merges.pop(twice))  # one piece is now made early and late
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="do not stand together"):
        read_vocabulary(TokenizerSource("tokenizer.json", tmp_path / "tokenizer.json"))
