"""`pad` and `make_seq2seq_fields`: shapes, values and errors of the official functions, computed again by hand."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from gemma import gm
from gemma.errors import DataError


def test_pad_lengthens_the_last_axis():
    assert gm.data.pad([1, 2, 3], max_length=6).tolist() == [1, 2, 3, 0, 0, 0]
    assert gm.data.pad([1, 2, 3], 3).dtype == np.int32
    rows = np.arange(6).reshape(2, 3) + 1
    assert gm.data.pad(rows, 5).tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]]
    assert rows.shape == (2, 3)
    assert gm.data.pad(rows, 3, fill_value=7, axis=0).tolist() == [[1, 2, 3], [4, 5, 6], [7, 7, 7]]
    assert gm.data.pad([], 2).tolist() == [0, 0]
    assert gm.data.pad([5], 3, fill_value=-1).tolist() == [5, -1, -1]
    assert gm.data.pad([2**40], 2).tolist() == [2**40, 0]
    mask = gm.data.pad(np.array([True]), 3)
    assert mask.dtype == bool and mask.tolist() == [True, False, False]


def test_pad_keeps_dtypes_of_arrays():
    for dtype in ("int64", "float16", "uint8"):
        assert gm.data.pad(np.ones(2, dtype), 4).dtype == dtype
    assert gm.data.pad([0.5], 2).tolist() == [0.5, 0.0]


def test_pad_maps_trees():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        a: object
        b: object

    tree = {"x": [1], "y": (np.array([2, 3]), [[4], [5, 6, 7]]), "z": None, "p": Pair([8], np.array([9.0]))}
    done = gm.data.pad(tree, 3)
    assert done["x"].tolist() == [1, 0, 0] and done["z"] is None
    assert isinstance(done["y"], tuple) and done["y"][0].tolist() == [2, 3, 0]
    assert [row.tolist() for row in done["y"][1]] == [[4, 0, 0], [5, 6, 7]]
    assert done["p"].a.tolist() == [8, 0, 0] and done["p"].b.tolist() == [9.0, 0.0, 0.0]
    assert tree["x"] == [1]


def test_pad_refuses_what_is_too_long():
    with pytest.raises(ValueError, match=r"Cannot pad sequence of length 7 to max_length 6: .*truncate=True"):
        gm.data.pad(list(range(7)), max_length=6)
    with pytest.raises(DataError, match=r"length 3 to max_length 2 \(a\.b\[1\]\)"):
        gm.data.pad({"a": {"b": ([1], [1, 2, 3])}}, 2)
    assert gm.data.pad(list(range(7)), max_length=6, truncate=True).tolist() == [0, 1, 2, 3, 4, 5]
    assert gm.data.pad(np.arange(6).reshape(2, 3), 2, truncate=True).tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize("leaf", ["text", b"bytes", ["a"], {"k": "v"}, object()])
def test_pad_refuses_what_is_no_array(leaf):
    with pytest.raises(DataError, match="expected an array or a list of numbers"):
        gm.data.pad(leaf, 3)


def test_pad_checks_its_arguments():
    with pytest.raises(DataError, match="axis 1 of an array of 1 dimensions"):
        gm.data.pad([1], 3, axis=1)
    with pytest.raises(DataError, match="axis -1 of an array of 0"):
        gm.data.pad(3, 3)
    for length in (-1, 2.5, "3", True):
        with pytest.raises(DataError, match="max_length"):
            gm.data.pad([1], length)


def test_seq2seq_fields():
    out = gm.data.make_seq2seq_fields(prompt=[10, 11, 12, 13, 14], response=[20, 21, 1])
    assert out.input.tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert out.target.tolist() == [11, 12, 13, 14, 20, 21, 1]
    assert out.target_mask.tolist() == [False] * 4 + [True] * 3
    assert (out.input.dtype, out.target.dtype, out.target_mask.dtype) == (np.int32, np.int32, bool)
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, r = rng.integers(3, 99, rng.integers(1, 6)), rng.integers(3, 99, rng.integers(0, 6))
        out = gm.data.make_seq2seq_fields(p, r)
        whole = [*p, *r]
        assert out.input.tolist() == whole[:-1] and out.target.tolist() == whole[1:]
        assert out.target_mask.tolist() == [False] * (len(p) - 1) + [True] * len(r)


def test_seq2seq_fields_of_an_empty_prompt_line_up():
    out = gm.data.make_seq2seq_fields([], [5, 6, 7])
    assert out.input.tolist() == [5, 6] and out.target_mask.tolist() == [True, True]
    for prompt, response in (([], []), ([[1]], [2]), ("ab", [1]), ([1.5], [2])):
        with pytest.raises(DataError):
            gm.data.make_seq2seq_fields(prompt, response)


def test_seq2seq_fields_are_a_pytree():
    import jax

    out = gm.data.make_seq2seq_fields([1, 2], [3])
    doubled = jax.tree.map(lambda x: x * 2, out)
    assert isinstance(doubled, gm.data.Seq2SeqFields) and doubled.input.tolist() == [2, 4]
    padded = gm.data.pad(out, 4)
    assert padded.input.tolist() == [1, 2, 0, 0] and padded.target_mask.tolist() == [False, True, False, False]
    assert isinstance(gm.data.pad(jax.numpy.arange(2), 3), jax.Array)


def test_nothing_but_numpy_is_loaded():
    code = (
        "from gemma import gm; import sys\n"
        "for n in ('pad', 'make_seq2seq_fields', 'Seq2SeqTask', 'ContrastiveTask', 'Tokenize', 'MapInts', 'Pad',"
        " 'FormatText', 'DecodeBytes', 'AddSeq2SeqFields'): getattr(gm.data, n)\n"
        "gm.data.AddSeq2SeqFields(in_prompt='a', in_response='b', out_input='c', out_target='d', out_target_mask='e')"
        ".map({'a': [1], 'b': [2]})\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "grain", "kauldron", "pyarrow", "tensorflow"} & set(done.stdout.split())
