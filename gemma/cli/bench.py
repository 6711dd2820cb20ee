# SPDX-License-Identifier: Apache-2.0
"""`gemma bench`: how fast the native CPU backend is here, beside the memory's bandwidth and beside llama.cpp.

How things are measured is `_bench_measure.py`; the other side's process is `_bench_peer.py`. Here: the flags, what is
measured in which order, the table and the JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from gemma.cli import _backend, _common
from gemma.cli._progress import waiting
from gemma.errors import ConfigError

HELP = """\
Measure the native CPU backend on this machine.

Reading a prompt, decoding at several depths and in batches, guessing ahead, cold starts; each beside the rate at which
the memory could deliver the weights. With --peers also beside llama.cpp: DIR is a Python environment that holds
llama-cpp-python or xllamacpp, or a folder of such environments. The sides are measured in turns, with the same threads
on the same file, and medians are compared. Measure on an idle machine. The last line is JSON.

\b
Examples:
  gemma bench --quick
  gemma bench --model model.gguf --threads 4 --peers ~/peers
  gemma bench --json | tail -1 > result.json
"""
_LLAMA = "llama.cpp"


def command(
    model: _common.Model = "demo",
    threads: _common.Threads = None,
    cache_type: _common.CacheType = None,
    adapter: _common.Adapter = None,
    peers: Annotated[
        str | None, typer.Option("--peers", metavar="DIR", help="Environments with llama.cpp bindings to compare with.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds: a minute or two.")] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="Measurements of each figure.  [default: 5; quick: 3]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line only.")] = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    if rounds is not None and not 1 <= rounds <= 1000:
        raise ConfigError(f"--rounds: expected 1 to 1000, got {rounds}")
    folder = None if peers is None else Path(peers).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--peers: expected a folder of Python environments, got {peers}")
    result = _measured(model, threads, cache_type or "f32", adapter, folder, quick, rounds or (3 if quick else 5))
    if not as_json:
        _common.write(_explained(result) + _common.columns(_table(result), right=(1, 2, 3, 4)) + "\n")
    _common.write(json.dumps(result) + "\n")


def _measured(
    name: str, threads: int | None, cache_type: str, adapter: str | None, folder: Path | None, quick: bool, rounds: int
) -> dict:
    """Every figure; rates are tokens per second."""
    from gemma.cli import _bench_measure as measure

    begin = time.perf_counter()
    opened = _backend.open_model(name, **_common.backend_options("cpu", "float32", threads, cache_type, 0, adapter))
    ours = measure.Ours(opened.model.runner, opened.tokenizer)
    load_seconds = time.perf_counter() - begin
    used, sizes = ours.model.context, _sizes(opened.config.max_position_embeddings, quick)
    result: dict[str, Any] = {
        "model": name,
        "threads": used.threads,
        "instruction_set": used.isa,
        "cache_type": cache_type,
        "adapter": adapter,
        "adapter_bytes": ours.model.adapter_bytes,
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 2),
        "load_s": round(load_seconds, 3),
        "weight_bytes": ours.model.weight_bytes,
        "peers": [],
    }
    with contextlib.ExitStack() as stack, waiting("measuring"):
        result["bandwidth_GBps"] = round(measure.read_bandwidth(used.threads) / 1e9, 2)
        sides: list[Any] = [ours]
        for python in measure.find_peers(folder) if folder else ():
            peer = measure.Peer(python, _gguf(opened.path), used.threads, sizes.context)
            sides.append(stack.enter_context(peer))
            told = dict(name=peer.name, version=peer.version, folder=peer.folder, load_s=round(peer.load_seconds, 3))
            result["peers"].append(told)
        result["rows"] = _rates(sides, sizes, rounds, cache_type, result["bandwidth_GBps"] * 1e9)
        result["guessing"] = _guesses(ours, sizes, rounds, cache_type)
        starts = [measure.cold_start(name, used.threads, adapter) for _ in range(rounds)]
    result["cold_start_s"] = round(statistics.median(start.seconds for start in starts), 3)
    result["resident_bytes"] = max(start.memory for start in starts)
    result["ratios"] = _ratios(result["rows"])
    return result


class _Sizes(NamedTuple):
    """What is measured: lengths of prompts, depths and batches of decoding, steps of each, tokens of a slot."""

    prefill: list[int]
    depths: list[int]
    batches: list[int]
    steps: int
    context: int


def _sizes(most: int, quick: bool) -> _Sizes:
    """The sizes that fit a model's context."""
    steps = min(32 if quick else 64, most // 2)
    prefill = [n for n in ([512] if quick else [128, 512, 2048]) if n < most]
    depths = [n for n in ([16, 512] if quick else [16, 512, 4096]) if n + steps < most]
    context = min(most, max([128, *prefill, *(n + steps for n in depths)]) + 2)
    return _Sizes(prefill, depths, [8] if quick else [4, 8], steps, context)


def _rates(sides: list[Any], sizes: _Sizes, rounds: int, cache_type: str, bandwidth: float) -> list[dict]:
    """Prompts and decoding, in turns; batches on our side alone."""
    from gemma.cli._bench_measure import in_turns
    from gemma.kernels._model import CACHE_SHORT

    ours, rows, steps = sides[0], [], sizes.steps
    ours.open(1, sizes.context, CACHE_SHORT[cache_type])
    for count in sizes.prefill:
        rows.append(_row(f"prefill_{count}", in_turns(sides, rounds, lambda side, n=count: side.prefill(n))))
    for depth in sizes.depths:
        rates = in_turns(sides, rounds, lambda side, n=depth: side.decode(n, steps))
        rows.append(_row(f"decode_{depth}", rates, bandwidth / ours.bytes_per_token(depth)))
    depth = min(sizes.depths, default=8)
    for batch in sizes.batches:
        ours.open(batch, min(sizes.context, depth + steps + 2), CACHE_SHORT[cache_type])
        rows.append(_row(f"decode_batch_{batch}", [[ours.decode(depth, steps, batch) for _ in range(rounds)]]))
    return rows


def _guesses(ours: Any, sizes: _Sizes, rounds: int, cache_type: str) -> dict:
    """Speed-up and share of right guesses, on a text that repeats itself and on another."""
    from gemma.kernels._model import CACHE_SHORT

    ours.open(1, sizes.context, CACHE_SHORT[cache_type])
    found = {}
    for kind in ("repeating", "other"):
        pairs = [ours.guessing(kind == "repeating", 2 * sizes.steps) for _ in range(rounds)]
        found[kind] = dict(zip(("speedup", "right"), (round(statistics.median(column), 3) for column in zip(*pairs))))
    return found


def _gguf(path: Path) -> Path:
    """The file that llama.cpp reads."""
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(f"--peers: llama.cpp reads one .gguf file, and {path} is none: give its path as --model")
    return found[0]


def _row(name: str, rates: list[list[float]], floor: float | None = None) -> dict:
    """One figure of each side: ours, the peers', and what the memory would allow."""
    ours, *others = (statistics.median(values) for values in rates)
    best = max(others, default=None)
    return {
        "name": name,
        "rate": round(ours, 2),
        "spread": round((max(rates[0]) - min(rates[0])) / ours, 3),
        "peers": [round(rate, 2) for rate in others],
        "ratio": None if best is None else round(ours / best, 3),
        "of_bandwidth": None if floor is None else round(ours / floor, 3),
    }


def _ratios(rows: list[dict]) -> dict:
    """The figures by which versions are compared; None where there was nothing to compare with."""
    named = {row["name"]: row for row in rows}

    def of(name: str, key: str) -> float | None:
        return named[name][key] if name in named else None

    alone, many = of("decode_16", "rate"), of("decode_batch_8", "rate")
    return {
        "decode_vs_llama_cpp": of("decode_16", "ratio"),
        "decode_512_vs_llama_cpp": of("decode_512", "ratio"),
        "prefill_vs_best_peer": of("prefill_512", "ratio"),
        "decode_of_bandwidth": of("decode_16", "of_bandwidth"),
        "batch_8_vs_1": round(many / alone, 3) if alone and many else None,
    }


def _explained(result: dict) -> str:
    peers = ", ".join(f"{peer['name']} {peer['version']} ({peer['folder']})" for peer in result["peers"])
    lines = (
        f"{result['model']} on {result['threads']} threads, {result['instruction_set']}, cache {result['cache_type']}; "
        f"medians of {result['rounds']} rounds, tokens per second, sampling included",
        f"memory: {result['bandwidth_GBps']} GB/s read by the same threads; a token reads "
        f"{result['weight_bytes'] / 1e6:.0f} MB of weights",
        f"beside us, in turns: {peers or 'nobody (--peers DIR)'}",
    )
    busy = result["load_average"] > 0.5
    note = f"the machine was busy before (load {result['load_average']}): trust no figure\n" if busy else ""
    return "\n".join(lines) + "\n" + note + "\n"


def _table(result: dict) -> list[tuple]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows: list[tuple] = [("what", "tokens/s", _LLAMA if result["peers"] else "peer", "ratio", "of bandwidth")]
    for row in result["rows"]:
        peer = max(row["peers"], default=None)
        name = row["name"].replace("_", " ")
        figures = shown(row["rate"], ".1f"), shown(peer, ".1f"), shown(row["ratio"], ".2f")
        rows.append((name, *figures, shown(row["of_bandwidth"], ".0%")))
    for key, value in result["guessing"].items():
        rows.append((f"guessing, {key} text", f"{value['speedup']:.2f} x", "", "", f"{value['right']:.0%} right"))
    load = max((peer["load_s"] for peer in result["peers"]), default=None)
    rows.append(("loading, seconds", f"{result['load_s']:.2f}", shown(load, ".2f"), "", ""))
    rows.append(("cold start to first text, seconds", f"{result['cold_start_s']:.2f}", "", "", ""))
    rows.append(("most memory of that process, MB", f"{result['resident_bytes'] / 1e6:.0f}", "", "", ""))
    return rows
