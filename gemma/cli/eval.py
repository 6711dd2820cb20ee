# SPDX-License-Identifier: Apache-2.0
"""`gemma eval`: perplexity of a text, how far a model is from another one, and how often it is right on examples.

Numbers are `gemma/gm/_evaluate.py`, windows of text `gemma/gm/_windows.py`; examples are `_accuracy.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma.cli import _common
from gemma.cli._progress import steps
from gemma.errors import ConfigError

HELP = """\
Perplexity of a text; with --against also the KL divergence from another model, and how often both would say the same.
With --data: how often the model is right on a file of examples.

The text is cut into windows of --context tokens, each beginning with <bos>, that move on by --stride; every token
counts once, with at least context - stride tokens before it (but for the first window). Weights that are packed in the
file stay packed; everything is computed in float32. The model of --against is read as floats: give the unquantized one.

Files of --data are those of gemma finetune. Texts with labels: accuracy, the share whose label is the likeliest of the
labels. The labels are those that the adapter was trained on, where it says so, else those of the file. Chats and prompts
with completions: exact match, the share of answers, generated greedily, that are the last answer of the row. Behind a
share stands its 95 % interval (Wilson's).

\b
Examples:
  gemma eval demo
  gemma eval gemma-3-1b-q4_0.gguf --against gemma-3-1b --text book.txt --tokens 8192
  gemma eval demo --data test.csv --adapter finetuned/train-classification/adapter
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
Batch = Annotated[
    int,
    typer.Option(
        "--batch", metavar="N", min=1, help="Windows, or labelled texts, computed together; no effect on exact match."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="Examples instead of a text; may be repeated.", show_default=False),
]
Metric = Annotated[str, typer.Option("--metric", metavar="NAME", help="Of --data: accuracy, exact_match, or auto.")]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Use the first N examples.", show_default=False)
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="NAME[=TEXT]",
        help="A label, and the text of one token that stands for it; may be repeated. Default: those of the adapter, else "
        "of the data.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="TEXT", help="What a label follows, with {text} in it.", show_default=False),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Of an answer, at most.")]


def command(
    model: Model,
    text: TextFile = None,
    against: Against = None,
    tokens: Tokens = 2048,
    context: Window = 512,
    stride: Stride = None,
    batch: Batch = 4,
    data: Data = None,
    metric: Metric = "auto",
    adapter: _common.Adapter = None,
    limit: Limit = None,
    label: Labels = None,
    template: Template = None,
    max_new_tokens: NewTokens = 64,
    backend: _common.BackendName = "auto",
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    if data:
        if text is not None or against is not None:
            raise ConfigError("--data: goes without --text and --against")
        options = dict(metric=metric, adapter=adapter, limit=limit, template=template, max_new_tokens=max_new_tokens)
        _examples(model, data, label or [], as_json, dict(options, max_length=context, batch=batch, backend=backend))
        return
    if adapter is not None or metric != "auto" or label or template or limit:
        raise ConfigError("--adapter, --metric, --label, --template, --limit: go with --data")
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


def _examples(model: str, data: list[str], labels: list[str], as_json: bool, options: dict[str, Any]) -> None:
    from gemma import hub
    from gemma.cli import _accuracy

    if options["metric"] not in _accuracy.METRICS:
        raise ConfigError(f"--metric: expected one of {', '.join(_accuracy.METRICS)}, got {options['metric'][:80]!r}")
    path = Path(hub.resolve(model))
    pairs = [text.partition("=") for text in labels]
    named = tuple((name, text if equals else name) for name, equals, text in pairs)
    with steps() as progress:
        found = _accuracy.measure(_accuracy.Asked(model, path, data, labels=named, **options), progress)
    found |= {"model": str(path), "data": ", ".join(data), "adapter": options["adapter"]}
    _common.write(json.dumps(found, ensure_ascii=False) + "\n" if as_json else _accuracy.page(found))


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
