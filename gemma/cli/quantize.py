# SPDX-License-Identifier: Apache-2.0
"""`gemma quantize`: a model in fewer bits, and what that costs: bytes, error, and with --text perplexity and KL.

Files are written and proven by `_convert.py`; perplexity is `gemma/gm/_evaluate.py`, importance matrices are collected
by `gemma/gm/_importance.py` and kept by `gemma/imatrix.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma.cli import _common
from gemma.cli._progress import steps
from gemma.errors import ConfigError

HELP = """\
Write a model in fewer bits, and report what that costs.

Mixes such as q4_k_m, q4_0 or q8_0 become a GGUF file, int4 and int8 a Hugging Face folder, sfp8 a gemma.cpp folder;
q4_0_pure and its like have every matrix in that type, which is what quantization-aware training trains. Every file is
opened again and compared before it appears, as by gemma convert. A source that is quantized already loses twice:
the report compares with the source as it is.

\b
Examples:
  gemma quantize gemma-3-1b --to q4_k_m
  gemma quantize gemma-3-1b --to q4_0 --imatrix book.txt --text other.txt
  gemma quantize gemma-3-1b --to q8_0 --to q4_k_m --to int4 --text python
"""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As for gemma convert.")]
To = Annotated[
    list[str], typer.Option("--to", metavar="TYPE", help="q4_k_m, q4_0, q8_0, int4, int8, sfp8, ...; may be repeated.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="PATH", help="File or folder; of several types: a folder for all.")
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="An importance matrix, or a text to collect one over."),
]
TextFile = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="Evaluate each on this text (python: the one inside of Python)."),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Use the first N tokens of texts.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]


def command(
    model: Model,
    to: To,
    out: Out = None,
    imatrix: Imatrix = None,
    text: TextFile = None,
    tokens: Tokens = 2048,
    force: Force = False,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma._quants_mixes import recipe
    from gemma.cli import _convert

    source = Path(hub.resolve(model))
    names = [recipe(name).name for name in to]
    targets = {name: _target(source, name, out, len(names) > 1) for name in names}
    requests = [
        _convert.Request(source, target, format_of(name), quantize=name, replace=force)
        for name, target in targets.items()
    ]
    for request in requests:
        _convert.check(request)
    with steps() as progress:
        matrix = None if imatrix is None else _matrix(source, imatrix, next(iter(targets.values())), tokens, progress)
        measure = None if text is None else _Measure(source, text, tokens)
        rows = [_quantized(request, matrix, measure, progress) for request in requests]
    _common.write(json.dumps({"source": str(source), "choices": rows}) + "\n" if as_json else page(source, rows))


def format_of(name: str) -> str:
    """The format that holds a type."""
    return {"int4": "safetensors", "int8": "safetensors", "sfp8": "sbs"}.get(name, "gguf")


def _target(source: Path, name: str, out: Path | None, several: bool) -> Path:
    gguf = format_of(name) == "gguf"
    stem = source.stem if source.is_file() else source.name
    file = f"{stem}-{name}{'.gguf' if gguf else ''}"
    return Path(file) if out is None else out / file if several else out


def _matrix(source: Path, given: Path, target: Path, tokens: int, progress) -> Path:
    """A file with an importance matrix: the one given, or one collected over the text given, beside the output."""
    from gemma import imatrix
    from gemma.cli import _measure

    if not given.is_file():
        raise ConfigError(f"--imatrix {given}: no such file; give a text, a .npz or llama.cpp's GGUF")
    if imatrix.is_file_of(given):
        return given
    from gemma.gm._importance import collect

    config, windows = _measure.config_of(source), _measure.Windows(stride=511)  # each token once
    text = _measure.read_text(source, str(given), tokens)
    batches = _measure.batches(config, text, windows)
    values = collect(_measure.open_model(source), batches, progress=_measure.counted(progress, "reading the text"))
    file = target.with_name(f"{target.name.removesuffix('.gguf')}.imatrix.gguf")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = sum(int((batch.tokens != 0).sum()) for batch in batches)
    imatrix.write(file, values, config, tokens=count, context=windows.context, dataset=given.name, replace=True)
    _common.note(f"the importance matrix of {count} tokens is in {file}")
    return file


class _Measure:
    """Scores what was written against the source."""

    def __init__(self, source: Path, text: str, tokens: int):
        from gemma.cli import _measure
        from gemma.gm._evaluate import Reference

        found = _measure.read_text(source, text, tokens)
        self._batches = _measure.batches(_measure.config_of(source), found, _measure.Windows())
        self._reference = Reference(_measure.open_model(source, packed=False), self._batches)

    def __call__(self, path: Path, progress) -> dict[str, Any]:
        from gemma.cli import _measure
        from gemma.cli.eval import data_of
        from gemma.gm._evaluate import evaluate

        model = _measure.open_model(path)
        return data_of(evaluate(model, self._batches, reference=self._reference, progress=progress))


def _quantized(request, matrix: Path | None, measure: _Measure | None, progress) -> dict[str, Any]:
    import dataclasses

    from gemma.cli import _convert

    uses = matrix is not None and request.format == "gguf"
    result = _convert.convert(dataclasses.replace(request, imatrix=matrix if uses else None), progress)
    if result.proof.problems:
        typer.echo(f"gemma: error: {_convert.failure(request, result.proof)}", err=True)
        raise typer.Exit(_common.FAILED)
    tensors = [t for t in result.report.tensors if t.rmse is not None]
    sizes = [math.prod(t.shape) for t in tensors]
    rmse = math.sqrt(sum(t.rmse**2 * n for t, n in zip(tensors, sizes, strict=True)) / max(1, sum(sizes)))
    values = sum(math.prod(t.shape) for t in result.report.tensors)
    row: dict[str, Any] = {
        "type": request.quantize,
        "path": str(result.report.path),
        "bytes": result.report.bytes,
        "bits_per_weight": 8 * sum(t.nbytes for t in result.report.tensors) / max(1, values),
        "rmse": rmse,
        "largest_error": max((t.max_error for t in tensors), default=0.0),
        "types": result.report.types,
        "imatrix": str(matrix) if uses else None,
    }
    if measure is not None:
        row["scores"] = measure(request.destination, lambda done, total: progress("evaluating", done, total))
    return row


def page(source: Path, rows: list[dict[str, Any]]) -> str:
    """The report as text."""
    from gemma.fit import format_bytes as size

    head = ["type", "bytes", "bits", "rmse", "largest"]
    scored = "scores" in rows[0]
    head += ["perplexity", "KL", "same token"] if scored else []
    table = [(*head, "written")]
    for row in rows:
        cells = [row["type"], size(row["bytes"]), f"{row['bits_per_weight']:.2f}", f"{row['rmse']:.2e}"]
        cells.append(f"{row['largest_error']:.2e}")
        if scored:
            scores = row["scores"]
            cells += [f"{scores['perplexity']:.4f}", f"{scores['kl']:.5f}", f"{scores['agreement']:.2%}"]
        table.append((*cells, row["path"]))
    text = f"  {source}, as written; errors in the units of the weights\n"
    if scored:
        text = text[:-1] + f"; the source's perplexity is {rows[0]['scores']['reference_perplexity']:.4f}\n"
    return text + _common.columns(table, right=range(1, len(head)))
