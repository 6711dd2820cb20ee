# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: saved whole or not at all, retired by rule, restored exactly or refused with names.

    checkpoints = Checkpoints("run/checkpoints", keep=3, keep_best=("eval_loss", "min"))
    checkpoints.save(200, state, {"data": loader.get_state()}, metrics={"eval_loss": 2.1})
    state, extra = checkpoints.restore(like=state)

A step is a folder with a checksum of every file, which appears by one rename after all of it is on the disk:

    run/checkpoints/step_200/state/...             the arrays, as Orbax writes and reads them
                             step.json             number, metrics, fingerprint, names of the leaves, `extra`
                             gemma_manifest.json   sizes and SHA-256 of the above

In a run of several processes all of them call `save` and `restore` with the same arguments; process 0 writes, the others
send it their parts leaf by leaf, and every process reads what its own devices hold: the folder must be one that all see.
Leaves, their names and their transfer are `_checkpoints_state.py`; what makes a folder appear is `gemma/_atomic.py`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma import _atomic
from gemma._manifest import MANIFEST, DamagedCheckpointWarning, verify_manifest
from gemma.errors import CheckpointError, CheckpointNotFound, ConfigError, SaveError, TrainingError
from gemma.gm.train import _checkpoints_files as files
from gemma.gm.train import _checkpoints_state as arrays
from gemma.gm.train._processes import gather_objects, process

_STATE = "state"


class Checkpoints:
    """The saved steps of one run.

    Attributes:
      folder: that holds them, an absolute path.
      keep, keep_every, keep_best, fingerprint: as given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_best: tuple[str, str] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        """Checks the folder; nothing is created yet.

        Args:
          folder: where the steps are, or will be.
          keep: so many of the newest steps are kept; None: all.
          keep_every: steps that this divides are kept for ever.
          keep_best: (name of a metric, "min" or "max"): the step with the best value of it is kept as well.
          fingerprint: what a run must have in common with the one that saved, JSON values by field; a restore with
            another one is refused. None: anything is accepted.
          read_only: only restore; the folder need not be writable.

        Raises:
          ConfigError: a rule that makes no sense.
          SaveError: the folder cannot be written, is a link, or has a name that no folder should have.
        """
        if keep is not None and keep < 1:
            raise ConfigError(f"keep: expected at least 1 checkpoint, or None for all, got {keep}")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"keep_every: expected a number of steps of at least 1, or None, got {keep_every}")
        if keep_best is not None and (len(keep_best) != 2 or keep_best[1] not in ("min", "max")):
            raise ConfigError(f'keep_best: expected (name of a metric, "min" or "max"), got {keep_best!r}')
        self.folder = Path(os.path.abspath(os.fspath(folder)))
        self.keep, self.keep_every, self.keep_best, self.read_only = keep, keep_every, keep_best, read_only
        self.fingerprint = None if fingerprint is None else files.plain(fingerprint, "fingerprint")
        self._damaged: set[int] = set()
        self._lock: files.Lock | None = None
        if not read_only:
            files.check_writable(folder)

    def prepare(self, state: Any = None) -> None:
        """Makes ready to save, before anything is computed: the folder, its lock, and the room on the disk.

        Args:
          state: of the run, arrays or their shapes: whether it fits on the disk is checked. None: not checked.

        Raises:
          SaveError: nothing can be written there, another process saves there, or the disk lacks the room.
        """
        error = None
        if process()[0] == 0:
            try:
                self._take(state)
            except SaveError as caught:
                error = caught
        self._settle(error, f"{self.folder}: cannot be used")

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Saves a step; when this returns it is complete, on the disk, and steps that need not be kept are gone.

        Besides the state at most one leaf is in host memory at a time, where a device is not the host itself.

        Args:
          step: its number, from 0; a damaged step of this number is replaced.
          state: a tree of arrays (JAX, numpy), for example a `State`.
          extra: JSON values; those of each process where there are several.
          metrics: values to choose the best by; None: `extra["metrics"]`, if it is there.

        Returns:
          The folder of the step.

        Raises:
          SaveError: it could not be written; what was saved before is unchanged, and so is the state in memory: it can
            be saved again, here or through a Checkpoints of another folder.
          TrainingError: a newer step is there, so that this one would never be restored; or `extra` is not JSON.
        """
        if self.read_only:
            raise TrainingError(f"{self.folder}: was opened with read_only=True; open it without to save")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise TrainingError(f"step: expected a whole number of at least 0, got {step!r}")
        extra = files.plain(extra or {}, "extra")
        leaves = arrays.named(state)
        found = metrics if metrics is not None else extra.get("metrics") or {}
        extras = gather_objects(extra)
        about = files.About(
            step=step,
            metrics={name: float(value) for name, value in found.items() if isinstance(value, (int, float))},
            fingerprint=self.fingerprint,
            leaves={name: arrays.spec_of(leaf) for name, leaf in leaves.items()},
            extras=extras[:1] if all(other == extras[0] for other in extras) else extras,
        )
        error = None
        try:
            self._write(step, leaves, about)
        except (SaveError, TrainingError) as caught:  # the other processes are told before it is raised
            error = caught
        self._settle(error, f"step {step} could not be saved")
        return self._path(step)

    def restore(self, step: int | None = None, like: Any = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step.

        Args:
          step: its number. None: the newest that is whole; damaged ones are passed over with a warning.
          like: a tree of arrays, or of `jax.ShapeDtypeStruct`, with the names, shapes and dtypes that are expected; each
            leaf is put where its counterpart is (`sharding`), whatever devices it was saved from. None: a nested
            dictionary of numpy arrays.

        Returns:
          The state, a tree as `like`, and `extra`, that of this process.

        Raises:
          CheckpointNotFound: there is no such step, or no whole one.
          CheckpointError: the step that was asked for is damaged; each file that is wrong is named.
          WeightsMismatch: its leaves are not those of `like`; all differences are listed, nothing is restored.
          TrainingError: it was saved by a run with another fingerprint, or by another number of processes.
        """
        number = self.latest_valid() if step is None else step
        if number is None:
            raise CheckpointNotFound(f"{self.folder}: holds no whole step; expected folders named step_<number>")
        folder = self._path(number)
        if not folder.is_dir():
            held = ", ".join(str(n) for n in self.steps()) or "none"
            raise CheckpointNotFound(f"{self.folder}: has no step {number}; it has: {held}")
        if step is not None:
            error = None
            if process()[0] == 0:
                try:
                    verify_manifest(folder)
                except CheckpointError as caught:
                    error = caught
            self._settle(error, f"{folder}: is damaged")
        about = files.read_about(folder)
        self._check_fingerprint(about, folder)
        if like is not None:
            arrays.compare(folder, about.leaves, like)
        extra = self._extra_of(about, folder)
        return arrays.read(folder / _STATE, about.leaves, like), extra

    def steps(self) -> list[int]:
        """The numbers of the steps in the folder, ascending; whether they are whole is not checked."""
        return [number for number in _atomic.steps(self.folder) if self._path(number).is_dir()]

    def latest_valid(self) -> int | None:
        """The number of the newest step whose files all agree with its checksums; None if there is none.

        A newer one that is damaged is passed over with a DamagedCheckpointWarning, which names the bad files.
        """
        return gather_objects(self._find_valid() if process()[0] == 0 else None)[0]

    def best(self) -> int | None:
        """The number of the step with the best value of the metric of `keep_best`; None without one."""
        if self.keep_best is None:
            return None
        name, direction = self.keep_best
        values = {}
        for number in self.steps():
            try:
                value = files.read_about(self._path(number)).metrics.get(name)
            except CheckpointError:  # damaged, so not the best of those that can be restored
                continue
            if value is not None and math.isfinite(value):
                values[number] = value if direction == "min" else -value
        return min(values, key=values.__getitem__, default=None)

    def about(self, step: int) -> dict[str, Any]:
        """What a step says about itself, without its arrays: `step`, `metrics`, `fingerprint`, `leaves`, `extra`."""
        about = files.read_about(self._path(step))
        leaves = {name: f"{dtype}{list(shape)}" for name, (dtype, shape) in about.leaves.items()}
        return dict(
            step=about.step,
            metrics=about.metrics,
            fingerprint=about.fingerprint,
            leaves=leaves,
            extra=about.extras[0],
        )

    def close(self) -> None:
        """Gives back the lock of the folder; another process may save there then. The end of the process does it, too."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _take(self, state: Any) -> None:
        """Creates the folder, takes its lock, removes what a dead process left, and looks at the room."""
        files.check_writable(self.folder)
        if self._lock is None or not self._lock.holds(self.folder):
            self.close()
            files.make_folder(self.folder)
            self._lock = files.Lock.take(self.folder)
        _atomic.clean(self.folder)
        if state is not None:
            files.check_room(self.folder, arrays.total_bytes(state), self.keep, len(self.steps()))

    def _write(self, step: int, leaves: dict[str, Any], about: files.About) -> None:
        if process()[0] > 0:
            for leaf in leaves.values():
                arrays.host(leaf)  # their parts go to process 0; the order is the same everywhere
            return
        sent = arrays.Sent(leaves)
        try:
            self._take(None)
            self._check_newer(step)
            with _atomic.atomic_folder(self._path(step), replace=True) as folder:
                arrays.write(folder / _STATE, sent)
                files.write_about(folder, about)
        finally:
            sent.rest()  # after a failure the others still send: without a receiver they would wait for ever
        self._damaged.discard(step)
        self._retire(step)

    def _check_newer(self, step: int) -> None:
        for number in reversed(self.steps()):
            if number > step and not self._is_damaged(number):
                raise TrainingError(
                    f"{self.folder}: holds step {number}, newer than {step} which is to be saved; a resumed run would "
                    f"go on from there. Save to another folder, or delete the newer steps"
                )

    def _is_damaged(self, number: int) -> bool:
        if number not in self._damaged:
            try:
                verify_manifest(self._path(number))
            except CheckpointError:
                self._damaged.add(number)
        return number in self._damaged

    def _retire(self, saved: int) -> None:
        """Removes what no rule keeps, each step at once; what is newer than `saved` is damaged, and is left."""
        older = [number for number in self.steps() if number <= saved]
        whole = [number for number in older if number not in self._damaged]
        kept = set(whole if self.keep is None else whole[-self.keep :]) | {saved, self.best()}
        kept |= {number for number in whole if self.keep_every and number % self.keep_every == 0}
        for number in older:
            folder = self._path(number)
            if number in kept or not (folder / files.ABOUT).is_file() or not (folder / MANIFEST).is_file():
                continue  # not ours to delete
            try:
                files.remove(folder)
            except OSError as error:
                warnings.warn(f"{folder}: was to be removed, but cannot be ({error})", UserWarning, stacklevel=4)

    def _settle(self, error: Exception | None, what: str) -> None:
        """Raises the error of process 0 there, and a TrainingError that repeats it in the others."""
        told = gather_objects(None if error is None else str(error))
        if error is not None:
            raise error
        reasons = [reason for reason in told if reason is not None]
        if reasons:
            raise TrainingError(f"{what} by another process: {reasons[0]}")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _find_valid(self) -> int | None:
        for number in reversed(self.steps()):
            folder = self._path(number)
            try:
                verify_manifest(folder)
                files.read_about(folder)
                self._damaged.discard(number)
                return number
            except CheckpointError as error:
                self._damaged.add(number)
                reason = "; ".join(line.strip() for line in str(error).splitlines())
                warnings.warn(
                    f"step {number} is not usable, an older one is looked for: {reason}",
                    DamagedCheckpointWarning,
                    stacklevel=3,
                )
        return None

    def _check_fingerprint(self, about: files.About, folder: Path) -> None:
        if self.fingerprint is None or about.fingerprint is None:
            return
        differences = files.differences(about.fingerprint, self.fingerprint)
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise TrainingError(
                f"{folder}: was saved by a run with other settings:{lines}\nresume with those of the saved run, or "
                f"start a new one in another folder"
            )

    @staticmethod
    def _extra_of(about: files.About, folder: Path) -> dict[str, Any]:
        index, count = process()
        if len(about.extras) in (1, count):
            return about.extras[index if len(about.extras) > 1 else 0]
        first, *others = (_positions(extra) for extra in about.extras)
        differing = sorted(
            {name for other in others for name in {*first, *other} if first.get(name) != other.get(name)}
        )
        if differing:
            raise TrainingError(
                f"{folder}: was saved by {len(about.extras)} processes, and {', '.join(differing)} in `extra` differ "
                f"between them; this run has {count}: resume with {len(about.extras)}"
            )
        return about.extras[0]


def _positions(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What of `extra` must be the same for all processes if there may be more or fewer of them: all but plain numbers."""
    return {name: value for name, value in extra.items() if not isinstance(value, (int, float))}
