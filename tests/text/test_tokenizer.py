# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's three sources against each other and against `sentencepiece` on a file that it trained itself."""

from __future__ import annotations

import os
import random
import stat
import threading

import numpy as np
import pytest
import reference_tokenizers as ref
import sentencepiece
import tiny_vocabularies as tiny
from sentencepiece import sentencepiece_model_pb2 as pb

from gemma import _vocabulary_cache, hub
from gemma._sentencepiece_proto import Vocabulary, write_model
from gemma._special_tokens import SpellingFinder
from gemma.checkpoint import TokenizerSource, open_checkpoint
from gemma.errors import CheckpointNotFound, GemmaError, TokenizerError
from gemma.testing import ByteTokenizer, tiny_config, write_tiny_gguf
from gemma.tokenizer import SpecialTokens, Tokenizer


@pytest.fixture(scope="module")
def real():
    return Tokenizer.from_file(hub.demo_path())


@pytest.fixture(scope="module")
def data():
    return tiny.trained()


@pytest.fixture(scope="module")
def oracle(data):
    return sentencepiece.SentencePieceProcessor(model_proto=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """One vocabulary as `.model`, `tokenizer.json` and GGUF."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tokenizer.model").write_bytes(data)
    pieces, scores, types = tiny.parsed(data)
    tiny.write_json(folder / "tokenizer.json", tiny.as_json(pieces, scores, types))
    stored = [p.replace(tiny.SPACE, " ") if t == tiny.USER else p for p, t in zip(pieces, types)]
    config = tiny_config("gemma3", vocab_size=len(pieces), query_pre_attn_scalar=None)
    write_tiny_gguf(folder / "tiny.gguf", config, pieces=list(zip(stored, scores, types)))
    return folder


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json", "tiny.gguf"])
def tokenizer(request, folder):
    return Tokenizer.from_file(folder / request.param)


def strings(count, seed, special=()):
    rng = random.Random(seed)
    return [tiny.string(rng, special) for _ in range(count)]


# --- ids


def test_every_source_gives_the_ids_of_sentencepiece(tokenizer, oracle):
    """The oracle runs the trained file as it is; special spellings are left out, which it treats in its own way."""
    for text in strings(500, 1):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text), repr(text)
        assert ids == tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == text


def test_every_source_parses_special_spellings_alike(tokenizer, folder):
    model = Tokenizer.from_file(folder / "tokenizer.model")
    special = [*tiny.SPECIAL, *tiny.TURNS[3]]
    found = set()
    for text in strings(500, 2, special):
        ids = tokenizer.encode(text)
        assert ids == model.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
        found |= {i for i in ids if tokenizer.is_special(i)}
    assert found == {tokenizer.id_of(s) for s in special}


def test_plain_text_never_becomes_special(tokenizer):
    for text in strings(500, 3, [*tiny.SPECIAL, *tiny.TURNS[3]]):
        ids = tokenizer.encode(text, parse_special=False)
        assert not any(tokenizer.is_special(i) for i in ids), repr(text)
        assert tokenizer.decode(ids) == text


def test_content_pieces_are_matched_whether_special_ones_are_parsed_or_not(tokenizer):
    for piece in [*tiny.TAGS, *(run.replace(tiny.SPACE, " ") for run in tiny.RUNS)]:
        assert tokenizer.encode(piece, parse_special=False) == [tokenizer.id_of(piece)], piece


@pytest.mark.parametrize("kind", [tiny.NORMAL, tiny.CONTROL, tiny.USER, tiny.UNUSED])
def test_markers_are_special_whatever_type_a_file_gives_them(data, kind):
    """Converters disagree about the type of turn markers; a normal piece could even be merged out of plain text."""
    pieces, scores, types = tiny.parsed(data)
    first = pieces.index("<start_of_turn>")
    types[first] = types[pieces.index("<end_of_image>")] = kind
    pieces[-3:] = ["<start", "_of_turn>", "<end_of_image"]  # from these two, a merge would make the marker
    source = TokenizerSource("gguf", pieces=pieces, scores=np.array(scores), types=np.array(types))
    tokenizer = Tokenizer.from_source(source)
    for marker in ("<start_of_turn>", "<end_of_image>"):
        plain = tokenizer.encode(marker, parse_special=False)
        assert tokenizer.id_of(marker) not in plain and tokenizer.decode(plain) == marker
        assert tokenizer.encode(marker) == [tokenizer.id_of(marker)] and tokenizer.is_special(tokenizer.id_of(marker))


def test_merges_of_a_json_file_never_make_a_special_piece(tmp_path, data):
    content = tiny.as_json(*tiny.parsed(data))
    vocab = content["model"]["vocab"]
    for piece in ("<", "b", "o", "s", ">", "<b", "os", "os>"):
        vocab.setdefault(piece, len(vocab))
    content["model"]["merges"] = [["<", "b"], ["o", "s"], ["os", ">"], ["<b", "os>"]]
    tiny.write_json(tmp_path / "tokenizer.json", content)
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("<bos>", parse_special=False) == [vocab["<b"], vocab["os>"]]


@pytest.mark.parametrize("version", [2, 3, 4])
def test_special_tokens_and_version_are_found_by_their_pieces(tmp_path, version):
    (tmp_path / "tokenizer.model").write_bytes(tiny.trained(version))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.version == version
    special = tokenizer.special
    assert (special.pad, special.eos, special.bos, special.unk) == (0, 1, 2, 3)
    start, end = tiny.TURNS[version][:2]
    assert (tokenizer.piece(special.start_of_turn), tokenizer.piece(special.end_of_turn)) == (start, end)
    assert (special.start_of_image is None) == (version == 2)
    assert (special.image_soft_token is None) == (version != 4)


def test_location_and_segment_tokens_are_single_ids(tmp_path):
    pieces = [f"<loc{i:04}>" for i in range(0, 1024, 97)] + [f"<seg{i:03}>" for i in range(0, 128, 31)] + ["<image>"]
    (tmp_path / "tokenizer.model").write_bytes(tiny.trained(2, extra=pieces))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("".join(pieces)) == [tokenizer.id_of(piece) for piece in pieces]
    assert tokenizer.piece(tokenizer.special.image_soft_token) == "<image>"


def test_ids_of_the_real_vocabulary(real):
    assert real.encode("The history of computing began", add_bos=True) == [2, 818, 4083, 529, 20124, 6074]
    assert real.encode("  ") == [138] and real.encode("\n\n") == [108] and real.encode("</s>") == [212]
    assert real.special == SpecialTokens(
        pad=0, eos=1, bos=2, unk=3, mask=4, start_of_turn=105, end_of_turn=106, start_of_image=255_999,
        end_of_image=256_000,
    )  # fmt: skip
    assert (real.vocab_size, real.version) == (262_144, 3)


def test_the_real_vocabulary_as_a_model_file(real, tmp_path):
    """GGUF to `.model` and back to ids: the exported file is one that the official classes read."""
    with open_checkpoint(hub.demo_path()) as checkpoint:
        source = checkpoint.tokenizer_source()
    pieces = [
        (p.replace(" ", tiny.SPACE) if t == tiny.USER else p).encode() for p, t in zip(source.pieces, source.types)
    ]
    types = source.types.astype(np.uint8)
    types[3] = tiny.UNKNOWN
    data = write_model(Vocabulary(pieces, source.scores, types), dict(unk=3, bos=2, eos=1, pad=0))
    (tmp_path / "tokenizer.model").write_bytes(data)
    exported, again = Tokenizer.from_file(tmp_path), Tokenizer.from_source(source)
    rng, words = random.Random(5), source.pieces[500:200_000:37]
    for _ in range(300):
        text = ref.awkward(rng, words, controls=True)
        assert exported.encode(text) == real.encode(text) == again.encode(text)


@pytest.mark.nightly
def test_ten_thousand_strings_against_llama_cpp_and_hugging_face(real):
    metadata = ref.gguf_metadata(hub.demo_path())
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    words = [piece for piece, kind in zip(pieces, types) if kind == tiny.NORMAL]
    llama, face, rng = ref.LlamaCpp(hub.demo_path()), ref.hugging_face(metadata), random.Random(0)
    for n in range(10_000):
        text = ref.awkward(rng, words, controls=n % 3 == 0)
        ids, plain = real.encode(text), real.encode(text, parse_special=False)
        assert ids == llama.encode(text) == face.encode(text, add_special_tokens=False).ids, repr(text)
        assert real.decode(ids) == real.decode(plain) == text
        if "</s>" not in text:  # llama.cpp takes this tag for a control token, see docs/tokenizer.md
            assert plain == llama.encode(text, parse_special=False), repr(text)
    llama.close()


# --- the proto


def test_written_protos_are_read_back_by_the_official_classes(data):
    pieces, scores, types = tiny.parsed(data)
    scores = np.array(scores, np.float32)
    vocabulary = Vocabulary([piece.encode() for piece in pieces], scores, np.array(types, np.uint8))
    proto = pb.ModelProto.FromString(write_model(vocabulary, dict(unk=3, bos=2, eos=1, pad=-1)))
    assert [p.piece for p in proto.pieces] == pieces and [p.type for p in proto.pieces] == types
    assert [p.score for p in proto.pieces] == scores.tolist()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert (trainer.model_type, trainer.byte_fallback, trainer.vocab_size) == (2, True, len(pieces))
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (3, 2, 1, -1)
    assert not (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap)
    assert normalizer.escape_whitespaces and normalizer.name == "identity"


def edited(data, change) -> bytes:
    proto = pb.ModelProto.FromString(data)
    change(proto)
    return proto.SerializeToString()


FAULTS = {
    "a dummy prefix": (lambda p: setattr(p.normalizer_spec, "add_dummy_prefix", True), "add_dummy_prefix"),
    "a normalizer": (lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"x" * 9), "precompiled_charsmap"),
    "removed blanks": (lambda p: setattr(p.normalizer_spec, "remove_extra_whitespaces", True), "remove_extra"),
    "no escape": (lambda p: setattr(p.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
    "unigram": (lambda p: setattr(p.trainer_spec, "model_type", 1), "model_type"),
    "suffix blanks": (lambda p: setattr(p.trainer_spec, "treat_whitespace_as_suffix", True), "whitespace_as_suffix"),
    "a NUL": (lambda p: setattr(p.pieces[-1], "piece", "a\0b"), "NUL"),
    "no eos": (lambda p: setattr(p.pieces[1], "piece", "<end>"), "<eos>"),
    "no bytes": (lambda p: [setattr(q, "type", 1) for q in p.pieces if q.type == 6], "byte_fallback"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_model_files_of_another_kind_are_refused(data, tmp_path, fault):
    change, message = FAULTS[fault]
    (tmp_path / "tokenizer.model").write_bytes(edited(data, change))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(tmp_path)


def test_parts_that_a_model_file_may_have_are_ignored(data, tmp_path, oracle):
    def change(proto):
        proto.trainer_spec.input.append("corpus.txt")
        proto.normalizer_spec.normalization_rule_tsv = "rules.tsv"

    (tmp_path / "tokenizer.model").write_bytes(edited(data, change))
    assert Tokenizer.from_file(tmp_path).encode("the history") == oracle.encode("the history")


# --- GGUF vocabularies


def gguf(data, **changes):
    pieces, scores, types = tiny.parsed(data)
    fields = dict(pieces=pieces, scores=np.array(scores, np.float32), types=np.array(types, np.int32)) | changes
    return TokenizerSource("gguf", **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pieces=None), "pieces, scores and types"),
        (dict(scores=np.zeros(3, np.float32)), "3 scores"),
        (dict(types=np.full(620, 300)), "types in 1..6"),
        (dict(special={"bos": 5}), "bos_token_id is 5, but <bos> is id 2"),
        (dict(special={"unk": 600}, types=np.full(620, 1, np.int32)), "unknown"),
        (dict(flags={"add_space_prefix": True}), "add_space_prefix"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_vocabularies_that_contradict_themselves(data, changes, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_source(gguf(data, **changes))


def test_an_unknown_piece_stored_as_control_is_found(data):
    _, _, types = tiny.parsed(data)
    types[3] = tiny.CONTROL
    tokenizer = Tokenizer.from_source(gguf(data, types=np.array(types), special={"unk": 3}))
    assert tokenizer.special.unk == 3 == Tokenizer.from_source(gguf(data, types=np.array(types))).special.unk


# --- where a tokenizer is found


def test_folders(folder, tmp_path, data):
    both = Tokenizer.from_file(folder), Tokenizer.from_file(folder / "tiny.gguf")
    assert both[0].encode("the river") == both[1].encode("the river")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert Tokenizer.from_file(tmp_path / "model.safetensors").vocab_size == 620
    with pytest.raises(CheckpointNotFound, match=r"tokenizer\.model, tokenizer\.json or one \.gguf"):
        Tokenizer.from_file(folder.parent)


def test_a_json_file_of_any_name(folder, tmp_path):
    path = tmp_path / "gemma_tokenizer"
    path.write_bytes((folder / "tokenizer.json").read_bytes())
    assert Tokenizer.from_file(path).vocab_size == 620


# --- the cache


@pytest.fixture
def cache(tmp_path, monkeypatch, data):
    """A cache folder of its own, for vocabularies of every size."""
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_vocabulary_cache, "_WORTH", 0)
    (tmp_path / "tokenizer.model").write_bytes(data)
    return tmp_path / "cache" / "tokenizers"


def test_a_kept_vocabulary_is_the_same(cache, folder, tmp_path, monkeypatch):
    for path in (tmp_path / "tokenizer.model", folder / "tiny.gguf"):
        cold = Tokenizer.from_file(path)
        with monkeypatch.context() as patch:
            patch.setattr("gemma._tokenizer_sources._build", None)  # a warm start builds nothing
            warm = Tokenizer.from_file(path)
        assert warm.pieces == cold.pieces and warm.special == cold.special
        for text in strings(50, 7, tiny.SPECIAL):
            assert warm.encode(text) == cold.encode(text)
    assert len(list(cache.iterdir())) == 2  # and no temporary file


@pytest.mark.parametrize("damage", [lambda d: d[:-100], lambda d: b"", lambda d: d[:200] + b"\xff" + d[201:]])
def test_a_damaged_cache_file_is_made_anew(cache, tmp_path, damage):
    good = Tokenizer.from_file(tmp_path / "tokenizer.model")
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    file.write_bytes(damage(kept))
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").encode("the river") == good.encode("the river")
    assert file.read_bytes() == kept


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, cache):
    blocked = tmp_path / "a_file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(blocked / "below"))  # no folder can be made there, even by root
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").encode("the") != []


def test_a_read_only_cache_is_read(tmp_path, cache):
    Tokenizer.from_file(tmp_path / "tokenizer.model")
    mode = cache.stat().st_mode
    os.chmod(cache, stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert Tokenizer.from_file(tmp_path / "tokenizer.model").vocab_size == 620
    finally:
        os.chmod(cache, mode)


# --- bos, eos, bytes, surrogates


def test_exactly_one_bos_and_eos(tokenizer):
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    the = tokenizer.encode("the")
    assert tokenizer.encode("the", add_bos=True, add_eos=True) == [bos, *the, eos]
    assert tokenizer.encode("<bos>the<eos>", add_bos=True, add_eos=True) == [bos, *the, eos]
    assert tokenizer.encode("", add_bos=True, add_eos=True) == [bos, eos]
    assert tokenizer.encode("", add_bos=True) == [bos] and tokenizer.encode("") == []
    plain = tokenizer.encode("<bos>the", add_bos=True, parse_special=False)
    assert plain[0] == bos and plain.count(bos) == 1 and tokenizer.decode(plain[1:]) == "<bos>the"


def test_invalid_bytes_in_every_source(tokenizer):
    rng = random.Random(8)
    for _ in range(100):
        data = b"".join(rng.choice([b"\xff", b"\xc3", b"\xe2\x96", b"the ", b"<b>", "é".encode()]) for _ in range(8))
        ids = tokenizer.encode(data)
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
        decoder = tokenizer.stream()
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids)


def test_surrogate_escapes_mean_their_bytes(tokenizer):
    assert tokenizer.encode("the\udcff") == tokenizer.encode(b"the\xff")
    assert tokenizer.encode("\udcc3\udca9") == tokenizer.encode("é")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


def test_invalid_bytes_without_byte_pieces(data):
    _, _, types = tiny.parsed(data)
    types = [tiny.UNUSED if t == tiny.BYTE else t for t in types]
    tokenizer = Tokenizer.from_source(gguf(data, types=np.array(types)))
    assert tokenizer.encode("\U0001fae8") == [tokenizer.special.unk]
    with pytest.raises(TokenizerError, match="no byte pieces"):
        tokenizer.encode(b"\xff")


# --- pieces and names


def test_pieces(tokenizer):
    pieces = tokenizer.pieces
    assert len(pieces) == len(tokenizer) == tokenizer.vocab_size and list(tokenizer) == pieces
    assert all(tokenizer.id_of(piece) == i for i, piece in enumerate(pieces))
    assert tokenizer.id_of("  ") == tokenizer.id_of(tiny.SPACE * 2)
    assert tokenizer.split("the <b>  of") == ["the", " ", "<b>", "  ", "of"]
    assert tokenizer.explain(tokenizer.encode("<bos>\n")) == [(2, "<bos>"), (tokenizer.id_of("\n"), "\n")]
    assert all(tokenizer.is_special(np.int64(i)) for i in range(4))
    with pytest.raises(TokenizerError, match="integer"):
        tokenizer.decode([1.5])
    with pytest.raises(TokenizerError, match="sequence"):
        tokenizer.decode(5)


def test_other_spellings(tokenizer):
    token = tokenizer.id_of("<unused1>")
    renamed = tokenizer.with_spellings({token: "my own tag"})
    assert renamed.encode("the my own tag the") == [*renamed.encode("the "), token, *renamed.encode(" the")]
    assert renamed.decode([token]) == renamed.piece(token) == "my own tag" and renamed.id_of("my own tag") == token
    assert token not in renamed.encode("my own tag", parse_special=False) + renamed.encode("<unused1>")
    assert tokenizer.piece(token) == "<unused1>"
    with pytest.raises(TokenizerError, match="no piece"):
        renamed.id_of("<unused1>")
    for wrong in ({token: ""}, {token: "<bos>"}, {tokenizer.id_of("the"): "x"}, {0: "x", token: "x"}):
        with pytest.raises(TokenizerError):
            tokenizer.with_spellings(wrong)


def test_spellings_are_found_leftmost_and_longest():
    finder = SpellingFinder({"<a>": 1, "<ab>": 2, "[x]": 3, "ab": 4, "abc": 5, "ab>": 6, "<a>b": 7})
    cases = {
        "<a><ab>": [1, 2],
        "<<a>": ["<", 1],
        "<foo [x]>": ["<foo ", 3, ">"],
        "abc ab>": [5, " ", 6],
        "<a>bc": [7, "c"],
        "<ab": ["<", 4],
        "[[x]]": ["[", 3, "]"],
        "": [],
    }
    for text, wanted in cases.items():
        assert list(finder.split(text)) == wanted, text


def test_the_double_of_the_tokenizer_has_its_interface():
    """`ByteTokenizer` stands in for a Tokenizer: whatever is public here but is not there must be known here."""
    public = {name for name in dir(Tokenizer) if not name.startswith("_")}
    missing = public - set(dir(ByteTokenizer()))
    assert missing <= {"from_file", "from_source", "from_checkpoint", "split", "explain", "with_spellings"}
    assert isinstance(ByteTokenizer().special, SpecialTokens)


def test_threads_share_a_tokenizer(tokenizer):
    texts = strings(60, 9, tiny.SPECIAL)
    wanted = [tokenizer.encode(text) for text in texts]
    wrong = []

    def work():
        wrong.extend(text for text, ids in zip(texts, wanted) if tokenizer.encode(text) != ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- tokenizer.json

JSON_FAULTS = {
    "normalizer": (lambda c: c.update(normalizer=dict(type="Lowercase")), "normalizer"),
    "no normalizer": (lambda c: c.update(normalizer=None), "normalizer"),
    "regex": (lambda c: c["pre_tokenizer"].update(pattern=dict(Regex="(x+x+)+y")), "pre_tokenizer"),
    "decoder": (lambda c: c.update(decoder=dict(type="ByteLevel")), "decoder"),
    "ignored merges": (lambda c: c["model"].update(ignore_merges=True), "model.ignore_merges"),
    "merge": (lambda c: c["model"]["merges"].append(["the", "qqq"]), r"model.merges\[\d+\]"),
    "a merge of three": (lambda c: c["model"]["merges"].append(["t", "h", "e"]), r"model.merges\[\d+\]"),
    "a merge of numbers": (lambda c: c["model"]["merges"].append([1, 2]), r"model.merges\[\d+\]"),
    "an id twice": (lambda c: c["model"]["vocab"].update(zzz=300), "given twice"),
    "stripping": (lambda c: c["added_tokens"][0].update(lstrip=True), r"added_tokens\[0\].lstrip"),
    "unk": (lambda c: c["model"].update(unk_token="<nope>"), "model.unk_token"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_files_of_another_kind_are_refused(data, tmp_path, fault):
    change, field = JSON_FAULTS[fault]
    content = tiny.as_json(*tiny.parsed(data))
    change(content)
    tiny.write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(TokenizerError, match=field):
        Tokenizer.from_file(tmp_path)


def test_json_merges_as_strings_and_the_tab_of_gemma_1(data, tmp_path, folder):
    """Older files write merges as "a b", and give the tab and its byte piece one id."""
    content = tiny.as_json(*tiny.parsed(data))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    tiny.write_json(tmp_path / "tokenizer.json", content)
    old, new = Tokenizer.from_file(tmp_path), Tokenizer.from_file(folder / "tokenizer.json")
    assert all(old.encode(text) == new.encode(text) for text in strings(50, 10))
    pieces, scores, types = tiny.parsed(tiny.trained(2))
    pieces[pieces.index("\t")] = "<unused9>"
    content = tiny.as_json(pieces, scores, types)
    content["model"]["vocab"]["\t"] = content["model"]["vocab"]["<0x09>"]
    tiny.write_json(tmp_path / "tokenizer.json", content)
    tab = Tokenizer.from_file(tmp_path)
    assert tab.encode("\t") == [content["model"]["vocab"]["<0x09>"]] and tab.decode(tab.encode("a\tb")) == "a\tb"


def test_errors_name_the_file(tmp_path):
    for name, content in (("tokenizer.json", b"{}"), ("tokenizer.model", b"\x0a\x7f"), ("x.gguf", b"GGUF")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GemmaError, match=name):
            Tokenizer.from_file(tmp_path / name)
