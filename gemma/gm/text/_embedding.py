# SPDX-License-Identifier: Apache-2.0
"""`TextEmbedder`: texts in, unit vectors out, with EmbeddingGemma.

The network is `gm/nn/_embedding.py`; prompts, shorter vectors and cosines are `gemma/embedding.py`. Texts are sorted by
their length before they are put into batches, so that little is computed on padding; results come in the order of the
texts. What a vector is depends on its text alone, to float rounding: not on its batch, nor on where padding stands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma import embedding, hub
from gemma.config import GemmaConfig
from gemma.errors import CheckpointError, ConfigError, PromptError, UnsupportedError
from gemma.gm.ckpts import _load, open_checkpoint
from gemma.gm.nn._embedding import EmbeddingGemma
from gemma.gm.typing import DType, Params
from gemma.tokenizer import Tokenizer

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of padded rows: one program is compiled for each that occurs
_WINDOW = 16  # batches whose texts are sorted together


@dataclasses.dataclass(frozen=True, eq=False)
class TextEmbedder:
    """An encoder with its parameters and its tokenizer.

    Attributes:
      model: an `EmbeddingGemma`; its `dim` is not used, vectors are shortened here.
      params: its parameters.
      tokenizer: of its vocabulary.
      prompts: what is put before a text, by task.
      add_eos: whether a text ends with the end token, as EmbeddingGemma's do.
    """

    model: EmbeddingGemma
    params: Params
    tokenizer: Tokenizer
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: embedding.TASKS)
    add_eos: bool = True

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, dtype: DType = "float32") -> TextEmbedder:
        """Opens a folder of Hugging Face, with its `modules.json`.

        Args:
          path: what `gemma.hub.resolve` takes.
          dtype: float32 or bfloat16; float16 cannot hold the activations.

        Raises:
          CheckpointNotFound, HubError, FormatError, WeightsMismatch: the checkpoint cannot be read.
          UnsupportedError: the model is no encoder.
          CheckpointError: no tokenizer, or one with more ids than the model; no `modules.json`.
        """
        path = hub.resolve(path)
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config()
            if not isinstance(config, GemmaConfig) or not config.use_bidirectional_attention:
                raise UnsupportedError(f"{path}: expected an EmbeddingGemma, got a model that continues text")
            source, modules = checkpoint.tokenizer_source(), getattr(checkpoint, "modules", None)
            if source is None:
                raise CheckpointError(f"{path}: no tokenizer beside the model; put its tokenizer.model there")
            if modules is None:
                raise CheckpointError(
                    f"{path}: expected modules.json and the folders of the dense layers that it names beside the encoder; "
                    f"without them the vectors would be others: fetch the whole model"
                )
        tokenizer = Tokenizer.from_source(source)
        if tokenizer.vocab_size > config.table_rows:
            raise CheckpointError(
                f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its embedding {config.table_rows} rows; the two "
                f"do not belong together"
            )
        params = _load.load_params(path, dtype=dtype)
        model = EmbeddingGemma.from_config(config, dtype=jnp.dtype(dtype))
        return cls(model, params, tokenizer, modules.prompts, _adds_eos(path))

    @property
    def width(self) -> int:
        """Numbers of a whole vector."""
        return self.model.width

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text, its prompt and both end markers included."""
        return self.model.config.source.max_position_embeddings

    def ids(self, text: str, task: str = "none", *, title: str | None = None, truncate: bool = False) -> list[int]:
        """The tokens of a text with its prompt.

        Raises:
          PromptError: (a ValueError) no text, an unknown task, or more tokens than `max_tokens` without `truncate`.
        """
        if not isinstance(text, str):
            raise PromptError(f"expected a text to embed, got {type(text).__name__}")
        if not text.strip():
            raise PromptError("expected a text to embed, got an empty one")
        whole = embedding.prompt(text, task, title=title, prompts=self.prompts)
        ids = self.tokenizer.encode(whole, add_bos=True, parse_special=False)
        room = self.max_tokens - self.add_eos
        if len(ids) > room and not truncate:
            raise PromptError(
                f"a text of {len(ids) + self.add_eos} tokens, but the model holds {self.max_tokens}: shorten it, or let "
                f"its end be cut off with truncate=True"
            )
        return ids[:room] + [self.tokenizer.special.eos] * self.add_eos

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        task: str = "none",
        title: str | None = None,
        dim: int | None = None,
        batch_size: int = 32,
        truncate: bool = False,
    ) -> np.ndarray:
        """Embeds.

        Args:
          texts: one text, or several.
          task: what the vectors are for, a key of `prompts`: "query" and "document" for search, "similarity", ...
          title: of the documents, with the task "document".
          dim: keep so many numbers, of unit length again: 512, 256 or 128 of EmbeddingGemma's 768. None: all.
          batch_size: texts computed side by side.
          truncate: cut off what the model cannot hold, instead of an error.

        Returns:
          float32 [dim], or [number of texts, dim] for several.

        Raises:
          PromptError: (a ValueError) a text that cannot be embedded; the message says which.
          ConfigError: (a ValueError) `dim` or `batch_size` out of range.
        """
        if isinstance(texts, str):
            return self.embed([texts], task=task, title=title, dim=dim, batch_size=batch_size, truncate=truncate)[0]
        rows = []
        for number, text in enumerate(texts):
            try:
                rows.append(self.ids(text, task, title=title, truncate=truncate))
            except PromptError as error:
                raise PromptError(f"text {number}: {error}") from error
        found = list(self.embed_ids(rows, dim=dim, batch_size=batch_size))
        return np.stack(found) if found else np.zeros((0, self.width if dim is None else dim), np.float32)

    def embed_ids(
        self, rows: Iterable[Sequence[int]], *, dim: int | None = None, batch_size: int = 32
    ) -> Iterator[np.ndarray]:
        """A vector for each row of token ids, in their order: float32 [dim].

        Rows are taken as they are needed, 16 batches at a time, so that there may be any number of them.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= 4096:
            raise ConfigError(f"batch_size: expected 1..4096, got {batch_size!r}")
        if dim is not None and not 1 <= dim <= self.width:
            raise ConfigError(f"dim: expected 1..{self.width}, the length of the vectors, got {dim}")
        rows = iter(rows)
        while window := list(itertools.islice(rows, _WINDOW * batch_size)):
            order = sorted(range(len(window)), key=lambda i: len(window[i]))
            found: dict[int, np.ndarray] = {}
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                found |= zip(chosen, self._batch([window[i] for i in chosen], batch_size), strict=True)
            for i in range(len(window)):
                yield found[i] if dim is None else embedding.shortened(found[i], dim)

    def _batch(self, rows: list[Sequence[int]], batch_size: int) -> np.ndarray:
        """One batch, padded to one of few shapes; the last batch of a window may be smaller."""
        longest = max(map(len, rows))
        length = next((n for n in LENGTHS if n >= longest), longest)
        count = batch_size if len(rows) * 2 > batch_size else 1 << (len(rows) - 1).bit_length()
        table = np.zeros((min(count, batch_size), length), np.int32)
        table[len(rows) :, 0] = self.tokenizer.special.bos  # a row that is thrown away, but not one of nothing
        for line, row in zip(table, rows):
            line[: len(row)] = row
        found = np.asarray(self._apply(self.params, table))[: len(rows)]
        if not np.isfinite(found).all():
            raise CheckpointError("an embedding is not finite: the weights are damaged")
        return found

    @functools.cached_property
    def _apply(self) -> Any:
        model = self.model.clone(dim=None)
        return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


def _adds_eos(path: Any) -> bool:
    """What the folder's tokenizer_config.json says about end tokens; EmbeddingGemma's own have one."""
    file = os.path.join(path, "tokenizer_config.json")
    if not os.path.isfile(file) or os.path.getsize(file) > 1 << 26:
        return True
    with open(file, "rb") as opened:
        try:
            values = json.load(opened)
        except ValueError as error:
            raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    said = values.get("add_eos_token") if isinstance(values, dict) else None
    return said if isinstance(said, bool) else True
