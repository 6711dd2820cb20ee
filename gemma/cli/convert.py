# SPDX-License-Identifier: Apache-2.0
"""`gemma convert`: a checkpoint in another format or type, proven before it is called done.

What happens is in `_convert.py` and `gm/_proof.py`; this module has the flags and the one-page report.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma.cli import _common
from gemma.cli._progress import steps

HELP = """\
Write a checkpoint in another format, and prove that it is the same model.

What was written is opened again: every number must be what rounding to its type makes of the source's, a quantized
tensor must be off by exactly the error that is reported, and the logits of a fixed prompt are compared. Only then
does the destination appear.

\b
Examples:
  gemma convert gemma-3-1b-it gemma-3-1b-it.gguf --to gguf --quantize q4_k_m
  gemma convert demo demo-hf --to safetensors --dtype bfloat16
  gemma convert gemma-3-4b-it gemma-3-4b-orbax --to orbax --layout flat
"""


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .gguf, .safetensors, .ckpt, .npz or .sbs file, a Hugging Face or Orbax folder, or demo.",
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DESTINATION", help="A file for gguf, a folder for the others.")]
To = Annotated[
    str, typer.Option("--to", metavar="FORMAT", help="safetensors, gguf, orbax, ckpt, npz or sbs.", show_default=False)
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", "-q", metavar="MIX", help="gguf: q4_k_m, q8_0, ...; ckpt: int8; sbs: sfp8.")
]
Floats = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="Floats as float32, bfloat16 or float16; else as stored.")
]
Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix for --quantize: .npz or GGUF.")
]
Layout = Annotated[
    str | None,
    typer.Option("--layout", metavar="NAME", help="orbax: nested (the default), flat, stacked or kauldron."),
]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Only the decoder of a model with images.")]
Vocabulary = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.model or tokenizer.json to go with it.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A config.json, for a source that has none.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing destination.")]
NoLogits = Annotated[
    bool, typer.Option("--no-logits", help="Compare values only: the model itself need not fit into memory.")
]
NoMmap = Annotated[
    bool, typer.Option("--no-mmap", help="Copy from files instead of mapping them, where others may truncate them.")
]


def command(
    source: Source,
    destination: Destination,
    to: To,
    quantize: Quantize = None,
    dtype: Floats = None,
    imatrix: Imatrix = None,
    layout: Layout = None,
    text_only: TextOnly = False,
    tokenizer: Vocabulary = None,
    config: Config = None,
    force: Force = False,
    no_logits: NoLogits = False,
    no_mmap: NoMmap = False,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma.cli import _convert

    request = _convert.Request(
        source=Path(hub.resolve(source)),
        destination=destination,
        format=to.lower(),
        quantize=quantize,
        dtype=dtype,
        imatrix=imatrix,
        layout=layout,
        text_only=text_only,
        tokenizer=tokenizer,
        config=config,
        replace=force,
        logits=not no_logits,
        mmap=not no_mmap,
    )
    with steps() as progress:
        result = _convert.convert(request, progress)
    if result.proof.problems:
        typer.echo(f"gemma: error: {_convert.failure(request, result.proof)}", err=True)
        raise typer.Exit(_common.FAILED)
    if as_json:
        _common.write(json.dumps(_data(request, result), default=str) + "\n")
    else:
        _common.write(page(request, result))


def _data(request, result) -> dict[str, Any]:
    report, proof = result.report, result.proof
    return {
        "source": str(request.source),
        "destination": str(report.path),
        "format": report.format,
        "files": [str(file) for file in report.files],
        "bytes": report.bytes,
        "types": report.types,
        "notes": list(report.notes),
        "tensors": [dataclasses.asdict(tensor) for tensor in proof.comparison.tensors],
        "logits": None if proof.logits is None else dataclasses.asdict(proof.logits),
        "logits_left_out": proof.no_logits,
        "tokenizer": proof.tokenizer,
        "seconds": dict(result.seconds),
    }


def page(request, result) -> str:
    """The report, one page of plain text."""
    from gemma.fit import format_bytes as size
    from gemma.gm._proof import worst_tensors

    report, proof = result.report, result.proof
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    rows = [
        ("from", request.source),
        ("to", f"{report.path} ({report.format})"),
        ("written", f"{size(report.bytes)} in {len(report.files)} file{'s' * (len(report.files) > 1)}, {types}"),
        ("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())),
        *(("note", note) for note in report.notes),
    ]
    tensors = proof.comparison.tensors
    exact = sum(t.unexpected == 0 or t.equal for t in tensors)
    proven = [("values", f"{exact} of {len(tensors)} tensors hold the source's numbers, rounded to their type")]
    if exact < len(tensors):
        proven.append(("", f"{len(tensors) - exact} were quantized, each off by the error that was announced"))
    if proof.comparison.config:
        proven += [("config", line) for line in proof.comparison.config]
    proven += [("tokenizer", proof.tokenizer), ("logits", _logits(proof))]
    text = _common.columns(rows) + "\nproven by opening what was written\n" + _common.columns(proven)
    worst = worst_tensors(proof.comparison)
    if worst:
        table = [("largest changes", "type", "relative", "rmse", "largest")]
        table += [(t.name, t.dtypes[1], f"{t.rmse / t.scale:.2%}", f"{t.rmse:.2e}", f"{t.max_abs:.2e}") for t in worst]
        text += "\n" + _common.columns(table, right=[2, 3, 4])
    return text


def _logits(proof) -> str:
    found = proof.logits
    if found is None:
        return proof.no_logits
    if found.max_abs == 0.0:
        return f"equal, bit for bit, on {found.tokens} tokens"
    return (
        f"at most {found.max_abs:.3g} apart on {found.tokens} tokens, KL {found.kl:.2e} nats, "
        f"same arg-max at {found.same_top} of {found.tokens}"
    )
