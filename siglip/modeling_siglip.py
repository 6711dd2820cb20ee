# SPDX-License-Identifier: Apache-2.0
"""SigLIP's vision transformer in PyTorch: pixels to one vector per patch, and to one per image where it has a head.

The parameters carry Hugging Face's names, so a published tower loads without renaming. Sizes are in `gemma.config`,
decoding and resizing of pictures in `gemma.image`, the JAX twin in `gemma/gm/vision`. What a language model does with
the patches is next door: `modeling_join.py`, `paligemma/modeling_paligemma.py`, `gemma/modeling_gemma3.py`.

Axes: B images, C channels, P patches, E the tower's width, A heads of U values each.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma import hub
from gemma._torch.load import as_numpy, check_dtype, without_values
from gemma.checkpoint import Checkpoint, load_tensors, open_checkpoint
from gemma.config import SiglipVisionConfig
from gemma.errors import CheckpointError, ConfigError, ShapeError


class SiglipVisionEmbeddings(nn.Module):
    """Cuts the picture into patches, projects each, and adds its learned position. No class token."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, image_size, image_size], values in -1..1, to [B, P, E]: patches row by row from the top left."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Every patch attends to every patch of its image; the projections have biases."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, E] to [B, P, E]."""
        q, k, v = (_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_merge(F.scaled_dot_product_attention(q, k, v)))


class SiglipMLP(nn.Module):
    """Two linear maps around a GELU in its tanh form."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _ProbeAttention(nn.Module):
    """Attention of one learned query over all patches; q, k and v are one fused parameter, as they are published."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        """[B, 1, E] and [B, P, E] to [B, 1, E]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            _heads(F.linear(source, weight, bias), self.num_heads)
            for source, weight, bias in zip((query, x, x), weights, biases)
        )
        return self.out_proj(_merge(F.scaled_dot_product_attention(q, k, v)))


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    """The pooling head of a stand-alone tower: PaliGemma and Gemma 3 are published without it."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = _ProbeAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, E] to [B, E]."""
        pooled = self.attention(self.probe.expand(x.shape[0], -1, -1), x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVisionTransformer(nn.Module):
    """A SigLIP tower: So400m/14 at 224, 448 or 896 pixels, or any other `SiglipVisionConfig`.

    Example:
      tower = SiglipVisionTransformer(SiglipVisionConfig(image_size=448))
      patches = tower(pixel_values)                       # [B, 1024, 1152]
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.vision_use_head:
            self.head = SiglipMultiheadAttentionPoolingHead(config)
        self.register_load_state_dict_pre_hook(_without_root)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """One vector per patch.

        Args:
          pixel_values: [B, C, H, W], H = W = `config.image_size`, values in -1..1 (`gemma.image.normalize`, channels
            moved to the front).

        Returns:
          [B, P, E] after the final norm, patches row by row from the top left, in the dtype of the weights.

        Raises:
          ShapeError: another size or number of channels. Each resolution has its own table of positions, so a picture
            is resized to the tower's, never the other way round.
        """
        self._check(pixel_values)
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))

    def pool(self, patches: Tensor) -> Tensor:
        """[B, P, E], what `forward` returned, to one vector per image [B, E]: the head of a stand-alone tower."""
        if not self.config.vision_use_head:
            raise ConfigError(
                "this tower has no pooling head (vision_use_head is false, as in PaliGemma and Gemma 3): use the patch "
                "vectors that calling it returns, or build it with SiglipVisionConfig(vision_use_head=True)"
            )
        return self.head(patches)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: SiglipVisionConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> SiglipVisionTransformer:
        """Loads a stand-alone tower, strictly.

        Args:
          path: a folder, a file, or a name that `gemma.hub.resolve` knows, of one tower.
          config: None takes the checkpoint's own.
          dtype: of the parameters; None keeps the file's.
          device: where they are put.

        Raises:
          CheckpointError: not a tower, or its tensors do not fit: all of them are listed, nothing is half loaded.
        """
        path = hub.resolve(path)
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config() if config is None else config
            if not isinstance(config, SiglipVisionConfig):
                raise CheckpointError(
                    f"{path}: expected a SigLIP tower alone, but this checkpoint is of a {type(config).__name__}; "
                    f"PaliGemma and Gemma 3 have their own classes"
                )
            with without_values():
                model = cls(config)
            model.load_state_dict(_read_tower(checkpoint, config, dtype, device), strict=True, assign=True)
        return model.eval()

    def _check(self, pixel_values: Tensor) -> None:
        c, size = self.config.num_channels, self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (c, size, size):
            raise ShapeError(
                f"pixel_values: expected [B, {c}, {size}, {size}] (channels first, the tower's own resolution), got "
                f"{list(pixel_values.shape)}; resize pictures with gemma.image.resize"
            )
        if not pixel_values.is_floating_point():
            raise ShapeError(
                f"pixel_values: expected floating-point values in -1..1, got {pixel_values.dtype}; "
                f"gemma.image.normalize makes them from uint8"
            )


def _read_tower(
    checkpoint: Checkpoint, config: SiglipVisionConfig, dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The parameters of a tower by name; one that several tensors share (q, k and v of the head) is filled in parts."""
    dtype = check_dtype(dtype, config)
    tensors = list(load_tensors(checkpoint, config))
    if dtype is None:
        stored = {reader.dtype for tensor, reader in tensors if len(tensor.shape) > 1}
        dtype = torch.bfloat16 if stored == {"BF16"} else torch.float32
    state: dict[str, Tensor] = {}
    for tensor, reader in tensors:
        slot = tensor.slots["hf"]
        whole = state.setdefault(slot.name, torch.empty(slot.shape, dtype=dtype))
        reader(out=as_numpy(whole if slot.rows is None else whole[slot.rows[0] : slot.rows[1]]))
        checkpoint.release(reader.slot.name)
    return {name: value.to(device) for name, value in state.items()}


def _without_root(tower: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict`: other libraries keep the tower in a `vision_model` of its own."""
    root = f"{prefix}vision_model."
    for name in [name for name in state if name.startswith(root)]:
        state[prefix + name.removeprefix(root)] = state.pop(name)


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, P, (A U)] to [B, A, P, U]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """[B, A, P, U] to [B, P, (A U)]."""
    return x.transpose(1, 2).flatten(2)
