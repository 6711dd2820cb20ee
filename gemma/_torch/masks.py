# SPDX-License-Identifier: Apache-2.0
"""Who may look at whom: positions and masks of one forward pass, made once and shared by all layers of a kind.

Windows are on positions, not on indices: padding and the order of a cache's slots never matter. The caches are
`gemma/modeling_gemma.py` and `cache.py`; what a layer sees is its `LayerSpec` in `gemma/config.py`.

    causal, window 3        groups 0 1 1 1 0 (an image of three tokens)     bidirectional, window 4
    keys  0 1 2 3 4         keys  0 1 2 3 4                                 keys  0 1 2 3 4
    q 0   x . . . .         q 0   x . . . .                                 q 0   x x x . .
    q 1   x x . . .         q 1   x x x x .                                 q 1   x x x x .
    q 2   x x x . .         q 2   x x x x .                                 q 2   x x x x x
    q 3   . x x x .         q 3   x x x x .                                 q 3   . x x x x
    q 4   . . x x x         q 4   x x x x x                                 q 4   . . x x x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma.config import GemmaConfig, LayerSpec
from gemma.errors import ConfigError, PromptError, ShapeError

if TYPE_CHECKING:
    from gemma.modeling_gemma import KVCache


def layer_masks(
    layers: Sequence[LayerSpec],
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    kv_cache: KVCache | None,
    groups: Tensor | None,
) -> tuple[Tensor, dict[int | None, Tensor | None]]:
    """Positions of the new tokens and one mask for each kind of layer; tells the cache what comes.

    Args:
      layers: of the network.
      x: embeddings [B, T, D] of the new tokens.
      attention_mask, position_ids, kv_cache, groups: as in `GemmaModel.forward` (`groups` is its `token_groups`).

    Returns:
      positions: integers [B, T].
      masks: window (None for global layers) to bool [B, 1, T, S]; None stands for causal and nothing else.
    """
    B, T = x.shape[:2]
    check_tensors(attention_mask=attention_mask, position_ids=position_ids, token_groups=groups)
    valid = _valid(attention_mask, B, T, x.device)
    held = None if kv_cache is None else kv_cache.token_counts()
    plain = held is None and valid is None and position_ids is None and groups is None
    positions = _positions(position_ids, valid, held, (B, T), x.device)
    if groups is not None and groups.shape != (B, T):
        raise ShapeError(f"token_groups: expected the shape {(B, T)} of the new tokens, got {tuple(groups.shape)}")
    if kv_cache is not None:
        kv_cache.prepare(positions, valid)
    masks: dict[int | None, Tensor | None] = {}
    for spec in layers:
        if spec.window in masks:
            continue
        if plain and not spec.bidirectional and (spec.window is None or spec.window >= T):
            masks[spec.window] = None
            continue
        if kv_cache is not None:
            keys = kv_cache.key_positions(spec.index)
        else:
            keys = positions if valid is None else positions.masked_fill(~valid, -1)
        both = dict(bidirectional=spec.bidirectional, reach=spec.reach)
        seen = visible(positions, keys, window=spec.window, groups=groups, **both)
        if valid is not None:  # a query of padding may see nothing; let it see everything: finite, and never looked at
            seen |= ~seen.any(-1, keepdim=True)
        masks[spec.window] = seen[:, None]
    return positions, masks


def visible(
    queries: Tensor,
    keys: Tensor,
    *,
    window: int | None,
    bidirectional: bool = False,
    groups: Tensor | None = None,
    reach: tuple[int, int] | None = None,
) -> Tensor:
    """Positions of queries [B, T] and keys [B, S], -1 for a key that is none, to bool [B, T, S].

    `groups` [B, T] belong to the last T keys, which are the queries' own tokens. Tokens of one group other than 0 see
    each other both ways; those of a negative number also where the window would not reach (a PaliGemma 2 that is given
    a window keeps it from its prompt). `reach` is how far a bidirectional layer sees before and after, where that is not
    what the window says (T5Gemma's encoder).
    """
    distance = queries[:, :, None] - keys[:, None, :]
    if reach is not None:
        return (distance <= reach[0]) & (distance >= -reach[1]) & (keys >= 0)[:, None]
    if bidirectional:
        seen = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window // 2 + 1
        return seen & (keys >= 0)[:, None]
    seen = distance >= 0
    own = slice(seen.shape[2] - queries.shape[1], None)
    together = None
    if groups is not None and groups.shape[1] > 1:
        together = (groups[:, :, None] == groups[:, None, :]) & (groups != 0)[:, None]
        seen[:, :, own] |= together
    if window is not None:
        seen &= distance < window
        if together is not None:
            seen[:, :, own] |= together & (groups < 0)[:, None]
    return seen & (keys >= 0)[:, None]


def check_tensors(**arguments: Any) -> None:
    """Refuses lists and numpy arrays where a tensor belongs, by the argument's name; None passes."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise ShapeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; torch.as_tensor makes one")


def check_inputs(config: GemmaConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Refuses what would otherwise end in an error from inside PyTorch, or on a GPU in the death of the process."""
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
    if (input_ids is None) == (inputs_embeds is None):
        raise ShapeError("expected either input_ids or inputs_embeds, got " + ("none" if input_ids is None else "both"))
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size or not inputs_embeds.shape[1]:
            raise ShapeError(
                f"inputs_embeds: expected [B, T, {config.hidden_size}], T at least 1, got {tuple(inputs_embeds.shape)}"
            )
        return
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ShapeError(f"input_ids: expected integers [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}")
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise PromptError(f"input_ids: expected ids in 0..{config.vocab_size - 1}, got {bad}")


def check_activations(config: GemmaConfig, x: Tensor) -> None:
    """Refuses float16 where the activations do not fit into it."""
    if x.dtype == torch.float16 and config.use_qk_norm:
        raise ConfigError(
            "float16 cannot hold the activations of Gemma 3 and later (they exceed 65504 and turn into NaN): use "
            "bfloat16 or float32 weights"
        )


def _valid(attention_mask: Tensor | None, B: int, T: int, device: torch.device) -> Tensor | None:
    """Which new tokens are real, bool [B, T]; None if all are."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ShapeError(
            f"attention_mask: expected {B} rows with a column for each of the {T} new tokens (or of all tokens so "
            f"far), got the shape {tuple(attention_mask.shape)}"
        )
    valid = attention_mask[:, attention_mask.shape[1] - T :].to(device) != 0
    if not torch.compiler.is_compiling() and not valid.is_meta and bool(valid.all()):
        return None
    return valid


def _positions(given: Tensor | None, valid: Tensor | None, held: Tensor | None, shape: tuple, device) -> Tensor:
    if given is not None:
        if given.shape[-1] != shape[1] or given.ndim > 2 or given.is_floating_point():
            raise ShapeError(f"position_ids: expected integers {shape}, got {given.dtype} {tuple(given.shape)}")
        return given.to(device).long().expand(shape)
    if valid is None:
        positions = torch.arange(shape[1], device=device).expand(shape)
    else:
        positions = (valid.cumsum(1) - 1).clamp(min=0)
    return positions if held is None else positions + held[:, None]
