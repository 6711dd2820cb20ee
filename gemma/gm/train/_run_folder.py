# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whether it can be used, the settings in it, and the README that says what was made.

Checkpoints in it are `_checkpoints.py`, tables and pictures `_loggers.py`, exports `_run_exports.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma import finetuning
from gemma._atomic import atomic_file, clean
from gemma.errors import ConfigError, SaveError, TrainingError
from gemma.finetuning import RunConfig
from gemma.fit import format_bytes
from gemma.gm.train import _checkpoints_files as files

SETTINGS = "config.yaml"
_TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. These weights are a
Model Derivative: they were modified by fine-tuning. Whoever passes them on has to hand over the same terms, including
the use restrictions of the Gemma Prohibited Use Policy, and to keep this notice.
"""


def check(run: RunConfig) -> Path:
    """The folder of a run, before anything else is done.

    Raises:
      SaveError: it cannot be written, or holds something that is no run.
      TrainingError: it holds a run that is not to be continued, or one with other settings.
    """
    folder = Path(os.path.abspath(run.folder))
    files.check_writable(run.folder)
    if not folder.is_dir():
        return folder
    held = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if held and SETTINGS not in held:
        raise SaveError(
            f"{run.folder}: exists and is no run (it has no {SETTINGS}); give another output, or an empty folder"
        )
    if SETTINGS in held:
        _check_settings(run, folder)
    return folder


def _check_settings(run: RunConfig, folder: Path) -> None:
    if not run.resume:
        raise TrainingError(
            f"{run.folder}: holds a run already; leave out --no-resume to go on with it, give another output, or delete it"
        )
    try:
        saved = RunConfig.from_dict(finetuning.read_yaml(folder / SETTINGS), where=str(folder / SETTINGS))
    except ConfigError as error:
        raise TrainingError(f"{run.folder}: its settings cannot be read, give another output ({error})") from error
    # A folder belongs to one base: nothing in a checkpoint would tell another one of the same sizes.
    differences = files.differences(_identity(saved), _identity(run))
    if differences:
        raise TrainingError(
            f"{run.folder}: holds a run with other settings ({'; '.join(differences[:8])}): go on with those of the run, "
            f"or give another output"
        )


def _identity(run: RunConfig) -> dict[str, Any]:
    return {"model": run.model, "adapter": run.adapter, **run.fingerprint()}


def begin(run: RunConfig, folder: Path) -> None:
    """Creates the folder and writes the settings into it."""
    files.make_folder(folder)
    clean(folder)
    _write(folder / SETTINGS, run.to_yaml())


def _write(path: Path, text: str) -> None:
    with atomic_file(path, replace=True) as file:
        file.write(text.encode("utf-8"))


def card(run: RunConfig, base: Any, report: Any, training: Any, exports: Sequence[Any], folder: Path) -> None:
    """Writes README.md: what was made of what, with which data, and the notice that the Gemma terms ask for."""
    last = next((row for row in reversed(training.history) if "loss" in row), {})
    scored = next((row for row in reversed(training.history) if "eval_loss" in row), None)
    numbers = [f"{last['step']:.0f} steps, training loss {last['loss']:.4f} in the last one"] if last else []
    if scored is not None:
        found = ", ".join(
            f"{name.removeprefix('eval_')} {value:.4f}" for name, value in scored.items() if name != "step"
        )
        numbers.append(f"on examples that were not trained on: {found}")
    what = finetuning.METHODS[run.method]
    made = "\n".join(f"- `{e.path.name}` ({e.kind}, {format_bytes(e.bytes)}): {e}" for e in exports)
    data = ", ".join(f"`{Path(path).name}`" for path in run.data)
    text = f"""\
# {folder.name}

{run.model} fine-tuned on {data}: {run.method} ({what}).

{_TERMS}
## What is here

{made or "- nothing was exported"}

Each was opened again after it was written and compared with the trained model, as stated.

## Training

{". ".join(numbers) or "No step was taken"}. Settings: `{SETTINGS}`; every step: `metrics.csv`, `curves.png`.

```text
{report}
```

## Before you pass this on

Say here what the model is for, what the data may be used for, how it was evaluated, and where it fails.
"""
    _write(folder / "README.md", text)
