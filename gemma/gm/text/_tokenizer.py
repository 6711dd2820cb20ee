# SPDX-License-Identifier: Apache-2.0
"""The JAX API's tokenizers: the official names and signatures over `gemma.tokenizer.Tokenizer`, which does the work.

A tokenizer of this module is a small hashable value; its vocabulary is read on first use.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import flax
import numpy as np

from gemma import hub, sampling, tokenizer
from gemma.config import GemmaConfig
from gemma.errors import DependencyError, HubError, ShapeError, TokenizerError

_CUSTOM_TOKENS = 99  # <unused0> .. <unused98>


class SpecialTokens(enum.IntEnum):
    """Base of the special tokens of a vocabulary; a name that a vocabulary lacks raises AttributeError."""


class Gemma2SpecialTokens(SpecialTokens):
    """Special tokens of Gemma 1 and 2."""

    PAD = 0
    EOS = 1
    BOS = 2
    UNK = 3
    MASK = 4
    CUSTOM = 7  # the first of 99 unused tokens
    START_OF_TURN = 106
    END_OF_TURN = 107


class Gemma3SpecialTokens(SpecialTokens):
    """Special tokens of Gemma 3."""

    PAD = 0
    EOS = 1
    BOS = 2
    UNK = 3
    MASK = 4
    CUSTOM = 6  # the first of 99 unused tokens
    START_OF_TURN = 105
    END_OF_TURN = 106
    START_OF_IMAGE = GemmaConfig.boi_token_index
    END_OF_IMAGE = GemmaConfig.eoi_token_index


class Gemma4SpecialTokens(SpecialTokens):
    """Special tokens of Gemma 4: the turn markers have other spellings, and the end of an image another id."""

    PAD = 0
    EOS = 1
    BOS = 2
    UNK = 3
    MASK = 4
    CUSTOM = 6  # the first of 99 unused tokens
    BEGIN_OF_TOOL_RESPONSE = 50
    START_OF_TURN = 105
    END_OF_TURN = 106
    START_OF_IMAGE = GemmaConfig.boi_token_index
    START_OF_AUDIO = GemmaConfig.eoi_token_index  # what ends an image in Gemma 3
    IMAGE_PLACEHOLDER = 258_880
    AUDIO_PLACEHOLDER = 258_881
    END_OF_IMAGE = 258_882
    END_OF_AUDIO = 258_883


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Base of the tokenizers; `from_version` makes the right one.

    Attributes:
      path: a `.model`, `tokenizer.json` or `.gguf` file, a folder with one, or `demo`. A `gs://` path, such as the
        default, means the file of that name in `$GEMMA_CACHE_DIR/tokenizer`; where there is none, Gemma 3 and 3n take
        the vocabulary of the installed demo model, which is the same.
      custom_tokens: number 0..98 of an unused token to the text that it stands for.
    """

    path: str | os.PathLike[str] = ""
    custom_tokens: Mapping[int, str] = dataclasses.field(default_factory=dict)

    VERSION: ClassVar[int | str] = 0
    FORBIDDEN_TOKENS: ClassVar[tuple[int, ...]] = ()
    special_tokens: ClassVar[type[SpecialTokens]] = SpecialTokens

    def __post_init__(self):
        object.__setattr__(self, "custom_tokens", flax.core.FrozenDict(self.custom_tokens))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "custom_tokens": self.custom_tokens}  # the vocabulary is read anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def from_version(cls, version: int | str) -> Tokenizer:
        """The tokenizer of a generation, as in `model.INFO.tokenizer_version`."""
        found = {kind.VERSION: kind for kind in (Gemma2Tokenizer, Gemma3Tokenizer, Gemma3nTokenizer, Gemma4Tokenizer)}
        if version not in found:
            raise TokenizerError(f"Unsupported tokenizer version: {version!r}; expected {', '.join(map(str, found))}")
        return found[version]()

    @functools.cached_property
    def core(self) -> tokenizer.Tokenizer:
        """The tokenizer that does the work."""
        path = _located(self.path, self.VERSION)
        found = tokenizer.Tokenizer.from_file(path)
        vocabulary = Gemma3Tokenizer.VERSION if self.VERSION == Gemma3nTokenizer.VERSION else self.VERSION
        if found.version is not None and found.version != vocabulary:
            raise TokenizerError(
                f"{path}: a vocabulary of version {found.version}; {type(self).__name__} expects {self.VERSION}"
            )
        return found.with_spellings(self._spellings(found)) if self.custom_tokens else found

    def _spellings(self, found: tokenizer.Tokenizer) -> dict[int, str]:
        spellings = {}
        for number, text in self.custom_tokens.items():
            if not isinstance(number, int) or not 0 <= number < _CUSTOM_TOKENS:
                raise TokenizerError(f"custom_tokens: expected numbers in 0..{_CUSTOM_TOKENS - 1}, got {number!r}")
            spellings[found.id_of(f"<unused{number}>")] = text
        return spellings

    @property
    def vocab_size(self) -> int:
        """V, the number of ids."""
        return self.core.vocab_size

    @property
    def special(self) -> tokenizer.SpecialTokens:
        """The ids of the special tokens, as the vocabulary itself has them."""
        return self.core.special

    @functools.cached_property
    def tokens(self) -> list[str]:
        """All pieces by id, with real spaces."""
        return [piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for piece in self.core.pieces]

    def encode(self, text: str | list[str], *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The ids of a text; special tokens may be spelled in it.

        Args:
          text: a text, or a list of pieces, each of which must be one token.
          add_bos: put a bos in front.
          add_eos: put an eos at the end.
        """
        if isinstance(text, str):
            return self.core.encode(text, add_bos=add_bos, add_eos=add_eos)
        ids = [self._id_of(piece) for piece in text]
        head, tail = [self.special.bos] if add_bos else [], [self.special.eos] if add_eos else []
        return [*head, *ids, *tail]

    def _id_of(self, piece: str) -> int:
        try:
            return self.core.id_of(piece)
        except TokenizerError as error:
            raise TokenizerError(f"Cannot tokenize {piece!r}: it is an unknown token.") from error

    def decode(self, ids: int | list[int] | np.ndarray) -> str:
        """The text of one id or of several. `<pad>`, `<bos>` and `<eos>` have no text; turn markers are spelled.

        Raises:
          TokenizerError: (a ValueError) an array of two or more dimensions, or an id outside of the vocabulary.
        """
        if hasattr(ids, "ndim"):
            if ids.ndim > 1:
                raise TokenizerError(f"Array must be 0 or 1 dimensional, got {tuple(ids.shape)}.")
            ids = np.asarray(ids).reshape(-1).tolist()
        elif not isinstance(ids, (list, tuple)):
            ids = [operator.index(ids)]
        return self.core.decode(visible(self, ids))

    def split(self, text: str) -> list[str]:
        """The pieces of a text, with real spaces."""
        return self.core.split(text)

    def plot_logits(self, logits: Any, *, keep_top: int = 30) -> Any:
        """A bar chart of the likeliest next tokens and their probabilities.

        Args:
          logits: [V] or [1, V].
          keep_top: how many tokens to show.

        Returns:
          A matplotlib figure; a notebook shows it.

        Raises:
          ShapeError: (a ValueError) logits of several positions.
          DependencyError: matplotlib is not installed.
        """
        values = np.asarray(logits, np.float32)
        values = values[0] if values.ndim == 2 and values.shape[0] == 1 else values
        if values.ndim != 1:
            raise ShapeError(f"logits: expected [V] or [1, V], the logits of one position, got {values.shape}")
        if isinstance(keep_top, bool) or not isinstance(keep_top, int) or keep_top < 1:
            raise ShapeError(f"keep_top: expected a whole number of tokens, 1 or more, got {keep_top!r}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DependencyError("matplotlib", "train", "plot_logits") from error
        shown = sampling.top_logprobs(values, keep_top)
        figure = Figure(figsize=(max(4.0, 0.3 * len(shown)), 3.0), layout="constrained")
        axes = figure.add_subplot(title="Probability of the next token", ylabel="probability")
        axes.bar(range(len(shown)), [np.exp(value) for _, value in shown])
        axes.set_xticks(range(len(shown)), [self._label(i) for i, _ in shown], rotation=90)
        return figure

    def _label(self, token: int) -> str:
        """A token's text, or its piece where it has none of its own; for matplotlib, to which a dollar sign means math."""
        shown = self.decode(token)
        return repr(self.tokens[token] if not shown or "\ufffd" in shown else shown).replace("$", r"\$")

    def stream(self) -> tokenizer.StreamDecoder:
        """A decoder for ids that come one at a time."""
        return self.core.stream()


@dataclasses.dataclass(frozen=True)
class Gemma2Tokenizer(Tokenizer):
    """The tokenizer of Gemma 1 and 2."""

    path: str | os.PathLike[str] = "gs://gemma-data/tokenizers/tokenizer_gemma2.model"

    VERSION: ClassVar[int] = 2
    special_tokens: ClassVar[type[SpecialTokens]] = Gemma2SpecialTokens


@dataclasses.dataclass(frozen=True)
class Gemma3Tokenizer(Tokenizer):
    """The tokenizer of Gemma 3."""

    path: str | os.PathLike[str] = "gs://gemma-data/tokenizers/tokenizer_gemma3.model"

    VERSION: ClassVar[int] = 3
    FORBIDDEN_TOKENS: ClassVar[tuple[int, ...]] = (Gemma3SpecialTokens.START_OF_IMAGE, Gemma3SpecialTokens.END_OF_IMAGE)
    special_tokens: ClassVar[type[SpecialTokens]] = Gemma3SpecialTokens


@dataclasses.dataclass(frozen=True)
class Gemma3nTokenizer(Gemma3Tokenizer):
    """The tokenizer of Gemma 3n: the vocabulary of Gemma 3."""

    path: str | os.PathLike[str] = "gs://gemma-data/tokenizers/tokenizer_gemma3n.model"

    VERSION: ClassVar[str] = "3n"


@dataclasses.dataclass(frozen=True)
class Gemma4Tokenizer(Tokenizer):
    """The tokenizer of Gemma 4."""

    path: str | os.PathLike[str] = "gs://gemma-data/tokenizers/tokenizer_gemma4.model"

    VERSION: ClassVar[int] = 4
    FORBIDDEN_TOKENS: ClassVar[tuple[int, ...]] = (
        *(Gemma4SpecialTokens.START_OF_IMAGE, Gemma4SpecialTokens.END_OF_IMAGE),
        *(Gemma4SpecialTokens.START_OF_AUDIO, Gemma4SpecialTokens.END_OF_AUDIO),
        *(Gemma4SpecialTokens.IMAGE_PLACEHOLDER, Gemma4SpecialTokens.AUDIO_PLACEHOLDER),
    )
    special_tokens: ClassVar[type[SpecialTokens]] = Gemma4SpecialTokens


def visible(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids without those that stand for no text: `<pad>`, `<bos>`, `<eos>`."""
    special = tokenizer.special
    return [i for i in ids if i not in (special.pad, special.bos, special.eos)]


def _located(path: str | os.PathLike[str], version: int | str) -> Any:
    if not isinstance(path, str) or not path.startswith("gs://"):
        return hub.resolve(path)
    name = path.rsplit("/", 1)[1]
    local = hub.cache_dir() / "tokenizer" / name
    if local.is_file():
        return local
    try:
        if version in (Gemma3Tokenizer.VERSION, Gemma3nTokenizer.VERSION):
            return hub.demo_path()
    except HubError as error:
        raise HubError(
            f"{name}: put this file into {local.parent}, pass path=, or install the demo model: {error}"
        ) from error
    raise HubError(f"{name}: put this file into {local.parent}, or pass path= (a .model, tokenizer.json or .gguf file)")
