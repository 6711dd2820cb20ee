# SPDX-License-Identifier: Apache-2.0
"""The output head of a model as data, and the activations that it is applied to: what every loss is computed from.

A forward pass that is asked for logits of all positions builds [B, T, V]; losses take the activations instead
(`hidden_states`) and apply the head to a few positions at a time (`_chunked.py`). The networks are `gm/nn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn

from gemma.errors import ConfigError, DataError, ShapeError
from gemma.gm.nn import _layers, _lora, _quantization, _transformer
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, Bool, Float, Int, Params

_TABLE = "embedder/input_embedding"


@flax.struct.dataclass
class Head:
    """Activations to logits: a pytree of the parameters involved, so that gradients reach them.

    Attributes:
      table: [V, D], an array or packed.
      a: [V, r] of a LoRA adapter on the table, or None.
      b: [r, D] of the same.
      scale: what the adapter's part is multiplied by.
      cap: the soft-cap of the logits (Gemma 2), or None.
    """

    table: Array | Packed
    a: Array | None = None
    b: Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    cap: float | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits, capped; as those of the model, before they are rounded to its dtype."""
        logits = _layers.weight_einsum("...D,VD->...V", hidden, self.table, accumulate=jnp.float32)
        if self.a is not None:
            low = _layers.weight_einsum("...D,rD->...r", hidden, self.b, accumulate=jnp.float32)
            logits = logits + _layers.weight_einsum("...r,Vr->...V", low, self.a, accumulate=jnp.float32) * self.scale
        return logits if self.cap is None else jnp.tanh(logits / self.cap) * self.cap


def head(model: nn.Module, params: Params) -> Head:
    """The output head of a model.

    Args:
      model: a network of `gm.nn`, or `LoRA`, `QuantizationAwareWrapper` or `IntWrapper` around one.
      params: its whole tree. Weights may be packed.

    Returns:
      A callable pytree; its gradients are those of the leaves of `params` that it was made of.

    Raises:
      ConfigError: a model without such a head. ShapeError: the adapter that the model has on its table is missing.
    """
    lora = model if isinstance(model, _lora.LoRA) else None
    inner = model.model if lora is not None else model
    network = inner.model if isinstance(inner, _quantization.Mapped) else inner
    if not isinstance(network, _transformer.Transformer):
        raise ConfigError(
            f"model: expected a decoder of gm.nn (Gemma3_1B, Transformer, ...) or LoRA, QuantizationAwareWrapper or "
            f"IntWrapper around one, got {type(network).__name__}"
        )
    held = params.get("embedder") if isinstance(params, Mapping) else None
    if not isinstance(held, Mapping) or "input_embedding" not in held:
        raise ShapeError(f"params: expected the model's tree with {_TABLE!r}, got no such leaf")
    table = held["input_embedding"]
    if isinstance(inner, _quantization.Mapped):
        table = inner.seen({"embedder": {"input_embedding": table}})["embedder"]["input_embedding"]
    found = Head(table, cap=network.config.final_logit_softcap)
    if lora is None or not lora.tie_embedder or not lora.spec.wants(_TABLE):
        return found
    factors = held.get("lora", {})
    if "a" not in factors or "b" not in factors:
        raise ShapeError(
            "params: this LoRA has an adapter on the embedding, but embedder/lora/{a, b} are missing; take parameters of "
            "its `init`, or add an adapter with gemma.peft.merge_params"
        )
    return found.replace(a=factors["a"], b=factors["b"], scale=float(lora.spec.of(_TABLE).scale))


def hidden_states(
    model: nn.Module, params: Params, batch: Mapping[str, Any], *, rngs: Mapping[str, Any] | None = None
) -> Float[Array, "*B T D"]:
    """The activations after the final norm of a batch.

    Call it inside of `jax.jit`: the logits that the model also returns are never computed there. Outside, they are.

    Args:
      model: as in `head`.
      params: its whole tree.
      batch: `tokens` [*B, T], and where present `positions` [*B, T], `segment_ids` [*B, T] (packed rows),
        `attention_mask` [*B, T, T], `images` [*B, I, H, W, C]; other entries are ignored.
      rngs: random streams, `{"dropout": key}` to train with the dropout of a `LoRA`; None: no dropout.

    Raises:
      DataError: images in packed rows, or both a mask and segments.
    """
    segments, mask, images = (batch.get(name) for name in ("segment_ids", "attention_mask", "images"))
    positions = batch.get("positions")
    if images is not None and segments is not None:
        raise DataError("batch: rows with images cannot be packed; make the batches with packing=False")
    if mask is not None and segments is not None:
        raise DataError("batch: expected attention_mask or segment_ids, got both; packing_mask makes one of the other")
    if segments is not None:
        if positions is None:
            raise DataError("batch: packed rows (segment_ids) need positions that restart with each segment")
        mask = packing_mask(segments)
    if images is not None:
        positions = None  # the model counts over tokens and images; without images it would count the same
    arguments = dict(images=images, positions=positions, attention_mask=mask)
    given = {name: value for name, value in arguments.items() if value is not None}
    variables = {"params": params}
    return model.apply(variables, batch["tokens"], return_hidden_states=True, rngs=rngs, **given).hidden_states


def packing_mask(segment_ids: Int[Array, "*B T"]) -> Bool[Array, "*B T T"]:
    """Who may look at whom in rows that hold several examples, as the `attention_mask` of a model.

    A token sees itself and what comes before it in its own segment; sliding windows come on top, by positions, which
    restart in each segment. Segments 1 1 2 2 2 0 (0: padding, which nothing sees and which sees nothing):

        x . . . . .
        x x . . . .
        . . x . . .
        . . x x . .
        . . x x x .
        . . . . . .
    """
    ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim < 1:
        raise ShapeError(f"segment_ids: expected integers [..., T], got {ids.dtype} {tuple(ids.shape)}")
    index = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    causal = (index[None, :] <= index[:, None]).reshape((1,) * (ids.ndim - 1) + (ids.shape[-1],) * 2)
    queries, keys = ids[..., :, None], ids[..., None, :]
    return causal & (queries == keys) & (keys > 0)
