# SPDX-License-Identifier: Apache-2.0
"""Models and texts for the verbs that measure: `gemma eval` and `gemma quantize`. Numbers are `gemma/gm/_evaluate.py`'s.

Weights that a file holds packed stay packed; everything is computed in float32, so that two models differ by their
weights and by nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma.errors import PromptError, TokenizerError, UnsupportedError

BUILT_IN = "python"  # what --text says for the text that comes with Python


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as ids, without <bos>: its name, the start of its SHA-256 and how many bytes it has in all."""

    name: str
    sha256: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a text is cut; see `gemma/gm/_windows.py`."""

    context: int = 512
    stride: int = 256
    batch: int = 4


def config_of(path: Path) -> Any:
    """The configuration of a Gemma decoder, without its image tower.

    Raises:
      UnsupportedError: the model does not continue text.
    """
    from gemma import config as configs
    from gemma.gm._proof import open_any

    with open_any(path) as checkpoint:
        config = checkpoint.config()
    if not isinstance(config, configs.GemmaConfig) or config.use_bidirectional_attention:
        kind = type(config).__name__.removesuffix("Config")
        raise UnsupportedError(f"{path}: holds a {kind} model that does not continue text; expected a Gemma decoder")
    return configs.text_only(config)


def open_model(path: Path, *, packed: bool = True, quantize: str | None = None):
    """A `gemma.gm._evaluate.Model`.

    Args:
      path: of the checkpoint.
      packed: keep packed what is packed in the file; False: all weights as float32.
      quantize: a recipe, instead of what the file holds.
    """
    from gemma.gm import nn
    from gemma.gm._evaluate import Model
    from gemma.gm.ckpts import load_params

    net = nn.Transformer.from_config(config_of(path), dtype="float32")
    how = quantize or ("keep" if packed else False)
    return Model(net, load_params(path, text_only=True, quantize=how, dtype="float32"))


def read_text(path: Path, source: str | None, tokens: int | None) -> Text:
    """A text in the ids of the model at `path`.

    Args:
      path: of the checkpoint, whose tokenizer is used; special spellings in the text are plain text.
      source: a UTF-8 file; None or "python": the language reference that every Python holds (`pydoc_data`).
      tokens: at most so many, from the start.

    Raises:
      TokenizerError: the checkpoint has no tokenizer. PromptError: the file cannot be read, or is empty.
    """
    from gemma.cli import _common
    from gemma.gm._proof import open_any
    from gemma.tokenizer import Tokenizer

    with open_any(path) as checkpoint:
        found = checkpoint.tokenizer_source()
        if found is None:
            raise TokenizerError(f"{path}: no tokenizer came with these weights; put tokenizer.model beside them")
        tokenizer = Tokenizer.from_source(found)
    if source in (None, BUILT_IN):
        name, text = BUILT_IN, _of_python()
    else:
        name, text = str(source), _common.read_text(None, str(source), "text", flag="--text")
    ids = tokenizer.encode(text, parse_special=False)
    ids = [token for token in ids if token != tokenizer.special.bos]
    if not ids:
        raise PromptError(f"--text {name}: holds no text")
    return Text(name, hashlib.sha256(text.encode()).hexdigest()[:12], tuple(ids[:tokens]))


def _of_python() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def batches(config: Any, text: Text, windows: Windows) -> Sequence[Any]:
    """The text in windows."""
    from gemma.gm._windows import batches as cut

    return cut(text.ids, config.bos_token_id, context=windows.context, stride=windows.stride, batch=windows.batch)


def counted(progress: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    """A progress of two numbers out of one with a name."""
    return lambda done, total: progress(what, done, total)
