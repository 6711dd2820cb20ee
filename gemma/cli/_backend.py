# SPDX-License-Identifier: Apache-2.0
"""The one place where the command line reaches a model: a checkpoint opened for generation, on a chosen backend.

A backend is a TextModel. The JAX one is the session of `gm/text`; `RunnerModel` makes one of any
`serving.runner.Runner`, through the engine. Frameworks are imported when a model is opened, not before; the native CPU
backend, which is used where nothing else was asked for, needs none (`_native.py`). Decoding is `_generation.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma.cli._common import note
from gemma.errors import CheckpointError, ConfigError, DependencyError, FormatError, TokenizerError, UnsupportedError

if TYPE_CHECKING:
    from gemma.adapters import AdapterFile
    from gemma.config import GemmaConfig
    from gemma.sampling import SamplingParams
    from gemma.serving.request import Request
    from gemma.serving.runner import Runner

_MAX_SETTINGS = 1 << 25  # bytes of a tokenizer_config.json; real ones are about 1 MB


class TextModel(Protocol):
    """Continues one sequence; what it has computed for earlier ids is kept and used again."""

    def begin(self, context: int) -> None:
        """Forgets everything and makes room for `context` tokens."""

    def tokens(self, ids: Sequence[int], params: SamplingParams, end_ids: Collection[int]) -> Iterator[int]:
        """Yields the tokens after `ids`, the whole sequence so far, until one of `end_ids` (yielded as well) or
        `params.max_new_tokens`. The caller may stop earlier. `params.seed` is set.
        """


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model ready to generate: its name as given, where it was found, and its parts."""

    name: str
    path: Path
    tokenizer: Any  # gemma.tokenizer.Tokenizer, or a double of it
    config: GemmaConfig
    model: TextModel


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a model. `threads` to `speculate` are for the native CPU backend; None and 0: as it likes.

    Attributes:
      backend: "auto" or one of BACKENDS.
      dtype: "float32", "bfloat16" or "float16": what JAX and PyTorch compute in.
      threads: of the CPU.
      cache_type: of keys and values: "f32", "bf16" or "int8".
      speculate: most tokens guessed ahead; 0: none.
      adapter: path of a LoRA adapter; run beside the weights on the native CPU backend, folded into them on the others.
    """

    backend: str = "auto"
    dtype: str = "float32"
    threads: int | None = None
    cache_type: str | None = None
    speculate: int = 0
    adapter: str | None = None


def open_model(name: str, **options: Any) -> Opened:
    """Finds, reads and prepares a model.

    Args:
      name: what `gemma.hub.resolve` takes.
      **options: the fields of `Options`.

    Raises:
      ConfigError: an unknown backend or dtype, or an option that the backend has not.
      HubError, CheckpointError, TokenizerError: the model cannot be used.
    """
    from gemma import fit, hub
    from gemma.cli._progress import waiting

    asked = Options(**options)
    if asked.backend not in ("auto", *BACKENDS):
        raise ConfigError(f"--backend: expected one of {', '.join(('auto', *BACKENDS))}, got {asked.backend!r}")
    if asked.dtype not in fit.DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(fit.DTYPES)}, got {asked.dtype!r}")
    if asked.backend in ("jax", "torch"):
        _only_native(asked, f"--backend {asked.backend} has no such setting")
    with waiting(f"loading {name}"):
        path = hub.resolve(name)
        if asked.backend == "auto":
            return _open_auto(name, path, asked)
        return BACKENDS[asked.backend](name, path, asked)


def _open_auto(name: str, path: Path, asked: Options) -> Opened:
    """The native kernels where they run this model on this machine, else JAX; a remark says why."""
    why = "it computes in float32" if asked.dtype != "float32" else _accelerator()
    if why is None:
        from gemma.checkpoint import open_checkpoint
        from gemma.cli._native import open_native, why_not

        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config()
            why = why_not(config)
            low = _adapter_of(asked, config) if why is None else None
            why = why_not(config, low)
            if why is None:
                return open_native(name, path, checkpoint, config, asked, low)
    _only_native(asked, f"JAX has no such setting, and the native CPU backend is not used: {why}")
    if why and asked.dtype == "float32":
        note(f"the native CPU backend is not used: {why}; this runs on JAX")
    return BACKENDS["jax"](name, path, asked)


def _adapter_of(asked: Options, config: Any) -> AdapterFile | None:
    """The adapter that was asked for, bound to a model."""
    from gemma import config as configs
    from gemma.adapters import open_adapter

    return None if asked.adapter is None else open_adapter(Path(asked.adapter).expanduser(), configs.text_only(config))


def _only_native(asked: Options, why: str) -> None:
    """Refuses settings of the native backend where another one runs."""
    for flag, value in (("threads", asked.threads), ("cache-type", asked.cache_type), ("speculate", asked.speculate)):
        if value:
            raise ConfigError(f"--{flag}: {why}")


def _accelerator() -> str | None:
    """The device on which JAX would run, if it is none of the CPU's; nothing is imported to find out."""
    plugins = {"jax_cuda12_plugin": "/dev/nvidiactl", "jax_cuda13_plugin": "/dev/nvidiactl", "libtpu": "/dev/accel0"}
    for plugin, device in plugins.items():
        if os.path.exists(device) and importlib.util.find_spec(plugin) is not None:
            return f"JAX has an accelerator here ({device})"
    return None


def is_tuned(path: Path) -> bool:
    """Whether a checkpoint was tuned to follow a chat template: it carries one, or is named so ("gemma-3-1b-it")."""
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(path) as opened:
        if "tokenizer.chat_template" in opened.metadata:
            return True
    return has_template(path) or re.search(r"(^|[-_.])it([-_.]|$)", path.name.lower()) is not None


def has_template(path: Path) -> bool:
    """Whether a folder holds a chat template, in a file of its own or in the tokenizer's settings."""
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = path / "tokenizer_config.json"
    if settings.is_file() and settings.stat().st_size < _MAX_SETTINGS:
        try:
            values = json.loads(settings.read_text())
        except (ValueError, RecursionError) as error:
            raise FormatError(settings, None, f"expected JSON ({error})") from error
        return isinstance(values, dict) and "chat_template" in values
    return False


class RunnerModel:
    """A TextModel over a runner, through the engine: one slot, of which each call reads only what is new.

    `blocked` ids are never picked. `runner` is the engine's from `begin` on; `request` is the newest Request, with its
    counts, None before the first.
    """

    def __init__(
        self, runner: Runner, blocked: Collection[int] = (), *, cache_type: str | None = None, speculate: int = 0
    ):
        self.runner, self._cache_type, self._speculate = runner, cache_type, speculate
        self._blocked = dict.fromkeys(blocked, -math.inf)
        self.request: Request | None = None

    def begin(self, context: int) -> None:
        from gemma.serving.engine import Engine

        flags = dict(cache_dtype=self._cache_type, speculate=self._speculate)
        self._engine = Engine(self.runner, slots=1, max_len=context, **flags)

    def tokens(self, ids: Sequence[int], params: SamplingParams, end_ids: Collection[int]) -> Iterator[int]:
        # Stop strings are the caller's: it sees the text.
        bias = {**params.logit_bias, **self._blocked}
        params = dataclasses.replace(params, stop=(), logit_bias=bias)
        self.request = self._engine.submit(ids, params, end_ids)
        for event in self._engine.stream(self.request):
            if event.token is not None:
                yield event.token
        if self.request.error is not None:
            raise self.request.error


def _open_jax(name: str, path: Path, asked: Options) -> Opened:
    from gemma.cli._seq2seq import is_seq2seq, load_writer
    from gemma.gm.text._generate import Session
    from gemma.gm.text._load import load_model

    if is_seq2seq(path):
        if asked.adapter is not None:
            raise UnsupportedError(f"{path}: holds a T5Gemma, which takes no adapter here; leave --adapter out")
        loaded, writer = load_writer(path, asked.dtype)
        if loaded.tokenizer is None:
            raise no_tokenizer(path)
        return Opened(name, path, loaded.tokenizer, loaded.config.decoder, writer)
    loaded = load_model(path, dtype=asked.dtype, adapter=asked.adapter)
    if loaded.tokenizer is None:
        raise no_tokenizer(path)
    return Opened(name, path, loaded.tokenizer, loaded.config, Session(loaded))


def _open_cpu(name: str, path: Path, asked: Options) -> Opened:
    from gemma.checkpoint import open_checkpoint
    from gemma.cli._native import open_native
    from gemma.kernels._model import unserved

    if asked.dtype != "float32":
        raise ConfigError(f"--dtype: --backend cpu computes in float32, got {asked.dtype!r}; see --cache-type")
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config()
        why = unserved(config)
        if why is not None:  # before its adapter is looked at
            raise UnsupportedError(f"{path}: not for the native CPU decoder: {why}; use JAX or PyTorch")
        return open_native(name, path, checkpoint, config, asked, _adapter_of(asked, config))


def _open_torch(name: str, path: Path, asked: Options) -> Opened:
    if importlib.util.find_spec("torch") is None:
        raise DependencyError("torch", "torch", "--backend torch")
    from gemma.checkpoint import open_checkpoint
    from gemma.serving._runner_torch import load_runner
    from gemma.tokenizer import Tokenizer

    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
    if tokenizer is None:
        raise no_tokenizer(path)
    runner = load_runner(path, dtype=asked.dtype, adapter=asked.adapter)
    config = runner.info.config
    check_vocabulary(path, tokenizer, config)
    nameless = range(tokenizer.vocab_size, config.vocab_size)  # rows of the table that stand for no token
    return Opened(name, path, tokenizer, config, RunnerModel(runner, (tokenizer.special.pad, *nameless)))


def check_vocabulary(path: Path, tokenizer: Any, config: GemmaConfig) -> None:
    """Every id of a tokenizer must have a row in the embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {config.vocab_size} rows; the two do "
            f"not belong together"
        )


def no_tokenizer(path: Path) -> TokenizerError:
    """What to say where weights came alone."""
    return TokenizerError(
        f"{path}: no tokenizer came with these weights; put the model's tokenizer.model or tokenizer.json beside them"
    )


BACKENDS: dict[str, Callable[[str, Path, Options], Opened]] = {
    "cpu": _open_cpu,
    "jax": _open_jax,
    "torch": _open_torch,
}
