"""`Seq2SeqTask` and `ContrastiveTask`, against ids that are put together by hand."""

import copy

import numpy as np
import pytest

from gemma import gm
from gemma.errors import DataError
from gemma.testing import ByteTokenizer

T = ByteTokenizer()
START, END, BOS = (T.pieces.index(p) for p in ("<start_of_turn>", "<end_of_turn>", "<bos>"))
SEQ = dict(in_prompt="src", in_response="dst", out_input="input", out_target="target", out_target_mask="loss_mask")
PAIR = dict(
    in_prompt="q", in_chosen="good", in_rejected="bad", out_tokens="tokens", out_targets="targets", out_mask="m"
)


def plain(text: str) -> list[int]:
    return T.encode(text, parse_special=False)


def head(prompt: str) -> list[int]:
    """<bos><start_of_turn>user\\n..<end_of_turn>\\n<start_of_turn>model\\n, marker by marker."""
    return [BOS, START, *plain(f"user\n{prompt}"), END, *plain("\n"), START, *plain("model\n")]


def shifted(prompt: str, answer: str, length: int):
    """Input, target and mask by their definition: a token at a time."""
    start, ids = len(head(prompt)), [*head(prompt), *plain(answer), END]
    rows = [(ids[i], ids[i + 1], i + 1 >= start) for i in range(len(ids) - 1)][:length]
    rows += [(0, 0, False)] * (length - len(rows))
    return [list(column) for column in zip(*rows)]


def test_seq2seq_task():
    task = gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=60)
    element = {"src": b"Hello \xc3\xa9", "dst": "Bonjour", "id": 4}
    before = copy.deepcopy(element)
    done = task.map(element)
    assert element == before and set(done) == {"input", "target", "loss_mask", "id"}
    assert (done["input"].shape, done["target"].shape, done["loss_mask"].shape) == ((60,), (60, 1), (60, 1))
    assert (done["input"].dtype, done["target"].dtype, done["loss_mask"].dtype) == (np.int32, np.int32, bool)
    inputs, target, mask = shifted("Hello é", "Bonjour", 60)
    assert done["input"].tolist() == inputs
    assert done["target"][:, 0].tolist() == target and done["loss_mask"][:, 0].tolist() == mask
    assert sum(mask) == len(plain("Bonjour")) + 1  # the end token counts
    assert T.decode([int(i) for i in done["target"][done["loss_mask"]]]).startswith("Bonjour")


def test_seq2seq_task_cuts_only_when_asked():
    element = {"src": "a question", "dst": "a rather long answer"}
    length = len(head("a question")) + 5
    with pytest.raises(ValueError, match="Cannot pad sequence of length"):
        gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=length).map(element)
    done = gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=length, truncate=True).map(element)
    inputs, target, mask = shifted("a question", "a rather long answer", length)
    assert done["input"].tolist() == inputs and done["loss_mask"][:, 0].tolist() == mask
    whole = length - 5 + len(plain("a rather long answer"))  # exactly as long is not too long
    assert gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=whole).map(element)["loss_mask"].sum() == 21


def test_seq2seq_task_for_sampling_gives_texts():
    done = gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=4, sampling=True).map(
        {"src": "Hi", "dst": b"Yo", "id": 1}
    )
    prompt = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert done == {"input": prompt, "target": "Yo<end_of_turn>", "id": 1}


def test_inputs_stay_when_asked_and_keys_are_paths():
    keys = SEQ | dict(in_prompt="pair[0].text", in_response="pair[1].text", out_input="x.input")
    element = {"pair": [{"text": "Hi"}, {"text": "Yo"}]}
    kept = gm.data.Seq2SeqTask(**keys, tokenizer=T, max_length=50, drop_inputs=False).map(element)
    assert kept["pair"] == element["pair"] and kept["x"]["input"].tolist() == shifted("Hi", "Yo", 50)[0]
    dropped = gm.data.Seq2SeqTask(**keys, tokenizer=T, max_length=50).map(element)
    assert dropped["pair"] == [{}, {}] and element["pair"][0] == {"text": "Hi"}
    same = SEQ | dict(out_input="src")  # a result may take the place of its text
    assert gm.data.Seq2SeqTask(**same, tokenizer=T, max_length=50).map({"src": "Hi", "dst": "Yo"})["src"].shape == (50,)


def test_contrastive_task():
    task = gm.data.ContrastiveTask(**PAIR, tokenizer=T, max_length=64)
    element = {"q": "How much?", "good": b"4.", "bad": np.str_("Of course 42."), "id": 0}
    before = copy.deepcopy(element)
    done = task.map(element)
    assert element == before and set(done) == {"tokens", "targets", "m", "id"}
    for row, answer in enumerate(("4.", "Of course 42.")):
        inputs, target, mask = shifted("How much?", answer, 64)
        assert done["tokens"][row].tolist() == inputs
        assert done["targets"][row].tolist() == target and done["m"][row].tolist() == mask
    assert (done["tokens"].dtype, done["targets"].dtype, done["m"].dtype) == (np.int32, np.int32, bool)
    with pytest.raises(ValueError, match="Cannot pad sequence"):
        gm.data.ContrastiveTask(**PAIR, tokenizer=T, max_length=20).map(element)
    cut = gm.data.ContrastiveTask(**PAIR, tokenizer=T, max_length=20, truncate=True, drop_inputs=False).map(element)
    assert cut["tokens"].shape == (2, 20) and cut["q"] == "How much?"


@pytest.mark.parametrize(
    ("element", "match"),
    [
        ({"dst": "Yo"}, r"key 'src': no 'src' in the element; it has 'dst'"),
        ({"src": None, "dst": "Yo"}, "key 'src': expected a text .*, got NoneType"),
        ({"src": 4, "dst": "Yo"}, "key 'src': expected a text .*, got int"),
        ({"src": b"\xff", "dst": "Yo"}, "key 'src': expected utf-8, .* at byte 0"),
    ],
)
def test_tasks_name_the_wrong_key(element, match):
    with pytest.raises(DataError, match=match):
        gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=60).map(element)


def test_turn_markers_are_those_of_the_vocabulary():
    """Gemma 4 spells its turns differently; a vocabulary without turns has the markers as words."""

    class Newer(ByteTokenizer):
        version = 4

    made = gm.data.Seq2SeqTask(**SEQ, tokenizer=Newer(), max_length=9, sampling=True).map({"src": "Hi", "dst": "Yo"})
    assert made["input"] == "<|turn>user\nHi<turn|>\n<|turn>model\n" and made["target"] == "Yo<turn|>"
    words = gm.testing.DummyTokenizer()
    made = gm.data.Seq2SeqTask(**SEQ, tokenizer=words, max_length=9, sampling=True).map({"src": "Hi", "dst": "Yo"})
    assert made["target"] == "Yo<end_of_turn>"


def test_the_helper_of_the_official_tests():
    from gemma.gm.data import _tasks

    for value, expected in ((b"caf\xc3\xa9", "café"), ("s", "s"), (b"", ""), (42, 42), (None, None)):
        assert _tasks._decode_bytes(value) == expected


class Records:
    """A random-access source as TFDS gives it: bytes and scalars of numpy by a row's number, nothing else."""

    def __len__(self):
        return 5

    def __getitem__(self, record_key):
        return {"src": f"count {record_key}".encode(), "dst": b"x" * (record_key + 1), "id": np.int64(record_key)}


def test_a_source_becomes_batches_without_a_trainer():
    """By hand, and as a data set of grain: shuffled, batched, more than one epoch."""
    grain = pytest.importorskip("grain")
    task = gm.data.Seq2SeqTask(**SEQ, tokenizer=T, max_length=60)
    rows = [task.map(row) for row in (Records()[i] for i in range(5))]
    assert [int(row["loss_mask"].sum()) for row in rows] == [2, 3, 4, 5, 6]
    ds = grain.MapDataset.source(Records()).seed(3).shuffle().map(task).repeat(2).batch(2).to_iter_dataset()
    seen = []
    for batch in ds:
        assert batch["input"].shape == (2, 60) and batch["target"].shape == batch["loss_mask"].shape == (2, 60, 1)
        assert (batch["input"].dtype, batch["loss_mask"].dtype) == (np.int32, bool) and set(batch) == set(rows[0])
        for at, row in enumerate(batch["id"].tolist()):
            seen.append(row)
            for name, values in rows[row].items():
                np.testing.assert_array_equal(batch[name][at], values)
    assert sorted(seen) == sorted([*range(5)] * 2) and seen != [*range(5)] * 2
