# SPDX-License-Identifier: Apache-2.0
"""The one place where the command line reaches a model: a checkpoint opened for generation, on a chosen backend.

A backend is a TextModel. The JAX one is the session of `gm/text`; `RunnerModel` makes one of any
`serving.runner.Runner`. Frameworks are imported when a model is opened, not before. Decoding is `_generation.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma.errors import CheckpointError, ConfigError, DependencyError, FormatError, TokenizerError

if TYPE_CHECKING:
    from gemma.config import GemmaConfig
    from gemma.sampling import SamplingParams
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


def open_model(name: str, *, backend: str = "jax", dtype: str = "float32") -> Opened:
    """Finds, reads and prepares a model.

    Raises:
      ConfigError: an unknown backend or dtype. HubError, CheckpointError, TokenizerError: the model cannot be used.
    """
    from gemma import fit, hub
    from gemma.cli._progress import waiting

    if backend not in BACKENDS:
        raise ConfigError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if dtype not in fit.DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(fit.DTYPES)}, got {dtype!r}")
    with waiting(f"loading {name}"):
        path = hub.resolve(name)
        return BACKENDS[backend](name, path, dtype)


def is_tuned(path: Path) -> bool:
    """Whether a checkpoint was tuned to follow a chat template: it carries one, or is named so ("gemma-3-1b-it")."""
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(path) as opened:
        if "tokenizer.chat_template" in opened.metadata:
            return True
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = path / "tokenizer_config.json"
    if settings.is_file() and settings.stat().st_size < _MAX_SETTINGS:
        try:
            values = json.loads(settings.read_text())
        except (ValueError, RecursionError) as error:
            raise FormatError(settings, None, f"expected JSON ({error})") from error
        if isinstance(values, dict) and "chat_template" in values:
            return True
    return re.search(r"(^|[-_.])it([-_.]|$)", path.name.lower()) is not None


class RunnerModel:
    """A TextModel over a runner: one slot, filled with what is new in each call. `blocked` ids are never picked."""

    def __init__(self, runner: Runner, blocked: Collection[int] = ()):
        self._runner = runner
        self._blocked = dict.fromkeys(blocked, -math.inf)
        self._held: list[int] = []

    def begin(self, context: int) -> None:
        self._runner.open(1, context, self._runner.info.dtype)
        self._held = []

    def tokens(self, ids: Sequence[int], params: SamplingParams, end_ids: Collection[int]) -> Iterator[int]:
        from gemma.sampling import sample, step_seed
        from gemma.serving.runner import StepIn

        if self._blocked:
            params = dataclasses.replace(params, logit_bias={**params.logit_bias, **self._blocked})
        ids, held = list(ids), self._held
        if ids[: len(held)] != held or len(held) == len(ids):  # not a continuation, or nothing new to compute
            self._runner.free(0)
            held.clear()
        self._runner.prefill(0, ids[len(held) :], len(held))
        held[:] = ids
        token = sample(self._runner.logits(0), params, ids, step_seed(params.seed or 0, 0))
        for index in range(1, params.max_new_tokens):
            yield token
            if token in end_ids:
                return
            ids.append(token)
            step = StepIn(0, token, params, step_seed(params.seed or 0, index), tuple(ids))
            held.append(token)
            token = self._runner.step([step])[0].token
        yield token


def _open_jax(name: str, path: Path, dtype: str) -> Opened:
    from gemma.gm.text._generate import Session
    from gemma.gm.text._load import load_model

    loaded = load_model(path, dtype=dtype)
    if loaded.tokenizer is None:
        raise _no_tokenizer(path)
    return Opened(name, path, loaded.tokenizer, loaded.config, Session(loaded))


def _open_torch(name: str, path: Path, dtype: str) -> Opened:
    if importlib.util.find_spec("torch") is None:
        raise DependencyError("torch", "torch", "--backend torch")
    from gemma.serving._runner_torch import load_runner
    from gemma.tokenizer import Tokenizer

    source = _tokenizer_source(path)
    if source is None:
        raise _no_tokenizer(path)
    tokenizer = Tokenizer.from_source(source)
    runner = load_runner(path, dtype=dtype)
    config = runner.info.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {config.vocab_size} rows; the two do "
            f"not belong together"
        )
    nameless = range(tokenizer.vocab_size, config.vocab_size)  # rows of the table that stand for no token
    return Opened(name, path, tokenizer, config, RunnerModel(runner, (tokenizer.special.pad, *nameless)))


def _tokenizer_source(path: Path):
    from gemma.checkpoint import open_checkpoint

    with open_checkpoint(path) as opened:
        return opened.tokenizer_source()


def _no_tokenizer(path: Path) -> TokenizerError:
    return TokenizerError(
        f"{path}: no tokenizer came with these weights; put the model's tokenizer.model or tokenizer.json beside them"
    )


BACKENDS: dict[str, Callable[[str, Path, str], Opened]] = {"jax": _open_jax, "torch": _open_torch}
