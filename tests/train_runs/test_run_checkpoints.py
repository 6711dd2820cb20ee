# SPDX-License-Identifier: Apache-2.0
"""The steps of a run are saved whole or not at all, retired by rule, and restored exactly or refused with names."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import failing_disk as fd
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma._manifest import DamagedCheckpointWarning
from gemma.errors import CheckpointError, CheckpointNotFound, ConfigError, SaveError, TrainingError, WeightsMismatch
from gemma.gm.train import Checkpoints
from gemma.gm.train import _checkpoints_files as files
from gemma.gm.train import _checkpoints_state as arrays

EXTRA = {"loader": {"epoch": 1, "buffer": [[1, 2], [3]]}, "loss": float("nan"), "rows": (1, 2), "n": np.int64(7)}


@flax.struct.dataclass
class Run:
    """The shape of a training state."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def run_state(value: float = 1.0) -> Run:
    lora = {"a": np.full((6, 2), value, np.float32), "b": np.full((2, 6), value, jnp.bfloat16)}
    params = {"layer_0": {"attn": {"q_einsum": {"lora": lora}}}, "none": np.zeros((0, 3), np.float32)}
    params = jax.tree.map(jnp.asarray, params)
    moments = optax.ScaleByAdamState(jnp.int32(value), *(jax.tree.map(lambda x: x * 2, params) for _ in range(2)))
    key = jax.random.key_data(jax.random.key(int(value)))
    return Run(jnp.int32(value), params, (optax.EmptyState(), (moments, optax.MaskedNode())), None, key)


def small(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full((5, 3), value, np.float32), "b": np.float32(value)}


def value_of(folder) -> float | None:
    """The number that a resumed run would find; all leaves and `extra` must agree on it."""
    checkpoints = Checkpoints(folder)
    number = checkpoints.latest_valid()
    if number is None:
        return None
    state, extra = checkpoints.restore(number, like=small(0))
    values = {float(v) for leaf in state.values() for v in np.ravel(leaf)} | {extra["value"], float(number)}
    assert len(values) == 1, f"a mixture: {values}"
    return values.pop()


def bury(checkpoints: Checkpoints) -> None:
    """Forgets the lock of a process that was killed; the disk has closed its file already."""
    if checkpoints._lock is not None:
        checkpoints._lock._end.detach()
        files.Lock._held.pop(checkpoints._lock._identity, None)


def same(one: Any, other: Any) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def save_value(checkpoints: Checkpoints, value: int) -> None:
    checkpoints.save(value, small(value), {"value": float(value)})


def test_a_state_comes_back_bit_for_bit_and_orbax_reads_it(tmp_path):
    import orbax.checkpoint as ocp

    state = run_state(3.0)
    checkpoints = Checkpoints(tmp_path / "new" / "run")
    checkpoints.prepare(state)
    folder = checkpoints.save(3, state, EXTRA, metrics={"eval_loss": 2.5})
    restored, extra = checkpoints.restore(like=jax.eval_shape(lambda: run_state(0.0)))
    assert same(state, restored) and isinstance(restored, Run)
    assert repr(extra) == repr({**EXTRA, "rows": [1, 2], "n": 7})
    about = checkpoints.about(3)
    assert about["metrics"] == {"eval_loss": 2.5} and about["leaves"]["opt_state/1/0/count"] == "int32[]"
    keys, _ = checkpoints.restore(3)  # without `like`: names and numpy
    assert same(keys["params"], state.params) and isinstance(keys["step"], np.ndarray)
    numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    # Orbax takes an empty array that is not stored for a mistake of its own, hence without that one.
    assert folder == checkpoints.folder / "step_3"
    checkpoints.save(4, state.replace(params={"layer_0": state.params["layer_0"]}, opt_state=()), {})
    path = checkpoints.folder / "step_4" / "state"
    tree = ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree
    read = ocp.PyTreeCheckpointer().restore(path, restore_args=jax.tree.map(lambda _: numpy, tree))
    assert same(read["params"]["layer_0"], state.params["layer_0"]) and same(read["key"], np.asarray(state.key))


def test_random_keys_and_committed_leaves(tmp_path):
    device = jax.devices()[0]
    state = {
        "key": jax.random.key(5),
        "here": jax.device_put(jnp.ones(3), device),
        "free": jnp.ones(3),
        "n": np.ones(2),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state)
    restored, _ = checkpoints.restore(like=state)
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))
    assert restored["here"].committed and not restored["free"].committed and isinstance(restored["n"], np.ndarray)
    state["free"].delete()
    with pytest.raises(TrainingError, match="was freed"):
        checkpoints.save(1, state)
    assert checkpoints.steps() == [0]


def test_what_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4, keep_best=("eval_loss", "min"))
    (tmp_path / "step_1").mkdir()  # somebody else's
    losses = {2: 3.0, 3: 1.0, 4: 2.0, 5: float("nan"), 6: 1.5, 7: 1.7, 8: 9.0, 9: 4.0}
    for step, loss in losses.items():
        checkpoints.save(step, small(step), metrics={"eval_loss": loss})
    assert checkpoints.steps() == [1, 3, 4, 8, 9] and checkpoints.best() == 3
    assert Checkpoints(tmp_path, keep_best=("eval_loss", "max")).best() == 8
    assert not fd.temporaries(tmp_path) and (tmp_path / "step_1").is_dir()
    with pytest.raises(TrainingError, match="holds step 9, newer than 7"):
        checkpoints.save(7, small(7))
    with pytest.raises(CheckpointNotFound, match=r"no step 5; it has: 1, 3, 4, 8, 9"):
        checkpoints.restore(5)


def test_every_difference_is_listed(tmp_path):
    checkpoints = Checkpoints(tmp_path, fingerprint={"model": "m", "lora": {"rank": 8, "alpha": 16.0}, "old": 1})
    checkpoints.save(1, run_state())
    like = run_state()
    lora = {"a": np.zeros((6, 4), np.float32), "b": jnp.zeros((2, 6), jnp.float32)}
    like = like.replace(params={"layer_1": {"w": jnp.ones(2)}, "layer_0": {"attn": {"q_einsum": {"lora": lora}}}})
    with pytest.raises(WeightsMismatch) as caught:
        checkpoints.restore(like=like)
    name = "params/layer_0/attn/q_einsum/lora"
    assert f"{name}/a: expected float32[6, 4], got float32[6, 2]" in caught.value.misshaped
    assert f"{name}/b: expected float32[2, 6], got bfloat16[2, 6]" in caught.value.misshaped
    assert caught.value.missing == ("params/layer_1/w: float32[2]",)
    assert caught.value.unexpected == ("params/none: float32[0, 3]",)
    other = {"model": "m", "lora": {"rank": 16, "alpha": 16.0}, "new": 2}
    with pytest.raises(TrainingError) as refused:
        Checkpoints(tmp_path, fingerprint=other).restore(like=run_state())
    lines = [line.strip() for line in str(refused.value).splitlines()[1:4]]
    assert lines == [
        "lora.rank: saved 8, this run has 16",
        "old: saved 1, this run has none",
        "new: saved none, this run has 2",
    ]
    assert Checkpoints(tmp_path).restore(like=run_state())[1] == {}  # nothing to compare with


@pytest.mark.parametrize(
    "extra, place",
    [
        ({"a": {1: 2}}, "extra.a"),
        ({"a": [{"b": object()}]}, r"extra.a\[0\].b"),
        ({"x": b"bytes"}, "extra.x: .*got bytes"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path, extra, place):
    with pytest.raises(TrainingError, match=place):
        Checkpoints(tmp_path).save(0, small(0), extra)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a": 1.0}, "a: expected an array, got float"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "the same on disk"),
        ({"a\nb": np.ones(1)}, "printable names"),
    ],
)
def test_states_that_cannot_be_saved(tmp_path, state, message):
    with pytest.raises(TrainingError, match=message):
        Checkpoints(tmp_path).save(0, state)
    assert not any(tmp_path.iterdir())


def damage(folder, kind: str):
    """Breaks one file of a saved step; returns its name."""
    target = next(p for p in sorted((folder / "state").rglob("*")) if p.is_file() and p.parent.name == "d")
    if kind == "flipped":
        data = target.read_bytes()
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "truncated":
        os.truncate(target, target.stat().st_size // 2)
    elif kind == "missing":
        target.unlink()
    else:
        target = folder / {"empty manifest": "gemma_manifest.json", "no step": "step.json"}[kind]
        target.write_bytes(b"")
    return target.name


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "empty manifest", "no step"])
def test_a_damaged_step_is_passed_over_and_named(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for value in (1, 2, 3):
        save_value(checkpoints, value)
    name = damage(tmp_path / "step_3", kind)
    again = Checkpoints(tmp_path, keep=2)
    with pytest.warns(DamagedCheckpointWarning, match=f"step 3 is not usable.*{name}"):
        assert again.latest_valid() == 2
    with pytest.raises(CheckpointError, match=name):
        again.restore(3, like=small(0))
    save_value(again, 2)  # replaced; the damaged one is not counted, not deleted, and not in the way
    assert again.steps() == [2, 3]
    save_value(again, 3)
    assert value_of(tmp_path) == 3.0


def test_killed_at_every_effect(tmp_path):
    with fd.on(fd.Counting()) as counting:
        checkpoints = Checkpoints(tmp_path / "count", keep=1)
        for value in (1, 2):
            save_value(checkpoints, value)
        checkpoints.close()
    seen = []
    for at in range(1, counting.count + 6):  # in how many files the store puts its arrays varies a little
        folder = tmp_path / str(at)
        with fd.on(fd.Dying(at, torn=at % 2 == 0)):
            checkpoints = Checkpoints(folder, keep=1)
            for value in (1, 2):
                save_value(checkpoints, value)
        bury(checkpoints)
        with warnings.catch_warnings():  # a step that was being removed is never half there
            warnings.simplefilter("error", DamagedCheckpointWarning)
            seen.append(value_of(folder) or 0.0)
        survivor = Checkpoints(folder, keep=1)
        save_value(survivor, 3)
        assert value_of(folder) == 3.0 and not fd.temporaries(folder)
        assert [path.name for path in folder.iterdir()] == ["step_3"]
    assert counting.count > 30 and seen[0] == 0.0 and seen[-1] == 2.0 and set(seen) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_loses_nothing(tmp_path, code):
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    save_value(checkpoints, 1)
    with fd.on(fd.Counting()) as counting:
        save_value(checkpoints, 2)
    failures = 0
    for at in range(1, counting.count + 1):
        value = at + 2
        with fd.on(fd.Failing(at, code, forever=code != errno.EIO)), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                save_value(checkpoints, value)
            except SaveError as error:
                assert error.errno == code and str(tmp_path) in str(error)
                failures += 1
            else:  # what failed was the removal of an old step: told, and made up for later
                assert any(
                    "cannot be removed" in str(w.message) or "cannot be (" in str(w.message) for w in caught
                ) or (checkpoints.steps() == [value])
        assert value_of(tmp_path / "run") in (value, value - 1)
        save_value(Checkpoints(tmp_path / f"elsewhere {at}"), value)  # the state is still there
        save_value(checkpoints, value)
        assert value_of(tmp_path / "run") == value
    assert failures > 3


def test_writes_of_a_few_bytes(tmp_path):
    with fd.on(fd.Short()), Checkpoints(tmp_path) as checkpoints:
        save_value(checkpoints, 4)
    assert value_of(tmp_path) == 4.0


def test_the_store_of_arrays_reports_a_full_disk(tmp_path):
    """The arrays are not written through the shim: here the system itself refuses them."""
    script = (
        "import resource, sys, numpy as np\n"
        "from gemma.gm.train import Checkpoints\n"
        "from gemma.errors import SaveError\n"
        "state = {'a': np.random.default_rng(0).random((64, 1024))}\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "checkpoints.save(1, state)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    checkpoints.save(2, state)\nexcept SaveError as error:\n    print(error)\n"
        "print(checkpoints.steps(), checkpoints.latest_valid())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "could not be written" in done.stdout and "[1] 1" in done.stdout, (done.stdout, done.stderr[-2000:])
    assert not fd.temporaries(tmp_path)
    # Another process has the folder now; this one may read, and is refused before it trains.
    script = (
        "import sys\nfrom gemma.gm.train import Checkpoints\nc = Checkpoints(sys.argv[1])\nc.prepare()\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "ready\n"
    mine = Checkpoints(tmp_path)
    assert mine.latest_valid() == 1
    for refused in (mine.prepare, lambda: mine.save(2, small(2))):
        with pytest.raises(SaveError, match="another process saves its steps there"):
            refused()
    other.kill()  # as a crash: the lock goes with it
    other.wait()
    other.stdin.close(), other.stdout.close()
    mine.save(2, small(2))
    assert mine.steps() == [1, 2]


def test_folders_that_are_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, message in (
        ("a\nb", "printable"),
        ("..", "printable"),
        ("file", "expected a folder"),
        ("link", "symbolic"),
    ):
        with pytest.raises(SaveError, match=message):
            Checkpoints(tmp_path / name)
    for name in ("file/below", "a\0b"):
        with pytest.raises(SaveError):
            Checkpoints(f"{tmp_path}/{name}")
    with monkeypatch.context() as patched:  # whoever runs this may be root, who may write anywhere
        patched.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(SaveError, match="cannot be written to"):
            Checkpoints(tmp_path)
        assert Checkpoints(tmp_path, read_only=True).latest_valid() is None
    for wrong in (dict(keep=0), dict(keep_every=0), dict(keep_best=("loss", "least"))):
        with pytest.raises(ConfigError):
            Checkpoints(tmp_path, **wrong)
    with pytest.raises(CheckpointNotFound, match="no whole step"):
        Checkpoints(tmp_path / "none").restore()
    with pytest.raises(TrainingError, match="read_only"):
        Checkpoints(tmp_path, read_only=True).save(1, small(1))


def test_room_on_the_disk(tmp_path, monkeypatch):
    size = arrays.total_bytes(run_state())
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: dataclasses.replace(fake, free=free))

    @dataclasses.dataclass
    class Fake:
        free: int

    fake, free = Fake(usage.free), 1000
    with pytest.raises(SaveError, match=r"takes 1\.05 MB and the disk has 1\.00 kB left") as caught:
        Checkpoints(tmp_path).prepare(run_state())
    assert caught.value.errno == errno.ENOSPC
    free = 3 * (size + (1 << 20))
    with pytest.warns(UserWarning, match="keep=5 takes up to"):
        Checkpoints(tmp_path, keep=5).prepare(run_state())
    Checkpoints(tmp_path, keep=2).prepare(run_state())


def test_a_folder_that_vanished_is_made_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    save_value(checkpoints, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    save_value(checkpoints, 2)
    assert value_of(tmp_path / "run") == 2.0 and value_of(tmp_path / "moved") == 1.0


def test_a_step_of_another_version_is_named(tmp_path):
    from gemma._atomic import write_manifest

    checkpoints = Checkpoints(tmp_path)
    save_value(checkpoints, 1)
    path = tmp_path / "step_1" / "step.json"
    for changes, message in (
        (dict(version=2), "expected version 1, got 2"),
        (dict(extras=[]), "expected step, metrics"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(version=1) | changes))
        write_manifest(tmp_path / "step_1")
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1)
