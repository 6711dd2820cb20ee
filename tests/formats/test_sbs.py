# SPDX-License-Identifier: Apache-2.0
"""gemma.cpp's `.sbs` files, assembled here byte by byte from the description of the container.

Header: magic "SBS\\n" as one word, number of blobs, bytes of the file; directory: 16-byte keys, then offset and size of
each; blobs at multiples of 256. The first order has header and directory in front, the newer one at the end. SFP8 is
decoded by its formula. No build of gemma.cpp is at hand: these tests and the reader share the description only.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path

import foreign_layouts as layouts
import ml_dtypes
import numpy as np
import pytest

from gemma import weights
from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.config import preset
from gemma.errors import CheckpointError, ConfigError, FormatError, UnsupportedError, WeightsMismatch
from gemma.hf_config import write_config
from gemma.saving import from_arrays, save
from gemma.testing import random_tensors, tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIGS = {
    "gemma": tiny_config("gemma", num_hidden_layers=2),
    "gemma-mha": tiny_config("gemma", num_hidden_layers=2, num_key_value_heads=4),
    "gemma2": tiny_config("gemma2", query_pre_attn_scalar=24.0),
    "gemma3": tiny_config("gemma3", query_pre_attn_scalar=24.0),
}
TYPES = {"F32": 1, "BF16": 2, "SFP8": 3}
LETTERS = {"F32": "F", "BF16": "B", "SFP8": "$"}
WIDTH = {"F32": 4, "BF16": 2, "SFP8": 1}


def aligned(data: bytes, size: int = 256) -> bytes:
    return data + bytes(-len(data) % size)


def directory(blobs: dict[str, bytes], start: int) -> tuple[bytes, bytes]:
    """(keys and ranges, payload) of blobs whose payload begins at `start`."""
    keys, ranges, payload = b"", b"", b""
    for name, data in blobs.items():
        keys += name.encode().ljust(16, b"\0")
        ranges += struct.pack("<QQ", start + len(payload), len(data))
        payload = aligned(payload + data)
    return keys + ranges, payload


def version1(blobs: dict[str, bytes]) -> bytes:
    start = -(-(16 + 32 * len(blobs)) // 256) * 256
    table, payload = directory(blobs, start)
    head = struct.pack("<IIQ", 0x0A534253, len(blobs), start + len(payload)) + table
    return head.ljust(start, b"\0") + payload


def version2(blobs: dict[str, bytes]) -> bytes:
    table, payload = directory(blobs, 256)
    size = -(-(256 + len(payload) + len(table) + 16) // 65536) * 65536
    head = struct.pack("<IIQ", 0x0A534253, 0, 0).ljust(256, b"\0")
    tail = table + struct.pack("<IIQ", 0x0A534253, len(blobs), size)
    return (head + payload).ljust(size - len(tail), b"\0") + tail


def words_of(text: str) -> list[int]:
    data = aligned(text.encode(), 4)
    return [len(data) // 4, *struct.unpack(f"<{len(data) // 4}I", data)]


def toc(entries: dict[str, tuple[str, int, int, float]]) -> bytes:
    """name: (type, rows, cols, scale); each entry begins with how many words follow."""
    words = []
    for name, (type, rows, cols, scale) in entries.items():
        bits = struct.unpack("<I", struct.pack("<f", scale))[0]
        entry = [*words_of(name), TYPES[type], WIDTH[type], rows * cols, rows, cols, bits, cols]
        words += [len(entry), *entry]
    return struct.pack(f"<{len(words)}I", *words)


def sfp8_value(code: int) -> float:
    """The formula of the description: 3 mantissa bits from 64 on, 2 below."""
    v, sign = code & 127, -1.0 if code & 128 else 1.0
    if v == 0:
        return 0.0
    if v >= 64:
        return sign * (1 + (v & 7) / 8) * 2.0 ** ((v >> 3) - 15)
    return sign * (1 + (v & 3) / 4) * 2.0 ** ((v >> 2) - 23)


TABLE = np.array([sfp8_value(code) for code in range(256)], np.float32)


def nearest_codes(x: np.ndarray) -> np.ndarray:
    """A code of the smallest distance, by trying all of them."""
    codes = np.array([c for c in range(256) if c != 128], np.uint8)
    return codes[np.abs(TABLE[codes][None] - x.reshape(-1, 1)).argmin(1)].reshape(x.shape)


def stored(array: np.ndarray, type: str) -> bytes:
    if type == "SFP8":
        return nearest_codes(array).tobytes()
    return array.astype(BF16 if type == "BF16" else "<f4").tobytes()


def model_blobs(config, type="F32", table=True):
    """(blobs, arrays as they will decode) of a tiny model; norms are always float32."""
    state = weights.pack(random_tensors(config), config, format="hf")
    arrays = layouts.gemma_cpp(state, config.num_attention_heads, config.num_key_value_heads)
    blobs, entries = {}, {}
    for name, array in arrays.items():
        kind = type if array.ndim > 1 else "F32"
        rows = int(np.prod(array.shape[:-1]))
        entries[name] = (kind, rows, array.shape[-1], 1.0)
        blobs[name if table else LETTERS[kind] + name] = stored(array, kind)
    if table:
        blobs |= {"toc": toc(entries)}
    return blobs


def expected_of(config, type):
    """Canonical values after the rounding of `type`; norms keep theirs."""
    values = random_tensors(config)
    round_ = {
        "F32": lambda a: a,
        "BF16": lambda a: a.astype(BF16).astype(np.float32),
        "SFP8": lambda a: TABLE[nearest_codes(a)],
    }[type]
    return {name: round_(a) if a.ndim > 1 else a for name, a in values.items()}


def check_model(path, config, expected, mmap=True):
    with open_checkpoint(path, mmap=mmap) as opened:
        assert opened.format == "sbs"
        found = {tensor.name: reader(np.float32) for tensor, reader in load_tensors(opened, None)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


# ---- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "copy"])
@pytest.mark.parametrize("order", [version1, version2])
@pytest.mark.parametrize("names", ["toc", "prefixes"])
def test_orders_and_ways_of_naming(order, names, mmap, tmp_path):
    for type in TYPES:
        config = CONFIGS["gemma3"]
        (tmp_path / "m.sbs").write_bytes(order(model_blobs(config, type, names == "toc")))
        (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
        check_model(tmp_path / "m.sbs", config, expected_of(config, type), mmap)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_layout_of_every_family(family, tmp_path):
    """k and v alternate by head (q, k, v where all heads have their own); gate and up are one array."""
    config = CONFIGS[family]
    (tmp_path / "m.sbs").write_bytes(version2(model_blobs(config)))
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    check_model(tmp_path / "m.sbs", config, expected_of(config, "F32"))


def test_every_code_of_sfp8(tmp_path):
    codes = np.array([code for code in range(256) if code != 128], np.uint8)
    blobs = {"codes": codes.tobytes(), "scaled": codes.tobytes()}
    blobs["toc"] = toc({"codes": ("SFP8", 1, 255, 1.0), "scaled": ("SFP8", 15, 17, 3.25)})
    (tmp_path / "m.sbs").write_bytes(version2(blobs))
    with open_checkpoint(tmp_path / "m.sbs") as opened:
        plain, scaled = opened.read("codes"), opened.read("scaled")
        assert opened.info("scaled").shape == (15, 17) and opened.info("codes").dtype == "SFP8"
        assert np.array_equal(plain.reshape(-1), TABLE[codes])
        assert np.array_equal(scaled.reshape(-1), TABLE[codes] * np.float32(3.25))
        assert np.array_equal(opened.read_rows("scaled", 3, 5), scaled[3:5])
        half = opened.read("codes", BF16)
    assert np.array_equal(half.astype(np.float32).reshape(-1), TABLE[codes])  # every value is exact in bfloat16


def test_scales_of_the_older_files_belong_to_nobody_we_can_tell(tmp_path):
    """All ones mean nothing; anything else must not be dropped in silence."""
    blobs = model_blobs(CONFIGS["gemma"], "SFP8", table=False)
    config = json.dumps(write_config(CONFIGS["gemma"]))
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "m.sbs").write_bytes(version1(blobs | {"Fscales": np.ones(9, "<f4").tobytes()}))
    check_model(tmp_path / "m.sbs", None, expected_of(CONFIGS["gemma"], "SFP8"))
    scales = np.ones(9, "<f4")
    scales[4] = 1.5
    (tmp_path / "m.sbs").write_bytes(version1(blobs | {"Fscales": scales.tobytes()}))
    with pytest.raises(UnsupportedError, match=r"m\.sbs: scales"):
        open_checkpoint(tmp_path / "m.sbs")


@pytest.mark.parametrize("letter", ["2", "I", "4", "Z"])
def test_types_that_are_not_read_are_named(letter, tmp_path):
    (tmp_path / "m.sbs").write_bytes(version1({"Fnorm": np.ones(4, "<f4").tobytes(), f"{letter}weight": bytes(64)}))
    with pytest.raises(UnsupportedError, match="weight"):
        open_checkpoint(tmp_path / "m.sbs")


def test_types_of_the_table_that_are_not_read_are_named(tmp_path):
    for number, name in ((4, "NUQ"), (5, "F64"), (8, "I8"), (77, "77")):
        table = bytearray(toc({"weight": ("F32", 2, 8, 1.0)}))
        at = 4 * (1 + len(words_of("weight")))
        assert table[at] == 1
        table[at] = number
        (tmp_path / "m.sbs").write_bytes(version2({"weight": bytes(64), "toc": bytes(table)}))
        with pytest.raises(UnsupportedError, match=f"weight is .*{name}"):
            open_checkpoint(tmp_path / "m.sbs")


def test_a_scale_of_plain_floats_is_not_dropped(tmp_path):
    blobs = {"weight": np.ones(16, "<f4").tobytes(), "toc": toc({"weight": ("F32", 2, 8, 2.0)})}
    (tmp_path / "m.sbs").write_bytes(version2(blobs))
    with pytest.raises(CheckpointError, match=r"m\.sbs.*weight.*scale"):
        open_checkpoint(tmp_path / "m.sbs")


def test_a_longer_entry_of_a_later_version_is_read(tmp_path):
    """Fields that are appended later are skipped by the length in front of each record."""
    words = list(struct.unpack(f"<{len(toc({'a': ('F32', 1, 4, 1.0)})) // 4}I", toc({"a": ("F32", 1, 4, 1.0)})))
    words = [words[0] + 2, *words[1:], 77, 78]
    blobs = {"a": np.arange(4, dtype="<f4").tobytes(), "toc": struct.pack(f"<{len(words)}I", *words)}
    (tmp_path / "m.sbs").write_bytes(version2(blobs))
    with open_checkpoint(tmp_path / "m.sbs") as opened:
        assert np.array_equal(opened.read("a").reshape(-1), np.arange(4))


def test_names_of_another_model_are_listed(tmp_path):
    config = CONFIGS["gemma3"]
    blobs = model_blobs(config, table=False)
    del blobs["Fc_final_norm"], blobs["Fpost_ff_ns_4"]
    blobs["Fsurprise"] = bytes(16)
    (tmp_path / "m.sbs").write_bytes(version1(blobs))
    with pytest.raises(WeightsMismatch) as caught, open_checkpoint(tmp_path / "m.sbs") as opened:
        load_tensors(opened, config)
    assert all(name in str(caught.value) for name in ("c_final_norm", "post_ff_ns_4", "surprise"))


def test_a_tokenizer_inside_of_the_file_is_the_models(tmp_path):
    from hostile_files import sentencepiece_bytes

    from gemma.tokenizer import Tokenizer

    blobs, model = model_blobs(CONFIGS["gemma"]), sentencepiece_bytes()
    (tmp_path / "m.sbs").write_bytes(version2(blobs | {"tokenizer": model}))
    with open_checkpoint(tmp_path / "m.sbs") as opened:
        source = opened.tokenizer_source()
        assert source.kind == "sentencepiece" and source.model == model
        ids = Tokenizer.from_source(source).encode("the world")
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").encode("the world") == ids and len(ids) > 1
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "n.sbs").write_bytes(version2(blobs | {"tokenizer": b"unavailable"}))
    with open_checkpoint(tmp_path / "n.sbs") as opened:
        assert opened.tokenizer_source() is None


def test_a_published_model_is_known_by_its_sizes(tmp_path):
    """No configuration anywhere: a sparse file with the blobs of the 270M is the 270M; one odd size is nobody."""
    config = preset("gemma3_270m")
    table = weights.tensors(config)
    sizes = {t.slots["sbs"].name: t.slots["sbs"].shape for t in table}
    for change in (None, "linear_w_3"):
        start = -(-(16 + 32 * len(sizes)) // 256) * 256
        keys, ranges, at = b"", b"", start
        for name, shape in sizes.items():
            nbytes = int(np.prod(shape)) - (256 if name == change else 0)
            keys += f"${name}".encode().ljust(16, b"\0")
            ranges += struct.pack("<QQ", at, nbytes)
            at = -(-(at + nbytes) // 256) * 256
        with open(tmp_path / "m.sbs", "wb") as file:
            file.write(struct.pack("<IIQ", 0x0A534253, len(sizes), at) + keys + ranges)
            file.truncate(at)
        with open_checkpoint(tmp_path / "m.sbs") as opened:
            if change is None:
                assert opened.config() == config
                assert opened.info("qkv_ein_0").shape == (6, 256, 640)
            else:
                with pytest.raises(ConfigError, match="config.json"):
                    opened.config()


# ---- refusing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [version1, version2])
def test_cut_anywhere_it_is_refused(order, tmp_path):
    data = order({"Fa": np.ones(4, "<f4").tobytes(), "Bb": bytes(300), "$c": bytes(700)})
    path = tmp_path / "m.sbs"
    ends = {*range(4, 600), *range(600, len(data), 211), len(data) - 1}
    for end in sorted(ends):
        path.write_bytes(data[:end])
        with pytest.raises(FormatError, match=r"m\.sbs"):
            open_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_a_directory_that_lies_is_refused(tmp_path):
    """Sizes and places of 2**63 and more, overlaps, gaps, the header's own bytes, names twice or unprintable."""
    blobs = {"Fa": np.ones(4, "<f4").tobytes(), "Fb": np.ones(8, "<f4").tobytes()}
    data, path = version1(blobs), tmp_path / "m.sbs"
    first, second = 16 + 32, 16 + 32 + 16
    for where, values in (
        (first, (0, 16, 255, 512, 2**63, 2**64 - 256)),
        (first + 8, (0, 257, 2**63, 2**64 - 1, len(data))),
        (second, (256, 300, 2**64 - 1)),
        (second + 8, (0, len(data), 2**64 - 1)),
        (4, (0, 1, 3, 2**31)),
        (8, (0, len(data) - 1, 2**64 - 1)),
    ):
        for value in values:
            wrong = bytearray(data)
            width = 4 if where == 4 else 8
            wrong[where : where + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
            path.write_bytes(wrong)
            with pytest.raises(CheckpointError, match=r"m\.sbs"):
                open_checkpoint(path)
    for name in (b"Fa".ljust(16, b"\0"), b"F\xff\xfe".ljust(16, b"\0"), bytes(16), b"F\n".ljust(16, b"\0")):
        wrong = bytearray(data)
        wrong[32:48] = name
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"m\.sbs"):
            open_checkpoint(path)


def test_a_table_that_lies_is_refused(tmp_path):
    """Each word of the table set to each of some values: refused, or read as a smaller truth, never a crash."""
    good = toc({"a": ("F32", 2, 8, 1.0), "b": ("SFP8", 4, 4, 2.0)})
    path, accepted = tmp_path / "m.sbs", 0
    for word, value in itertools.product(range(len(good) // 4), (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1)):
        table = bytearray(good)
        table[4 * word : 4 * word + 4] = value.to_bytes(4, "little")
        path.write_bytes(version2({"a": bytes(64), "b": bytes(16), "toc": bytes(table)}))
        try:
            with open_checkpoint(path) as opened:
                for name, info in opened.tensors.items():
                    assert opened.read(name, np.float32).size == {"a": 16, "b": 16}[name] == int(np.prod(info.shape))
                accepted += 1
        except CheckpointError as error:
            assert "m.sbs" in str(error)
    assert accepted < 60  # of 154: what is not checked are element sizes, counts and one-row strides


# ---- writing ------------------------------------------------------------------------------------------------------------


def parse2(data: bytes) -> dict[str, bytes]:
    """The blobs of a file in the newer order, by the description; asserts its alignment."""
    magic, zero, _ = struct.unpack_from("<IIQ", data)
    assert magic == 0x0A534253 and zero == 0
    magic, count, size = struct.unpack_from("<IIQ", data, len(data) - 16)
    assert magic == 0x0A534253 and size == len(data)
    at = len(data) - 16 - 32 * count
    names = [data[at + 16 * n : at + 16 * n + 16].rstrip(b"\0").decode() for n in range(count)]
    ranges = [struct.unpack_from("<QQ", data, at + 16 * count + 16 * n) for n in range(count)]
    assert all(offset % 256 == 0 and offset + nbytes <= at for offset, nbytes in ranges)
    return {name: data[offset : offset + nbytes] for name, (offset, nbytes) in zip(names, ranges)}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "sfp8"])
def test_what_we_write_is_what_the_description_says(family, kind, tmp_path):
    config = CONFIGS[family]
    tensors = from_arrays(random_tensors(config), config)
    options = dict(quantize="sfp8") if kind == "sfp8" else dict(dtype=kind)
    report = save(tmp_path / "out", tensors, config, format="sbs", **options)
    assert any("not proven by gemma.cpp" in note for note in report.notes)
    blobs = parse2((tmp_path / "out/model.sbs").read_bytes())
    state = weights.pack(random_tensors(config), config, format="hf")
    expected = layouts.gemma_cpp(state, config.num_attention_heads, config.num_key_value_heads)
    assert set(blobs) == {*expected, "toc", "config", "tokenizer"}
    for name, array in expected.items():
        if kind == "sfp8" and array.ndim > 1:
            codes = np.frombuffer(blobs[name], np.uint8).reshape(array.shape)
            assert not (codes == 128).any(), "the code that is never written"
            best = np.abs(TABLE[nearest_codes(array)] - array)
            assert np.array_equal(np.abs(TABLE[codes] - array), best), name  # |x| <= 1.875: the scale is 1
        else:
            want = array.astype(BF16 if kind == "bfloat16" else "<f4")
            assert blobs[name] == want.tobytes(), name


def test_large_values_get_a_scale(tmp_path):
    """1.0 up to 1.875, then the largest value over 1.875, one for the tensor."""
    config = CONFIGS["gemma"]
    values = random_tensors(config)
    values["embed"] = values["embed"] * np.float32(100)
    report = save(tmp_path / "out", from_arrays(values, config), config, format="sbs", quantize="sfp8")
    scale = np.float32(np.abs(values["embed"]).max() / np.float32(1.875))
    with open_checkpoint(tmp_path / "out") as opened:
        found = opened.read("c_embedding")
        ratio = found / scale
        assert np.isin(ratio.round(9), TABLE.round(9)).mean() > 0.9 or np.allclose(
            np.abs(ratio[..., None] - np.unique(TABLE)).min(-1), 0, atol=1e-6
        )
        assert np.abs(found).max() == pytest.approx(np.abs(values["embed"]).max(), rel=1e-6)
    [saved] = [tensor for tensor in report.tensors if tensor.name == "c_embedding"]
    assert saved.max_error == pytest.approx(np.abs(found.astype(np.float64) - values["embed"]).max(), rel=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_file_states_its_own_sizes(family, tmp_path):
    """Without config.json the record inside says what the network computes (names of fields aside)."""
    from gemma.compare import config_changes

    config = CONFIGS[family]
    save(tmp_path / "out", from_arrays(random_tensors(config), config), config, format="sbs")
    (tmp_path / "out/config.json").unlink()
    with open_checkpoint(tmp_path / "out") as opened:
        lines = config_changes(config, opened.config())
    # Its record has no field for the scaling of positions; 24.0 is the default that None stands for.
    assert set(lines) <= {"rope_scaling_factor: 8.0, 1.0", "query_pre_attn_scalar: 24.0, None"}


def test_what_it_cannot_hold_is_refused(tmp_path):
    for changes, text in ((dict(query_pre_attn_scalar=17.0), "17.0"), (dict(tie_word_embeddings=False), "tied")):
        config = tiny_config("gemma3", **changes)
        with pytest.raises((UnsupportedError, ConfigError, WeightsMismatch), match=text):
            save(tmp_path / "out", from_arrays(random_tensors(config), config), config, format="sbs")
        assert not (tmp_path / "out").exists()
