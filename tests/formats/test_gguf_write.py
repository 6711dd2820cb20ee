# SPDX-License-Identifier: Apache-2.0
"""The GGUF writer, read back by the `gguf` package and by our own reader; what it must refuse before it writes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from gguf import GGUFReader

from gemma.errors import ShapeError
from gemma.formats._source import Source
from gemma.formats.gguf import Gguf
from gemma.formats.gguf_write import TensorSpec, write_gguf
from gemma.quants import QuantType, quantize

METADATA = {
    "general.architecture": "gemma3",
    "a.flag": True,
    "a.whole": 7,
    "a.negative": -7,
    "a.large": 2**40,
    "a.real": 0.5,
    "a.text": "naïve ▁",
    "a.names": ["", "b", "ü"],
    "a.none": [],
    "a.numbers": np.arange(5, dtype=np.float32),
    "a.ints": np.arange(-2, 3, dtype=np.int32),
    "a.flags": np.array([True, False]),
}


def arrays() -> dict[str, tuple[QuantType, np.ndarray]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    return {
        "matrix": (QuantType.Q4_K, x),
        "short": (QuantType.Q8_0, x[:1, :32]),
        "vector": (QuantType.F32, x[0, :5]),
        "half": (QuantType.BF16, x[:3, :7]),
        "cube": (QuantType.F16, x[:, :4].reshape(2, 3, 4)),
    }


def write(path, **options):
    packed = {name: quantize(x.reshape(-1, x.shape[-1]), type).data for name, (type, x) in arrays().items()}
    specs = [TensorSpec(name, type, x.shape) for name, (type, x) in arrays().items()]
    with open(path, "wb") as file:
        size = write_gguf(file, METADATA, specs, lambda spec: [packed[spec.name]], **options)
    assert path.stat().st_size == size
    return packed


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_both_readers_see_what_was_written(tmp_path, alignment):
    path = tmp_path / "x.gguf"
    packed = write(path, alignment=alignment)
    source = Source(path)
    ours = Gguf(source)
    theirs = GGUFReader(path)
    assert ours.version == 3 and ours.alignment == alignment == theirs.alignment
    assert list(ours.tensors) == list(packed) == [t.name for t in theirs.tensors]
    for name, (type, x) in arrays().items():
        tensor = ours.tensors[name]
        assert tensor.type is type and tensor.shape == x.shape and tensor.offset % alignment == 0
        assert source.read(tensor.offset, tensor.nbytes).tobytes() == packed[name].tobytes()
    for tensor in theirs.tensors:
        type, x = arrays()[tensor.name]
        assert int(tensor.tensor_type) == type.ggml_id and tuple(tensor.shape[::-1]) == x.shape
        assert np.asarray(tensor.data).tobytes() == packed[tensor.name].tobytes()
    types = {key: (value.type, value.item_type) for key, value in ours.values.items()}
    assert types["a.flag"] == ("BOOL", "") and types["a.whole"] == ("UINT32", "") and types["a.real"] == ("FLOAT32", "")
    assert types["a.negative"] == ("INT32", "") and types["a.large"] == ("UINT64", "")
    assert types["a.names"] == ("ARRAY", "STRING") and types["a.ints"] == ("ARRAY", "INT32")
    assert types["a.flags"] == ("ARRAY", "BOOL") and types["a.numbers"] == ("ARRAY", "FLOAT32")
    for key, value in METADATA.items():
        got = ours.array(key) if types[key][0] == "ARRAY" else ours.scalar(key)
        assert np.array_equal(got, value) and theirs.get_field(key) is not None
    source.close()


def refused(metadata=None, specs=(), read=None, match="", **options):
    file = io.BytesIO()
    with pytest.raises(ShapeError, match=match):
        write_gguf(file, metadata or {}, list(specs), read, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "match"),
    [(None, "got None"), (2**64, "metadata k"), (1e39, "metadata k"), ([1, 2], "metadata k"), (object(), "metadata k"),
     (np.zeros((2, 2)), "metadata k"), (["a", 1], "metadata k")],
)  # fmt: skip
def test_metadata_that_has_no_type_is_refused(value, match):
    assert refused({"k": value}, match=match) == b""


def test_names_shapes_and_alignments_that_cannot_be_read_are_refused_before_anything_is_written():
    spec = TensorSpec("a", QuantType.F32, (4,))
    for specs, match in (
        ([spec, spec], "'a': expected a new name"),
        ([TensorSpec("", QuantType.F32, (4,))], "1..63 bytes"),
        ([TensorSpec("é" * 32, QuantType.F32, (4,))], "1..63 bytes"),
        ([TensorSpec("a", QuantType.F32, ())], "axes"),
        ([TensorSpec("a", QuantType.F32, (2, 0))], "axes"),
        ([TensorSpec("a", QuantType.F32, (1, 1, 1, 1, 1))], "axes"),
        ([TensorSpec("a", QuantType.Q8_0, (4, 33))], "a: Q8_0: a row must be"),
        ([TensorSpec("a", QuantType.SFP8, (4, 32))], "a: SFP8 is no type of GGUF"),
    ):
        assert refused(specs=specs, match=match) == b""
    assert refused({"": 1}, match="key") == b"" and refused({"k" * 70_000: 1}, match="key") == b""
    for alignment in (0, 4, 48, 1 << 20):
        assert refused(alignment=alignment, match="alignment") == b""


def test_a_tensor_of_the_wrong_size_is_refused():
    spec = TensorSpec("a", QuantType.F32, (4,))
    refused(specs=[spec], read=lambda _: [np.zeros(5, np.float32)], match="a: expected 16 contiguous bytes")
    refused(specs=[spec], read=lambda _: [np.zeros(8, np.float32)[::2]], match="a: expected contiguous")
    refused(specs=[spec], read=lambda _: [np.zeros(2, np.float32)], match="a: expected 16 contiguous bytes")
    refused(specs=[spec], read=lambda _: [], match="a: expected 16 contiguous bytes .*, got 0")


def test_a_tensor_may_come_in_runs():
    spec, file = TensorSpec("a", QuantType.F32, (4, 2)), io.BytesIO()
    write_gguf(file, {}, [spec], lambda _: (np.full((2, 2), i, np.float32) for i in (1, 2)))
    assert np.frombuffer(file.getvalue()[-32:], np.float32).tolist() == [1] * 4 + [2] * 4
