# SPDX-License-Identifier: Apache-2.0
"""`gemma eval`: perplexity of a text, and how far a model is from another one.

Numbers are `gemma/gm/_evaluate.py`, windows of text `gemma/gm/_windows.py`.
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
Perplexity of a text; with --against also the KL divergence from another model, and how often both would say the same.

The text is cut into windows of --context tokens, each beginning with <bos>, that move on by --stride; every token
counts once, with at least context - stride tokens before it (but for the first window). Weights that are packed in the
file stay packed; everything is computed in float32. The model of --against is read as floats: give the unquantized one.

\b
Examples:
  gemma eval demo
  gemma eval gemma-3-1b-q4_0.gguf --against gemma-3-1b --text book.txt --tokens 8192
"""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As for gemma generate --model.")]
TextFile = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text. Default: the language reference inside of Python."),
]
Against = Annotated[str | None, typer.Option("--against", metavar="MODEL", help="Compare with this model.")]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Use the first N tokens of the text.")]
Window = Annotated[int, typer.Option("--context", "-c", metavar="N", min=2, help="Tokens of a window.")]
Stride = Annotated[
    int | None, typer.Option("--stride", metavar="N", min=1, help="Tokens it moves on by; default: half a window.")
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Windows computed together.")]


def command(
    model: Model,
    text: TextFile = None,
    against: Against = None,
    tokens: Tokens = 2048,
    context: Window = 512,
    stride: Stride = None,
    batch: Batch = 4,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma.cli import _measure
    from gemma.gm._evaluate import Reference, evaluate

    path, other = Path(hub.resolve(model)), None if against is None else Path(hub.resolve(against))
    config = _measure.config_of(path)
    windows = _measure.Windows(context, context // 2 if stride is None else stride, batch)
    found = _measure.read_text(path, text, tokens)
    cut = _measure.batches(config, found, windows)
    with steps() as progress:
        progress("reading", 0, 1)
        reference = None if other is None else Reference(_measure.open_model(other, packed=False), cut)
        opened = _measure.open_model(path)
        scores = evaluate(opened, cut, reference=reference, progress=_measure.counted(progress, "evaluating"))
    data = data_of(scores) | {"model": str(path), "against": other and str(other), "text": found.name}
    data |= {"sha256": found.sha256, "context": windows.context, "stride": windows.stride}
    _common.write(json.dumps(data) + "\n" if as_json else page(data))


def data_of(scores: Any) -> dict[str, Any]:
    """The numbers as JSON has them; nats."""
    values = dataclasses.asdict(scores) | {"perplexity": scores.perplexity}
    return values | {"reference_perplexity": scores.reference_perplexity}


def page(data: dict[str, Any]) -> str:
    """The report as text."""
    spread = data["perplexity"] * data["error"]
    rows = [
        ("model", data["model"]),
        ("text", f"{data['text']} (sha256 {data['sha256']}...), {data['tokens']} tokens count"),
        ("windows", f"{data['context']} tokens, moving on by {data['stride']}"),
        ("perplexity", f"{data['perplexity']:.4f} +- {spread:.4f}"),
    ]
    if data["kl"] is not None:
        rows += [
            ("against", data["against"]),
            ("its perplexity", f"{data['reference_perplexity']:.4f}"),
            ("KL", f"{data['kl']:.6f} nats per token, at most {data['worst_kl']:.4f}"),
            ("same token", f"likeliest in both at {data['agreement']:.2%} of the tokens"),
        ]
    return _common.columns(rows)
