# SPDX-License-Identifier: Apache-2.0
"""How long a GGUF takes to open and to dequantize whole, and how much memory that needs at its peak.

    python benchmarks/bench_load.py [FILE] [--dtype float32|bfloat16|float16] [--runs 3]

Every figure comes from a process of its own, started in turn with the `gguf` package (if installed) so that both meet
the same machine; the best run counts. FILE defaults to the demo model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time

BOUND = 1.1  # peak memory of a load over the size of what it leaves in memory


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_ours(path: str, dtype: str) -> dict:
    import ml_dtypes
    import numpy as np

    from gemma import weights
    from gemma.checkpoint import load_tensors, open_checkpoint

    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for lazy in ("tensors", "bind", "extract"):
        getattr(weights, lazy)  # its import is not the loading
    before, start = resident(), time.perf_counter()
    checkpoint = open_checkpoint(path)
    opened = time.perf_counter()
    readers = load_tensors(checkpoint)
    bound = time.perf_counter()
    arrays = [next(readers)[1](target)]
    first = time.perf_counter()
    arrays += [read(target) for _, read in readers]
    whole = time.perf_counter()
    size, top, shape = sum(a.nbytes for a in arrays), peak(), list(arrays[0].shape)
    del arrays
    start_again = time.perf_counter()
    for name in checkpoint.tensors:
        checkpoint.read(name, target)
    again = time.perf_counter() - start_again
    start_vocabulary = time.perf_counter()
    checkpoint.tokenizer_source()
    vocabulary = time.perf_counter()
    return {
        "open_s": opened - start,
        "bind_s": bound - opened,
        "first_tensor_s": first - bound,
        "whole_s": whole - start,
        "warm_s": again,
        "vocabulary_s": vocabulary - start_vocabulary,
        "final_bytes": size,
        "peak_bytes": top - before,
        "first_shape": shape,
    }


def measure_gguf(path: str, dtype: str) -> dict:
    import gguf
    import ml_dtypes
    import numpy as np

    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    before, start = resident(), time.perf_counter()
    reader = gguf.GGUFReader(path)
    opened = time.perf_counter()
    order = sorted(reader.tensors, key=lambda t: t.name != "token_embd.weight")
    arrays, first = [], 0.0
    for tensor in order:
        arrays.append(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(target, copy=False))
        first = first or time.perf_counter()
    whole, size, top = time.perf_counter(), sum(a.nbytes for a in arrays), peak()
    del arrays
    start_again = time.perf_counter()
    for tensor in order:
        gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(target, copy=False)
    return {
        "open_s": opened - start,
        "first_tensor_s": first - opened,
        "whole_s": whole - start,
        "warm_s": time.perf_counter() - start_again,
        "final_bytes": size,
        "peak_bytes": top - before,
    }


def run(who: str, path: str, dtype: str, timeout: float) -> dict:
    command = [sys.executable, __file__, path, "--dtype", dtype, "--measure", who]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout:g} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout)


def best(results: list[dict]) -> dict:
    """The smallest of every time; memory does not vary."""
    good = [r for r in results if "error" not in r]
    if not good:
        return results[0]
    return good[0] | {key: min(r[key] for r in good) for key in good[0] if key.endswith(("_s", "peak_bytes"))}


def row(title: str, ours, theirs, ratio: str = "") -> str:
    return f"| {title:<44} | {ours:>12} | {theirs:>12} | {ratio:>7} |"


def report(path: str, dtype: str, ours: dict, theirs: dict, runs: int) -> int:
    print(__doc__.split("\n\n")[0])
    print(f"\n{path}: {os.path.getsize(path) / 1e6:.0f} MB, to {dtype}; best of {runs} runs.")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {version('numpy')}\n"
    )
    print(row("", "gemmakit", "gguf", "ratio"))
    print(f"|{'-' * 46}|{'-' * 13}:|{'-' * 13}:|{'-' * 8}:|")
    titles = {
        "open_s": "open: header, metadata, tensor table (s)",
        "vocabulary_s": "pieces, scores and types, checked (s)",
        "bind_s": "configuration and strict binding (s)",
        "first_tensor_s": f"first tensor {ours.get('first_shape', '')} (s)",
        "whole_s": "all of it, open to last tensor (s)",
        "warm_s": "every tensor a second time, one by one (s)",
    }
    for key, title in titles.items():
        a, b = ours.get(key), theirs.get(key)
        ratio = f"{b / a:.1f} x" if a and b else ""
        print(row(title, f"{a:.3f}" if a is not None else "-", f"{b:.3f}" if b is not None else "-", ratio))
    share = [r["peak_bytes"] / r["final_bytes"] if "error" not in r else None for r in (ours, theirs)]
    print(row("peak memory / final size", *(f"{s:.3f}" if s else "-" for s in share), f"<= {BOUND}"))
    for who, result in (("gemmakit", ours), ("gguf", theirs)):
        if "error" in result:
            print(f"\n{who}: {result['error']}")
    failed = "error" in ours or share[0] > BOUND
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "load",
                "file": os.path.basename(path),
                "dtype": dtype,
                "ours": ours,
                "gguf": theirs,
                "peak_over_final": share[0],
                "bound": BOUND,
                "within_bound": not failed,
                "gguf_version": version("gguf"),
                "cores": os.cpu_count(),
            }
        )
    )
    return int(failed)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="demo")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-timeout", type=float, default=180.0, help="seconds for one run of the gguf package")
    parser.add_argument("--measure", choices=["ours", "gguf"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure = {"ours": measure_ours, "gguf": measure_gguf}[args.measure]
        print(json.dumps(measure(args.file, args.dtype)))
        return 0
    path = args.file
    if path == "demo":
        from gemma.hub import demo_path

        path = str(demo_path())
    ours, theirs = [], []
    for _ in range(args.runs):
        ours.append(run("ours", path, args.dtype, 600))
        installed = version("gguf") is not None
        theirs.append(
            run("gguf", path, args.dtype, args.peer_timeout)
            if installed
            else {"error": "not installed: pip install gguf"}
        )
    return report(path, args.dtype, best(ours), best(theirs), args.runs)


if __name__ == "__main__":
    sys.exit(main())
