# SPDX-License-Identifier: Apache-2.0
"""Mutation fuzzing of the file readers, in process: `python scripts/fuzz.py gguf --count 100000 --seed 7`.

Valid tiny files are mutated with knowledge of their structure (fields get boundary values; blocks are cut, doubled,
moved; JSON and protobuf are rebuilt with wrong parts) and used end to end. Anything but success or a GemmaError is a
defect: it is printed with its seed, and the input is kept with `--keep DIR`. `(target, seed)` always gives the same
bytes. A crash of the process itself is found by its seed: `--trace` prints each one before it runs.

The readers are in `gemma/checkpoint.py` and `gemma/tokenizer.py`, the named faults in `tests/hostile/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hostile"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import _fuzz_archives as archives
import guard
import hostile_files as h

from gemma.errors import GemmaError
from gemma.tokenizer import Tokenizer

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    33,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
]
NUMBERS += [2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 64, 2**64 - 32, 2**64 - 1, 2**59 + 2]
JSON_VALUES: list = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**31,
    2**63,
    2**64,
    "",
    "x",
    "F32",
    "../x",
    [],
    {},
    [0],
    [0, 0],
    {"a": 1},
]


@dataclasses.dataclass(frozen=True)
class Target:
    """`make(rng)` gives the bytes of one input, `use(path)` runs it, `name` is the file name it is given."""

    name: str
    make: Callable[[random.Random], bytes]
    use: Callable[[Path], None]


# --- mutations of plain bytes


def scramble(rng: random.Random, data: bytes, limit: int | None = None) -> bytes:
    """One to four byte-level mutations within the first `limit` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = min(len(out), limit or len(out))
        if end < 2:
            return bytes(out)
        at = rng.randrange(end)
        size = min(rng.choice([1, 2, 4, 8, 16, 100]), end - at)
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size), bytes(out[at : at + size])])
        elif kind == 4:
            width = rng.choice([1, 2, 4, 8])
            out[at : at + width] = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 5:
            source = rng.randrange(end)
            out[at : at + size] = out[source : source + size]
        else:
            del out[rng.randrange(len(out)) :]
    return bytes(out)


# --- one maker per target


def gguf(rng: random.Random) -> bytes:
    blob = rng.choice(_gguf_seeds())
    if rng.random() < 0.25:
        return scramble(rng, bytes(blob.data), blob.data_start)
    marks = [m for m in blob.marks if not m.endswith((".bytes", ".items"))]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mark = rng.choice(marks)
        at, width = blob.marks[mark]
        old = int.from_bytes(blob.data[at : at + width], "little")
        near = [old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * width), rng.getrandbits(8 * width)]
        blob = blob.patch(mark, rng.choice(NUMBERS + near * 4))
    data = bytes(blob.data)
    return scramble(rng, data, blob.data_start) if rng.random() < 0.15 else data


def safetensors(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return scramble(rng, _safetensors_seed(), rng.choice([None, 8, 200, 1000]))
    header_size = int.from_bytes(_safetensors_seed()[:8], "little")
    header, body = json.loads(_safetensors_seed()[8 : 8 + header_size]), _safetensors_seed()[8 + header_size :]
    for _ in range(rng.choice([1, 1, 2, 3])):
        _break_json(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = scramble(rng, text)
    return h.raw_safetensors(text, body[: rng.choice([len(body), len(body), len(body) - 1])])


def _break_json(rng: random.Random, node) -> None:
    """Replaces, removes or renames one thing somewhere below `node`."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        kind = rng.randrange(4)
        if kind == 0 and isinstance(node, dict):
            node[rng.choice(["", "x", "__metadata__", "dtype"])] = node.pop(key)
        elif kind == 1:
            del node[key]
        elif isinstance(node[key], int) and kind == 2:
            node[key] += rng.choice([-1, 1, 4, -4, 2**32, 2**62])
        else:
            node[key] = rng.choice(JSON_VALUES)
        return


def tokenizer(rng: random.Random) -> bytes:
    small = rng.random() < 0.85
    if rng.random() < 0.35:
        return scramble(rng, _model_seed(small))
    pieces, scores, types = (list(x) for x in _vocabulary(small))
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        kind = rng.randrange(6)
        if kind == 0:
            pieces[i] = rng.choice(
                ["", "\0", "▁", "<0x00>", "<0xG0>", "<0x100>", "x" * 5000, b"\xff", b"\xed\xa0\x80", " a"]
            )
        elif kind == 1:
            types[i] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63])
        elif kind == 2:
            scores[i] = rng.choice([0.0, -0.0, 1e38, -1e38, float("inf"), float("nan"), 1e-45])
        elif kind == 3:
            pieces[i] = pieces[j]
        elif kind == 4:
            for column in (pieces, scores, types):
                column[i], column[j] = column[j], column[i]
        else:
            for column in (pieces, scores, types):
                del column[i:]
            if not pieces:
                break
    data = h.sentencepiece_bytes(pieces, scores, types, model_type=rng.choice([2, 2, 2, 2, 1, 3, 4, 9]))
    return scramble(rng, data) if rng.random() < 0.15 else data


_CACHE: dict[str, object] = {}


def _once(key: str, make):
    if key not in _CACHE:
        _CACHE[key] = make()
    return _CACHE[key]


def _gguf_seeds() -> list[h.Blob]:
    return _once(
        "gguf", lambda: [h.small_gguf(), h.tiny_gguf(words=3), h.gguf_bytes(h.gguf_keys(), h.gguf_tensors(40))]
    )


def _safetensors_seed() -> bytes:
    return _once("safetensors", lambda: h.safetensors_bytes(h.hf_tensors(8), {"format": "pt"}))


def _vocabulary(small: bool):
    """With its 256 byte pieces and unused ones, or (faster to build and to read) without."""

    def make():
        rows = zip(*h.vocabulary(words=12))
        return list(zip(*(row for row in rows if not small or (row[2] != h.BYTE and "unused" not in row[0]))))

    return _once(f"vocabulary {small}", make)


def _model_seed(small: bool) -> bytes:
    return _once(f"model {small}", lambda: h.sentencepiece_bytes(*_vocabulary(small)))


# --- one user per target


def use_checkpoint(path: Path) -> None:
    guard.drive(path)


def use_safetensors(path: Path) -> None:
    with guard.open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def use_weights(path: Path) -> None:
    with guard.open_checkpoint(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            checkpoint.read(name, "float32" if info.dtype in ("INT8", "SFP8") else None)
            if info.shape and info.dtype in ("F32", "INT8", "SFP8"):
                checkpoint.read_rows(name, 0, min(1, info.shape[0]))
        with contextlib.suppress(GemmaError):
            checkpoint.config()


def use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_file(path)
    for text in ("the  world\n\n日é<table>", "<start_of_turn>x", " "):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)


TARGETS = {
    "gguf": Target("model.gguf", gguf, use_checkpoint),
    "safetensors": Target("model.safetensors", safetensors, use_safetensors),
    "tokenizer": Target("tokenizer.model", tokenizer, use_tokenizer),
    "sbs": Target("model.sbs", lambda rng: archives.make_sbs(rng, scramble), use_weights),
    "ckpt": Target("model.ckpt", lambda rng: archives.make_ckpt(rng, scramble), use_weights),
    "npz": Target("model.npz", lambda rng: archives.make_npz(rng, scramble), use_weights),
}


@dataclasses.dataclass
class Failure:
    seed: int
    error: BaseException

    def __str__(self) -> str:
        return f"seed {self.seed}: " + "".join(traceback.format_exception(self.error)).rstrip()


def run(
    target: str,
    count: int,
    seed: int = 0,
    *,
    keep: Path | None = None,
    trace: bool = False,
    deadline: float | None = None,
) -> tuple[list[Failure], Counter]:
    """Runs inputs seed, seed+1, ... Returns the failures and how often each outcome came ("accepted", error names)."""
    job, failures, outcomes = TARGETS[target], [], Counter()
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # rewriting a file on a disk costs more than the test
    with tempfile.TemporaryDirectory(prefix="gemma-fuzz-", dir=memory) as folder:
        path = Path(folder) / job.name
        for number in range(seed, seed + count):
            if deadline is not None and time.monotonic() > deadline:
                break
            if trace:
                print(f"{target} {number}", flush=True)
            data = job.make(random.Random(f"{target} {number}"))
            path.write_bytes(data)
            try:
                with guard.no_hang():
                    job.use(path)
                outcomes["accepted"] += 1
            except GemmaError as e:
                outcomes[type(e).__name__] += 1
            except Exception as e:  # the point of the exercise: whatever escapes is a finding
                failures.append(Failure(number, e))
                outcomes["FAILED"] += 1
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{target}-{number}{path.suffix}").write_bytes(data)
    return failures, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--count", type=int, default=10_000, help="inputs per target")
    parser.add_argument("--seed", type=int, default=0, help="the first input's seed")
    parser.add_argument("--keep", type=Path, help="folder for inputs that failed")
    parser.add_argument("--trace", action="store_true", help="print each seed before it runs")
    arguments = parser.parse_args()
    bad = 0
    for target in TARGETS if arguments.target == "all" else [arguments.target]:
        started = time.monotonic()
        failures, outcomes = run(target, arguments.count, arguments.seed, keep=arguments.keep, trace=arguments.trace)
        for failure in failures[:20]:
            print(f"{target} {failure}\n", file=sys.stderr)
        print(f"{target}: {dict(outcomes.most_common())} in {time.monotonic() - started:.0f} s", flush=True)
        bad += len(failures)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
