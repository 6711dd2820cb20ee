# SPDX-License-Identifier: Apache-2.0
"""How fast a model is quantized and written as a GGUF, beside ggml's own quantizer; and the peak of memory.

    python benchmarks/bench_quantize.py [--preset gemma3_1b] [--layers N] [--quantize q4_k_m] [--runs 1] [--imatrix]

The weights are random bfloat16, made of one block of numbers that is repeated, so that making them costs little; that
time is measured and taken off. Ours is the whole of `gemma.saving.save`: types, quantization, error of each tensor,
metadata, synced file. The peer is ggml's `ggml_quantize_chunk` (out of the `xllamacpp` wheel) on the same matrices with
as many threads, without measuring errors and without writing a file. Both run in a process of their own; the best run
counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

POOL = 1 << 22  # random numbers that every matrix is made of


class Weights:
    """Random matrices of any shape, and the time that making them took."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self._pool = (rng.standard_normal(POOL, dtype=np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        self.seconds = 0.0

    def make(self, shape: tuple[int, ...]) -> np.ndarray:
        start = time.perf_counter()
        array = np.resize(self._pool, shape)
        self.seconds += time.perf_counter() - start
        return array


def model(arguments):
    from gemma import weights
    from gemma.config import PRESETS, text_only

    config = text_only(PRESETS[arguments.preset])
    if arguments.layers:
        config = dataclasses.replace(config, num_hidden_layers=arguments.layers)
    return config, weights.tensors(config)


def importance(tensors):
    rng = np.random.default_rng(1)
    return {t.name: np.exp(rng.normal(0, 1, t.shape[-1])).astype(np.float32) for t in tensors if len(t.shape) == 2}


def peak() -> int:
    """The most bytes of this process in memory so far (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024


def run_ours(arguments) -> dict:
    from gemma.saving import ArrayReader, save

    config, tensors = model(arguments)
    source = Weights()
    pairs = [(t, ArrayReader(lambda t=t: source.make(t.shape), ml_dtypes.bfloat16)) for t in tensors]
    imatrix = importance(tensors) if arguments.imatrix else None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        report = save(f"{folder}/x.gguf", pairs, config, format="gguf", quantize=arguments.quantize, imatrix=imatrix)
        seconds = time.perf_counter() - start
    worst = max(tensor.rmse or 0 for tensor in report.tensors)
    return dict(
        seconds=seconds - source.seconds, peak_bytes=peak(), bytes=report.bytes, types=report.types, worst_rmse=worst
    )


def run_ggml(arguments) -> dict:
    from gemma._quants_mixes import plan

    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        return {}
    library = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(found.origin), "xllamacpp*.so"))[0])
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    _, tensors = model(arguments)
    types = plan(tensors, arguments.quantize, importance=arguments.imatrix)
    imatrix, source, seconds, size = importance(tensors), Weights(), 0.0, 0
    threads = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for tensor in tensors:
            type = types[tensor.name]
            values = source.make(tensor.shape)
            start = time.perf_counter()
            if type.is_float:
                values.astype(np.float32)
            else:
                columns = values.shape[-1]
                step, width = max(1, (1 << 20) // columns), type.row_bytes(columns)
                out = np.empty((len(values), width), np.uint8)
                weights = imatrix[tensor.name].ctypes.data if arguments.imatrix else None

                def work(first, values=values, out=out, weights=weights, type=type, step=step, columns=columns):
                    part = np.ascontiguousarray(values[first : first + step], np.float32)
                    target = out[first:].ctypes.data
                    quantize(type.ggml_id, part.ctypes.data, target, 0, len(part), columns, weights)

                list(pool.map(work, range(0, len(values), step)))
                size += out.nbytes
            seconds += time.perf_counter() - start
    return dict(seconds=seconds, peak_bytes=peak(), bytes=size)


def in_child(who: str, arguments) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", who]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma3_1b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the preset's, for a quick look")
    parser.add_argument("--quantize", default="q4_k_m")
    parser.add_argument("--imatrix", action="store_true", help="with a random importance matrix")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", default=None, help="where the file is written; default: the temporary folder")
    parser.add_argument("--child", choices=["ours", "ggml"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps({"ours": run_ours, "ggml": run_ggml}[arguments.child](arguments)))
        return
    _, tensors = model(arguments)
    values = sum(tensor.size for tensor in tensors)
    largest = max(tensor.size for tensor in tensors) * 2
    best: dict[str, dict] = {}
    for _ in range(arguments.runs):
        for who in ("ours", "ggml"):
            found = in_child(who, arguments)
            if found and (who not in best or found["seconds"] < best[who]["seconds"]):
                best[who] = found
    with_matrix = ", with an importance matrix" if arguments.imatrix else ""
    print(f"{arguments.preset}: {values / 1e6:.0f} million weights as {arguments.quantize}{with_matrix}, "
          f"{len(os.sched_getaffinity(0))} threads; the source is {values * 2 / 1e6:.0f} MB of bfloat16, its largest "
          f"matrix {largest / 1e6:.0f} MB")  # fmt: skip
    print(f"{'':24}{'seconds':>10}{'million/s':>12}{'peak MB':>10}{'file MB':>10}")
    names = {"ours": "gemmakit, file written", "ggml": "ggml, in memory"}
    for who, found in best.items():
        rate = values / found["seconds"] / 1e6
        sizes = f"{found['peak_bytes'] / 1e6:10.0f}{found['bytes'] / 1e6:10.0f}"
        print(f"{names[who]:24}{found['seconds']:10.2f}{rate:12.1f}{sizes}")
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "xllamacpp") if name_installed(name)}
    machine = dict(machine=platform.machine(), cpus=os.cpu_count(), python=platform.python_version())
    print(
        json.dumps(
            dict(preset=arguments.preset, weights=values, quantize=arguments.quantize, **best) | machine | versions
        )
    )


def name_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
