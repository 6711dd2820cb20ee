# SPDX-License-Identifier: Apache-2.0
"""The native CPU backend of the command line: a checkpoint, opened once, becomes tokenizer and runner.

Nothing here imports a framework: the program begins to write before one would be loaded. Which backend is used is
decided in `_backend.py`; the decoder is `kernels/_model.py`, its runner `serving/_runner_cpu.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma.cli import _backend
from gemma.errors import ConfigError

if TYPE_CHECKING:
    from gemma.adapters import AdapterFile
    from gemma.checkpoint import Checkpoint
    from gemma.cli._backend import Opened, Options


def why_not(config: Any, adapter: AdapterFile | None = None) -> str | None:
    """Why the native backend cannot run a model here, or the adapter on it, as half a sentence; None where it can."""
    from gemma.kernels import _adapter, _native
    from gemma.kernels._model import unserved

    why = unserved(config)
    if why is None and _native.library() is None:
        why = f"its library is {_native.why_missing()}"
    return _adapter.unserved(adapter) if why is None and adapter is not None else why


def open_native(
    name: str, path: Path, checkpoint: Checkpoint, config: Any, asked: Options, adapter: AdapterFile | None = None
) -> Opened:
    """A checkpoint on native kernels, with an adapter beside its weights.

    Raises:
      UnsupportedError, KernelError: it cannot run there. TokenizerError: it came without a tokenizer.
      CheckpointError: the adapter was trained on another base.
    """
    from gemma.kernels._model import CACHE_SHORT, NativeModel
    from gemma.serving._runner_cpu import CpuRunner
    from gemma.tokenizer import Tokenizer

    cache_type = asked.cache_type or "f32"
    if cache_type not in CACHE_SHORT:
        raise ConfigError(f"--cache-type: expected one of {', '.join(CACHE_SHORT)}, got {cache_type!r}")
    model = NativeModel(checkpoint, config=config, threads=asked.threads)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    if tokenizer is None:
        raise _backend.no_tokenizer(path)
    _backend.check_vocabulary(path, tokenizer, model.config)
    nameless = range(tokenizer.vocab_size, model.config.vocab_size)  # rows of the table that stand for no token
    runner = CpuRunner(model, slots=0, top=0, blocked=nameless, adapter=adapter)
    flags = dict(cache_type=CACHE_SHORT[cache_type], speculate=asked.speculate)
    return _backend.Opened(name, path, tokenizer, model.config, _backend.RunnerModel(runner, **flags))
