# SPDX-License-Identifier: Apache-2.0
"""Gemma in PyTorch, one file to read from top to bottom: Gemma 1, 2 and 3 text models from one `GemmaConfig`.

What a layer does (window, RoPE, scales, caps) comes from its `LayerSpec`; nothing here asks for a generation by name.
Beside it: masks, the preallocated cache, generating, loading and the loss are in `gemma/_torch/`, sizes in
`gemma/config.py`, images in `gemma/modeling_gemma3.py` and `paligemma/`. Parameters have Hugging Face's names. Axis
letters: B batch, T queries, S keys, N query heads, K key heads, G = N/K, H head size, D width, F MLP width, V vocabulary.

    x ── norm ── attention ─┬─ (norm) ── + ── norm ── MLP ── (norm) ── + ──      the norms in brackets: Gemma 2 and 3
    └───────────────────────┼────────────┘└───────────────────────────┘
                            └ qk norm (Gemma 3), RoPE, scale, soft-cap (Gemma 2), mask, softmax
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma._torch.attention import attend
from gemma._torch.linear import GemmaLinear, drop_tied_copy, linear
from gemma._torch.masks import check_activations, check_inputs, layer_masks
from gemma.config import GemmaConfig
from gemma.errors import ShapeError, UnsupportedError

__all__ = ["GemmaAttention", "GemmaConfig", "GemmaDecoderLayer", "GemmaEmbedding", "GemmaForCausalLM", "GemmaLinear"]
__all__ += ["GemmaMLP", "GemmaModel", "GemmaRMSNorm", "GemmaRotaryEmbedding", "KVCache", "attend", "rotate"]


class KVCache:
    """Keys and values of the tokens read so far; it grows by concatenation.

    Before the layers `update` it, the model says with `prepare` where the new tokens stand and which are padding, so
    that later calls need no mask for earlier tokens. `gemma/_torch/cache.py` has the same face without copying.

      cache = KVCache()
      model(input_ids=prompt, kv_cache=cache)["logits"]        # [B, T, V]
      model(input_ids=next_token, kv_cache=cache)["logits"]    # [B, 1, V]: reads one token
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # by layer [B, K, S, H]
        self.values: list[Tensor] = []
        self.positions: Tensor | None = None  # [B, S], -1 is padding

    def num_items(self) -> int:
        """Slots in use, padding included."""
        return self.keys[0].shape[-2] if self.keys else 0

    def token_counts(self) -> Tensor | None:
        """Tokens of each row, padding not counted: [B]; None if there are none at all."""
        if not self.keys:
            return None
        return (self._positions() >= 0).sum(1)

    def prepare(self, positions: Tensor, valid: Tensor | None) -> None:
        """Announces the next tokens: their positions [B, T], and which are no padding (None: all)."""
        new = positions if valid is None else positions.masked_fill(~valid, -1)
        if self.keys and self.keys[0].shape[0] != new.shape[0]:
            raise ShapeError(f"kv_cache: it holds {self.keys[0].shape[0]} rows, but {new.shape[0]} rows came")
        self.positions = torch.cat([self._positions(), new], 1) if self.keys else new

    def key_positions(self, layer_idx: int) -> Tensor:
        """Positions [B, S] of the keys that `update` will return, -1 where a key must not be looked at."""
        assert self.positions is not None, "prepare() comes first"
        return self.positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, K, T, H] of one layer; returns all it holds now, [B, K, S, H] each."""
        if layer_idx == len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
        elif layer_idx < len(self.keys):
            self.keys[layer_idx] = torch.cat([self.keys[layer_idx], key_states], dim=-2)
            self.values[layer_idx] = torch.cat([self.values[layer_idx], value_states], dim=-2)
        else:
            raise ShapeError(f"kv_cache: layer {layer_idx} came before layer {len(self.keys)}; layers come in order")
        return self.keys[layer_idx], self.values[layer_idx]

    def _positions(self) -> Tensor:
        """Of what is held. Whoever filled the cache without `prepare` means consecutive tokens."""
        if self.positions is not None:
            return self.positions[:, : self.num_items()]
        return torch.arange(self.num_items(), device=self.keys[0].device).expand(self.keys[0].shape[0], -1)


class GemmaRMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` over the last axis; computed in float32, rounded to the input's dtype last."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class GemmaRotaryEmbedding(nn.Module):
    """Sines and cosines of the rotation angles: float32 from integer positions, whatever the model's dtype is. It holds
    no tensor, so that `model.to(dtype)` rounds nothing and a model built on the meta device misses nothing.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0, scale: float = 1.0, fraction: float = 1.0):
        super().__init__()
        self.head_dim, self.base, self.scale, self.fraction = head_dim, base, scale, fraction

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T], in tokens, to float32 (cos, sin), [B, 1, T, H]: cos twice; -sin, then sin."""
        pairs = self.head_dim // 2
        rotating = int(self.fraction * self.head_dim // 2)
        j = torch.arange(pairs, device=position_ids.device, dtype=torch.float32)
        # The power in float64, the division in float32, as in the JAX network; pairs that do not rotate: angle 0.
        timescale = torch.pow(self.base, j.double() * (2.0 / self.head_dim)).float()
        timescale = torch.where(j < rotating, timescale, torch.inf)
        angles = position_ids[:, None, :, None].float() / timescale / self.scale
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (j, j + H/2) of every head [B, N, T, H]; float32 inside, returned in the input's dtype."""
    cos, sin = rope
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class GemmaEmbedding(nn.Embedding):
    """Token ids to embeddings, scaled by sqrt(D) rounded to the dtype of the weights (in bfloat16, 25.25 for 640)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = super().forward(input_ids)
        return rows * torch.full((), self.embedding_dim**0.5, dtype=rows.dtype, device=rows.device)


class GemmaMLP(nn.Module):
    """The gated MLP `down(gelu(gate(x)) * up(x))`; GELU in its tanh form."""

    def __init__(self, config: GemmaConfig, layer_idx: int = 0):
        super().__init__()
        d, f = config.hidden_size, config.layers[layer_idx].mlp_size
        self.gate_proj, self.up_proj, self.down_proj = GemmaLinear(d, f), GemmaLinear(d, f), GemmaLinear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaAttention(nn.Module):
    """Grouped-query attention of one layer, over the new tokens and what the cache holds."""

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.spec = layer_idx, config.layers[layer_idx]
        d, h = config.hidden_size, self.spec.head_dim
        self.q_proj = GemmaLinear(d, self.spec.num_heads * h)
        self.k_proj = GemmaLinear(d, self.spec.num_kv_heads * h)
        self.v_proj = GemmaLinear(d, self.spec.num_kv_heads * h)
        self.o_proj = GemmaLinear(self.spec.num_heads * h, d)
        if self.spec.qk_norm:
            self.q_norm = GemmaRMSNorm(h, config.rms_norm_eps)
            self.k_norm = GemmaRMSNorm(h, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> Tensor:
        """Activations [B, T, D] to [B, T, D]; `rope` is (cos, sin) of the positions, `mask` as in `attend`."""
        heads = (*x.shape[:2], -1, self.spec.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # [B, N, T, H]
        k = self.k_proj(x).view(heads).transpose(1, 2)  # [B, K, T, H]
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)
        out = attend(q, k, v, mask, scale=self.spec.query_scale, softcap=self.spec.attn_softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GemmaDecoderLayer(nn.Module):
    """Attention and MLP with their norms. The names are Hugging Face's: without post norms (Gemma 1)
    `post_attention_layernorm` stands before the MLP, with them (Gemma 2 and 3) it is what its name says.
    """

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.post_norms = config.use_post_norms
        self.self_attn, self.mlp = GemmaAttention(config, layer_idx), GemmaMLP(config, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = GemmaRMSNorm(d, eps), GemmaRMSNorm(d, eps)
        if self.post_norms:
            self.pre_feedforward_layernorm = GemmaRMSNorm(d, eps)
            self.post_feedforward_layernorm = GemmaRMSNorm(d, eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; arguments as in GemmaAttention."""
        added = self.self_attn(self.input_layernorm(x), rope, mask, kv_cache)
        if not self.post_norms:
            x = x + added
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(added)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaModel(nn.Module):
    """The decoder without its head: token ids or embeddings to activations after the final norm."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        if not config.is_classic:
            raise UnsupportedError("the PyTorch models are Gemma 1 to 3; Gemma 3n and 4 run in JAX: gm.nn.Transformer")
        self.config = config
        self.embed_tokens = GemmaEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._specs = config.layers
        # One rotation for each kind of layer; layers of a kind share its table.
        self._kinds = [(s.head_dim, s.rope_base, s.rope_scale, s.rope_fraction) for s in self._specs]
        self._rotations = {kind: GemmaRotaryEmbedding(*kind) for kind in self._kinds}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        token_groups: Tensor | None = None,
    ) -> dict[str, Any]:
        """Reads T new tokens of each row.

        Args:
          input_ids: [B, T], or None if `inputs_embeds` come.
          attention_mask: [B, T] or [B, S], not zero where there is a token; the last T columns count, and padding may
            be anywhere: what an earlier call called padding stays so. None: no padding.
          position_ids: [B, T], 0-based, in tokens. None: counted over the real tokens, on top of what the cache holds.
          kv_cache: a KVCache or one of `gemma/_torch/cache.py`; it is filled. None: nothing is kept.
          inputs_embeds: [B, T, D], scaled already, in the weights' dtype.
          token_groups: integers [B, T]: tokens of one row with the same positive number see each other both ways, as
            far as the layer's window reaches; 0 is an ordinary causal token. Earlier calls' groups are not looked at.

        Returns:
          "last_hidden_state" [B, T, D] after the final norm (of padding: finite, without meaning), and "kv_cache".
        """
        check_inputs(self.config, input_ids, inputs_embeds)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_activations(self.config, x)
        positions, masks = layer_masks(
            self._specs, x, attention_mask, position_ids, kv_cache=kv_cache, groups=token_groups
        )
        ropes = {kind: rotation(positions) for kind, rotation in self._rotations.items()}
        for layer, spec, kind in zip(self.layers, self._specs, self._kinds):
            x = layer(x, ropes[kind], masks[spec.window], kv_cache)
        return {"last_hidden_state": self.norm(x), "kv_cache": kv_cache}


class GemmaForCausalLM(nn.Module):
    """A Gemma text model with its head, which shares the embedding's weight unless the configuration unties it.

    model = GemmaForCausalLM.from_pretrained("demo")
    ids = model.generate(prompt_ids, temperature=0, max_new_tokens=14)
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)
        if config.tie_word_embeddings:  # other libraries' state dicts hold the shared weight twice
            self.register_load_state_dict_pre_hook(drop_tied_copy)
        else:
            self.lm_head = GemmaLinear(config.hidden_size, config.vocab_size)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device="cpu", quantize=None
    ):
        """Reads a checkpoint: a folder, a safetensors or GGUF file, or `demo`; see `gemma/_torch/load.py`.

        With `quantize`, matrices are packed and run so, on a CPU: "keep" as the file holds them, "Q8_0", "Q4_0", ...
        """
        from gemma._torch.load import text_from_pretrained

        return text_from_pretrained(cls, path, dtype=dtype, device=device, quantize=quantize)

    def get_input_embeddings(self) -> GemmaEmbedding:
        return self.model.embed_tokens

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, D] of the head: a tensor, or a `gemma._torch.packed.PackedWeight`."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Activations [..., D] to logits [..., V] in their dtype; the cap of Gemma 2 in float32."""
        logits, cap = linear(hidden, self.head_weight), self.config.final_logit_softcapping
        return logits if cap is None else (torch.tanh(logits.float() / cap) * cap).to(logits.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        token_groups: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> dict[str, Any]:
        """Arguments as in GemmaModel, and

          labels: [B, T], the ids themselves, -100 where nothing is to be learnt: position t is compared with label
            t + 1. The loss is the mean over what counts, and no logits come back unless `logits_to_keep` is set.
          logits_to_keep: logits of the last so many positions; 0: of all.

        Returns "logits" [B, T or logits_to_keep, V] or None, "kv_cache", and "loss" (float32 []) if labels came.
        """
        out = self.model(input_ids, attention_mask, position_ids, kv_cache, inputs_embeds, token_groups)
        hidden, result = out["last_hidden_state"], {"logits": None, "kv_cache": kv_cache}
        if labels is not None:
            from gemma._torch.loss import next_token_loss

            cap = self.config.final_logit_softcapping
            result["loss"] = next_token_loss(hidden, self.head_weight, labels, softcap=cap)
        if labels is None or logits_to_keep:
            result["logits"] = self.logits(hidden[:, -logits_to_keep:])
        return result

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Continues token ids [B, T], for example `max_new_tokens=40, temperature=0`; see `gemma/_torch/generate.py`."""
        from gemma._torch.generate import generate

        return generate(self, input_ids, **options)
