# SPDX-License-Identifier: Apache-2.0
"""T5Gemma in PyTorch: an encoder that reads both ways and a decoder that looks at it, from the blocks of
`gemma/modeling_gemma.py`. Parameters have Hugging Face's names.

The JAX network is `t5gemma.py` beside this file; T5Gemma 2 exists there only. Masks, caches, generating and loading are
those of `gemma/_torch/`. Axis letters: B batch, S input tokens, T target tokens, Z encoder width, D decoder width, N
query heads, K key heads, H head size, V vocabulary.

    x ── norm ── self-attention ── norm ── + ── norm ── cross-attention ── norm ── + ── norm ── MLP ── norm ── + ──
    └──────────────────────────────────────┘└──────────── decoder only ────────────┘└────────────────────────┘
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemma import config as configs
from gemma import hub, seq2seq
from gemma._torch import generate as generating
from gemma._torch.attention import attend
from gemma._torch.linear import GemmaLinear, linear
from gemma._torch.load import load_weights, without_values
from gemma._torch.loss import IGNORE, next_token_loss
from gemma._torch.masks import check_inputs, check_tensors, layer_masks
from gemma.checkpoint import open_checkpoint
from gemma.config import GemmaConfig, LayerSpec, T5GemmaConfig
from gemma.errors import CheckpointError, ConfigError, PromptError, ShapeError, UnsupportedError
from gemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaRMSNorm, GemmaRotaryEmbedding, KVCache

__all__ = ["T5GemmaConfig", "T5GemmaCrossAttention", "T5GemmaForConditionalGeneration", "T5GemmaLayer", "T5GemmaMemory"]
__all__ += ["T5GemmaModel", "T5GemmaSide"]


class T5GemmaMemory(NamedTuple):
    """What a decoder looks at: of each layer, keys and values [B, K, S, H] of the input, and which tokens are real."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor  # bool [B, S]


class T5GemmaCrossAttention(nn.Module):
    """Grouped-query attention over the encoded input: no RoPE and no window; scale and cap are the layer's."""

    def __init__(self, config: GemmaConfig, layer_idx: int, width: int):
        super().__init__()
        self.spec = config.layers[layer_idx]
        d, heads, h = config.hidden_size, self.spec.num_heads, self.spec.head_dim
        self.q_proj = GemmaLinear(d, heads * h)
        self.k_proj = GemmaLinear(width, self.spec.num_kv_heads * h)
        self.v_proj = GemmaLinear(width, self.spec.num_kv_heads * h)
        self.o_proj = GemmaLinear(heads * h, d)

    def remember(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, S, H] of what the encoder computed, [B, S, Z]."""
        k, v = (
            proj(hidden).unflatten(2, (-1, self.spec.head_dim)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        return k, v

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]; `mask` is bool [B, 1, T, S]."""
        q = self.q_proj(x).unflatten(2, (-1, self.spec.head_dim)).transpose(1, 2)
        out = attend(q, *memory, mask, scale=self.spec.query_scale, softcap=self.spec.attn_softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class T5GemmaLayer(nn.Module):
    """One layer of either side; `width` (Z) makes it a decoder's."""

    def __init__(self, config: GemmaConfig, layer_idx: int, width: int | None = None):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = GemmaAttention(config, layer_idx), GemmaMLP(config, layer_idx)
        self.pre_self_attn_layernorm, self.post_self_attn_layernorm = GemmaRMSNorm(d, eps), GemmaRMSNorm(d, eps)
        self.cross_attn = None
        if width is not None:
            self.cross_attn = T5GemmaCrossAttention(config, layer_idx, width)
            self.pre_cross_attn_layernorm, self.post_cross_attn_layernorm = GemmaRMSNorm(d, eps), GemmaRMSNorm(d, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = GemmaRMSNorm(d, eps), GemmaRMSNorm(d, eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        kv_cache: KVCache | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        added = self.self_attn(self.pre_self_attn_layernorm(x), rope, mask, kv_cache)
        x = x + self.post_self_attn_layernorm(added)
        if self.cross_attn is not None:
            added = self.cross_attn(self.pre_cross_attn_layernorm(x), memory, memory_mask)
            x = x + self.post_cross_attn_layernorm(added)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class T5GemmaSide(nn.Module):
    """Embedding, layers and final norm of the encoder, or (with `width`) of the decoder."""

    def __init__(self, config: GemmaConfig, specs: tuple[LayerSpec, ...], width: int | None = None):
        super().__init__()
        self.config, self._specs = config, specs
        self.embed_tokens = GemmaEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(T5GemmaLayer(config, spec.index, width) for spec in specs)
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._kinds = [(s.head_dim, s.rope_base, s.rope_scale, s.rope_fraction) for s in specs]
        self._rotations = {kind: GemmaRotaryEmbedding(*kind) for kind in self._kinds}

    def remember(self, hidden: Tensor, valid: Tensor) -> T5GemmaMemory:
        """What each layer looks at of the encoder's activations [B, S, Z]."""
        return T5GemmaMemory(tuple(layer.cross_attn.remember(hidden) for layer in self.layers), valid)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        kv_cache: KVCache | None = None,
        memory: T5GemmaMemory | None = None,
    ) -> Tensor:
        """Ids [B, T] to activations [B, T, D] after the final norm."""
        check_inputs(self.config, input_ids, None)
        x = self.embed_tokens(input_ids)
        positions, masks = layer_masks(self._specs, x, attention_mask, None, kv_cache=kv_cache, groups=None)
        ropes = {kind: rotation(positions) for kind, rotation in self._rotations.items()}
        seen = None if memory is None else memory.valid[:, None, None].expand(-1, 1, x.shape[1], -1)
        keys = [None] * len(self.layers) if memory is None else memory.layers
        for layer, spec, kind, key in zip(self.layers, self._specs, self._kinds, keys):
            x = layer(x, ropes[kind], masks[spec.window], kv_cache, key, seen)
        return self.norm(x)


class T5GemmaModel(nn.Module):
    """Both sides, without the head."""

    def __init__(self, config: T5GemmaConfig, window: str = "hf"):
        super().__init__()
        self.encoder = T5GemmaSide(config.encoder, configs.encoder_layers(config, window=window))
        self.decoder = T5GemmaSide(config.decoder, config.decoder.layers, config.encoder.hidden_size)


class T5GemmaForConditionalGeneration(nn.Module):
    """A T5Gemma with its head, which shares the weight of the decoder's embedding unless the configuration unties it.

      model = T5GemmaForConditionalGeneration.from_pretrained("path/to/t5gemma-s-s-prefixlm")
      ids = torch.tensor(encode_inputs(tokenizer, "Translate to French: good morning"))
      answer = model.generate(ids.long(), temperature=0, max_new_tokens=32)

    Attributes:
      config: both sides.
      window: "hf" or "deepmind", see `gemma.config.encoder_layers`.
    """

    def __init__(self, config: T5GemmaConfig, *, window: str = "hf"):
        super().__init__()
        if isinstance(config, configs.T5Gemma2Config) or not isinstance(config, T5GemmaConfig):
            raise ConfigError(f"expected a T5GemmaConfig, got {type(config).__name__}: T5Gemma 2 runs in JAX only")
        self.config, self.window = config, window
        self.model = T5GemmaModel(config, window)
        if config.decoder.tie_word_embeddings:
            self.register_load_state_dict_pre_hook(_drop_tied_copy)
        else:
            self.lm_head = nn.Module()
            self.lm_head.out_proj = GemmaLinear(config.decoder.hidden_size, config.decoder.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        window: str = "hf",
    ) -> T5GemmaForConditionalGeneration:
        """Reads a Hugging Face folder or safetensors file, strictly; in evaluation mode.

        Raises:
          HubError, CheckpointError, WeightsMismatch: the checkpoint cannot be found or used.
          UnsupportedError: it holds another model.
        """
        path = hub.resolve(path)
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config()
            if not isinstance(config, T5GemmaConfig) or isinstance(config, configs.T5Gemma2Config):
                kind = type(config).__name__.removesuffix("Config")
                hint = "T5Gemma 2 runs in JAX" if kind == "T5Gemma2" else "see gemma.modeling_gemma for decoders"
                raise UnsupportedError(f"{path}: holds a {kind} model; expected a T5Gemma ({hint})")
            with without_values():
                model = cls(config, window=window)
            load_weights(model, checkpoint, config, dtype=dtype, device=device)
        return model.eval()

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, D] of the head."""
        tied = self.config.decoder.tie_word_embeddings
        return self.model.decoder.embed_tokens.weight if tied else self.lm_head.out_proj.weight

    def get_encoder(self) -> T5GemmaSide:
        return self.model.encoder

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> T5GemmaMemory:
        """Reads an input: what every later step of the decoder looks at.

        Args:
          input_ids: [B, S].
          attention_mask: [B, S], 0 on padding; None: the pad id is padding.

        Raises:
          PromptError: (a ValueError) a row without a token, or an id outside of the table.
          ShapeError: (a ValueError) wrong shapes or dtypes.
        """
        check_inputs(self.config.encoder, input_ids, None)
        check_tensors(attention_mask=attention_mask)
        mask = input_ids != self.config.encoder.pad_token_id if attention_mask is None else attention_mask != 0
        if mask.shape != input_ids.shape:
            raise ShapeError(f"attention_mask: expected the shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        empty = (~mask.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise PromptError(f"input_ids: row {empty[0]} is empty, all padding: an encoder needs a token to read")
        return self.model.decoder.remember(self.model.encoder(input_ids, mask), mask.to(input_ids.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory: T5GemmaMemory | None = None,
        kv_cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> dict[str, Any]:
        """The logits after each token of the decoder.

        Args:
          input_ids, attention_mask: what the encoder reads, as in `encode`; None where `memory` comes.
          decoder_input_ids: [B, T]: bos, then the tokens so far. None: the labels, shifted to the right once.
          decoder_attention_mask: [B, T], 0 on padding; None: without a cache the pad id is padding, with one nothing is.
          labels: [B, T], what is to be said after each token, -100 where nothing is; they are not shifted again. The
            loss is the mean over what counts, and no logits come back unless `logits_to_keep` is set.
          memory: of an earlier `encode`.
          kv_cache: of the decoder's own attention; it is filled.
          logits_to_keep: logits of the last so many positions; 0: of all.

        Returns:
          "logits" [B, T or logits_to_keep, V] or None, "memory", "kv_cache", and "loss" (float32 []) if labels came.
        """
        check_tensors(labels=labels, decoder_input_ids=decoder_input_ids)
        if memory is None:
            if input_ids is None:
                raise ShapeError("expected input_ids, or the memory of an input that was read before, got neither")
            memory = self.encode(input_ids, attention_mask)
        decoder = self.config.decoder
        if decoder_input_ids is None:
            if labels is None:
                raise ShapeError("expected decoder_input_ids, or labels that they follow from, got neither")
            ids = dict(bos=decoder.bos_token_id, pad=decoder.pad_token_id)
            decoder_input_ids = torch.from_numpy(seq2seq.shift_right(labels.cpu().numpy(), **ids)).to(labels)
        elif labels is not None:
            seq2seq.check_aligned(decoder_input_ids.cpu().numpy(), labels.cpu().numpy(), decoder.pad_token_id)
        if len(decoder_input_ids) != len(memory.valid):
            raise ShapeError(f"expected {len(memory.valid)} rows of decoder_input_ids, got {len(decoder_input_ids)}")
        if decoder_attention_mask is None and kv_cache is None:
            decoder_attention_mask = decoder_input_ids != decoder.pad_token_id
        hidden = self.model.decoder(decoder_input_ids, decoder_attention_mask, kv_cache, memory)
        result: dict[str, Any] = {"logits": None, "memory": memory, "kv_cache": kv_cache}
        if labels is not None:
            result["loss"] = _loss(hidden, self.head_weight, labels, decoder.final_logit_softcapping)
        if labels is None or logits_to_keep:
            result["logits"] = self.logits(hidden[:, -logits_to_keep:])
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Activations [..., D] to logits [..., V] in their dtype; the cap in float32."""
        logits, cap = linear(hidden, self.head_weight), self.config.decoder.final_logit_softcapping
        return logits if cap is None else (torch.tanh(logits.float() / cap) * cap).to(logits.dtype)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """What the decoder writes for inputs [B, S]: ids [B, new], without the bos that it starts with.

        Options are those of `gemma/_torch/generate.py`, for example `max_new_tokens=40, temperature=0`.
        """
        writer = _Writer(self, self.encode(input_ids, attention_mask))
        bos = torch.full((len(input_ids), 1), self.config.decoder.bos_token_id, device=input_ids.device)
        return generating.generate(writer, bos, **options)[:, 1:]


class _Writer(nn.Module):
    """A decoder with its memory, in the form of a decoder-only model, which is what generating wants."""

    def __init__(self, model: T5GemmaForConditionalGeneration, memory: T5GemmaMemory):
        super().__init__()
        self.inner, self.memory, self.config = model, memory, model.config.decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kv_cache: Any = None, logits_to_keep: int = 0
    ) -> dict[str, Any]:
        more = dict(decoder_attention_mask=attention_mask, kv_cache=kv_cache, logits_to_keep=logits_to_keep)
        return self.inner(memory=self.memory, decoder_input_ids=input_ids, **more)


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """`next_token_loss` compares position t with label t + 1; here label t belongs to position t."""
    first = torch.full_like(labels[:, :1], IGNORE)
    last = torch.zeros_like(hidden[:, :1])
    return next_token_loss(torch.cat([hidden, last], 1), weight, torch.cat([first, labels], 1), softcap=softcap)


def _drop_tied_copy(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Removes the head from a state dict that holds the shared weight twice; a head of its own is an error."""
    name, table = f"{prefix}lm_head.out_proj.weight", f"{prefix}model.decoder.embed_tokens.weight"
    copy = state.pop(name, None)
    if copy is not None and table in state and not torch.equal(copy, state[table]):
        raise CheckpointError(f"{name} differs from {table}, but the configuration ties them")
