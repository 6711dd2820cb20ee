"""The element-wise steps, paths of keys, and how grain takes these transforms."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from gemma import gm
from gemma.errors import DataError, DependencyError
from gemma.gm.data import _maps, _paths
from gemma.testing import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_decode_bytes():
    step = gm.data.DecodeBytes(key="text")
    element = {"text": "café".encode(), "id": 3}
    assert step.map(element) == {"text": "café", "id": 3} and element["text"] == b"caf\xc3\xa9"
    assert step.map({"text": "as it is"}) == {"text": "as it is"}
    assert gm.data.DecodeBytes(key="t", encoding="latin-1").map({"t": b"\xe9"}) == {"t": "é"}
    with pytest.raises(DataError, match="DecodeBytes, key 'text': expected utf-8, .* at byte 1"):
        step.map({"text": b"a\xff"})
    with pytest.raises(DataError, match="expected bytes, got int"):
        step.map({"text": 4})


def test_key_may_be_one_several_or_a_renaming():
    element = {"a": b"1", "b": b"2", "c": b"3"}
    assert gm.data.DecodeBytes(key=["a", "b"]).map(element) == {"a": "1", "b": "2", "c": b"3"}
    assert gm.data.DecodeBytes(key=("a", "absent")).map(element)["a"] == "1"
    assert gm.data.DecodeBytes(key={"a": "x"}).map(element) == element | {"x": "1"}  # the original stays
    for error in (KeyError, DataError):
        with pytest.raises(error, match=r"DecodeBytes: expected the key 'z', the element has 'a', 'b', 'c'"):
            gm.data.DecodeBytes(key="z").map(element)


def test_format_text():
    step = gm.data.FormatText(key="t", template="\n  Say:\n    {text} {{x}}\n")
    assert step.map({"t": "hi {y}"}) == {"t": "\nSay:\n  hi {y} {x}\n"}
    for template in ("no place", "{txt}"):
        with pytest.raises(ValueError, match=r"placeholder \{text\}"):
            gm.data.FormatText(key="t", template=template)
    for template in ("{text} {other}", "{text} {", "{text} {}"):
        with pytest.raises(DataError, match="other braces doubled"):
            gm.data.FormatText(key="t", template=template)
    with pytest.raises(DataError, match="key 't': expected a text, got bytes; put DecodeBytes before"):
        step.map({"t": b"hi"})


def test_tokenize_pad_and_labels():
    ids = TOKENIZER.encode("hi")
    bos, eos = TOKENIZER.special.bos, TOKENIZER.special.eos
    assert gm.data.Tokenize(key="t", tokenizer=TOKENIZER).map({"t": "hi"})["t"] == ids
    both = gm.data.Tokenize(key="t", tokenizer=TOKENIZER, add_bos=True, add_eos=True)
    assert both.map({"t": "hi"})["t"] == [bos, *ids, eos]
    with pytest.raises(DataError, match="expected a text, got list"):
        both.map({"t": ["hi"]})
    assert gm.data.Pad(key="t", max_length=4).map({"t": ids})["t"].tolist() == [*ids, 0, 0]
    with pytest.raises(ValueError, match="Pad, key 't': Cannot pad sequence of length 2"):
        gm.data.Pad(key="t", max_length=1).map({"t": ids})
    assert gm.data.Pad(key="t", max_length=1, truncate=True).map({"t": ids})["t"].tolist() == ids[:1]

    labels = gm.data.MapInts(key="label", old_to_new={0: 1294, 1: 3553})
    assert labels.map({"label": 1}) == {"label": 3553}
    assert labels.map({"label": np.int64(0)}) == {"label": 1294}
    assert labels.map({"label": np.array([[0, 1]])})["label"].tolist() == [[1294, 3553]]
    with pytest.raises(KeyError, match="Label 7 not found in `old_to_new`"):
        labels.map({"label": 7})


PATHS = dict(in_prompt="q.turns[0]", in_response="a", out_input="x.input", out_target="x.target", out_target_mask="m")


def test_add_seq2seq_fields_follows_paths():
    element = {"q": {"turns": [[10, 11], [12]]}, "a": [20, 1], "x": {"kept": 5}}
    before = copy.deepcopy(element)
    done = gm.data.AddSeq2SeqFields(**PATHS).map(element)
    assert element == before
    assert done["x"]["input"].tolist() == [10, 11, 20] and done["x"]["target"].tolist() == [11, 20, 1]
    assert done["m"].tolist() == [False, True, True] and done["x"]["kept"] == 5 and done["q"] == element["q"]
    with pytest.raises(DataError, match=r"key 'q.turns\[0\]': no 0 in what is before 0; it has 0 entries"):
        gm.data.AddSeq2SeqFields(**PATHS).map({"q": {"turns": []}, "a": [1]})
    with pytest.raises(DataError, match="key 'a': expected a flat sequence of token ids, got str"):
        gm.data.AddSeq2SeqFields(**PATHS).map({"q": {"turns": [[1]]}, "a": "text"})


def test_paths():
    @dataclasses.dataclass(frozen=True)
    class Node:
        inner: object

    tree = {"a": [{"b": 1}, Node({"c d": 2})], "a.b": 3, "t": (1, [4, 5])}
    assert _paths.get(tree, "a[0].b") == 1 and _paths.get(tree, "a[1].inner['c d']") == 2
    assert _paths.get(tree, "a.b") == 3  # spelled exactly so
    assert _paths.get(tree, "t[1][-1]") == 5
    assert _paths.with_value(tree, "new.x.y", 1)["new"] == {"x": {"y": 1}}
    assert _paths.with_value(tree, "t[1][0]", 9)["t"] == (1, [9, 5]) and tree["t"] == (1, [4, 5])
    assert _paths.with_value(tree, "a[1].inner['c d']", 7)["a"][1].inner == {"c d": 7}
    assert _paths.without(tree, "a[0].b")["a"][0] == {} and tree["a"][0] == {"b": 1}
    for wrong in ("", ".a", "a..b", "a[", "a[x]", "a b", "[", 3, None):
        with pytest.raises(DataError, match="expected a path such as"):
            _paths.split(wrong)
    for missing in ("zz", "a[9]", "a[0].c", "t[0].x"):
        with pytest.raises(DataError, match=r"key .*no "):
            _paths.get(tree, missing)
    with pytest.raises(DataError, match="cannot be set in a tuple"):
        _paths.with_value(tree, "t[5]", 0)
    with pytest.raises(DataError, match="drop_inputs=False"):
        _paths.without(tree, "t[0]")


def test_fields_are_keywords_and_values():
    assert gm.data.Pad(key="t", max_length=4) == gm.data.Pad(key="t", max_length=4)
    with pytest.raises(TypeError):
        gm.data.Pad("t", 4)
    for name in ("DecodeBytes", "FormatText", "Tokenize", "Pad", "MapInts", "AddSeq2SeqFields"):
        with pytest.raises(TypeError):
            getattr(gm.data, name)()  # there is no default key


def test_grain_takes_them_and_they_survive_a_process():
    grain = pytest.importorskip("grain")
    step = gm.data.Tokenize(key={"t": "ids"}, tokenizer=TOKENIZER)
    pad = gm.data.Pad(key="ids", max_length=4)
    assert isinstance(step, grain.transforms.Map) and issubclass(gm.data.Seq2SeqTask, grain.transforms.Map)
    ds = grain.MapDataset.source([{"t": "hi"}, {"t": "abc"}]).map(step).map(pad)
    assert [ds[i]["ids"].tolist() for i in range(2)] == [
        [*TOKENIZER.encode(t), *[0] * n] for t, n in (("hi", 2), ("abc", 1))
    ]
    loader = grain.DataLoader(
        data_source=[{"t": "hi"}],
        sampler=grain.samplers.SequentialSampler(1, grain.sharding.NoSharding()),
        operations=[step, pad],
    )
    assert next(iter(loader))["ids"].shape == (4,)
    again = pickle.loads(pickle.dumps(pad))
    assert again == pad and again({"ids": [1]})["ids"].tolist() == [1, 0, 0, 0]
    assert isinstance(again, _maps.MapTransform)


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"text": [f"row {i}" for i in range(7)], "ids": [[i, i + 1] for i in range(7)]})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    parquet.write_table(table.slice(0, 2), tmp_path / "a.parquet")
    rows = gm.data.Parquet(tmp_path / "b.parquet")
    if rows.__class__.__module__.endswith("_kauldron"):
        pytest.skip("where kauldron is installed the name is its data set")
    assert len(rows) == 7 and [rows[i]["text"] for i in (6, 0, -1, 3)] == ["row 6", "row 0", "row 6", "row 3"]
    assert rows[np.int64(4)]["ids"].tolist() == [4, 5]
    both = gm.data.Parquet(tmp_path, columns=["text"])  # a before b
    assert [row["text"] for row in both] == ["row 0", "row 1", *(f"row {i}" for i in range(7))] and set(both[0]) == {
        "text"
    }
    assert pickle.loads(pickle.dumps(both))[2] == {"text": "row 0"}
    for row in (7, -8):
        with pytest.raises(IndexError):
            rows[row]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for wrong in ("absent.parquet", "broken.parquet"):
        with pytest.raises(DataError, match="expected a parquet file"):
            len(gm.data.Parquet(tmp_path / wrong))
    with pytest.raises(DataError, match="no column label; it has text, ids"):
        len(gm.data.Parquet(tmp_path / "b.parquet", columns=["label"]))
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", []):
        with pytest.raises(DataError):
            len(gm.data.Parquet(wrong))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"gemmakit\[train\]"):
        len(gm.data.Parquet(tmp_path / "a.parquet"))
