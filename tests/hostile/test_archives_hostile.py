# SPDX-License-Identifier: Apache-2.0
"""Archives made to harm: pickles that call, bombs, members outside of the archive, tables that lie.

Every fault must end in one GemmaError that names the file, in bounded memory and time, with nothing run and nothing
written. For pickles, `torch.load(weights_only=True)` is asked as well: what it refuses is refused here, and each case is
seen to be dangerous or broken to somebody else too. `.npz` files go through the same archive reader.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from guard import bounded, no_hang, refused, resident, survives

from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, FormatError, UnsupportedError

VALUES = np.arange(12, dtype="<f4")
WHOLE = (("data/0", VALUES.tobytes()),)


# ---- an assembler of pickles ------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(kind="FloatStorage", key="0", size=12, where="cpu") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text(where) + number(size) + b"tQ"


def tensor(source=None, offset=0, shape=(3, 4), stride=(4, 1), rest=b"\x89ccollections\nOrderedDict\n)R") -> bytes:
    sizes = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (source or storage()) + number(offset) + sizes + rest + b"tR"


def state(*items: tuple[str, bytes], protocol=2) -> bytes:
    return b"\x80" + bytes([protocol]) + b"}(" + b"".join(text(k) + v for k, v in items) + b"u."


GOOD = state(("w", tensor()))


def archive(path, data: bytes = GOOD, *, members=WHOLE, root="m/", deflate=False):
    """A PyTorch archive around a pickle."""
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice
        with zipfile.ZipFile(path, "w", method) as out:
            out.writestr(f"{root}data.pkl", data)
            for name, content in members:
                out.writestr(f"{root}{name}" if not name.startswith("=") else name[1:], content)
            out.writestr(f"{root}version", b"3\n")
    return path


def read_all(path) -> None:
    with open_checkpoint(path) as opened:
        for name in opened.tensors:
            opened.read(name)


def torch_refuses(path) -> bool:
    import torch

    try:
        torch.load(path, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
    ):
        return True
    return False


def test_the_assembled_file_is_a_good_one(tmp_path):
    """Everything below differs from this in one thing."""
    import torch

    archive(tmp_path / "m.ckpt")
    assert torch.equal(torch.load(tmp_path / "m.ckpt", weights_only=True)["w"], torch.arange(12.0).view(3, 4))
    with open_checkpoint(tmp_path / "m.ckpt") as opened:
        assert np.array_equal(opened.read("w"), VALUES.reshape(3, 4))
    archive(tmp_path / "squeezed.ckpt", deflate=True)
    refused(tmp_path / "squeezed.ckpt", UnsupportedError, match="compressed")


# ---- pickles that call --------------------------------------------------------------------------------------------------

TOUCH = text("touch ran")
INNER = pickle.dumps({"w": 1})
CALLS = {
    "os.system": b"cos\nsystem\n(" + TOUCH + b"tR",
    "posix.system": b"cposix\nsystem\n(" + TOUCH + b"tR",
    "builtins.eval": b"cbuiltins\neval\n(" + text("open('ran','w')") + b"tR",
    "__builtin__.exec": b"c__builtin__\nexec\n(" + text("open('ran','w')") + b"tR",
    "builtins.getattr": b"cbuiltins\ngetattr\n(" + text("x") + text("upper") + b"tR",
    "subprocess.Popen": b"csubprocess\nPopen\n(" + TOUCH + b"tR",
    "by the stack": text("os") + text("system") + b"\x93(" + TOUCH + b"tR",
    "an attribute of what is allowed": text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93",
    "a neighbour of what is allowed": b"ctorch._utils\n_import_dotted_name\n(" + text("os.system") + b"tR",
    "a module of the same name": b"cxtorch\nFloatStorage\n",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + TOUCH + b"o",
    "NEWOBJ": b"cos\n_wrap_close\n)\x81",
    "NEWOBJ_EX": b"cos\n_wrap_close\n)}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "a pickle within": b"cpickle\nloads\n(C" + bytes([len(INNER)]) + INNER + b"tR",
    "torch's pickle within": b"ctorch.storage\n_load_from_bytes\n(C" + bytes([len(INNER)]) + INNER + b"tR",
    "torch.hub": b"ctorch.hub\nload\n(" + text("evil/repo") + text("model") + b"tR",
    "numpy.load": b"cnumpy\nload\n(" + text("x.npy") + b"tR",
    "PERSID": b"Pstorage\n",
    "a call of a string": text("os.system") + b")R",
    "a call of what a call gave": b"ccollections\nOrderedDict\n)R)R",
    "state set on a class": b"ctorch\nFloatStorage\n}(" + text("__reduce__") + text("x") + b"ub",
    "a call of a storage": b"ctorch\nFloatStorage\n(" + number(5) + b"tR",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["value", "alone", "behind the weights", "key"])
def test_a_pickle_calls_nothing(call, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm = CALLS[call]
    data = {
        "value": state(("w", tensor()), ("x", harm), protocol=4),
        "alone": b"\x80\x04" + harm + b".",
        "behind the weights": b"\x80\x04}" + text("w") + tensor() + b"s" + harm + b"0.",
        "key": b"\x80\x04}" + harm + tensor() + b"s.",
    }[place]
    path = archive(tmp_path / "m.ckpt", data)
    refused(path, act=read_all)
    assert not (tmp_path / "ran").exists()


def test_torch_refuses_the_calls_as_well(tmp_path, monkeypatch):
    """The oracle: a list of harmless things would prove nothing."""
    monkeypatch.chdir(tmp_path)
    accepted = [
        call
        for call, harm in CALLS.items()
        if not torch_refuses(archive(tmp_path / "m.ckpt", state(("x", harm), protocol=2)))
    ]
    assert set(accepted) <= {"a call of a storage"}
    assert not (tmp_path / "ran").exists()


def test_the_import_is_named(tmp_path):
    error = refused(archive(tmp_path / "m.ckpt", state(("x", CALLS["builtins.eval"]))), match="builtins.eval")
    assert "refused" in str(error) and "\n" not in str(error)
    refused(archive(tmp_path / "m.ckpt", b"\x80\x02c" + b"a" * 100_000 + b"\nb\n."), match="aaa", longest=1000)


# ---- pickles that cost --------------------------------------------------------------------------------------------------


def laughs(depth: int = 200, opening: bytes = b")") -> bytes:
    """A tuple of two tuples of two ...: a few hundred bytes, 2 ** depth leaves to whoever walks over it."""
    return opening + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))


COSTLY = {
    "laughs as a value": state(("w", laughs())),
    "laughs as a key": b"\x80\x02}" + laughs() + b"Ns.",
    "laughs as a storage": state(("w", tensor(laughs()))),
    "laughs as a storage's key": state(
        ("w", tensor(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + laughs() + text("cpu") + number(12) + b"tQ"))
    ),
    "laughs in a storage made by hand": state(
        ("w", tensor(b"(" + text("FloatStorage") + laughs() + number(12) + b"t"))
    ),
    "laughs as a shape": state(
        ("w", b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + number(0) + laughs() * 2 + b"\x89NtR")
    ),
    "laughs as an offset": state(("w", b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + laughs() + b"))\x89NtR")),
    "laughs as a persistent id": b"\x80\x02" + laughs() + b"Q.",
    "laughs as attributes": b"\x80\x02}" + laughs() + b"b.",
    "laughs as the whole": b"\x80\x02" + laughs() + b".",
    "a dictionary in itself": b"\x80\x02}q\x00" + text("model_state_dict") + b"h\x00s.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 20_000 + b".",
    "deep lists": b"\x80\x02" + b"](" * 15_000 + b"e" * 15_000 + b".",
    "deep dictionaries": b"\x80\x02" + (b"}" + text("model_state_dict")) * 8_000 + b"N" + b"s" * 8_000 + b".",
    "a flood of floats": b"\x80\x02(" + b"G\x3f\xf0\x00\x00\x00\x00\x00\x01" * 20_000 + b"t.",
    "a flood of marks and tuples": b"\x80\x02" + b"((t" * 15_000 + b".",
    "a pickle of 100 MB": b"\x80\x02" + b"N0" * 50_000_000 + b"}.",
    "a number of many digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "a number of many bytes": state(("w", b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000)),
    "a number of minus one bytes": state(("w", b"\x8b" + struct.pack("<i", -1))),
    "a string of 2**60 bytes": b"\x80\x04}\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "bytes of 2**60": b"\x80\x04}\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "an array of 2**60": b"\x80\x05}\x96" + struct.pack("<Q", 2**60) + b"x.",
    "a frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a shape of 2**31": state(("w", tensor(shape=(2**31 - 1,) * 3, stride=(1, 1, 1)))),
    "a thousand dimensions": state(("w", tensor(shape=(1,) * 1000, stride=(1,) * 1000))),
    "repeated without end": state(("w", tensor(shape=(2**31 - 1, 12), stride=(0, 1)))),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_pickle_costs_nothing(name, tmp_path):
    path = archive(tmp_path / "m.ckpt", COSTLY[name], deflate=len(COSTLY[name]) > 1_000_000)
    if name == "a pickle of 100 MB":
        assert path.stat().st_size < 1_000_000
    refused(path, CheckpointError, act=read_all)


@pytest.mark.parametrize("operation", [b"}", b"("], ids=["dictionaries", "marks"])
def test_a_flood_of_operations_stops_at_the_limit(operation, tmp_path):
    """A file of some kilobytes; each of the operations that it unpacks to would cost a hundred bytes."""
    path = archive(tmp_path / "m.ckpt", b"\x80\x02" + operation * 8_000_000 + b".", deflate=True)
    assert path.stat().st_size < 20_000
    with resident(), pytest.raises(FormatError, match=r"m\.ckpt.*operations"), no_hang():
        open_checkpoint(path)


BROKEN = {
    "nothing": b"",
    "no end": GOOD[:-1],
    "two values": b"\x80\x02}}.",
    "no value": b"\x80\x02.",
    "only a mark": b"\x80\x02(.",
    "text": b"hello",
    "a key without a value": b"\x80\x02}(" + text("w") + b"u.",
    "a key twice": state(("w", tensor()), ("w", tensor())),
    "a list as key": b"\x80\x02}]Ns.",
    "an unset memo": b"\x80\x02h\x07.",
    "no mark": b"\x80\x02t.",
    "half a string": b"\x80\x02}X\xff\x00\x00\x00w.",
    "not UTF-8": b"\x80\x02}(X\x02\x00\x00\x00\xff\xfe" + tensor() + b"u.",
    "lone surrogates": b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"u.",
    "line breaks in a name": state(("w\n\x1b[31m", tensor())),
    "no storage": state(("w", tensor(storage(key="7")))),
    "a storage above": state(("w", tensor(storage(key="../version")))),
    "another storage's type": state(("w", tensor(storage("DoubleStorage")))),
    "a larger storage": state(("w", tensor(storage(size=13)))),
    "a smaller storage": state(("w", tensor(storage(size=11), shape=(11,), stride=(1,)))),
    "a negative storage": state(("w", tensor(storage(size=-12)))),
    "beyond the storage": state(("w", tensor(offset=1))),
    "before the storage": state(("w", tensor(offset=-1))),
    "a negative shape": state(("w", tensor(shape=(-3, -4)))),
    "a stride too few": state(("w", tensor(stride=(1,)))),
    "a storage as tensor": state(("w", storage())),
    "a tuple as storage": state(("w", tensor(b"(" + text("FloatStorage") + text("0") + number(12) + b"t"))),
    "a parameter of nothing": state(("w", b"ctorch._utils\n_rebuild_parameter\n(N\x89)tR")),
    "an ordered dictionary of arguments": state(("w", b"ccollections\nOrderedDict\n(]tR")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pickle_is_refused(name, tmp_path):
    refused(archive(tmp_path / "m.ckpt", BROKEN[name]), CheckpointError, act=read_all)


def test_every_single_byte_of_a_pickle(tmp_path):
    """Each byte replaced by each of some operations: refused, or another harmless state dict."""
    operations = b"\x00(.0123BCFGHIJKLMNPQRSTUVXabcdeghijlopqrstu]\x80\x81\x82\x85\x88\x8a\x8b\x8c\x8d\x92\x93\x95\xff"
    path, wrong = tmp_path / "m.ckpt", bytearray(archive(tmp_path / "m.ckpt").read_bytes())
    at = bytes(wrong).find(GOOD)
    entries = bytes(wrong).find(b"PK\x01\x02")
    with bounded(seconds=120):
        for position, operation in itertools.product(range(0, len(GOOD), 5), operations[::5]):
            data = bytearray(wrong)
            data[at + position] = operation
            checksum = struct.pack("<I", zlib.crc32(data[at : at + len(GOOD)]))
            data[14:18] = data[entries + 16 : entries + 20] = checksum
            path.write_bytes(data)
            survives(path, read_all)


# ---- other PyTorch files ------------------------------------------------------------------------------------------------


def test_files_from_before_the_archives(tmp_path):
    """The pickle file of old, and the tar before it: never unpickled, whatever they hold."""
    import torch

    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", CheckpointError, match="pickle|torch.save")
    (tmp_path / "bare.ckpt").write_bytes(b"\x80\x04" + CALLS["os.system"] + b".")
    refused(tmp_path / "bare.ckpt", CheckpointError, match="pickle")
    (tmp_path / "text.ckpt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(tmp_path / "text.ckpt", CheckpointError)
    with tarfile.open(tmp_path / "tar.ckpt", "w") as out:
        for name, data in (("sys_info", INNER), ("pickle", CALLS["os.system"]), ("../../up", b"x"), ("/abs", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        out.addfile(link)
    before = set(tmp_path.rglob("*"))
    refused(tmp_path / "tar.ckpt", CheckpointError)
    assert set(tmp_path.rglob("*")) == before


def test_a_compiled_module_is_refused(tmp_path):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "m.pt"))
    refused(tmp_path / "m.pt", CheckpointError)


def test_a_whole_module_is_refused(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", match="torch.nn.modules.linear.Linear")


# ---- archives -----------------------------------------------------------------------------------------------------------


def npy(array=VALUES) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


def zip_of(path, entries: list[tuple[str, bytes]], method=zipfile.ZIP_STORED):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", method) as out:
            for name, data in entries:
                out.writestr(zipfile.ZipInfo(name), data, method)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../up.npy",
        "a/../../up.npy",
        "/etc/up.npy",
        "C:\\up.npy",
        "a\\..\\up.npy",
        "./a.npy",
        "a//b.npy",
        "a\x1b[31m.npy",
    ],
)
def test_names_outside_of_the_archive(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    refused(zip_of(folder / "m.npz", [("fine.npy", npy()), (name, npy())]), match="name")
    path = archive(folder / "m.ckpt", members=[("data/0", VALUES.tobytes()), (f"={name}", b"x")])
    refused(path, match="name")
    assert {file.name for file in tmp_path.rglob("*")} == {"in", "m.npz", "m.ckpt"}


def test_a_name_cut_by_a_zero_byte(tmp_path):
    """`zipfile` cuts it there; another program would see another name."""
    data = zip_of(tmp_path / "m.npz", [("fine.npy_../up", npy())]).read_bytes().replace(b"fine.npy_", b"fine.npy\0")
    (tmp_path / "m.npz").write_bytes(data)
    assert survives(tmp_path / "m.npz", read_all) is None or True
    assert {file.name for file in tmp_path.rglob("*")} == {"m.npz"}


def test_a_link_in_an_archive_is_only_bytes(tmp_path):
    info = zipfile.ZipInfo("link.npy")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as out:
        out.writestr(info, str(tmp_path))
    refused(tmp_path / "m.npz", match="link")
    assert not (tmp_path / "link.npy").exists()


def test_members_twice(tmp_path):
    refused(zip_of(tmp_path / "m.npz", [("a.npy", npy()), ("a.npy", npy(VALUES + 1))]), match="twice")
    two = [("data/0", VALUES.tobytes()), ("data/0", (VALUES + 1).tobytes())]
    refused(archive(tmp_path / "m.ckpt", members=two), match="twice")
    two = [("data/0", VALUES.tobytes()), ("=other/data.pkl", GOOD)]
    refused(archive(tmp_path / "n.ckpt", members=two), match=r"data\.pkl")


@pytest.mark.parametrize("method", ["deflate", "bzip2"])
def test_bombs(method, tmp_path):
    """Nothing is unpacked to see how large it is."""
    kind = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}[method]
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", kind) as out, out.open("a.npy", "w") as member:
        for _ in range(18):
            member.write(bytes(4_000_000))
    refused(path, CheckpointError, match="bomb")
    if method != "deflate":
        refused(zip_of(path, [("a.npy", npy())], kind), UnsupportedError, match="compression")


def test_a_bomb_that_says_it_is_small(tmp_path):
    """The directory says 48 bytes, the stream holds 30 MB: inflating stops at what was said."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = packer.compress(npy() + bytes(30_000_000)) + packer.flush()
    path = zip_of(tmp_path / "m.npz", [("a.npy", npy())], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as source:
        info = source.getinfo("a.npy")
    old = info.compress_size
    start = 30 + len("a.npy")
    data = bytearray(data[:start] + stream + data[start + old :])
    data[18:22] = struct.pack("<I", len(stream))
    central = data.find(b"PK\x01\x02", start + len(stream))
    data[central + 20 : central + 24] = struct.pack("<I", len(stream))
    end = data.rfind(b"PK\x05\x06")
    data[end + 16 : end + 20] = struct.pack("<I", central)
    path.write_bytes(data)
    refused(path, act=read_all)


def test_overlapping_members(tmp_path):
    """A thousand names for the same bytes."""
    path = zip_of(tmp_path / "m.npz", [(f"a{n:03}.npy", npy()) for n in range(100)])
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 42 : at + 46] = bytes(4)  # every member at the place of the first
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)
    refused(path)


FIELDS = {  # of a directory entry: offset, width
    "flags": (8, 2), "method": (10, 2), "checksum": (16, 4), "packed size": (20, 4), "size": (24, 4),
    "name length": (28, 2), "extra length": (30, 2), "comment length": (32, 2), "disk": (34, 2), "offset": (42, 4),
}  # fmt: skip
LOCAL = {"method": (8, 2), "packed size": (18, 4), "size": (22, 4), "name length": (26, 2), "extra length": (28, 2)}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", ["ckpt", "npz"])
def test_a_directory_that_lies(field, kind, tmp_path):
    """Every field, small and large lies: the values are those of the file, or it is refused; never anything else."""
    path = tmp_path / f"m.{kind}"
    path = archive(path) if kind == "ckpt" else zip_of(path, [("w.npy", npy(VALUES.reshape(3, 4)))])
    good, (offset, width) = path.read_bytes(), FIELDS[field]
    entries = [n for n in range(len(good)) if good[n : n + 4] == b"PK\x01\x02"]
    with bounded(seconds=60):
        for entry in entries:
            old = int.from_bytes(good[entry + offset : entry + offset + width], "little")
            top = 256**width - 1
            for value in {0, 1, old ^ 1, old + 1, old * 2, 8, 64, top, top - 1, top // 2}:
                if value % (top + 1) == old:
                    continue
                data = bytearray(good)
                data[entry + offset : entry + offset + width] = (value % (top + 1)).to_bytes(width, "little")
                path.write_bytes(data)
                if survives(path, read_all) is None:
                    with open_checkpoint(path) as opened:
                        assert np.array_equal(opened.read("w"), VALUES.reshape(3, 4)), (field, value)


@pytest.mark.parametrize("field", LOCAL)
def test_a_members_own_header_that_lies(field, tmp_path):
    """Where directory and header disagree, programs read different things out of one file."""
    path = zip_of(tmp_path / "m.npz", [("w.npy", npy())])
    good, (offset, width) = path.read_bytes(), LOCAL[field]
    old = int.from_bytes(good[offset : offset + width], "little")
    for value in {old + 1, old + 64, old * 2 + 8}:
        data = bytearray(good)
        data[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
        path.write_bytes(data)
        refused(path, CheckpointError, act=read_all)
    data = bytearray(good)
    data[30:35] = b"v.npy"
    path.write_bytes(data)
    refused(path, match="own header")


def test_zip64_fields_that_lie(tmp_path):
    """A member of 2**63 bytes, at 2**63, a directory of 2**40 entries at 2**60."""
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as out, out.open("w.npy", "w", force_zip64=True) as member:
        member.write(npy())
    read_all(path)
    good = path.read_bytes()
    central = good.find(b"PK\x01\x02")
    name = good[central + 46 : central + 51]
    for size, packed, offset in ((2**63, 2**63, 0), (2**64 - 1, 176, 0), (176, 176, 2**63), (2**64 - 1,) * 3):
        extra = struct.pack("<HHQQQ", 1, 24, size, packed, offset)
        entry = bytearray(good[central : central + 46])
        entry[20:28], entry[42:46] = b"\xff" * 8, b"\xff" * 4
        entry[30:32] = struct.pack("<H", len(extra))
        table = bytes(entry) + name + extra
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(table), central, 0)
        path.write_bytes(good[:central] + table + end)
        refused(path, CheckpointError)
    table = good[central : good.rfind(b"PK\x05\x06")]
    for count, size, at in ((2**40, 2**50, central), (1, 2**63, central), (1, len(table), 2**60), (2**64 - 1, 0, 0)):
        end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        locator = struct.pack("<IIQI", 0x07064B50, 0, central + len(table), 1)
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path.write_bytes(good[:central] + table + end64 + locator + end)
        survives(path, read_all)
        with bounded():
            survives(path, read_all)


def test_directories_of_many_members(tmp_path):
    """More names than any model has tensors, in a file of some megabytes."""
    path = tmp_path / "m.npz"
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0) + b"a"
    for count in (33_000, 70_000):
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count % 65536, count % 65536, count * 47, len(head), 0)
        path.write_bytes(head + entry * count + end)
        refused(path, CheckpointError)


@pytest.mark.parametrize("kind", ["ckpt", "npz"])
def test_cut_anywhere(kind, tmp_path):
    path = tmp_path / f"m.{kind}"
    path = archive(path) if kind == "ckpt" else zip_of(path, [("w.npy", npy()), ("v.npy", npy())])
    data = path.read_bytes()
    for end in {*range(4, len(data), 7), *range(len(data) - 30, len(data))}:
        path.write_bytes(data[:end])
        error = survives(path, read_all)
        assert isinstance(error, CheckpointError), end
    for junk in (b"\0" * 100, b"PK\x05\x06" + bytes(18), data):
        path.write_bytes(data + junk)
        survives(path, read_all)


def test_zeros_in_place_of_the_weights(tmp_path):
    """A copy that stopped leaves files of the right length."""
    path = archive(tmp_path / "m.ckpt")
    data = path.read_bytes()
    path.write_bytes(data.replace(VALUES.tobytes(), bytes(VALUES.nbytes)))
    refused(path, act=read_all, match="checksum")
    path = zip_of(tmp_path / "m.npz", [("w.npy", npy())])
    path.write_bytes(path.read_bytes().replace(VALUES.tobytes(), bytes(VALUES.nbytes)))
    refused(path, act=read_all, match="checksum")


# ---- arrays -------------------------------------------------------------------------------------------------------------


def header(text: str, version=b"\x01\x00", length=None) -> bytes:
    data = text.encode()
    size = len(data) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version[0] == 1 else 4, "little") + data


HEADERS = {
    "code": header("__import__('os').system('touch ran')"),
    "code in a shape": header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').system('touch ran'),), }"
    ),
    "an object": header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + pickle.dumps([1]),
    "a huge shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 18 + ",), }"),
    "a product of nothing": header(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, " + "9" * 18 + ", 99999999999), }"
    ),
    "more digits": header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 4000 + ",), }"),
    "a negative shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    "many dimensions": header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 40 + "), }"),
    "thirty dimensions": header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 30 + "), }") + bytes(4),
    "deep brackets": header("(" * 4000),
    "a length beyond": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", length=60_000) + bytes(4),
    "a length of 4 GB": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\x02\x00", 2**32 - 1),
    "version 9": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\x09\x00") + bytes(4),
    "no magic": b"NUMPY" + bytes(100),
    "nothing": b"",
    "too few values": header("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }") + bytes(12),
    "too many values": header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }") + bytes(12),
    "a type of 999 bytes": header("{'descr': '|V999', 'fortran_order': False, 'shape': (1,), }") + bytes(999),
    "no such type": header("{'descr': '<q7', 'fortran_order': False, 'shape': (1,), }") + bytes(8),
    "a type of none": header("{'descr': '|V0', 'fortran_order': False, 'shape': (1,), }"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_arrays_that_lie(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(zip_of(tmp_path / "m.npz", [("w.npy", HEADERS[name])]), CheckpointError, act=read_all)
    assert not (tmp_path / "ran").exists()


# ---- what lies beside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3_text", "num_hidden_layers": 10**9},
        {"model_type": "gemma", "num_attention_heads": -1},
        {"model_type": "gemma", "auto_map": {"AutoModel": "evil.Model"}, "architectures": ["Evil"]},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
        [],
        {"model_type": "gemma3_text", "rope_theta": float("nan")},
    ],
    ids=["layers", "heads", "auto_map", "unknown", "list", "nan"],
)
def test_a_hostile_configuration_beside_the_archive(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    archive(tmp_path / "m.ckpt")

    def load(path):
        from gemma.checkpoint import load_tensors

        with open_checkpoint(path) as opened:
            for _, read in load_tensors(opened):
                read()

    with bounded():
        error = survives(tmp_path / "m.ckpt", load)
    assert error is not None and not (tmp_path / "ran").exists()


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    refused(tmp_path / "pipe.ckpt", CheckpointError)
    (tmp_path / "folder.ckpt").mkdir()
    refused(tmp_path / "folder.ckpt", CheckpointError)
    (tmp_path / "empty.ckpt").write_bytes(b"")
    refused(tmp_path / "empty.ckpt", FormatError)
    (tmp_path / "loop.ckpt").symlink_to(tmp_path / "loop.ckpt")
    refused(tmp_path / "loop.ckpt", CheckpointError)
