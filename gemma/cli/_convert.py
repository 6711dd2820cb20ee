# SPDX-License-Identifier: Apache-2.0
"""A conversion: write beside the destination, let `gm/_proof.py` open and compare what was written, only then publish.

Writing is `gemma.saving` (Orbax: `gm.ckpts`); what the user sees is `convert.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma import saving
from gemma.checkpoint import Checkpoint, TokenizerSource, load_tensors
from gemma.config import GemmaConfig, text_only
from gemma.errors import ConfigError
from gemma.gm._proof import Proof, open_any, prove
from gemma.saving import SaveReport

ORBAX = "orbax"
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = (*saving.FORMATS, ORBAX)

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to convert; fields as in `gemma.saving.save`."""

    source: Path
    destination: Path
    format: str
    quantize: str | None = None
    dtype: str | None = None
    imatrix: Path | None = None
    layout: str | None = None
    text_only: bool = False
    tokenizer: Path | None = None
    config: Path | None = None
    replace: bool = False
    logits: bool = True
    mmap: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done; `report.path` holds the model only if `proof.problems` is empty."""

    report: SaveReport
    proof: Proof
    seconds: Mapping[str, float]


def convert(request: Request, progress: Progress) -> Result:
    """Converts; the destination appears only when the proof holds, that is, when `proof.problems` is empty.

    Raises:
      GemmaError: the source cannot be read or the destination not written.
    """
    check(request)
    seconds: dict[str, float] = {}
    with open_any(request.source, mmap=request.mmap) as source:
        config = _config(request, source)
        tokenizer = _tokenizer(request, source)
        with _Staging(request.destination) as staged:
            start = time.perf_counter()
            report = _write(request, source, config, tokenizer, staged, progress)
            seconds["writing"] = time.perf_counter() - start
            start = time.perf_counter()
            proof = prove(
                source,
                config,
                report,
                staged,
                progress,
                tokenizer,
                answers=functools.partial(_answers, request.source, config) if request.logits else None,
                text_only=request.text_only,
                mmap=request.mmap,
            )
            seconds["checking"] = time.perf_counter() - start
            if not proof.problems:
                publish(staged, request.destination, replace=request.replace)
    moved = [request.destination / file.relative_to(staged) for file in report.files]
    files = (request.destination,) if request.destination.is_file() else tuple(moved)
    return Result(dataclasses.replace(report, path=request.destination, files=files), proof, seconds)


def _answers(path: Path, config: Any, ids: Sequence[int]) -> np.ndarray:
    from gemma.gm._prompt_logits import prompt_logits

    return prompt_logits(path, config, ids)


def check(request: Request) -> None:
    """Refuses what can be refused before anything is read."""
    from gemma._atomic import check_destination

    if request.format not in FORMATS:
        raise ConfigError(f"--to: expected one of {', '.join(FORMATS)}, got {request.format!r}")
    if request.format == ORBAX and (request.quantize or request.imatrix):
        raise ConfigError("--quantize, --imatrix: an Orbax checkpoint holds floats")
    if request.format != ORBAX and request.layout is not None:
        raise ConfigError(f"--layout: only an Orbax checkpoint has layouts, not {request.format}")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {request.dtype[:80]!r}")
    source, destination = (Path(os.path.realpath(path)) for path in (request.source, request.destination))
    if destination == source or destination in source.parents:  # replacing it would delete what is being read
        raise ConfigError(f"{request.destination}: is the source, or holds it; give another destination")
    folder = request.format == ORBAX or saving.FORMATS[request.format].folder
    check_destination(request.destination, replace=request.replace, folder=folder)


def _config(request: Request, source: Checkpoint) -> Any:
    if request.config is not None:
        from gemma.hf_config import read_config

        config = read_config(request.config)
    else:
        config = source.config()
    if request.text_only:
        if not isinstance(config, GemmaConfig):
            raise ConfigError("--text-only: only a Gemma 3 with images has a decoder that stands alone")
        return text_only(config)
    return config


def _tokenizer(request: Request, source: Checkpoint) -> TokenizerSource | None:
    if request.tokenizer is None:
        return source.tokenizer_source()
    kind = "tokenizer.json" if request.tokenizer.suffix == ".json" else "sentencepiece"
    return TokenizerSource(kind, request.tokenizer)


class _Staging:
    """A folder beside the destination for a file or folder of the destination's name; gone at the end."""

    def __init__(self, destination: Path):
        self._destination = destination.absolute()  # the report's paths are

    def __enter__(self) -> Path:
        parent = self._destination.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".gemma-convert-", dir=parent))
        return self._folder / self._destination.name

    def __exit__(self, *exc_info) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def publish(staged: Path, destination: Path, *, replace: bool) -> None:
    """Gives what was proven its name, in one step; what it replaces goes afterwards."""
    from gemma import _atomic

    _atomic.publish(staged, destination, replace=replace)


def _write(request, source, config, tokenizer, staged: Path, progress: Progress) -> SaveReport:
    tensors = load_tensors(source, config, text_only=request.text_only)

    def advance(done: int, total: int) -> None:
        progress("writing", done, total)

    if request.format == ORBAX:
        from gemma.gm.ckpts._save import save_tensors

        return save_tensors(
            staged,
            tensors,
            config,
            layout=request.layout or "nested",
            dtype=request.dtype,
            tokenizer=tokenizer,
            progress=advance,
        )
    return saving.save(
        staged,
        tensors,
        config,
        format=request.format,
        tokenizer=tokenizer,
        dtype=request.dtype,
        quantize=request.quantize,
        imatrix=None if request.imatrix is None else read_imatrix(request.imatrix),
        progress=advance,
    )


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """An importance matrix; see `gemma.imatrix.read`."""
    from gemma import imatrix

    return imatrix.read(path)


def failure(request: Request, proof: Proof) -> str:
    """What is said, in lines, when the proof does not hold."""
    shown = "".join(f"\n  {problem}" for problem in proof.problems[:20])
    more = f"\n  and {len(proof.problems) - 20} more" if len(proof.problems) > 20 else ""
    return (
        f"{request.destination}: NOT converted: what was written does not hold what it should, and was deleted again. "
        f"The format cannot express this model, or this is a defect of gemmakit or of the disk:{shown}{more}"
    )
