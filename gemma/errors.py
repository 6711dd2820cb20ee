# SPDX-License-Identifier: Apache-2.0
"""Every error that gemmakit raises on purpose, in one tree.

Each message says what was expected, what came, and what to do, and names the file, tensor or field. Each class also
inherits the builtin that callers of similar software already catch. Errors of other libraries are not defined here,
and nothing in this module is raised for a defect of gemmakit itself (those stay ordinary assertions).

    GemmaError
    ├── ConfigError            (ValueError)         a configuration field or preset name is wrong
    ├── CheckpointError        (ValueError)         a checkpoint cannot be used
    │   ├── FormatError                             the bytes of a file break its format
    │   ├── UnsupportedError   (NotImplementedError) the file is valid, but uses something we do not read
    │   ├── WeightsMismatch                         missing, unexpected or mis-shaped tensors, all listed
    │   ├── SaveError          (OSError)            a file or folder could not be written
    │   └── CheckpointNotFound (FileNotFoundError)  nothing to read at that path
    ├── TokenizerError         (ValueError)         a vocabulary or an id is wrong
    ├── PromptError            (ValueError)         a prompt, a turn or an image cannot be used
    ├── ContextFull            (ValueError)         more tokens than the context holds
    ├── QueueFull              (RuntimeError)       an engine has no room for another request
    ├── SamplingError          (ValueError)         a sampling parameter is out of range
    ├── ShapeError             (ValueError)         an array has the wrong shape or dtype
    ├── DataError              (ValueError)         a row of training data, or a file of rows, cannot be used
    ├── TrainingError          (RuntimeError)       a training run cannot start or go on
    ├── ToolError              (ValueError)         a tool was called wrongly, or could not do what it was asked
    ├── HubError               (OSError)            a model could not be found or fetched
    ├── KernelError            (RuntimeError)       native code cannot be built, loaded or run
    └── DependencyError        (ImportError)        an optional package is missing
"""

from __future__ import annotations

import os
from collections.abc import Iterable


class GemmaError(Exception):
    """Base of every deliberate gemmakit error: catch this to catch them all."""


class ConfigError(GemmaError, ValueError):
    """A configuration field, file or preset name is wrong."""


class CheckpointError(GemmaError, ValueError):
    """A checkpoint cannot be used; the subclasses say why."""


class FormatError(CheckpointError):
    """The bytes of a file break the rules of its format.

    Attributes:
      path: the file.
      offset: the byte at which the rule is broken, or None where it concerns the whole file.
      rule: the rule, with the expected and the found value.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None, rule: str):
        self.path, self.offset, self.rule = os.fspath(path), offset, rule
        where = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{self.path}{where}: {rule}")

    def __reduce__(self):
        return type(self), (self.path, self.offset, self.rule)


class UnsupportedError(CheckpointError, NotImplementedError):
    """A valid file that uses something gemmakit does not read, for example an IQ quantization type."""


class SaveError(CheckpointError, OSError):
    """A file or folder could not be written; what was there before is unchanged. `errno` is the system's, or None."""

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.message, self.errno = message, errno

    def __str__(self) -> str:
        return self.message

    def __reduce__(self):
        return type(self), (self.message, self.errno)


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at that path."""


class WeightsMismatch(CheckpointError):
    """The tensors of a checkpoint are not those the configuration asks for. All of them are listed at once.

    Attributes:
      missing: names that the configuration needs and the checkpoint lacks.
      unexpected: names that the checkpoint holds and the configuration has no place for.
      misshaped: lines "name: expected (..), got (..)".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshaped: Iterable[str] = (),
        hint: str = "",
    ):
        self.path, self.hint = os.fspath(path), hint
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), tuple(misshaped)
        lines = [f"{self.path}: its tensors do not fit the configuration."]
        for title in ("missing", "unexpected", "misshaped"):
            names = getattr(self, title)
            if names:
                lines += [f"{title} ({len(names)}):"] + [f"  {name}" for name in names]
        super().__init__("\n".join(lines + ([hint] if hint else [])))

    def __reduce__(self):
        keywords = dict(missing=self.missing, unexpected=self.unexpected, misshaped=self.misshaped, hint=self.hint)
        return _rebuild_mismatch, (self.path, keywords)


def _rebuild_mismatch(path, keywords):
    return WeightsMismatch(path, **keywords)


class TokenizerError(GemmaError, ValueError):
    """A vocabulary, a token or an id is wrong."""


class PromptError(GemmaError, ValueError):
    """A prompt, a chat turn or an image cannot be used as given."""


class ContextFull(GemmaError, ValueError):
    """More tokens than the context holds. `used` and `limit` are counts of tokens."""

    def __init__(self, used: int, limit: int, what: str = "the prompt and its continuation"):
        self.used, self.limit, self.what = used, limit, what
        verb = "need" if " and " in what else "needs"
        super().__init__(
            f"{what} {verb} {used} tokens, but the context holds {limit}: shorten the prompt, lower the number of "
            f"new tokens, or raise the context length (up to the model's own limit)."
        )

    def __reduce__(self):
        return type(self), (self.used, self.limit, self.what)


class QueueFull(GemmaError, RuntimeError):
    """An engine's queue has no room for another request. `waiting` and `limit` are counts of requests."""

    def __init__(self, waiting: int, limit: int):
        self.waiting, self.limit = waiting, limit
        super().__init__(
            f"{waiting} requests wait for a slot already, and {limit} may: try again when some have ended, or raise "
            f"the queue's limit"
        )

    def __reduce__(self):
        return type(self), (self.waiting, self.limit)


class SamplingError(GemmaError, ValueError):
    """A sampling parameter is out of range."""


class ShapeError(GemmaError, ValueError):
    """An array has the wrong shape or dtype; the message names the axis."""


class DataError(GemmaError, ValueError):
    """A file of examples, or a row of it, cannot be used; the message names the file and line."""


class TrainingError(GemmaError, RuntimeError):
    """A training run cannot start or go on; what was saved before is intact."""


class ToolError(GemmaError, ValueError):
    """A tool was called wrongly, or could not do what it was asked; in a conversation the model is told."""


class HubError(GemmaError, OSError):
    """A model could not be found locally or fetched; the message says what to set, click or install."""


class KernelError(GemmaError, RuntimeError):
    """The native kernels cannot be built, loaded or run; the message says what else works or what to do."""


class DependencyError(GemmaError, ImportError):
    """An optional package is missing; the message holds the pip command."""

    def __init__(self, package: str, extra: str, purpose: str):
        self.package, self.extra, self.purpose = package, extra, purpose
        super().__init__(f'{purpose} needs the package "{package}": pip install "gemmakit[{extra}]"')

    def __reduce__(self):
        return type(self), (self.package, self.extra, self.purpose)
