# SPDX-License-Identifier: Apache-2.0
"""`gemma fit`: whether a model at a context length fits this machine, before anything is downloaded or loaded.

The arithmetic is `gemma/fit.py`; here it is laid out as a table.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gemma.cli import _common

HELP = """\
Say whether a model fits into memory at a context length.

Exit code 1 if it does not. Weights and cache are exact: layers with a sliding window hold no more than their
window. Activations are an upper estimate for a prompt that fills the context. Python and JAX themselves, about
0.3 GB, are not counted. The line marked with > is the one asked for, and decides; generate and chat compute in
float32 unless told otherwise.

\b
Examples:
  gemma fit gemma3_12b --context 32k --dtype bfloat16
  gemma fit gemma3_27b --quant Q4_K --memory 24GB
  gemma fit demo
"""
_KINDS = ("float32", "bfloat16", "Q8_0", "Q5_0", "Q4_K")  # the rows of the table, beside the one asked for


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The name of a size (gemma3_4b), a checkpoint, or demo.")
    ],
    context: Annotated[
        str, typer.Option("--context", "-c", metavar="N", help="Tokens held at once: 4096, 32k.")
    ] = "4096",
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences held at once.")] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Weights and cache in float32, bfloat16 or float16.")
    ] = "float32",
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="TYPE", help="Weights kept packed (Q8_0, Q4_K, ...), cache in bfloat16."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Ask for this much instead of this machine: 16GB.")
    ] = None,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import fit as arithmetic

    if quant is None and dtype not in arithmetic.DTYPES:
        arithmetic.quant_type(dtype)  # a name of no type at all is refused with the list of types
        raise _bad_dtype(dtype, arithmetic.DTYPES)
    asked = arithmetic.quant_type(quant or dtype).name
    name, config = _config(model)
    tokens = arithmetic.parse_context(context)
    limit = _limit(memory)
    rows = []
    for kind in dict.fromkeys([*(arithmetic.quant_type(k).name for k in _KINDS), asked]):
        value_bytes = 4 if kind == "F32" else 2
        rows.append(
            (
                kind,
                arithmetic.estimate(config, tokens, weight_bytes=kind, cache_bytes_per_value=value_bytes, batch=batch),
            )
        )
    need = dict(rows)[asked].total
    fits = need <= limit.available
    if as_json:
        _print_json(name, tokens, batch, asked, rows, limit, fits)
    else:
        _print(name, config, tokens, batch, asked, rows, limit, fits)
    raise typer.Exit(_common.OK if fits else _common.FAILED)


def _bad_dtype(dtype: str, dtypes):
    from gemma.errors import ConfigError

    return ConfigError(
        f"--dtype: expected one of {', '.join(dtypes)}, got {dtype!r}; packed types are given as --quant"
    )


def _config(model: str):
    """(what the model is called, its configuration): a size's name needs no files."""
    from gemma import checkpoint, config, hub
    from gemma.errors import ConfigError

    try:
        name = config.preset_name(model)
        return name, config.PRESETS[name]
    except ConfigError:
        path = hub.resolve(model)
    with checkpoint.open_checkpoint(path) as opened:
        return str(path), opened.config()


def _limit(memory: str | None):
    from gemma import fit as arithmetic
    from gemma.errors import ConfigError

    if memory is not None:
        size = arithmetic.parse_bytes(memory)
        return arithmetic.Memory(size, size, "--memory")
    found = arithmetic.machine_memory()
    if found is None:
        raise ConfigError("this system does not say how much memory it has; give it as --memory 16GB")
    return found


def _print(name, config, tokens, batch, asked, rows, limit, fits) -> None:
    from gemma.fit import format_bytes as size

    held = f"{tokens:,} tokens" + (f" x {batch} sequences" if batch > 1 else "")
    _common.write(f"{name}: {config.num_parameters:,} parameters, {held}\n\n")
    table = [("", "weights as", "weights", "cache", "activations", "total", "fits")]
    for kind, e in rows:
        parts = map(size, (e.weights, e.cache, e.activations, e.total))
        table.append((">" if kind == asked else "", kind, *parts, "yes" if e.total <= limit.available else "no"))
    _common.write(_common.columns(table, right=[2, 3, 4, 5], indent=""))
    where = {"machine": "this machine", "control group": "this container"}.get(limit.limited_by, limit.limited_by)
    _common.write(f"\n{where}: {size(limit.available)} free of {size(limit.total)}\n")
    need = dict(rows)[asked].total
    if fits:
        _common.write(f"{asked} fits: {size(need)} of {size(limit.available)}.\n")
        return
    smaller = [kind for kind, e in rows if e.total <= limit.available]
    advice = (
        f"{smaller[0]} would fit" if smaller else "none of these types fits: try a shorter context or a smaller model"
    )
    if need <= limit.total:
        advice = f"it would fit if other programs were closed; {advice}"
    _common.write(f"{asked} does not fit: {size(need)} needed, {size(need - limit.available)} too many; {advice}.\n")


def _print_json(name, tokens, batch, asked, rows, limit, fits) -> None:
    parts = ("weights", "cache", "activations", "total")
    result = {
        "model": name,
        "context": tokens,
        "batch": batch,
        "asked": asked,
        "fits": fits,
        "memory": {"total": limit.total, "available": limit.available, "limited_by": limit.limited_by},
        "types": {kind: {part: getattr(e, part) for part in parts} for kind, e in rows},
    }
    _common.write(json.dumps(result) + "\n")
