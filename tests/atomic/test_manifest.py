# SPDX-License-Identifier: Apache-2.0
"""Manifests notice every kind of damage; `latest_valid` takes the newest step that has none."""

from __future__ import annotations

import json
import warnings

import pytest

from gemma import _manifest
from gemma._atomic import MANIFEST, atomic_folder, latest_valid, steps, verify_manifest, write_manifest
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError


def save(path, text):
    with atomic_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "d").mkdir()
        (folder / "d" / "b").write_bytes(bytes(range(256)) * 40)
    return path


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "step_1", "one")


def test_sizes_and_hashes(saved):
    manifest = verify_manifest(saved)
    assert set(manifest.files) == {"a", "d/b"} and manifest.size == 3 + 256 * 40
    assert manifest.files["a"].sha256 == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


DAMAGE = {
    "a missing file": lambda p: (p / "a").unlink(),
    "an empty file": lambda p: (p / "a").write_bytes(b""),
    "a flipped byte": lambda p: (p / "a").write_text("onf"),
    "a truncated array": lambda p: (p / "d" / "b").write_bytes((p / "d" / "b").read_bytes()[:-1]),
    "an extra file": lambda p: (p / "d" / "c").write_bytes(b""),
    "a link": lambda p: ((p / "a").unlink(), (p / "a").symlink_to(p / "d" / "b")),
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "an empty manifest": lambda p: (p / MANIFEST).write_bytes(b""),
    "half a manifest": lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes()[:80]),
    "another version": lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('": 1', '": 2')),
    "a list": lambda p: (p / MANIFEST).write_text("[]"),
    "deep nesting": lambda p: (p / MANIFEST).write_text("[" * 100000),
    "a name outside": lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace("d/b", "../b")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(saved, damage):
    DAMAGE[damage](saved)
    with pytest.raises(CheckpointError):
        verify_manifest(saved)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_step_before_is_taken(tmp_path, damage):
    for number in (1, 2, 10):
        save(tmp_path / f"step_{number}", str(number))
    DAMAGE[damage](tmp_path / "step_10")
    with pytest.warns(_manifest.DamagedCheckpointWarning, match="step 10 is not usable"):
        assert latest_valid(tmp_path) == tmp_path / "step_2"


def test_all_differences_are_listed(saved):
    (saved / "a").write_text("onf")
    (saved / "d" / "b").unlink()
    (saved / "new").write_text("")
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(saved)
    assert all(part in str(caught.value) for part in ("missing: d/b", "unexpected: new", "a: expected SHA-256"))
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(saved, hashes=False)
    assert "a: expected" not in str(caught.value)


def test_steps(tmp_path):
    for name in ("step_1", "ckpt_20", "checkpoint-3", "007", "7", "best", "step_x", ".step_9.1.ab.gemma-tmp", "1.5"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_99").write_text("a file")
    found = steps(tmp_path)
    assert list(found) == [1, 3, 7, 20] and found[7].name == "7"
    assert steps(tmp_path / "nothing") == {} and latest_valid(tmp_path / "nothing") is None


def test_nothing_valid(tmp_path):
    (tmp_path / "step_1").mkdir()
    with pytest.warns(_manifest.DamagedCheckpointWarning):
        assert latest_valid(tmp_path) is None


def test_the_newest_whole_step_without_a_warning(tmp_path):
    save(tmp_path / "1", "x")
    save(tmp_path / "2", "y")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_valid(tmp_path) == tmp_path / "2"


def test_a_folder_of_another_library(tmp_path):
    (tmp_path / "x").write_text("y")
    with pytest.raises(CheckpointNotFound, match="not saved completely, or not by gemmakit"):
        verify_manifest(tmp_path)
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    write_manifest(tmp_path)  # again: the manifest does not list itself
    assert set(verify_manifest(tmp_path).files) == {"x"}


def test_hostile_manifests(saved):
    path = saved / MANIFEST
    good = json.loads(path.read_text())
    for files in (
        {"a": 1},
        {"a": {"size": -1, "sha256": "0" * 64}},
        {"a": {"size": 1}},
        [],
        None,
        {"a": {"size": True, "sha256": "0" * 64}},
    ):
        path.write_text(json.dumps(good | {"files": files}))
        with pytest.raises(FormatError):
            verify_manifest(saved)
    path.write_bytes(b" " * (_manifest._LIMIT + 1))
    with pytest.raises(FormatError, match="at most"):
        verify_manifest(saved)
    path.unlink()
    deep = saved
    for _ in range(70):
        deep = deep / "x"
        deep.mkdir()
    path.write_text(json.dumps(good))
    with pytest.raises(CheckpointError, match="folders deep"):
        verify_manifest(saved)
