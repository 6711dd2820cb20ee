# SPDX-License-Identifier: Apache-2.0
"""Finding models, and assembling the demo: small files stand for the 253 MB, so that faults can be made."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from gemma import hub
from gemma.errors import CheckpointNotFound, HubError

PARTS = [b"one" * 1000, b"two" * 2000, b"", b"four"]
DATA = b"".join(PARTS)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def demo(cache, tmp_path, monkeypatch):
    """A demo model of a few kilobytes; returns the path that it is assembled at."""
    chunks = []
    for number, data in enumerate(PARTS):
        chunks.append(tmp_path / f"part{number}")
        chunks[-1].write_bytes(data)
    monkeypatch.setattr(hub, "_demo_chunks", lambda: chunks)
    monkeypatch.setattr(hub, "DEMO_SHA256", SHA)
    return cache / "models" / hub.DEMO_FILE


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", "~/somewhere")
    assert hub.cache_dir() == Path.home() / "somewhere"
    for unset in ("", "  "):
        monkeypatch.setenv("GEMMA_CACHE_DIR", unset)
        assert hub.cache_dir() == Path.home() / ".gemma"


def test_demo_is_assembled_once(demo, monkeypatch):
    assert hub.resolve("demo") == demo == hub.demo_path()
    assert demo.read_bytes() == DATA and not leftovers(demo.parent)
    assert demo.stat().st_mode & 0o777 == 0o666 & ~_umask()
    monkeypatch.setattr(hub, "_hash", lambda path: pytest.fail("hashed a file that its marker vouches for"))
    monkeypatch.setattr(hub, "_assemble", lambda *args: pytest.fail("assembled again"))
    assert hub.demo_path() == demo


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("damage", [DATA[:-1], DATA + b"x", b"", bytes([DATA[0] ^ 1]) + DATA[1:]])
def test_a_damaged_file_is_assembled_anew(demo, damage):
    hub.demo_path()
    demo.write_bytes(damage)
    os.utime(demo, ns=(0, 12345))  # a damaged file of the same size has another time
    assert hub.demo_path().read_bytes() == DATA


def test_a_copied_file_is_hashed_and_kept(demo, monkeypatch):
    hub.demo_path()
    os.utime(demo, ns=(0, 12345))
    monkeypatch.setattr(hub, "_assemble", lambda *args: pytest.fail("assembled a good file again"))
    assert hub.demo_path() == demo
    monkeypatch.setattr(hub, "_hash", lambda path: pytest.fail("the marker was not renewed"))
    assert hub.demo_path() == demo


@pytest.mark.parametrize("marker", [b"", b"{", b"[" * 5000, b"null", b'{"size": 1}', b"\xff\xfe"])
def test_a_broken_marker_means_hashing(demo, marker):
    hub.demo_path()
    hub._marker_path(demo).write_bytes(marker)
    assert hub.demo_path().read_bytes() == DATA
    assert hub._marker(demo) == hub._marker_of(demo.stat(), SHA)


def test_damaged_packages_are_refused_and_leave_nothing(demo, monkeypatch):
    monkeypatch.setattr(hub, "DEMO_SHA256", "0" * 64)
    with pytest.raises(HubError, match=r"damaged: expected SHA-256 0{64}, got .*--force-reinstall"):
        hub.demo_path()
    assert not list(demo.parent.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(demo, monkeypatch, code):
    def full(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hub.os, "fsync", full)
    with pytest.raises(HubError, match=r"no space left.*free some space, or set GEMMA_CACHE_DIR"):
        hub.demo_path()
    assert not list(demo.parent.iterdir())


def test_a_cache_that_cannot_be_written(demo, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(HubError, match="set GEMMA_CACHE_DIR"):
        hub.demo_path()


def test_a_good_file_in_a_read_only_cache_is_used(demo, monkeypatch):
    hub.demo_path()
    hub._marker_path(demo).unlink()

    def refuse(*args):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(hub.os, "replace", refuse)
    assert hub.demo_path() == demo and not leftovers(demo.parent)


def test_several_at_once(demo):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: hub.demo_path(), range(16))) == {demo}
    assert demo.read_bytes() == DATA and not leftovers(demo.parent)


def test_files_of_dead_processes_are_removed(demo):
    demo.parent.mkdir(parents=True)
    old, young = (demo.parent / f".{demo.name}.{name}.tmp" for name in ("1.aa", "2.bb"))
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    hub.demo_path()
    assert leftovers(demo.parent) == [young.name]


def test_not_installed(cache, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HubError, match=r'pip install "gemmakit\[demo\]".*Gemma Terms of Use'):
        hub.resolve("demo")


def test_a_missing_part(cache, monkeypatch, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(HubError, match=r"part00.*missing"):
        hub.resolve("demo")


def test_paths(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.gguf").touch()
    for given in (tmp_path / "model.gguf", str(tmp_path / "model.gguf"), "~/model.gguf", Path("~/model.gguf")):
        assert hub.resolve(given) == tmp_path / "model.gguf"
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(CheckpointNotFound, match="no such file"):
        hub.resolve(Path("demo"))  # a Path is never the word


def test_weights_in_the_cache_are_found_by_name(cache):
    (cache / "models" / "gemma3_1b").mkdir(parents=True)
    (cache / "models" / "codegemma_2b.gguf").touch()
    assert hub.resolve("gemma-3-1b") == cache / "models" / "gemma3_1b"
    assert hub.resolve("CodeGemma-2B") == cache / "models" / "codegemma_2b.gguf"
    with pytest.raises(CheckpointNotFound):
        hub.resolve("gemma_2b")  # the same shape, other weights


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma3_1b", "name of a size.*accept the gemma terms.*gemma pull google/gemma-3-1b-it"),
        ("gemma_2b", "gemma pull google/gemma-2b-it"),
        ("codegemma_7b", "gemma pull google/codegemma-7b-it"),
        ("paligemma_3b_224", "name of a size.*https://huggingface.co/google/paligemma-3b-pt-224, then"),
        ("gemm3_1b", "give the path of a .gguf.*did you mean gemma3_1b"),
        ("google/gemma-3-1b-it", "hugging face repository.*gemma pull google/gemma-3-1b-it"),
        ("nothing", "give the path of a .gguf, .safetensors, .*Orbax folder"),
        ("", "an empty name"),
        ("a\0b", "no such file"),
        ("x" * 5000, r"x{200}\.\.\. \(5000 characters\)"),
    ],
)
def test_what_is_not_there(cache, name, says):
    with pytest.raises(CheckpointNotFound, match=f"(?i){says}"):
        hub.resolve(name)


@pytest.mark.real
def test_the_real_demo():
    path = hub.resolve("demo")
    assert path.read_bytes()[:4] == b"GGUF"
    assert hub._marker(path)["sha256"] == hub.DEMO_SHA256
