# SPDX-License-Identifier: Apache-2.0
"""One measurement after another on llama.cpp, in an environment of its own. `gemma bench` runs this file with the
Python of that environment, which has no gemmakit: standard library here, and the binding that is installed there.

Its arguments are FILE.gguf THREADS CONTEXT. Each line of standard input asks for something, each line of standard output
answers in JSON: first {"name", "version", "load_s"}, then a rate in tokens per second for "prefill N" and "decode DEPTH
STEPS", until the input ends.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time


class LlamaCppPython:
    """The package llama-cpp-python."""

    package, module = "llama-cpp-python", "llama_cpp"

    def __init__(self, path: str, threads: int, context: int):
        llama = importlib.import_module(self.module)
        flags = dict(n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
        self.model = llama.Llama(path, **flags)

    def prefill(self, count: int) -> float:
        self.model.reset()
        return self._rate(list(range(1000, 1000 + count)), 512)

    def decode(self, depth: int, steps: int) -> float:
        self.prefill(depth)
        return self._rate(list(range(100, 100 + steps)), 1)

    def _rate(self, ids: list, chunk: int) -> float:
        begin = time.perf_counter()
        for start in range(0, len(ids), chunk):
            self.model.eval(ids[start : start + chunk])
        return len(ids) / (time.perf_counter() - begin)


class Xllamacpp:
    """The package xllamacpp: llama.cpp's server inside the process; it reports its own times."""

    package, module = "xllamacpp", "xllamacpp"

    def __init__(self, path: str, threads: int, context: int):
        llama = importlib.import_module(self.module)
        params = llama.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.n_batch = path, context, 1, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = llama.Server(params)

    def prefill(self, count: int) -> float:
        return self._timings(count, 1)["prompt_per_second"]

    def decode(self, depth: int, steps: int) -> float:
        return self._timings(depth, steps + 1)["predicted_per_second"]

    def _timings(self, count: int, steps: int) -> dict:
        ids = list(range(1000, 1000 + count))
        asked = {"prompt": ids, "n_predict": steps, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        return (json.loads(answer) if isinstance(answer, (str, bytes)) else answer)["timings"]


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    kind = next((k for k in (LlamaCppPython, Xllamacpp) if importlib.util.find_spec(k.module)), None)
    if kind is None:
        print(json.dumps({"error": "neither llama-cpp-python nor xllamacpp is installed"}), flush=True)
        return
    begin = time.perf_counter()
    peer = kind(path, threads, context)
    version = importlib.metadata.version(kind.package)
    loaded = time.perf_counter() - begin
    print(json.dumps({"name": kind.package, "version": version, "load_s": loaded}), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(json.dumps(getattr(peer, what)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
