# SPDX-License-Identifier: Apache-2.0
"""Batches: every example once per epoch, packed rows equal to unpacked ones, exact resuming anywhere, shards, report."""

import hashlib
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gemma.chat import Turn
from gemma.errors import DataError
from gemma.gm.data import Completion, Conversation, Examples, Labelled, Loader, Preference, Rated, Text, encode
from gemma.gm.data._packing import choose_buckets, order, pack
from gemma.testing import ByteTokenizer

TOK = ByteTokenizer()
MODES = {
    "plain": dict(shuffle=False),
    "grouped": dict(),
    "packed": dict(packing=True, packing_buffer=3),
    "first fit": dict(packing="first", packing_buffer=2, shuffle=False),
    "dropped last": dict(packing="best", drop_last=True),
}


def chats(n, seed=0):
    rng = random.Random(seed)

    def word(k):
        return "".join(rng.choices("abcdefgh ", k=rng.randint(1, k))) + "."

    out = []
    for i in range(n):
        turns = [
            t for _ in range(rng.choice([1, 1, 2])) for t in (Turn("user", word(30)), Turn("model", f"{i}{word(40)}"))
        ]
        out.append(Conversation(tuple(turns)) if i % 5 else Completion(f"{i}{word(9)}", word(60)))
    return out


def loader(examples, **options):
    return Loader(examples, TOK, **(dict(batch_size=4, max_length=160, epochs=2) | options))


def segments(batch):
    """Each example of a batch, wherever it lies, as the four columns of its tokens."""
    names = ("tokens", "targets", "loss_mask", "positions")
    ids = batch.get("segment_ids")
    for n, row in enumerate(batch["tokens"]):
        if ids is None:
            length = np.flatnonzero(row).max(initial=-1) + 1
            spans = [slice(0, length)] if length else []
        else:
            spans = [np.flatnonzero(ids[n] == k) for k in range(1, ids[n].max() + 1)]
            spans = [slice(span[0], span[-1] + 1) for span in spans]
            assert not row[ids[n] == 0].any() and sum(s.stop - s.start for s in spans) == (ids[n] > 0).sum()
        for span in spans:
            yield tuple(batch[name][n, span].tolist() for name in names)


def alone(example, max_length=160):
    encoded = encode(example, TOK, max_length=max_length)
    ids, mask = encoded.ids.tolist(), encoded.loss_mask.tolist()
    targets = [i if learnt else 0 for i, learnt in zip(ids[1:], mask[1:])] + [0]
    return ids, targets, [*mask[1:], False], list(range(len(ids)))


@pytest.mark.parametrize("mode", ["plain", "grouped", "packed", "first fit"])
def test_every_example_is_there_once_an_epoch_and_as_if_alone(mode):
    """The data's side of "packing changes no loss": tokens, targets, mask and positions are those of a row of its own."""
    examples = chats(41)
    wanted = sorted(alone(example) for example in examples)
    data = loader(examples, **MODES[mode])
    batches = list(data)
    assert len(batches) == data.total_steps
    epochs = batches[: data.steps_per_epoch], batches[data.steps_per_epoch :]
    for epoch in epochs:
        assert sorted(segment for batch in epoch for segment in segments(batch)) == wanted
    rows = [[list(segments(batch)) for batch in epoch] for epoch in epochs]
    assert (rows[0] == rows[1]) == (not data.shuffle)
    for batch in batches:
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            name: ((4, batch["tokens"].shape[1]), "bool" if name == "loss_mask" else "int32")
            for name in ("tokens", "targets", "positions", "loss_mask", *(["segment_ids"] if data.packing else []))
        }
        assert batch["tokens"].shape[1] in data.buckets and len(data.buckets) <= 4
        assert (batch["targets"][batch["loss_mask"]] != 0).all() and not batch["targets"][~batch["loss_mask"]].any()
    if mode == "plain":
        assert [s for batch in epochs[0] for s in segments(batch)] == [alone(example) for example in examples]


@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_exact_at_every_batch(mode):
    data = loader(chats(23), **MODES[mode])
    wanted, states = [], []
    batches = iter(data)
    for _ in range(data.total_steps):
        states.append(json.dumps(batches.get_state()))
        wanted.append(next(batches))
    states.append(json.dumps(batches.get_state()))
    assert next(batches, None) is None
    resumed = iter(loader(chats(23), **MODES[mode]))
    for at in random.Random(0).sample(range(len(states)), len(states)):  # backwards too
        resumed.set_state(json.loads(states[at]))
        assert json.dumps(resumed.get_state()) == states[at]
        for batch in wanted[at : at + 3]:
            got = next(resumed)
            assert got.keys() == batch.keys() and all(np.array_equal(got[k], batch[k]) for k in batch)
    resumed.set_state(json.loads(states[-1]))
    assert next(resumed, None) is None


def test_batches_are_the_same_in_another_process():
    code = (
        "from test_loader import *; d = loader(chats(20), packing=True, seed=9)\n"
        "print(hashlib.sha256(b''.join(b[k].tobytes() for b in d for k in sorted(b))).hexdigest(), d.fingerprint['data'])"
    )
    data = loader(chats(20), packing=True, seed=9)
    here = hashlib.sha256(b"".join(b[k].tobytes() for b in data for k in sorted(b))).hexdigest()
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [here, data.fingerprint["data"]]
    # Golden: a change of these breaks the resuming of everybody's runs.
    assert order(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3] and order(8, 1, 0).tolist() != order(8, 0, 1).tolist()


def test_shuffling_is_a_fair_permutation():
    n, seen = 30, np.zeros((30, 30))
    for epoch in range(400):
        perm = order(n, 5, epoch)
        assert sorted(perm) == list(range(n))
        seen[np.arange(n), perm] += 1
    # 400 draws of 1/30: mean 13.3, deviation 3.6; the largest of 900 such counts is below mean + 5 deviations
    assert seen.max() < 32 and seen.min() >= 1


@pytest.mark.parametrize("mode", MODES)
def test_shards_part_every_batch(mode):
    examples = chats(30)
    whole = list(loader(examples, **MODES[mode]))
    parts = [loader(examples, shard=(k, 4), **MODES[mode]) for k in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(np.array_equal(np.concatenate([s[k] for s in shares]), batch[k]) for k in batch)
        assert all(share["tokens"].shape[0] == 1 for share in shares)
    state = iter(parts[1]).get_state() | {"batch": 1}
    again = iter(loader(examples, shard=(1, 2), **MODES[mode]))  # another number of processes
    again.set_state(state)
    assert np.array_equal(next(again)["tokens"], whole[1]["tokens"][2:])


def test_states_of_other_data_or_settings_are_refused():
    data = loader(chats(20))
    state = next_state = iter(data).get_state()
    for options, why in [
        (dict(seed=1), "seed was 0, is 1"),
        (dict(batch_size=2), "batch_size was 4, is 2"),
        (dict(packing=True), "buckets was .* packing was None, is 'best'"),
        (dict(shuffle=False), "shuffle was True, is False"),
    ]:
        with pytest.raises(DataError, match=why):
            iter(loader(chats(20), **options)).set_state(state)
    for examples, options in [(chats(20, seed=1), dict(buckets=data.buckets)), (chats(20), dict(last_turn_only=True))]:
        with pytest.raises(DataError, match="it is of other data"):
            iter(loader(examples, **options)).set_state(state)
    batches = iter(data)
    for changes in [
        dict(version=2),
        dict(epoch=-1),
        dict(batch="1"),
        dict(batch=99),
        dict(epoch=1.0),
        dict(epoch=10**30),
        dict(of=None),
        dict(epoch=7, batch=1),
    ]:
        with pytest.raises(DataError, match="state: "):
            batches.set_state(next_state | changes)
    with pytest.raises(DataError, match="state: "):
        batches.set_state("x")
    assert batches.get_state() == state  # refusing changed nothing


def test_the_report_is_right():
    """Every number again, by brute force."""
    long = Conversation((Turn("user", "a" * 200), Turn("model", "b")))
    silent = Conversation((Turn("user", "a"), Turn("model", "b")), mute=(1,))
    examples = [*chats(37), long, silent, Text("c" * 400), Text("d" * 10)]
    for mode, options in MODES.items():
        data = loader(examples, epochs=1, **options)
        report, batches = data.report, list(data)
        kept = [alone(e) for e in examples[:37]] + [alone(Text("d" * 10))]
        pieces = [160, 160, 402 - 1 + 3 - 320]  # one bos per piece: 399 + 2 ids after the first bos, 159 at a time
        tokens = sum(len(ids) for ids, *_ in kept) + sum(pieces)
        assert (report.rows, report.kept, report.dropped_long, report.no_labels, report.split) == (41, 39, 1, 1, 1)
        assert report.tokens == tokens and report.cut == 0
        assert report.label_tokens == sum(sum(mask) for _, _, mask, _ in kept) + sum(pieces) - 3
        assert report.tokens_lost == sum(len(encode(e, TOK, max_length=999).ids) for e in (long,)) + len(
            encode(Conversation(silent.turns), TOK, max_length=999).ids
        )
        assert report.batches == len(batches) == data.steps_per_epoch
        assert report.positions == sum(b["tokens"].size for b in batches)
        padding = sum((b["tokens"] == 0).sum() for b in batches)
        assert report.padding_share == pytest.approx(padding / report.positions)
        assert dict(report.shapes) == {
            width: sum(b["tokens"].shape[1] == width for b in batches)
            for width in {b["tokens"].shape[1] for b in batches}
        }
        if mode != "dropped last":
            assert report.label_tokens == sum(b["loss_mask"].sum() for b in batches)
            assert report.placed_tokens == report.tokens
        assert report.label_share == report.label_tokens / report.tokens
        assert f"{tokens:,}" in str(report) and "too long, dropped" in str(report) and json.dumps(report.to_dict())
    cut = loader([*chats(10), long], truncate="left").report
    assert (cut.cut, cut.dropped_long, cut.tokens_lost) == (1, 0, len(encode(long, TOK, max_length=999).ids) - 160)


def test_packing_is_dense_whole_and_bounded():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 90, 2000)
    for best, share in [(True, 0.96), (False, 0.93)]:
        rows = list(pack(np.arange(2000), lengths, 100, 64, best=best))
        assert sorted(itertools.chain(*rows)) == list(range(2000))
        filled = [lengths[list(row)].sum() for row in rows]
        assert max(filled) <= 100 and np.mean(filled) / 100 > share
    # An item waits for at most `buffer` rows: with one open row, rows are runs of neighbours.
    rows = list(pack(np.arange(2000), lengths, 100, 1, best=False))
    assert all(list(row) == list(range(row[0], row[-1] + 1)) for row in rows)


def test_buckets_are_the_best_ones():
    rng = np.random.default_rng(1)
    for _ in range(5):
        lengths = rng.integers(1, 200, 60)
        found = choose_buckets(lengths, 200, 3)
        widths = sorted({min(-(-int(n) // 16) * 16, 200) for n in lengths})

        def padded(buckets, lengths=lengths):
            return sum(min((b for b in buckets if b >= n), default=10**6) for n in lengths)

        assert padded(found) == min(padded(c) for c in itertools.combinations(widths, 3))
    assert choose_buckets(np.array([5]), 8) == (8,) and choose_buckets(np.array([100_000]), 131_072)[-1] >= 100_000
    given = loader(chats(20), buckets=(500, 64))
    assert given.buckets == (64, 160) and {b["tokens"].shape[1] for b in given} <= {64, 160}
    assert loader(chats(20), buckets=[64]).buckets == (64, 160)  # an example is wider than all that were given
    with pytest.raises(DataError, match="expected widths"):
        loader(chats(20), buckets=["8"]).buckets  # noqa: B018


def test_preferences_ratings_and_labels():
    ask = (Turn("user", "Hi"),)
    pairs = [Preference(ask, "a" * n, "b" * (9 - n)) for n in range(1, 7)]
    got = list(loader(pairs, shuffle=False, epochs=1))
    assert [b["tokens"].shape for b in got] == [(4, 2, got[0]["tokens"].shape[2])] * 2
    rows = [row for b in got for row in zip(b["tokens"], b["targets"], b["loss_mask"])]
    for example, row in zip(pairs, rows):
        for which, text in enumerate((example.chosen, example.rejected)):
            assert TOK.decode(row[1][which][row[2][which]]) == f"{text}<end_of_turn>"
            assert TOK.decode(row[0][which][row[0][which] > 0]).endswith(f"model\n{text}<end_of_turn>\n")
    assert not any(part.any() for row in rows[6:] for part in row)
    report = loader(pairs).report
    assert report.positions == sum(b["tokens"].size for b in got)
    assert report.placed_tokens == report.tokens == sum((b["tokens"] > 0).sum() for b in got)

    [batch] = loader([Rated(ask, "x", n > 0) for n in range(3)], shuffle=False, epochs=1)
    assert batch["good"].tolist() == [False, True, True, False] and batch["loss_mask"].any(1).tolist() == [True] * 3 + [
        False
    ]

    rows = [Labelled("t", name) for name in ("10", "9", "9")]
    data = loader(rows, shuffle=False, epochs=1, labels={"9": "N", "10": "T"})
    [batch] = data
    assert batch["label"].tolist() == [1, 0, 0, -1] and batch["loss_mask"].sum(1).tolist() == [1, 1, 1, 0]
    where = batch["loss_mask"][:3].argmax(1)
    assert data.label_ids[batch["label"][:3]].tolist() == batch["targets"][np.arange(3), where].tolist()
    assert TOK.decode(batch["tokens"][0][: where[0] + 1]).endswith("<start_of_turn>model\n")
    assert list(loader([Labelled("t", n) for n in "21z"]).labels) == ["1", "2", "z"]
    assert loader(rows, labels=data.labels).labels == data.labels  # the loader for evaluation
    for options, why in [(dict(packing=True), "hold one example each"), (dict(labels=["a", "b"]), "expected none")]:
        with pytest.raises(DataError, match=why):
            loader(pairs, **options)


def test_images(tmp_path):
    for name, colour in [("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))]:
        Image.new("RGB", (7, 5), colour).save(tmp_path / name)
    mark = "<start_of_image>"
    one = Conversation((Turn("user", f"{mark}x"), Turn("model", "y")), (str(tmp_path / "a.png"),))
    two = Conversation((Turn("user", mark + mark), Turn("model", "y")), tuple(str(tmp_path / f"{n}.png") for n in "ba"))
    [batch] = loader([one, two, Completion("x", "y")], shuffle=False, epochs=1, image_size=4)
    assert batch["images"].shape == (4, 2, 4, 4, 3) and batch["images"].dtype == np.uint8
    assert batch["images"][:, :, 2, 2].tolist() == [
        [[255, 0, 0], [0, 0, 0]],
        [[0, 0, 255], [255, 0, 0]],
        *[[[0, 0, 0]] * 2] * 2,
    ]
    for options, why in [(dict(), "image_size"), (dict(packing=True, image_size=4), "packing: rows with images")]:
        with pytest.raises(DataError, match=why):
            loader([one], **options).report  # noqa: B018
    (tmp_path / "a.png").write_bytes(b"\x89PNG, broken")
    batches = iter(loader([one], image_size=4))
    for _ in range(2):  # the failing batch stays the next one
        with pytest.raises(DataError, match=r"examples\[0\]: images\[0\]"):
            next(batches)
    assert batches.get_state()["batch"] == 0


def test_examples_that_do_not_fit_the_memory_are_encoded_again():
    full, none = (list(loader(chats(20), packing=True, cache_bytes=n)) for n in (1 << 20, 0))
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(full, none, strict=True) for k in a)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=True), "batch_size"),
        (dict(epochs=0), "epochs"),
        (dict(packing="worst"), "packing"),
        (dict(shard=(1, 1)), "shard"),
        (dict(shard=3), "shard"),
        (dict(shard=(0, 3)), "cannot be shared evenly"),
        (dict(max_length="9"), "max_length"),
        (dict(seed=-1), "seed"),
        (dict(packing_buffer=0), "packing_buffer"),
    ],
)
def test_bad_arguments(options, why):
    with pytest.raises(DataError, match=why):
        loader([Text("a")], **options)


def test_data_that_gives_no_batch():
    with pytest.raises(DataError, match="no example is left to train on: 1 are longer than max_length 4"):
        loader([Completion("aaa", "bbb")], max_length=4).report  # noqa: B018
    with pytest.raises(DataError, match="fill no batch of 4"):
        next(iter(loader([Text("a")], drop_last=True, epochs=None)))
    with pytest.raises(DataError, match="expected one kind, got no example"):
        loader([])
    with pytest.raises(DataError, match=r"examples\[1\]: 10 tokens, but a row holds 9"):
        loader([Text("a"), Text("a" * 8)], max_length=9, truncate="error").report  # noqa: B018
    many = [Text("a" * n) for n in (8, 1, 20, 9)]
    with pytest.raises(
        DataError, match=r"examples\[0\]: 10 tokens, .* 9 \(3 of 4 rows are too long, the longest has 22\): "
    ):
        loader(many, max_length=9, truncate="error").report  # noqa: B018
    assert len(Examples.of([Text("a")])) == 1
    seen = []
    endless = iter(loader([Text("a")], epochs=None, progress=lambda *done: seen.append(done)))
    assert [int((next(endless)["tokens"] > 0).sum()) for _ in range(3)] == [3, 3, 3] and seen == [(1, 1)]


def test_grain_sees_the_same_batches():
    pytest.importorskip("grain")
    data = loader(chats(9), packing=True)
    dataset = data.to_grain()
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(dataset, data, strict=True))
    batches, own = iter(dataset), iter(data)
    next(batches), next(own)
    assert batches.get_state() == own.get_state()
    again = iter(dataset)
    again.set_state(batches.get_state())
    assert np.array_equal(next(again)["tokens"], next(own)["tokens"])
