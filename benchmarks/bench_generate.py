# SPDX-License-Identifier: Apache-2.0
"""How fast the JAX path generates: cold start, compile times without and with the persistent cache, prefill, decode,
a batch of eight, and what streaming costs.

    python benchmarks/bench_generate.py [--model demo] [--dtype float32|bfloat16] [--runs 3] [--peers DIR]

Two fresh processes share an empty compile cache: the first compiles everything ("cold"), the second finds it compiled
("warm"). Decoding one sequence reads every weight once per token, so its physical limit is the memory's read bandwidth,
measured in the same process as the sum over all weights; "of the limit" is how close decoding comes to it. `--peers`
names a folder with a virtual environment `llama_cpp` (benchmarks/peers/README.md): its figures are printed beside ours.
The last line is one JSON object. Close other programs: the figures are those of a quiet machine or they are nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The history of computing began"
PREFILL = (64, 256, 512)
DECODE = 64
DEPTHS = (16, 512)
BATCH = 8


def measure(model: str, dtype: str) -> dict:
    """All figures of one process, started with the clock of its parent in GEMMA_BENCH_START."""
    started = float(os.environ["GEMMA_BENCH_START"])
    import jax
    import numpy as np

    from gemma.gm import text
    from gemma.sampling import SamplingParams

    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    out: dict = {"import_s": time.time() - started}
    begin = time.perf_counter()
    loaded = text.load_model(model, dtype=dtype)
    out["load_s"] = time.perf_counter() - begin
    ids = loaded.tokenizer.encode(PROMPT, add_bos=True)
    greedy = SamplingParams(temperature=0, max_new_tokens=DECODE + 1)

    def first_token(prompt: list[int]) -> float:
        start = time.perf_counter()
        next(text.generate_ids(loaded, prompt, greedy))
        return time.perf_counter() - start

    out["first_token_call_s"] = first_token(ids)
    out["start_to_first_token_s"] = time.time() - started
    filler = [2, *(1000 + i for i in range(max(PREFILL)))]
    for length in PREFILL:
        compiled.clear()
        cold = first_token(filler[:length])
        again = min(first_token(filler[:length]) for _ in range(3))
        out[f"prefill_{length}"] = {"ready_s": cold - again, "xla_s": sum(compiled), "tokens_per_s": length / again}
    for depth in DEPTHS:
        compiled.clear()
        gaps = []  # seconds between tokens, of two runs; the first gap of the first run holds the compiling
        for _ in range(2):
            times = [time.perf_counter() for _ in text.generate_ids(loaded, filler[:depth], greedy)]
            gaps.append(np.diff(times))
        step = min(float(gap[1:].mean()) for gap in gaps)
        out[f"decode_{depth}"] = {
            "ready_s": float(gaps[0][0]) - step,
            "xla_s": sum(compiled),
            "tokens_per_s": 1 / step,
        }
    out.update(measure_sampler(text, loaded, compiled, filler))
    leaves = jax.tree.leaves(loaded.params)
    read = jax.jit(lambda leaves: sum(leaf.sum(dtype="float32") for leaf in leaves))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        read(leaves).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    out["weights_bytes"] = sum(leaf.nbytes for leaf in leaves)
    out["bandwidth_limit_tokens_per_s"] = 1 / min(seconds)
    return out


def measure_sampler(text, loaded, compiled: list[float], filler: list[int]) -> dict:
    """Decoding in a batch, with the loop on the device, and one sequence streamed and not."""
    sampler = text.Sampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        cache_length=512,
        max_out_length=DECODE + 1,
    )
    depth, out = DEPTHS[0], {}
    prompts = [filler[b : b + depth] for b in range(BATCH)]  # differ, so that none ends when another does
    # A prompt of tokens that no text holds may end early: end tokens are forbidden, so that every row decodes DECODE.
    special = loaded.tokenizer.special
    sampler = dataclasses.replace(sampler, forbidden_tokens=[i for i in (special.eos, special.end_of_turn) if i])

    def seconds(prompt, count: int, stream: bool) -> float:
        begin = time.perf_counter()
        made = sampler.sample(prompt, max_new_tokens=count, stream=stream)
        if stream:
            for _ in made:
                pass
        return time.perf_counter() - begin

    for name, prompt, rows, stream in (
        (f"decode_batch_{BATCH}", prompts, BATCH, False),
        ("decode_batch_1", prompts[0], 1, False),
        ("decode_streamed", prompts[0], 1, True),
    ):
        compiled.clear()
        cold = seconds(prompt, DECODE + 1, stream)
        first = min(seconds(prompt, 1, stream) for _ in range(3))  # the prompt and one token
        whole = min(seconds(prompt, DECODE + 1, stream) for _ in range(2))
        out[name] = {
            "ready_s": cold - whole,
            "xla_s": sum(compiled),
            "tokens_per_s": rows * DECODE / (whole - first),
        }
    return out


def run(model: str, dtype: str, cache: str) -> dict:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "GEMMA_BENCH_START": repr(time.time()),
    }
    command = [sys.executable, __file__, "--measure", "--model", model, "--dtype", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peer(folder: str, model: str) -> dict | None:
    from gemma import hub

    python = Path(folder) / "llama_cpp" / "bin" / "python"
    if not python.is_file():
        return None
    script = Path(__file__).parent / "peers" / "llama_cpp_bench.py"
    done = subprocess.run([python, script, hub.resolve(model)], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def show(rows: list[tuple[str, str, str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=3, help="warm processes; the best figure of each kind counts")
    parser.add_argument("--peers", metavar="DIR")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.model, arguments.dtype)))
        return
    import jax

    with tempfile.TemporaryDirectory() as cache:
        cold = run(arguments.model, arguments.dtype, cache)
        warm = [run(arguments.model, arguments.dtype, cache) for _ in range(arguments.runs)]
    best = {"start_s": min(w["start_to_first_token_s"] for w in warm), "load_s": min(w["load_s"] for w in warm)}
    limit = max(w["bandwidth_limit_tokens_per_s"] for w in [cold, *warm])
    rows = [("", "compile cache empty", "compile cache filled")]
    rows += [("start to first token, s", f"{cold['start_to_first_token_s']:.2f}", f"{best['start_s']:.2f}")]
    rows += [("of which loading, s", f"{cold['load_s']:.2f}", f"{best['load_s']:.2f}")]
    names = [*(f"prefill_{n}" for n in PREFILL), *(f"decode_{n}" for n in DEPTHS)]
    names += [f"decode_batch_{BATCH}", "decode_batch_1", "decode_streamed"]
    for name in names:
        ready = min(w[name]["ready_s"] for w in warm)
        rows.append((f"{name}: until compiled, s", f"{cold[name]['ready_s']:.2f}", f"{ready:.2f}"))
    other = peer(arguments.peers, arguments.model) if arguments.peers else None
    show(rows)
    print()
    rows = [("tokens per second", "gemmakit, JAX", "llama.cpp")]
    for name in names:
        best[name] = max(w[name]["tokens_per_s"] for w in [cold, *warm])
        rows.append((name, f"{best[name]:.1f}", f"{other[name]:.1f}" if other and name in other else "-"))
    best["of_the_limit"] = best[f"decode_{DEPTHS[0]}"] / limit
    best["batch_over_one"] = best[f"decode_batch_{BATCH}"] / best["decode_batch_1"]
    best["streaming_keeps"] = best["decode_streamed"] / best["decode_batch_1"]
    rows.append((f"batch of {BATCH} over one", f"{best['batch_over_one']:.2f} x", ""))
    rows.append(("streaming, of the loop on the device", f"{best['streaming_keeps']:.0%}", ""))
    rows.append((f"limit of the memory, {arguments.dtype}", f"{limit:.1f}", ""))
    rows.append(("decoding, of the limit", f"{best['of_the_limit']:.0%}", ""))
    show(rows)
    about = {"model": arguments.model, "dtype": arguments.dtype, "cores": os.cpu_count(), "jax": jax.__version__}
    about |= {"machine": platform.machine(), "limit_tokens_per_s": limit}
    print(json.dumps(about | {"best": best, "cold": cold, "peer": other}))


if __name__ == "__main__":
    main()
