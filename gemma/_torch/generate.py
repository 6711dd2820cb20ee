# SPDX-License-Identifier: Apache-2.0
"""Generating: batches of token ids in, token ids out, for every model with the forward of `GemmaForCausalLM`.

`stream` yields one token per row and step; `generate` collects them. Prompts of different lengths may be padded on
either side: inside they stand on the right, so that their last tokens are in one column. How a token is picked is
`sampling.py`; one row's tokens depend neither on its neighbours nor on its padding.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma._torch import sampling
from gemma._torch.cache import WindowedKVCache
from gemma._torch.masks import check_tensors
from gemma.config import GemmaConfig, PaliGemmaConfig
from gemma.errors import ContextFull, PromptError, SamplingError, ShapeError
from gemma.sampling import SamplingParams, StopChecker, fresh_seed, step_seed, uniform

_DEFAULT = SamplingParams()
_COMPILED_LENGTHS = 256  # caches of compiled models have a multiple of so many slots: few lengths are compiled


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    params: SamplingParams | None = None,
    end_ids: Collection[int] | None = None,
    streamer: Callable[[Tensor], Any] | None = None,
    **options: Any,
) -> Tensor:
    """Continues every row until one of its end ids, a stop string, or `params.max_new_tokens`.

    Args:
      model: GemmaForCausalLM, PaliGemma, or anything with their forward and a `config`.
      input_ids: [B, T]; rows may be padded on either side.
      attention_mask: [B, T], 0 where there is padding; None: there is none.
      params: how to sample; every row draws from the same seed. Its fields may be given by name instead, or on top of
        it: `max_new_tokens=40, temperature=0.7`.
      end_ids: ids that end a row, and stay in it; None: those of the configuration (a chat format has more of them,
        `gemma.chat.end_token_ids`).
      streamer: called with the new tokens [B] of each step, on the CPU; the pad id stands in rows that have ended.
      **options: see `stream`; others go to the model's first call, for example `pixel_values` or `token_groups`.

    Returns:
      [B, T + new]: the rows as given, and what follows, the pad id after a row's end.

    Raises:
      ContextFull, PromptError, SamplingError, ShapeError: what was asked for does not fit; before anything is computed
        as far as it can be known.
    """
    params = with_fields(_DEFAULT if params is None else params, options)
    columns = []
    for tokens in stream(model, input_ids, attention_mask=attention_mask, params=params, end_ids=end_ids, **options):
        columns.append(tokens)
        if streamer is not None:
            streamer(tokens)
    return torch.cat([input_ids, torch.stack(columns, 1).to(input_ids)], 1)


@torch.inference_mode()
def stream(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    params: SamplingParams = _DEFAULT,
    end_ids: Collection[int] | None = None,
    blocked_ids: Sequence[int] = (),
    tokenizer: Any = None,
    prefill_chunk: int = 1024,
    compile: bool = False,
    **first_call: Any,
) -> Iterator[Tensor]:
    """Yields the new tokens of each step, int64 [B] on the CPU; the pad id in rows that have ended.

    Args (beyond those of `generate`):
      blocked_ids: ids that are never picked. The pad id never is.
      tokenizer: a `gemma.tokenizer.Tokenizer`; needed for `params.stop`. Ids that it does not have are never picked.
      prefill_chunk: prompts are read in chunks of so many tokens, unless the first call has further arguments.
      compile: decode through `torch.compile`: it takes about a minute once, and fewer microseconds for every token.
    """
    config = text_config(model)
    check_tensors(input_ids=input_ids, attention_mask=attention_mask)
    _check_options(model, first_call)
    rows = _Rows(params, len(input_ids), config.end_token_ids if end_ids is None else end_ids, tokenizer)
    input_ids, attention_mask, first_call = _to_the_right(input_ids, attention_mask, first_call)
    lengths = [input_ids.shape[1]] * len(input_ids)
    if attention_mask is not None:
        lengths = attention_mask.sum(1).tolist()
    total = max(lengths) + params.max_new_tokens
    if total > config.max_position_embeddings:
        raise ContextFull(total, config.max_position_embeddings)
    for row, length in zip(input_ids.tolist(), lengths):
        rows.histories.append(row[len(row) - length :])
    blocked = _blocked(config, blocked_ids, tokenizer, input_ids.device)
    slots = total - 1  # the last token is never read
    if compile:
        slots = -(-slots // _COMPILED_LENGTHS) * _COMPILED_LENGTHS
    weight = next(model.parameters())
    cache = WindowedKVCache(config.layers, len(input_ids), slots, dtype=weight.dtype, device=weight.device)
    logits = _read(model, input_ids, attention_mask, cache, first_call, prefill_chunk)
    cache.static = compile
    forward = torch.compile(model.forward, dynamic=False) if compile else model.forward
    for index in range(params.max_new_tokens):
        tokens = rows.pick(logits[:, -1].float().masked_fill_(blocked, -torch.inf), index)
        yield tokens.clone().masked_fill_(torch.tensor(rows.ended_before), config.pad_token_id)
        if all(rows.ended) or index + 1 == params.max_new_tokens:
            return
        logits = forward(input_ids=tokens[:, None].to(weight.device), kv_cache=cache, logits_to_keep=1)["logits"]


def with_fields(params: SamplingParams, options: dict[str, Any]) -> SamplingParams:
    """`params` with the fields that are in `options` by name; they are taken out of there."""
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in options]
    return dataclasses.replace(params, **{name: options.pop(name) for name in names})


def _check_options(model: nn.Module, first_call: dict[str, Any]) -> None:
    """Refuses an argument that neither sampling nor the model's forward has, before anything is computed."""
    known = inspect.signature(model.forward).parameters
    unknown = [name for name in first_call if name not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise SamplingError(
            f"generate: no such option: {', '.join(unknown)}; expected fields of SamplingParams "
            f"({', '.join(field.name for field in dataclasses.fields(SamplingParams))}), options of "
            f"gemma._torch.generate.stream, or arguments of {type(model).__name__}.forward"
        )


@dataclasses.dataclass
class _Rows:
    """What each row of a batch has been given, and whether it has ended."""

    params: SamplingParams
    batch: int
    end_ids: Collection[int]
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.params.stop and self.tokenizer is None:
            raise SamplingError("stop: stop strings are found in text; pass the model's tokenizer as `tokenizer`")
        self.seed = fresh_seed() if self.params.seed is None else self.params.seed
        self.histories: list[list[int]] = []
        self.ended = [False] * self.batch
        self.ended_before = list(self.ended)
        self.checkers = [StopChecker(self.params.stop) for _ in range(self.batch)]
        self.decoders = [self.tokenizer.stream() for _ in range(self.batch)] if self.params.stop else []

    def pick(self, logits: Tensor, index: int) -> Tensor:
        """The tokens after `logits` [B, V]: int64 [B]; those of rows that had ended mean nothing."""
        params = self.params
        if params.greedy and params.repetition_penalty == 1.0 and not params.logit_bias:
            tokens = sampling.greedy(logits, params).cpu()
        else:
            u = uniform(step_seed(self.seed, index))
            found = [0 if done else 1 for done in self.ended]
            for b, alive in enumerate(found):
                found[b] = sampling.pick(logits[b], params, self.histories[b], u) if alive else 0
            tokens = torch.tensor(found)
        self.ended_before = list(self.ended)
        for b, token in enumerate(tokens.tolist()):
            if not self.ended[b]:
                self.ended[b] = self._took(b, token)
        return tokens

    def _took(self, b: int, token: int) -> bool:
        """Adds a token to a row; whether that ends it."""
        self.histories[b].append(token)
        if self.decoders and self.checkers[b].stopped is None:
            self.checkers[b].push(self.decoders[b].push(token))
        return token in self.end_ids or self.checkers[b].stopped is not None


def text_config(model: nn.Module) -> GemmaConfig:
    """The configuration of a model's decoder."""
    config = model.config
    return config.text_config if isinstance(config, PaliGemmaConfig) else config


def _read(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: WindowedKVCache,
    first_call: dict[str, Any],
    chunk: int,
) -> Tensor:
    """Fills the cache with the prompt; the logits of its last tokens, [B, 1, V]."""
    length = input_ids.shape[1]
    chunk = length if first_call or chunk < 1 else chunk
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        mask = None if attention_mask is None else attention_mask[:, part]
        out = model(input_ids=input_ids[:, part], attention_mask=mask, kv_cache=cache, logits_to_keep=1, **first_call)
    return out["logits"]


def _to_the_right(
    input_ids: Tensor, attention_mask: Tensor | None, first_call: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The same rows with all padding on the left: what has a column per token is reordered alike."""
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ShapeError(f"input_ids: expected integers [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}")
    if attention_mask is None:
        return input_ids, None, first_call
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"attention_mask: expected the shape {tuple(input_ids.shape)} of input_ids, got "
            f"{tuple(attention_mask.shape)}"
        )
    valid = attention_mask.to(input_ids.device) != 0
    empty = (~valid.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise PromptError(f"prompt {empty[0]} is empty: its attention_mask has no token")
    if bool(valid.all()):
        return input_ids, None, first_call
    order = torch.argsort(valid.long(), dim=1, stable=True)
    per_token = {"token_groups", "position_ids", "token_type_ids"}
    moved = {
        name: value.gather(1, order.to(value.device)) if name in per_token else value
        for name, value in first_call.items()
        if value is not None
    }
    return input_ids.gather(1, order), valid.gather(1, order), moved


def _blocked(config: GemmaConfig, ids: Sequence[int], tokenizer: Any, device: torch.device) -> Tensor:
    """bool [V]: the padding, rows of the table that no token has, and what the caller forbids."""
    blocked = torch.zeros(config.vocab_size, dtype=torch.bool)
    outside = [i for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise SamplingError(f"blocked_ids: expected token ids in 0..{config.vocab_size - 1}, got {outside[0]}")
    if 0 <= config.pad_token_id < config.vocab_size:
        blocked[config.pad_token_id] = True
    if tokenizer is not None:
        blocked[tokenizer.vocab_size :] = True
    blocked[list(ids)] = True
    return blocked.to(device)
