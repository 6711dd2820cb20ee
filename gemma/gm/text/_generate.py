# SPDX-License-Identifier: Apache-2.0
"""One conversation on one model: token ids in, token ids out, and the cache kept between turns.

This is what the command line drives; the official-style face for texts and batches is `_sampler.py`. Sampling follows
`gemma.sampling.SamplingParams`, so a seed gives the tokens that the numpy sampler would pick from the same logits.
Texts, templates and stop strings are the caller's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import jax
import numpy as np

from gemma.errors import PromptError
from gemma.gm.text import _cuts, _loop
from gemma.gm.text._engine import PAD, Engine, cache_bucket
from gemma.gm.text._load import LoadedModel
from gemma.sampling import SamplingParams

_ENDS = 8  # end ids are padded to a multiple of this, so that their number rarely compiles anything


class Session:
    """One sequence in front of a loaded model; later calls read only what is new.

      session = Session(loaded)
      list(session.tokens(ids, SamplingParams(temperature=0), end_ids={1}))

    Attributes:
      ids: what was read and generated so far, the end token included.
    """

    def __init__(self, loaded: LoadedModel, *, context: int = 0):
        self._loaded = loaded
        self.begin(context)

    def begin(self, context: int = 0) -> None:
        """Forgets everything and makes room for `context` tokens; more are made room for when they come."""
        limit = self._loaded.config.max_position_embeddings
        length = cache_bucket(max(context, 1), limit)
        self._engine = Engine(self._loaded.model, self._loaded.params, 1, cache_length=length)

    @property
    def ids(self) -> list[int]:
        return list(self._engine.ids[0])

    def append(
        self, new: Sequence[int], params: SamplingParams, end_ids: Collection[int] = (), *, chunk: int = 1
    ) -> Iterator[int]:
        """Continues the sequence after `new`.

        Args:
          new: ids after those that are held; none of them is 0, the padding.
          params: how to sample. `stop` is not looked at: it is about text.
          end_ids: ids that end the continuation; the end id is yielded too.
          chunk: tokens computed on the device before they are yielded. 1 is for reading along; more saves the way
            to the host and back, and the same tokens come out. Leaving the iteration early keeps whole chunks.

        Yields:
          token ids.

        Raises:
          PromptError, ContextFull, SamplingError: before anything is generated.
        """
        if chunk < 1:
            raise PromptError(f"chunk: expected at least 1, got {chunk}")
        engine, count = self._engine, params.max_new_tokens
        how, choice = picking(params, self._loaded, end_ids)
        key = jax.random.key(0)  # not drawn from: `uniforms` are
        first = engine.start(
            [new],
            how,
            choice,
            reserve=count,
            key=key,
            u=_cuts.uniforms(params, 0, 1),
            penalty=params.repetition_penalty != 1.0,
        )
        yield int(first.tokens[0, 0])
        made = 1
        while made < count and not engine.done.all():
            wanted = min(chunk, count - made)
            u = np.zeros((1, chunk), np.float32)
            u[0, :wanted] = _cuts.uniforms(params, made, wanted)
            tokens = (engine.step(how, choice, u[:, 0]) if chunk == 1 else engine.run(how, choice, wanted, u)).tokens
            made += tokens.shape[1]
            yield from (int(token) for token in tokens[0] if token != PAD)

    def tokens(
        self, ids: Sequence[int], params: SamplingParams, end_ids: Collection[int] = (), *, chunk: int = 1
    ) -> Iterator[int]:
        """As `append`, with the whole sequence: what the session holds already is not read again.

        A sequence that does not begin with what is held is read from its start.
        """
        ids, held = [int(token) for token in ids], self._engine.ids[0]
        stored = self._engine.stored[0]
        if stored >= len(ids) or ids[: len(held)] != held[: len(ids)]:
            self._engine = Engine(self._loaded.model, self._loaded.params, 1, cache_length=self._engine.capacity)
            held = []
        return self.append(ids[len(held) :], params, end_ids, chunk=chunk)


def generate_ids(
    loaded: LoadedModel,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    end_ids: Iterable[int] = (),
    chunk: int = 1,
) -> Iterator[int]:
    """The continuation of `ids`, in a session of its own; see `Session.append`."""
    session = Session(loaded, context=len(ids) + params.max_new_tokens)
    return session.append(ids, params, frozenset(end_ids), chunk=chunk)


def picking(params: SamplingParams, loaded: LoadedModel, end_ids: Collection[int]) -> tuple[_cuts.Cuts, _loop.Choice]:
    """`SamplingParams` as the loop takes them."""
    rows = loaded.model.config.num_embed
    cuts, knobs = _cuts.from_params([params], rows)
    blocked = blocked_ids(rows, loaded.tokenizer.vocab_size if loaded.tokenizer is not None else rows)
    return cuts, _loop.Choice(knobs, blocked, end_array(end_ids))


def blocked_ids(rows: int, vocab_size: int, forbidden: Iterable[int] = ()) -> np.ndarray:
    """bool [V]: the padding, rows of the table that no token has (they are zero, not unlikely), and `forbidden`."""
    blocked = np.zeros(rows, bool)
    blocked[PAD] = True
    blocked[vocab_size:] = True
    blocked[list(forbidden)] = True
    return blocked


def end_array(end_ids: Collection[int]) -> np.ndarray:
    """int32 [E] with -1, which no token is, in the places left over."""
    ids = sorted(end_ids)
    return np.array(ids + [-1] * (-len(ids) % _ENDS if ids else _ENDS), np.int32)
