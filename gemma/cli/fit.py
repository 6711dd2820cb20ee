# SPDX-License-Identifier: Apache-2.0
"""`gemma fit`: whether a model at a context length fits this machine, before anything is downloaded or loaded.

The arithmetic is `gemma/fit.py`; here it is laid out as a table.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gemma.cli import _common
from gemma.cli._progress import waiting

HELP = """\
Say whether a model fits into memory at a context length.

Exit code 1 if it does not. Weights are counted tensor by tensor, as generate loads them: without a vision tower.
The cache is counted as it is allocated: its length is rounded up to a power of two, and layers with a sliding
window hold no more than their window. Activations are an upper estimate for a prompt that fills the context.
Python and JAX themselves, about 0.3 GB, are not counted. The line marked with > is the one asked for, and decides;
generate and chat compute in float32 unless told otherwise.

Packed types (Q8_0, Q4_K, ...) show the size of the weights as stored in a file, every matrix in that type. They do
not say whether the model fits: when it is run, packed weights are unpacked to --dtype.

\b
Examples:
  gemma fit gemma3_12b --context 32k --dtype bfloat16
  gemma fit gemma3_27b --quant Q6_K --memory 128GB
  gemma fit demo
"""
_RUN, _STORED = ("F32", "BF16"), ("Q8_0", "Q5_0", "Q4_K")  # the rows of the table, beside those asked for
_PARTS = ("weights", "cache", "activations", "total")


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The name of a size (gemma3_4b), a checkpoint, or demo.")
    ],
    context: Annotated[
        str | None,
        typer.Option(
            "--context", "-c", metavar="N", help="Tokens held at once: 4096, 32k.  [default: 4096]", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences held at once.")] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Weights and cache in float32, bfloat16 or float16.")
    ] = "float32",
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="TYPE", help="Also show the size of a file in this packed type (Q6_K, ...)."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Ask for this much instead of this machine: 16GB.")
    ] = None,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import fit as arithmetic

    if dtype not in arithmetic.DTYPES:
        arithmetic.quant_type(dtype)  # a name of no type at all is refused with the list of types
        raise _bad_dtype(dtype, arithmetic.DTYPES)
    asked, packed = arithmetic.quant_type(dtype).name, _packed(quant)
    tokens = _common.context_flag(context)
    name, config = _config(model)
    tokens = _common.context_within(tokens, arithmetic.decoder(config).max_position_embeddings, 4096)
    limit = _limit(memory)
    rows = {}
    for kind in dict.fromkeys([*_RUN, asked]):
        size = 4 if kind == "F32" else 2
        rows[kind] = arithmetic.estimate(config, tokens, weight_bytes=kind, cache_bytes_per_value=size, batch=batch)
    stored = {kind: arithmetic.stored_bytes(config, kind) for kind in dict.fromkeys([*_STORED, *packed])}
    fits = rows[asked].total <= limit.available
    if as_json:
        _print_json(name, config, tokens, batch, asked, rows, stored, limit, fits)
    else:
        _print(name, config, tokens, batch, asked, rows, stored, limit, fits)
    raise typer.Exit(_common.OK if fits else _common.FAILED)


def _packed(quant: str | None) -> list[str]:
    from gemma import fit as arithmetic
    from gemma.errors import ConfigError

    if quant is None:
        return []
    kind = arithmetic.quant_type(quant)
    if kind.is_float:
        raise ConfigError(f"--quant: expected a packed type such as Q8_0 or Q4_K, got {quant!r}; floats are --dtype")
    return [kind.name]


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
        with waiting(f"reading {model}"):
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


def _print(name, config, tokens, batch, asked, rows, stored, limit, fits) -> None:
    from gemma.fit import format_bytes as size
    from gemma.fit import loaded

    held = f"{tokens:,} tokens" + (f" x {batch} sequences" if batch > 1 else "")
    count, every = loaded(config).num_parameters, config.num_parameters
    left = f" of text (all: {every:,}; the vision tower is not loaded)" if count != every else ""
    _common.write(f"{name}: {count:,} parameters{left}, {held}\n\n")
    table = [("", "weights as", "weights", "cache", "activations", "total", "fits")]
    for kind, e in rows.items():
        parts = (size(getattr(e, part)) for part in _PARTS)
        table.append((">" if kind == asked else "", kind, *parts, "yes" if e.total <= limit.available else "no"))
    table += [("", kind, size(count), "-", "-", "-", "size only") for kind, count in stored.items()]
    _common.write(_common.columns(table, right=[2, 3, 4, 5], indent=""))
    _common.write(_caveat(config, asked))
    where = {"machine": "this machine", "control group": "this container"}.get(limit.limited_by, limit.limited_by)
    _common.write(f"\n{where}: {size(limit.available)} free of {size(limit.total)}\n")
    need = rows[asked].total
    if fits:
        _common.write(f"{asked} fits: {size(need)} of {size(limit.available)}.\n")
        return
    smaller = [kind for kind, e in rows.items() if e.total <= limit.available]
    advice = (
        f"{smaller[0]} would fit" if smaller else "none of these types fits: try a shorter context or a smaller model"
    )
    if need <= limit.total:
        advice = f"it would fit if other programs were closed; {advice}"
    _common.write(f"{asked} does not fit: {size(need)} needed, {size(need - limit.available)} too many; {advice}.\n")


def _caveat(config, asked: str) -> str:
    """What the table cannot say: that generate refuses this model, or this type for it."""
    from gemma.config import GemmaConfig

    if not isinstance(config, GemmaConfig) or config.use_bidirectional_attention:
        return "\nsizes only: generate and chat cannot run this kind of model\n"
    if asked == "F16" and config.use_qk_norm:
        return "\nsizes only: generate and chat cannot run Gemma 3 in float16; use bfloat16\n"
    return ""


def _print_json(name, config, tokens, batch, asked, rows, stored, limit, fits) -> None:
    from gemma.fit import loaded

    result = {
        "model": name,
        "context": tokens,
        "batch": batch,
        "asked": asked,
        "fits": fits,
        "memory": {"total": limit.total, "available": limit.available, "limited_by": limit.limited_by},
        "parameters": loaded(config).num_parameters,
        "types": {kind: {part: getattr(e, part) for part in _PARTS} for kind, e in rows.items()},
        "stored": stored,
    }
    _common.write(json.dumps(result) + "\n")
