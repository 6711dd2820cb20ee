# SPDX-License-Identifier: Apache-2.0
"""SigLIP's vision transformer in Flax linen, with the module and parameter names of the published JAX checkpoints.

It knows pixels that are already normalized and of the right size; pooling, soft tokens and stop-gradient are in
`_vision.py`, pixels in `_preprocess.py`. Axis letters: B images, Y and X pixels of a patch, C channels, P patches,
E width, A heads, U head size, M MLP width. Equivalent to SiglipVisionModel of Hugging Face transformers.

    pixels ── patches ── embedding + position ──┬─ LayerNorm ── attention ── + ─┬─ LayerNorm ── MLP ── + ── x depth
                                                └────────────────────────────┘  └──────────────────────┘
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma.config import SiglipVisionConfig
from gemma.errors import ConfigError, ShapeError
from gemma.gm.typing import Array, DType, Float

_SIZES = SiglipVisionConfig()  # of So400m/14, the tower of every published model

# Attention weights that exist at once, in numbers (64 MiB of float32). At 896 pixels one image has 16 x 4096 x 4096 of
# them, a GiB per layer; the queries then go in blocks, one image at a time. Small towers go in one piece.
SCORES_AT_ONCE = 2**24


def attend(
    queries: Float[Array, "B P A U"], keys: Float[Array, "B P A U"], values: Float[Array, "B P A U"]
) -> Float[Array, "B P A U"]:
    """Full attention, softmax in float32, in blocks of queries where the weights would not fit; see SCORES_AT_ONCE."""
    B, P, A, U = queries.shape
    S = keys.shape[1]
    if B * P * A * S <= SCORES_AT_ONCE:
        return jax.vmap(_attend)(queries, keys, values)
    rows = min(P, max(1, SCORES_AT_ONCE // (A * S)))
    blocks = -(-P // rows)

    def one_image(image):
        q, k, v = image
        q = jnp.pad(q, ((0, blocks * rows - P), (0, 0), (0, 0))).reshape(blocks, rows, A, U)
        # Without the checkpoint, a gradient would keep the weights of every block.
        mixed = jax.lax.map(jax.checkpoint(lambda block: _attend(block, k, v)), q)
        return mixed.reshape(blocks * rows, A, U)[:P]

    return jax.lax.map(one_image, (queries, keys, values))


def _attend(q: Float[Array, "P A U"], k: Float[Array, "S A U"], v: Float[Array, "S A U"]) -> Float[Array, "P A U"]:
    scores = jnp.einsum("PAU,SAU->APS", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("APS,SAU->PAU", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and projects each: a convolution whose stride is its size, as one product.

    Attributes:
      width: E.
      patch_size: Y and X.
      dtype: of the computation.
    """

    width: int
    patch_size: tuple[int, int]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B P E"]:
        B, H, W, C = images.shape
        Y, X = self.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (Y, X, C, self.width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,), jnp.float32)
        patches = images.astype(self.dtype).reshape(B, H // Y, Y, W // X, X, C).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(B, (H // Y) * (W // X), Y * X * C)
        kernel = kernel.astype(self.dtype).reshape(Y * X * C, self.width)
        return jnp.einsum("BPK,KE->BPE", patches, kernel) + bias.astype(self.dtype).reshape(1, 1, -1)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU (tanh form) between them.

    Attributes:
      mlp_dim: M; None: four times the width.
      dropout: share of activations dropped in training.
      dtype_mm: dtype of the computation.
    """

    mlp_dim: int | None = None
    dropout: float = 0.0
    dtype_mm: DType = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"], deterministic: bool = True) -> Float[Array, "*B E"]:
        dense = functools.partial(
            nn.Dense, dtype=jnp.dtype(self.dtype_mm), bias_init=nn.initializers.normal(stddev=1e-6)
        )
        hidden = nn.gelu(dense(self.mlp_dim or 4 * x.shape[-1], name="Dense_0")(x), approximate=True)
        hidden = nn.Dropout(rate=self.dropout)(hidden, deterministic)
        return dense(x.shape[-1], name="Dense_1")(hidden)


class MultiHeadDotProductAttention(nn.Module):
    """Attention of every query to every key, with biases.

    Attributes:
      num_heads: A.
      dtype_mm: dtype of the computation.
    """

    num_heads: int
    dtype_mm: DType = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"], keys: Float[Array, "B S E"]) -> Float[Array, "B P E"]:
        A, E = self.num_heads, x.shape[-1]
        if E % A:
            raise ConfigError(f"num_heads: the width {E} is not a multiple of {A}")
        dense = functools.partial(nn.DenseGeneral, features=(A, E // A), axis=-1, dtype=jnp.dtype(self.dtype_mm))
        queries, keys, values = dense(name="query")(x), dense(name="key")(keys), dense(name="value")(keys)
        mixed = attend(queries, keys, values)
        return nn.DenseGeneral(features=E, axis=(-2, -1), dtype=jnp.dtype(self.dtype_mm), name="out")(mixed)


class Encoder1DBlock(nn.Module):
    """One layer of the tower.

    Attributes:
      mlp_dim: M; None: four times the width.
      num_heads: A.
      dropout: share of activations dropped in training.
      dtype_mm: dtype of the computation.
      norm_eps: of both norms.
    """

    mlp_dim: int | None = None
    num_heads: int = _SIZES.num_attention_heads
    dropout: float = 0.0
    dtype_mm: DType = "float32"
    norm_eps: float = _SIZES.layer_norm_eps

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"], deterministic: bool = True) -> Float[Array, "B P E"]:
        norm = functools.partial(nn.LayerNorm, epsilon=self.norm_eps, dtype=jnp.dtype(self.dtype_mm))
        normed = norm(name="LayerNorm_0")(x)
        attention = MultiHeadDotProductAttention(self.num_heads, self.dtype_mm, name="MultiHeadDotProductAttention_0")
        x = x + nn.Dropout(rate=self.dropout)(attention(normed, normed), deterministic)
        normed = norm(name="LayerNorm_1")(x)
        added = MlpBlock(self.mlp_dim, self.dropout, self.dtype_mm, name="MlpBlock_0")(normed, deterministic)
        return x + nn.Dropout(rate=self.dropout)(added, deterministic)


class _ScannedBlock(Encoder1DBlock):
    """A block in the form that `nn.scan` takes."""

    @nn.compact
    def __call__(self, x, deterministic):
        return super().__call__(x, deterministic), None


class Encoder(nn.Module):
    """The layers and the norm after them.

    Attributes:
      depth: number of layers.
      mlp_dim: M; None: four times the width.
      num_heads: A.
      dropout: share of activations dropped in training.
      scan: the layers' parameters are stacked under `encoderblock`, and one layer is compiled.
      remat_policy: with `scan`, what `jax.checkpoint_policies` name a gradient keeps.
      dtype_mm: dtype of the computation.
      norm_eps: of the norms.
    """

    depth: int
    mlp_dim: int | None = None
    num_heads: int = _SIZES.num_attention_heads
    dropout: float = 0.0
    scan: bool = False
    remat_policy: str = "nothing_saveable"
    dtype_mm: DType = "float32"
    norm_eps: float = _SIZES.layer_norm_eps

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"], deterministic: bool = True) -> Float[Array, "B P E"]:
        fields = dict(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            dtype_mm=self.dtype_mm,
            norm_eps=self.norm_eps,
        )
        if self.scan:
            policy = getattr(jax.checkpoint_policies, self.remat_policy, None)
            block = nn.remat(_ScannedBlock, prevent_cse=False, static_argnums=(2,), policy=policy)
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = scanned(name="encoderblock", **fields)(x, deterministic)
        else:
            for layer in range(self.depth):
                x = Encoder1DBlock(name=f"encoderblock_{layer}", **fields)(x, deterministic)
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.dtype(self.dtype_mm), name="encoder_norm")(x)


class MAPHead(nn.Module):
    """The pooling head of a stand-alone SigLIP: one learned query attends to all patches, then an MLP.

    Attributes:
      mlp_dim: M; None: four times the width.
      num_heads: A.
      dtype_mm: dtype of the computation.
      norm_eps: of the norm.
    """

    mlp_dim: int | None = None
    num_heads: int = _SIZES.num_attention_heads
    dtype_mm: DType = "float32"
    norm_eps: float = _SIZES.layer_norm_eps

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B E"]:
        B, _, E = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, E), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (B, 1, E))
        attention = MultiHeadDotProductAttention(self.num_heads, self.dtype_mm, name="MultiHeadDotProductAttention_0")
        x = attention(probe, x)
        norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.dtype(self.dtype_mm), name="LayerNorm_0")
        x = x + MlpBlock(self.mlp_dim, dtype_mm=self.dtype_mm, name="MlpBlock_0")(norm(x))
        return x[:, 0]


class ViTModel(nn.Module):
    """The tower: normalized pixels to one vector per patch.

    Attributes:
      patch_size: Y and X, in pixels.
      width: E.
      depth: number of layers.
      mlp_dim: M; None: four times the width.
      num_heads: A.
      posemb: "learn" (a table with one row per patch) or "sincos2d" (fixed).
      dropout: share of activations dropped in training.
      head: end in the pooling head of a stand-alone SigLIP.
      scan: see `Encoder`.
      remat_policy: see `Encoder`.
      dtype_mm: dtype of the computation; parameters are float32.
      norm_eps: of the norms.
    """

    patch_size: tuple[int, int] = (_SIZES.patch_size, _SIZES.patch_size)
    width: int = _SIZES.hidden_size
    depth: int = _SIZES.num_hidden_layers
    mlp_dim: int | None = _SIZES.intermediate_size
    num_heads: int = _SIZES.num_attention_heads
    posemb: str = "learn"
    dropout: float = 0.0
    head: bool = False
    scan: bool = False
    remat_policy: str = "nothing_saveable"
    dtype_mm: DType = "float32"
    norm_eps: float = _SIZES.layer_norm_eps

    @classmethod
    def of(cls, config: SiglipVisionConfig, **fields) -> ViTModel:
        """The tower of a configuration."""
        sizes = dict(
            patch_size=(config.patch_size, config.patch_size),
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            mlp_dim=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head=config.vision_use_head,
            norm_eps=config.layer_norm_eps,
        )
        return cls(**sizes | fields)

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W C"], *, is_training: bool = False
    ) -> Float[Array, "B P E"] | Float[Array, "B E"]:
        """Encodes images.

        Args:
          image: pixels in -1..1; H and W are multiples of the patch size.
          is_training: apply dropout.

        Returns:
          One vector per patch, rows of patches first; with `head`, one vector per image.
        """
        if image.ndim != 4 or any(side % patch or not side for side, patch in zip(image.shape[1:3], self.patch_size)):
            raise ShapeError(
                f"image: expected [B, H, W, C] with H and W multiples of {self.patch_size}, got {tuple(image.shape)}"
            )
        dtype = jnp.dtype(self.dtype_mm)
        x = PatchEmbedding(self.width, tuple(self.patch_size), dtype, name="embedding")(image)
        grid = tuple(side // patch for side, patch in zip(image.shape[1:3], self.patch_size))
        x = x + self._positions(grid).astype(dtype)
        x = nn.Dropout(rate=self.dropout)(x, not is_training)
        encoder = Encoder(
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            scan=self.scan,
            remat_policy=self.remat_policy,
            dtype_mm=self.dtype_mm,
            norm_eps=self.norm_eps,
            name="Transformer",
        )
        x = encoder(x, not is_training)
        if self.head:
            x = MAPHead(self.mlp_dim, self.num_heads, self.dtype_mm, self.norm_eps, name="MAPHead_0")(x)
        return x

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "1 P E"]:
        if self.posemb == "learn":
            shape = (1, grid[0] * grid[1], self.width)
            return self.param("pos_embedding", nn.initializers.normal(self.width**-0.5), shape, jnp.float32)
        if self.posemb == "sincos2d":
            return jnp.asarray(sincos2d(*grid, self.width))
        raise ConfigError(f'posemb: expected "learn" or "sincos2d", got {self.posemb!r}')


def sincos2d(height: int, width: int, size: int, *, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed positions: sines and cosines of the column and the row, a quarter of `size` each; float32 [1, P, E]."""
    if size % 4:
        raise ConfigError(f"posemb sincos2d: the width must be a multiple of 4, got {size}")
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    frequency = temperature ** -(np.arange(size // 4) / max(size // 4 - 1, 1))
    y, x = y[:, None] * frequency, x[:, None] * frequency
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)[None]
