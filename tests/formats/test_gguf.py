# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader on files built by hand: every value type, windows, alignment, and where each refusal points."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from gemma.errors import FormatError, UnsupportedError
from gemma.formats import gguf as module
from gemma.formats._source import Source
from gemma.formats.gguf import Gguf
from gemma.quants import QuantType

STRING, ARRAY = 8, 9
LAYOUT = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value) -> bytes:
    head = text(key) + struct.pack("<I", kind)
    if kind == STRING:
        return head + text(value)
    if kind == ARRAY:
        inner, items = value
        body = b"".join(text(item) if inner == STRING else struct.pack("<" + LAYOUT[inner], item) for item in items)
        return head + struct.pack("<IQ", inner, len(items)) + body
    return head + struct.pack("<" + LAYOUT[kind], value)


def tensor(name: str, dims, kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(pairs=(), tensors=(), data=b"", version=3, alignment=32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def parse(tmp_path):
    def run(data: bytes, mmap: bool = True) -> Gguf:
        path = tmp_path / "file.gguf"
        path.write_bytes(data)
        return Gguf(Source(path, mmap=mmap))

    return run


SCALARS = [(0, 255), (1, -128), (2, 65535), (3, -32768), (4, 2**32 - 1), (5, -(2**31)), (6, 0.5), (7, True)]
SCALARS += [(8, "naïve 漢字"), (10, 2**64 - 1), (11, -(2**63)), (12, 0.1)]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(parse, version, mmap):
    pairs = [pair(f"k.{kind}", kind, value) for kind, value in SCALARS]
    arrays = {kind: [value, value] for kind, value in SCALARS}
    pairs += [pair(f"a.{kind}", ARRAY, (kind, items)) for kind, items in arrays.items()]
    pairs += [pair("a.empty", ARRAY, (4, []))]
    parsed = parse(build(pairs, version=version), mmap)
    for kind, value in SCALARS:
        assert parsed.scalar(f"k.{kind}") == value
        assert type(parsed.scalar(f"k.{kind}")) is type(value)
        assert parsed.values[f"a.{kind}"].count == 2
        assert list(parsed.array(f"a.{kind}")) == arrays[kind]
    assert list(parsed.array("a.empty")) == [] and parsed.scalar("a.empty") is None
    assert parsed.array("a.7").dtype == np.bool_
    with pytest.raises(FormatError, match=r"k\.4: expected an ARRAY, got UINT32"):
        parsed.array("k.4")


@pytest.mark.parametrize("mmap", [True, False])
def test_a_header_of_several_windows(parse, mmap):
    """Strings across the 1 MiB window of a file that is not mapped, one of them larger than a window."""
    pieces = [chr(97 + i % 26) * (i % 300) for i in range(20_000)] + ["é" * 700_000, "", "end"]
    pairs = [pair("tokens", ARRAY, (STRING, pieces)), pair("after", 4, 7)]
    scores = list(range(300_000))
    pairs += [pair("scores", ARRAY, (6, scores)), pair("last", STRING, "z")]
    parsed = parse(build(pairs), mmap)
    assert parsed.array("tokens") == pieces
    np.testing.assert_array_equal(parsed.array("scores"), np.arange(300_000, dtype=np.float32))
    assert (parsed.scalar("after"), parsed.scalar("last")) == (7, "z")


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors(parse, alignment):
    data = bytearray(3 * alignment + 4096)
    pairs = [pair("general.alignment", 4, alignment)] if alignment != 32 else []
    step = -(-136 // alignment) * alignment
    tensors = [tensor("a", (64, 2), 8, 0), tensor("b", (3, 2, 1, 5), 0, step)]
    parsed = parse(build(pairs, tensors, bytes(data), alignment=alignment))
    a, b = parsed.tensors["a"], parsed.tensors["b"]
    assert (a.shape, a.type, a.nbytes, a.offset % alignment) == ((2, 64), QuantType.Q8_0, 136, 0)
    assert (b.shape, b.type, b.nbytes, b.offset - a.offset) == ((5, 1, 2, 3), QuantType.F32, 120, step)
    assert parsed.alignment == alignment


REFUSED = {
    "zero dimension": (build([], [tensor("a", (0,), 0, 0)], bytes(64)), "dimension 0 is 0"),
    "no dimensions": (build([], [tensor("a", (), 0, 0)], bytes(64)), "expected 1..4 dimensions, got 0"),
    "misaligned offset": (build([], [tensor("a", (1,), 0, 4)], bytes(64)), "not a multiple of the alignment 32"),
    "past the end": (build([], [tensor("a", (17,), 0, 0)], bytes(64)), "needs bytes 64..132"),
    "overlap": (build([], [tensor("a", (9,), 0, 0), tensor("b", (1,), 0, 32)], bytes(64)), "overlap those of a"),
    "same offset": (build([], [tensor("a", (1,), 0, 0), tensor("b", (1,), 0, 0)], bytes(64)), "overlap"),
    "same name": (
        build([], [tensor("a", (1,), 0, 0), tensor("a", (1,), 0, 32)], bytes(64)),
        "duplicate tensor name 'a'",
    ),
    "no name": (build([], [tensor("", (1,), 0, 0)], bytes(64)), "has no name"),
    "long name": (build([], [tensor("n" * 65, (1,), 0, 0)], bytes(64)), "at most 64 bytes"),
    "half a block": (build([], [tensor("a", (33,), 8, 0)], bytes(64)), "not whole Q8_0 blocks of 32"),
    "type 99": (build([], [tensor("a", (32,), 99, 0)], bytes(64)), "unknown tensor type 99"),
    "same key": (build([pair("k", 4, 1), pair("k", 4, 1)]), "duplicate metadata key 'k'"),
    "empty key": (build([pair("", 4, 1)], data=bytes(32)), "is empty"),
    "bool of 2": (build([pair("k", 7, 2)], data=bytes(32)), "a BOOL is 0 or 1, got 2"),
    "value type 13": (build([text("k") + struct.pack("<IQ", 13, 0)]), "expected a value type 0..12, got 13"),
    "not UTF-8": (build([pair("k", STRING, b"ab\xff")]), "not UTF-8"),
    "alignment 4": (build([pair("general.alignment", 4, 4)]), "power of two in 8..65536, got UINT32 4"),
    "alignment 2**31": (build([pair("general.alignment", 4, 2**31)]), "power of two"),
    "alignment INT32": (build([pair("general.alignment", 5, 32)]), "got INT32 32"),
    "many pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64), "metadata pair count 9223372036854775808"),
    "version 4": (build(version=4), "version 2 or 3, got 4"),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("fault", REFUSED)
def test_refused_with_byte_and_rule(parse, fault, mmap):
    data, rule = REFUSED[fault]
    with pytest.raises(FormatError, match=rule) as caught:
        parse(data, mmap)
    assert caught.value.offset is not None and 0 <= caught.value.offset <= len(data)
    assert "file.gguf" in str(caught.value)


def test_the_byte_is_the_right_one(parse):
    data = build([pair("first", 4, 1), pair("k", STRING, b"ab\xff")])
    with pytest.raises(FormatError) as caught:
        parse(data)
    assert data[caught.value.offset] == 0xFF
    data = build([pair("k", ARRAY, (STRING, ["a", "b"]))])
    broken = data[: -len(data) % 1 or None].replace(text("b"), struct.pack("<Q", 2**40) + b"b")
    with pytest.raises(FormatError, match="item 1 has length 1099511627776") as caught:
        parse(broken)
    assert struct.unpack_from("<Q", broken, caught.value.offset)[0] == 2**40


@pytest.mark.parametrize(("kind", "name"), [(16, "IQ2_XXS"), (23, "IQ4_XS"), (34, "TQ1_0"), (28, "F64"), (4, "Q4_2")])
def test_known_types_that_are_not_read(parse, kind, name):
    with pytest.raises(UnsupportedError, match=rf"tensor a has type {name}, which gemmakit does not read"):
        parse(build([], [tensor("a", (256,), kind, 0)], bytes(4096)))


def test_known_versions_that_are_not_read(parse):
    with pytest.raises(UnsupportedError, match="version 1"):
        parse(build(version=1))
    with pytest.raises(UnsupportedError, match="big-endian"):
        parse(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedError, match="array of arrays"):
        parse(build([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 0)], data=bytes(64)))


def test_too_many_strings(parse, monkeypatch):
    monkeypatch.setattr(module, "MAX_STRINGS", 5)
    parse(build([pair("k", ARRAY, (STRING, ["a"] * 5))]))
    with pytest.raises(FormatError, match="more than 5 strings"):
        parse(build([pair("k", ARRAY, (STRING, ["a"] * 3)), pair("l", ARRAY, (STRING, ["a"] * 3))]))


def test_too_much_text(parse, monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXT", 100)
    parse(build([pair("k", STRING, "a" * 80)]))
    for pairs in (
        [pair("k", STRING, "a" * 60), pair("l", STRING, "a" * 60)],
        [pair("k", STRING, "a" * 60), pair("l", ARRAY, (STRING, ["a" * 30] * 2))],
        [pair("l", ARRAY, (STRING, ["a" * 60] * 2))],
    ):
        with pytest.raises(FormatError, match=r"bytes of (strings|text)"):
            parse(build(pairs))


def test_bytes_after_the_last_tensor_are_allowed(parse):
    assert parse(build([], [tensor("a", (1,), 0, 0)], bytes(1000))).tensors["a"].nbytes == 4
