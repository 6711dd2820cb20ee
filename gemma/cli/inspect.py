# SPDX-License-Identifier: Apache-2.0
"""`gemma inspect`: what a checkpoint is and holds. Reads headers only, whatever the size; loads no framework.

Reading is `gemma/checkpoint.py`, memory arithmetic `gemma/fit.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Annotated, Any

import typer

from gemma.cli import _common
from gemma.cli._progress import waiting

HELP = """\
Show what a checkpoint is and holds, or how two differ.

That is its format, configuration, types and sizes of tensors, tokenizer, and the memory that generate and chat
need at a context length. They compute in float32, bfloat16 or float16, and packed weights are unpacked when read.

\b
Examples:
  gemma inspect demo
  gemma inspect model.gguf --tensors
  gemma inspect path/to/gemma-3-4b-it --context 32k --json
  gemma inspect model-a --diff model-b.gguf
"""
_FORMATS = {
    "gguf": "GGUF",
    "hf": "Hugging Face names",
    "flax": "Orbax, names of the JAX package",
    "ckpt": "PyTorch archive, names of gemma_pytorch",
    "npz": ".npz of big_vision",
    "sbs": ".sbs of gemma.cpp",
}


def command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .gguf, .safetensors, .ckpt, .npz or .sbs file, a Hugging Face or Orbax folder, or demo.",
        ),
    ],
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            "-c",
            metavar="N",
            help="Tokens for the memory estimate: 4096, 32k.  [default: 4096]",
            show_default=False,
        ),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    diff: Annotated[
        str | None,
        typer.Option(
            "--diff", metavar="OTHER", help="Compare values with another checkpoint, of any format; 1 if they differ."
        ),
    ] = None,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma.gm._proof import open_any

    tokens = _common.context_flag(context)
    with waiting(f"reading {file}"):
        path = hub.resolve(file)
    if diff is not None:
        _compare(path, hub.resolve(diff), tensors, as_json)
        return
    with open_any(path) as opened:
        report = _report(opened, tokens)
    if as_json:
        _common.write(json.dumps(report, default=str) + "\n")
        return
    _print(report)
    if tensors:
        _common.write("\ntensors\n" + _tensor_table(report["tensors"]))


def _compare(one, two, every: bool, as_json: bool) -> None:
    """Says what differs; exit code 1 if the numbers do, or what the network computes from them."""
    from gemma.cli._progress import steps
    from gemma.compare import compare
    from gemma.gm._proof import open_any, worst_tensors

    with open_any(one) as a, open_any(two) as b, steps() as progress:
        found = compare(a, b, progress=lambda done, total: progress("comparing values", done, total))
    changed = [t for t in found.tensors if not t.equal]
    if as_json:
        data = dataclasses.asdict(found) | {"a": str(one), "b": str(two), "same_values": found.same_values}
        for row in data["tensors"]:  # JSON has no word for what is not a number
            row |= {key: None for key in ("max_abs", "rmse", "scale") if not math.isfinite(row[key])}
        _common.write(json.dumps(data | {"same_model": found.same_model}) + "\n")
    else:
        rows = [("a", one), ("b", two), *(("configuration", line) for line in found.config)]
        rows += [("only in a", name) for name in found.only_a] + [("only in b", name) for name in found.only_b]
        rows += [("shapes", line) for line in found.shapes]
        rows.append(
            ("values", f"{len(found.tensors) - len(changed)} of {len(found.tensors)} tensors hold equal numbers")
        )
        _common.write(_common.columns(rows))
        shown = changed if every else worst_tensors(found, 10)
        if shown:
            table = [("largest changes" if not every else "changed", "a", "b", "relative", "rmse", "largest")]
            for t in shown:
                relative = f"{t.rmse / t.scale:.2%}" if t.scale else "-"
                table.append((t.name, *t.dtypes, relative, f"{t.rmse:.2e}", f"{t.max_abs:.2e}"))
            _common.write("\n" + _common.columns(table, right=[3, 4, 5]))
    if not found.same_model:
        raise typer.Exit(_common.FAILED)


def _report(opened, asked: int | None) -> dict[str, Any]:
    """Everything that is shown, as plain data: what --json prints."""
    from gemma import fit

    config = opened.config()
    infos = list(opened.tensors.values())
    by_type: dict[str, list[int]] = {}
    for info in infos:
        row = by_type.setdefault(info.dtype, [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + math.prod(info.shape), row[2] + info.nbytes
    stored = sum(info.nbytes for info in infos)
    tokens = _common.context_within(asked, fit.decoder(config).max_position_embeddings, 4096)
    choices = [("bfloat16", "bfloat16", 2), ("float32", "float32", 4)]
    memory = {
        name: fit.estimate(config, tokens, weight_bytes=weights, cache_bytes_per_value=size)
        for name, weights, size in choices
    }
    return {
        "path": str(opened.path),
        "format": opened.format,
        "files": Counter(str(info.file) for info in infos),
        "bytes": stored,
        "shape_of": _same_shape(config),
        "parameters": config.num_parameters,
        "config": {"class": type(config).__name__} | dataclasses.asdict(config),
        "types": {name: dict(zip(("tensors", "values", "bytes"), row)) for name, row in by_type.items()},
        "tokenizer": _tokenizer(opened),
        "memory": {"context": tokens} | {k: dataclasses.asdict(e) | {"total": e.total} for k, e in memory.items()},
        "tensors": [
            {"name": i.name, "type": i.dtype, "shape": list(i.shape), "bytes": i.nbytes, "offset": i.offset}
            for i in infos
        ],
    }


def _same_shape(config) -> list[str]:
    """Presets of the same sizes; several sizes of fine-tunes may share one."""
    from gemma.config import PRESETS, GemmaConfig

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

    def key(c):
        return tuple(getattr(c, name) for name in (*sizes, "head_dim", "layer_pattern", "sliding_window"))

    if not isinstance(config, GemmaConfig):
        return [name for name, c in PRESETS.items() if c == config]
    return [name for name, c in PRESETS.items() if isinstance(c, GemmaConfig) and key(c) == key(config)]


def _tokenizer(opened) -> dict[str, Any] | None:
    source = opened.tokenizer_source()
    if source is None:
        return None
    where = None if source.path is None else str(source.path)
    pieces = getattr(source, "pieces", None)
    return {"kind": source.kind, "path": where, "pieces": None if pieces is None else len(pieces)}


def _print(report: dict[str, Any]) -> None:
    from gemma.fit import format_bytes as size

    tokenizer = report["tokenizer"]
    if tokenizer is None:
        about = "none in these files"
    else:
        about = {"gguf": "inside the file", "sentencepiece": "SentencePiece"}.get(tokenizer["kind"], tokenizer["kind"])
        about += f", {tokenizer['pieces']:,} pieces" if tokenizer["pieces"] else ""
        about += f", {tokenizer['path']}" if tokenizer["path"] and tokenizer["kind"] != "gguf" else ""
    config = report["config"]
    files = len(report["files"])
    head = [
        ("format", _FORMATS.get(report["format"], report["format"]) + (f", {files} files" if files > 1 else "")),
        ("weights", f"{size(report['bytes'])} in {len(report['tensors'])} tensors"),
        ("parameters", f"{report['parameters']:,}"),
        ("sizes of", ", ".join(report["shape_of"]) or "no preset"),
        ("tokenizer", about),
    ]
    _common.write(f"{report['path']}\n{_common.columns(head)}\nconfiguration ({config['class']})\n")
    _common.write(_common.columns(_flat({k: v for k, v in config.items() if k != "class"})))
    rows = [("type", "tensors", "values", "size", "bits each")]
    for name, row in sorted(report["types"].items(), key=lambda item: -item[1]["bytes"]):
        bits = 8 * row["bytes"] / row["values"] if row["values"] else 0.0
        rows.append((name, row["tensors"], f"{row['values']:,}", size(row["bytes"]), f"{bits:.2f}"))
    _common.write("\ntypes\n" + _common.columns(rows, right=[1, 2, 3, 4]))
    memory = dict(report["memory"])
    rows = [("weights", "weights", "cache", "activations", "total")]
    _common.write(f"\nmemory for {memory.pop('context'):,} tokens\n")
    rows.append(("file as stored", size(report["bytes"]), "-", "-", "-"))
    for name, e in memory.items():
        rows.append((name, *(size(e[part]) for part in ("weights", "cache", "activations", "total"))))
    _common.write(_common.columns(rows, right=[1, 2, 3, 4]))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested configurations as "vision.hidden_size" rows; what is not set is left out."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((prefix + name, value))
    return rows


def _tensor_table(tensors: list[dict[str, Any]]) -> str:
    rows = [("name", "type", "shape", "bytes", "offset")]
    rows += [(t["name"], t["type"], " x ".join(map(str, t["shape"])), t["bytes"], t["offset"]) for t in tensors]
    return _common.columns(rows, right=[3, 4])
