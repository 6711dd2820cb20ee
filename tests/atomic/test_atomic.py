# SPDX-License-Identifier: Apache-2.0
"""Saving: complete or not at all. Sweeps over every effect on the disk: killed, failing, without power; two writers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import failing_disk as fd
import pytest

from gemma import _atomic
from gemma._atomic import atomic_file, atomic_folder, check_destination, clean, verify_manifest
from gemma.errors import CheckpointError, CheckpointNotFound, GemmaError, SaveError

OLD = {"config.json": b"old config", "d/0": b"old zero", "d/1": b"old one", "old-only": b"x"}
NEW = {"config.json": b"new configuration", "d/0": b"new zero", "d/1": b"", "d/e/2": b"new two" * 100}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def save_folder(path: Path, files: dict[str, bytes], replace: bool = True) -> None:
    with atomic_folder(path, replace=replace) as folder:
        fill(folder, files)


def save_file(path: Path, files: dict[str, bytes], replace: bool = True) -> None:
    with atomic_file(path, replace=replace) as file:
        for data in files.values():
            file.write(data)
            file.flush()


def state(path: Path):
    """What a reader finds: None, the bytes of a file, or the files of a folder whose manifest agrees."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    verify_manifest(path)
    return {name: data for name, data in fd.content(path).items() if name != _atomic.MANIFEST}


KINDS = {
    "file": (save_file, b"".join(OLD.values()), b"".join(NEW.values())),
    "folder": (save_folder, OLD, NEW),
}


@pytest.fixture
def tmp_path(tmp_path, tmp_path_factory):
    """In memory where there is such a place: thousands of syncs, and none of them needs the real drive."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="gemmakit-tests-") as folder:
        yield Path(folder)


@pytest.fixture(params=[(kind, fresh) for kind in KINDS for fresh in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request, tmp_path):
    """A way to save, the states before and after, and a function that prepares a fresh place."""
    kind, fresh = request.param
    save, old, new = KINDS[kind]
    number = iter(range(10**6))

    def prepare() -> Path:
        path = tmp_path / str(next(number)) / "checkpoint"
        path.parent.mkdir()
        if not fresh:
            save(path, OLD)
        return path

    return save, None if fresh else old, new, prepare


def effects(save, prepare) -> int:
    with fd.on(fd.Counting()) as counting:
        pass
    path = prepare()
    with fd.on(fd.Counting()) as counting:
        save(path, NEW)
    return counting.count


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_effect(case, torn):
    save, old, new, prepare = case
    seen = []
    count = effects(save, prepare)
    assert count > 5
    for at in range(1, count + 2):
        path = prepare()
        with fd.on(fd.Dying(at, torn)):
            save(path, NEW)
        found = state(path)
        assert found in (old, new), f"killed at effect {at}"
        seen.append(found == new)
        save(path, NEW)  # the next save works, and cleans what the dead one left
        assert state(path) == new and not fd.temporaries(path.parent), f"killed at effect {at}"
    assert seen == sorted(seen) and seen[-1] and not seen[0]  # old until the rename, new ever after


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_failing_at_every_effect(case, code):
    save, old, new, prepare = case
    failures = 0
    for at in range(1, effects(save, prepare) + 1):
        path = prepare()
        with fd.on(fd.Failing(at, code, forever=code != errno.EIO)):
            try:
                save(path, NEW)
            except SaveError as error:
                failures += 1
                assert error.errno == code and str(path) in str(error) and "Traceback" not in str(error)
        assert state(path) in (old, new), f"effect {at}"
        save(path.with_name("elsewhere"), NEW)  # the caller still has everything and saves to another place
        save(path, NEW)
        assert state(path) == new and not fd.temporaries(path.parent)
    assert failures > 3


@pytest.mark.parametrize("eager", [False, True])
def test_power_lost_at_every_effect(case, tmp_path, eager):
    save, old, new, prepare = case
    count = effects(save, prepare)
    for at in range(1, count + 2):
        path = prepare()
        power = fd.Power(path.parent, eager)
        with fd.on(fd.Recording(power, at)):
            save(path, NEW)
        after = tmp_path / "after"
        power.restore(after)
        found = state(after / "checkpoint")
        assert found in (old, new), f"power lost at effect {at}"
        if at == count + 1:
            assert found == new  # a save that has returned is durable


def test_power_loss_is_seen_by_the_model(tmp_path, monkeypatch):
    """The model of power loss bites: without syncing files, the same sweep finds a mixture."""
    monkeypatch.setattr(fd.Power, "sync", lambda self, path: os.path.isdir(path) and fd_sync(self, path))
    fd_sync = Power_sync
    path = tmp_path / "a" / "checkpoint"
    path.parent.mkdir()
    power = fd.Power(path.parent, True)
    with fd.on(fd.Recording(power, 10**6)):
        save_folder(path, NEW)
    power.look()
    power.restore(tmp_path / "after")
    with pytest.raises(CheckpointError):
        state(tmp_path / "after" / "checkpoint")


Power_sync = fd.Power.sync


def test_short_writes(tmp_path):
    with fd.on(fd.Short()) as disk:
        save_file(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == b"".join(NEW.values()) and disk.count > 100


# ---- real processes ------------------------------------------------------------------------------------------------

SAVER = """
import sys, time
from pathlib import Path
from gemma._atomic import atomic_folder
path, byte = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
while True:
    with atomic_folder(path, replace=True) as folder:
        for name in range(20):
            (folder / str(name)).write_bytes(byte * 5000)
"""


def start(path: Path, byte: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(path), byte], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_real_kills(tmp_path):
    path = tmp_path / "checkpoint"
    for number, delay in enumerate((0.0, 0.011, 0.023, 0.031, 0.047, 0.06)):
        process = start(path, str(number))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            verify_manifest(path)
            assert len({data for name, data in state(path).items()}) == 1  # all files of one save
    save_folder(path, NEW)
    assert not fd.temporaries(tmp_path)


def test_two_processes_never_mix(tmp_path):
    path = tmp_path / "checkpoint"
    processes = [start(path, byte) for byte in "ab"]
    seen = set()
    deadline = time.monotonic() + 30
    try:
        while len(seen) < 2 and time.monotonic() < deadline:
            folder = os.open(tmp_path, os.O_RDONLY)
            try:
                parts = {p.read_bytes()[:1] for p in path.iterdir() if p.name.isdigit()} if path.exists() else set()
                seen |= parts if len(parts) == 1 else set()
            except FileNotFoundError:
                pass  # replaced while it was being listed
            finally:
                os.close(folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert seen == {b"a", b"b"}
    assert len(set(state(path).values())) == 1


@pytest.mark.parametrize("save", [save_file, save_folder])
def test_threads_to_one_name(tmp_path, save):
    path, errors = tmp_path / "checkpoint", []

    def work(files):
        try:
            save(path, files, replace=False)
        except SaveError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=({"x": bytes([i]) * 100},)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(errors) == 7 and all(error.errno == errno.EEXIST for error in errors)  # one won, the others were told
    assert len(set(state(path) if save is save_file else state(path)["x"])) == 1 and not fd.temporaries(tmp_path)


def test_a_living_writer_is_not_cleaned(tmp_path):
    with atomic_folder(tmp_path / "slow") as folder:
        fill(folder, NEW)
        assert clean(tmp_path) == []
        save_file(tmp_path / "other", NEW)
        assert folder.exists()
    assert state(tmp_path / "slow") == NEW


def test_what_is_no_temporary_is_not_cleaned(tmp_path):
    names = ["checkpoint", ".hidden.gemma-tmp", ".a.1.0123456789ab.gemma-tmp.txt", ".a.1.0123456789AB.gemma-tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_bytes(b"x")
    (tmp_path / ".a.1.0123456789ab.gemma-tmp").symlink_to(target)
    assert clean(tmp_path) == [] and (target / "kept").exists()
    (tmp_path / ".a.2.0123456789ab.gemma-tmp").mkdir()
    (tmp_path / ".a.2.0123456789ab.gemma-tmp" / "link").symlink_to(target)
    assert [p.name for p in clean(tmp_path)] == [".a.2.0123456789ab.gemma-tmp"] and (target / "kept").exists()


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_limit_on_file_size(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SaveError, match="beyond what the system allows") as caught:
            save_file(tmp_path / "file", {"x": b"x" * 5000})
        with pytest.raises(SaveError, match="beyond what the system allows"):
            save_folder(tmp_path / "folder", {"x": b"x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "..", "a/..", "new\nline", "nul\0", "tab\t", "\x1b[2J"])
def test_names_that_are_refused(tmp_path, name):
    for save in (save_file, save_folder):
        with pytest.raises(SaveError, match="printable characters"):
            save(f"{tmp_path}/{name}" if name else name, NEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_file, save_folder])
def test_an_existing_destination(tmp_path, save):
    path = tmp_path / "checkpoint"
    save(path, OLD)
    before = state(path)
    with pytest.raises(ValueError, match=r"Destination .*checkpoint already exists"):
        save(path, NEW, replace=False)
    other = save_folder if save is save_file else save_file
    with pytest.raises(SaveError, match=r"to replace, found a f"):
        other(path, NEW)
    assert state(path) == before
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(SaveError, match="symbolic link"):
        save(link, NEW)
    with pytest.raises(SaveError, match="is not a folder" if path.is_file() else "symbolic link"):
        save(path / "x" if path.is_file() else link, NEW)


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_atomic.os, "access", lambda path, mode: False)
    with pytest.raises(SaveError, match="cannot be written to") as caught:
        check_destination(tmp_path / "new" / "folder")
    assert caught.value.errno == errno.EACCES
    monkeypatch.undo()
    with pytest.raises(SaveError, match="cannot be written|could not be written"):
        save_file(Path("/proc/gemma/file"), NEW)


def test_a_folder_that_vanishes(tmp_path):
    path = tmp_path / "a" / "checkpoint"
    with pytest.raises(SaveError, match="could not be written"), atomic_folder(path) as folder:
        fill(folder, NEW)
        import shutil

        shutil.rmtree(path.parent)


def test_folders_above_are_made(tmp_path):
    save_file(tmp_path / "a" / "b" / "file", NEW)
    assert (tmp_path / "a" / "b" / "file").is_file()


def test_links_are_not_saved(tmp_path):
    with pytest.raises(SaveError, match="a link or a device"), atomic_folder(tmp_path / "x") as folder:
        (folder / "link").symlink_to("/etc/hostname")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_block_pass_through(tmp_path):
    for error in (KeyError("x"), ConnectionResetError(errno.ECONNRESET, "x"), CheckpointNotFound("x")):
        for context in (atomic_file, atomic_folder):
            with pytest.raises(type(error)) as caught, context(tmp_path / "x"):
                raise error
            assert caught.value is error and not isinstance(caught.value, SaveError)
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x"):
        (tmp_path / "source that is not there").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_longer_writable_after_its_block(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write(b"abc")
        file.seek(1)
        file.write(b"X")
        file.seek(0)
        assert file.read() == b"aXc"
    with pytest.raises(ValueError):
        file.write(b"late")
    assert (tmp_path / "x").read_bytes() == b"aXc"
    try:
        with atomic_file(tmp_path / "y") as file:
            file.write(b"unfinished")
            raise KeyError
    except KeyError:
        pass
    with pytest.raises(ValueError):
        file.write(b"late")


def test_an_open_reader_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    save_file(path, OLD)
    with open(path, "rb") as reader:
        save_file(path, NEW)
        assert reader.read() == b"".join(OLD.values())


def test_a_file_system_that_cannot_exchange(tmp_path, monkeypatch):
    save_folder(tmp_path / "x", OLD)
    monkeypatch.setattr("gemma._disk._rename", lambda *args: False)
    with pytest.raises(SaveError, match="cannot exchange two folders"):
        save_folder(tmp_path / "x", NEW)
    assert state(tmp_path / "x") == OLD
    save_folder(tmp_path / "y", NEW)
    save_file(tmp_path / "z", NEW, replace=False)
    with pytest.raises(SaveError):
        save_file(tmp_path / "z", NEW, replace=False)
    assert state(tmp_path / "y") == NEW and not fd.temporaries(tmp_path)


def test_without_locks_nothing_is_cleaned(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma._disk.fcntl", None)
    with fd.on(fd.Dying(6)):
        save_file(tmp_path / "x", NEW)
    left = fd.temporaries(tmp_path)
    save_file(tmp_path / "x", NEW)
    assert left and fd.temporaries(tmp_path) == left and state(tmp_path / "x") == b"".join(NEW.values())


def test_the_error_travels(tmp_path):
    import pickle

    error = pickle.loads(pickle.dumps(SaveError("full", errno.ENOSPC)))
    assert isinstance(error, (GemmaError, OSError, ValueError)) and str(error) == "full" and error.errno == errno.ENOSPC
