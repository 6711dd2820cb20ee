# SPDX-License-Identifier: Apache-2.0
"""How long a GGUF takes to open and to dequantize whole, to load as JAX parameters, or to be refused; and peak memory.

    python benchmarks/bench_load.py [FILE] [--dtype float32|bfloat16|float16] [--runs 3]

Every figure comes from a process of its own, started in turn with the `gguf` package (if installed) so that both meet
the same machine; the best run counts. FILE defaults to the demo model. The hostile files are written for the occasion:
a vocabulary of 2^19 strings (the most that is read) whose last one is no UTF-8, and counts that promise more than the
file holds; the worst of the refusals counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time

BOUND = 1.1  # peak memory of a load over the size of what it leaves in memory
REFUSAL_SECONDS, REFUSAL_BYTES = 1.0, 64_000_000  # what refusing a hostile file may cost
LOAD_DTYPES = ("float32", "bfloat16")  # of the JAX parameters


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes of this process in memory so far. (`ru_maxrss` would count its parent before the exec.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024


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


def measure_params(path: str, dtype: str) -> dict:
    """`gm.ckpts.load_params`, after JAX is up."""
    import jax
    import jax.numpy as jnp

    from gemma import gm, weights

    for lazy in ("tensors", "bind", "extract"):
        getattr(weights, lazy)
    jnp.zeros(1).block_until_ready()
    before, start = resident(), time.perf_counter()
    params = jax.block_until_ready(gm.ckpts.load_params(path, dtype=dtype))
    whole = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"whole_s": whole, "final_bytes": size, "peak_bytes": peak() - before}


def measure_refusal(path: str, dtype: str) -> dict:
    """A file opened, configured and tokenized, as a program does, until it is refused."""
    from gemma.checkpoint import open_checkpoint
    from gemma.errors import GemmaError
    from gemma.tokenizer import Tokenizer

    before, start = resident(), time.perf_counter()
    try:
        with open_checkpoint(path) as checkpoint:
            Tokenizer.from_source(checkpoint.tokenizer_source())
    except GemmaError as error:
        return {"whole_s": time.perf_counter() - start, "peak_bytes": max(peak() - before, 0), "said": str(error)}
    raise SystemExit("the file was accepted")


def hostile_files(folder: str) -> dict[str, str]:
    """{fault: path} of GGUF files that must be refused."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def array(name: bytes, kind: int, count: int) -> bytes:
        return text(name) + struct.pack("<IIQ", 9, kind, count)

    def head(tensors: int, pairs: int) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)

    n = 1 << 19
    architecture = text(b"general.architecture") + struct.pack("<I", 8) + text(b"gemma3")
    model = text(b"tokenizer.ggml.model") + struct.pack("<I", 8) + text(b"llama")
    strings = b"".join(text(b"%06x" % i) for i in range(n - 1)) + text(b"\xff")
    rest = array(b"tokenizer.ggml.scores", 6, n) + bytes(4 * n)
    rest += array(b"tokenizer.ggml.token_type", 5, n) + struct.pack("<i", 1) * n
    table = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 1, n, 0, 0) + bytes(4 * n + 32)
    names = b"tokenizer.ggml.tokens"
    contents = {
        "vocabulary": head(1, 5) + architecture + model + array(names, 8, n) + strings + rest + table,
        "items": head(0, 3) + architecture + model + array(names, 8, 1 << 60) + strings,
        "strings": head(0, 3) + architecture + model + array(names, 8, n) + strings[:-9] + struct.pack("<Q", 1 << 40),
        "tensors": head(1 << 60, 2) + architecture + model + bytes(1 << 24),
        "pairs": head(0, 1 << 60) + architecture + model + bytes(1 << 24),
    }
    paths = {}
    for fault, data in contents.items():
        paths[fault] = os.path.join(folder, f"{fault}.gguf")
        with open(paths[fault], "wb") as file:
            file.write(data)
    return paths


def measure_refusals(runs: int) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        files = hostile_files(folder)
        return {
            fault: best([run("refusal", path, "float32", 60) for _ in range(runs)]) for fault, path in files.items()
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


def params_rows(loads: dict[str, dict]) -> bool:
    """Prints the rows of `load_params`; whether all kept the bound."""
    kept = True
    for dtype, result in loads.items():
        if "error" in result:
            print(f"load_params to {dtype}: {result['error']}")
            kept = False
            continue
        share = result["peak_bytes"] / result["final_bytes"]
        kept = kept and share <= BOUND
        print(row(f"load_params to {dtype} (s)", f"{result['whole_s']:.3f}", "-"))
        print(row(f"load_params to {dtype}: peak / final size", f"{share:.3f}", "-", f"<= {BOUND}"))
    return kept


def refusal_rows(refusals: dict[str, dict]) -> bool:
    """Prints the rows of the hostile files, the worst of each figure; whether all kept the bounds."""
    for fault, result in refusals.items():
        if "error" in result:
            print(f"hostile {fault}: {result['error']}")
            return False
    seconds, size = (max(result[key] for result in refusals.values()) for key in ("whole_s", "peak_bytes"))
    title = "refusal of a hostile file, worst case"
    print(row(f"{title} (s)", f"{seconds:.3f}", "-", f"<= {REFUSAL_SECONDS:g}"))
    print(row(f"{title} (MB)", f"{size / 1e6:.1f}", "-", f"<= {REFUSAL_BYTES / 1e6:.0f}"))
    return seconds <= REFUSAL_SECONDS and size <= REFUSAL_BYTES


def report(path: str, dtype: str, ours: dict, theirs: dict, loads: dict, refusals: dict, runs: int) -> int:
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
    kept = [params_rows(loads), refusal_rows(refusals)]
    for who, result in (("gemmakit", ours), ("gguf", theirs)):
        if "error" in result:
            print(f"\n{who}: {result['error']}")
    failed = "error" in ours or share[0] > BOUND or not all(kept)
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "load",
                "file": os.path.basename(path),
                "dtype": dtype,
                "ours": ours,
                "gguf": theirs,
                "load_params": loads,
                "refusals": refusals,
                "peak_over_final": share[0],
                "bound": BOUND,
                "refusal_bounds": {"seconds": REFUSAL_SECONDS, "bytes": REFUSAL_BYTES},
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


MEASURES = {"ours": measure_ours, "gguf": measure_gguf, "params": measure_params, "refusal": measure_refusal}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="demo")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-timeout", type=float, default=180.0, help="seconds for one run of the gguf package")
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.file, args.dtype)))
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
    loads = {to: best([run("params", path, to, 600) for _ in range(args.runs)]) for to in LOAD_DTYPES}
    refusals = measure_refusals(args.runs)
    return report(path, args.dtype, best(ours), best(theirs), loads, refusals, args.runs)


if __name__ == "__main__":
    sys.exit(main())
