# SPDX-License-Identifier: Apache-2.0
"""`DummyGemma`, one small layer that compiles in a moment, and `DummyTokenizer`, fourteen words. Names of the JAX API.

They are real: the network is a `Transformer` and takes part in everything, the tokenizer has the interface of
`gm.text.Gemma3Tokenizer`. Nothing they say means anything. Sizes, words and ids are those of the official package: the
network's table has thirteen rows, so it cannot read the tokenizer's last word. A model with images, turns and every
other trait of a family is `_tiny.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from gemma.config import GemmaConfig
from gemma.errors import TokenizerError
from gemma.gm.nn import Transformer
from gemma.gm.nn._config import ModelInfo, TransformerConfig
from gemma.gm.text._tokenizer import Gemma3SpecialTokens, SpecialTokens, Tokenizer
from gemma.tokenizer import SpecialTokens as SpecialIds

_WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "input",
    "string",
    "hello",
    "world",
    "Hello",
    "there",
    "!",
    "My",
    "name",
    "is",
    "Morgane",
]
_CONFIG = GemmaConfig(
    vocab_size=13,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=4096,
)


class DummyGemma(Transformer, kw_only=True):
    """One global layer: V 13, D 32, F 128, N = K = 2, H 128, no norms after the branches."""

    config: TransformerConfig = TransformerConfig.of(_CONFIG)

    INFO: ClassVar[ModelInfo] = ModelInfo()


@dataclasses.dataclass(frozen=True)
class DummyTokenizer(Tokenizer):
    """Words between spaces, ids 0..13; special tokens of Gemma 3. VERSION 0: it goes with every model.

    A bos is id 2 and an eos id 1, as in Gemma, whatever the words at these ids look like.
    """

    VERSION: ClassVar[int] = 0
    special_tokens: ClassVar[type[SpecialTokens]] = Gemma3SpecialTokens
    version: ClassVar[int] = 3  # of the special tokens

    @property
    def core(self) -> DummyTokenizer:
        """Itself: there is no file behind it."""
        return self

    @property
    def vocab_size(self) -> int:
        return len(_WORDS)

    @property
    def tokens(self) -> list[str]:
        return list(_WORDS)

    @property
    def special(self) -> SpecialIds:
        names = {field.name: field.name.upper() for field in dataclasses.fields(SpecialIds)}
        known = Gemma3SpecialTokens.__members__
        return SpecialIds(**{name: int(known[upper]) for name, upper in names.items() if upper in known})

    def encode(
        self, text: str | list[str], *, add_bos: bool = False, add_eos: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text's words; any other word is a TokenizerError that lists them."""
        words = text.split() if isinstance(text, str) else list(text)
        unknown = [word for word in words if word not in _WORDS]
        if unknown:
            raise TokenizerError(
                f"DummyTokenizer: unknown word {unknown[0]!r}; expected some of {' '.join(_WORDS)}. It has no turns "
                f"either: for a chat take gm.testing.tiny_model()"
            )
        head = [int(Gemma3SpecialTokens.BOS)] if add_bos else []
        tail = [int(Gemma3SpecialTokens.EOS)] if add_eos else []
        return [*head, *map(_WORDS.index, words), *tail]

    def id_of(self, piece: str) -> int:
        """The id of one word."""
        return self.encode([piece])[0]

    def decode(self, ids: int | list[int] | np.ndarray) -> str:
        """The words of ids with spaces between them."""
        return " ".join(self._words(ids))

    def split(self, text: str) -> list[str]:
        return text.split()

    def stream(self) -> _WordStream:
        return _WordStream(self)

    def _words(self, ids: int | list[int] | np.ndarray) -> Iterator[str]:
        ids = np.asarray(ids)
        if ids.ndim > 1:
            raise TokenizerError(f"Array must be 0 or 1 dimensional, got {ids.shape}.")
        for token in ids.reshape(-1).tolist():
            if not 0 <= token < len(_WORDS):
                raise TokenizerError(f"DummyTokenizer: expected ids in 0..{len(_WORDS) - 1}, got {token}")
            yield _WORDS[token]


class _WordStream:
    """Words one at a time: the space comes before each word but the first."""

    def __init__(self, tokenizer: DummyTokenizer):
        self._tokenizer, self._first = tokenizer, True

    def push(self, token: int) -> str:
        text = ("" if self._first else " ") + self._tokenizer.decode(token)
        self._first = False
        return text

    def flush(self) -> str:
        return ""
