# SPDX-License-Identifier: Apache-2.0
"""The streams of Gemma 3n (AltUp): several copies of the activations, of which a layer computes only one.

`AltUp` is what a layer does with them, before and after its block; `Streams` makes them from the embeddings and makes
one of them again after the last layer. The block itself is in `_modules.py`.

    streams ── predict ──┬── the active one ── block ──┐
                         └──────────────────────────── correct ── streams       Source: https://arxiv.org/abs/2301.13310

Streams are the first axis, a (and b, c where an array has several such axes); the other letters are those of
`_modules.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from gemma.config import AltUpConfig
from gemma.gm.nn import _layers
from gemma.gm.typing import Array, DType, Float

_SMALLEST = 1e-5  # mean square of a projected stream, from below


class AltUp(nn.Module):
    """Predicts all streams from all of them, and corrects them by what the block made of the active one.

    Attributes:
      config: how many streams, and which is active.
      features: D.
      norm: fields of the router's `RMSNorm`.
      dtype: in which parameters are created; None: float32.
    """

    config: AltUpConfig
    features: int
    norm: dict
    dtype: DType | None = None

    def setup(self):
        count, dtype = self.config.num_inputs, self.dtype or jnp.float32
        self.router_norm_layer = _layers.RMSNorm(**self.norm)
        self.modality_router = _layers.Einsum(shape=(self.features, count), dtype=self.dtype)
        small = nn.initializers.normal()
        self.prediction_coefs = self.param("prediction_coefs", small, (count, count, count), dtype)
        self.correction_coefs = self.param("correction_coefs", small, (count, count), dtype)
        if self.config.correct_scale:
            self.correct_output_scale = self.param(
                "correct_output_scale", nn.initializers.zeros_init(), (self.features,), dtype
            )

    def predict(self, streams: Float[Array, "a B T D"]) -> Float[Array, "a B T D"]:
        """Each stream plus a mixture of all; the active stream decides the mixture."""
        modalities = self._route(streams[self.config.active_idx])
        mixture = jnp.einsum("BTc,cab->BTab", modalities, self._clipped(self.prediction_coefs, modalities))
        return streams + jnp.einsum("bBTD,BTab->aBTD", streams, mixture)

    def correct(self, predicted: Float[Array, "a B T D"], computed: Float[Array, "B T D"]) -> Float[Array, "a B T D"]:
        """Each stream plus a multiple of what the prediction of the active one was wrong by."""
        modalities = self._route(computed)
        share = jnp.einsum("BTc,ca->aBT", modalities, self._clipped(self.correction_coefs, modalities)) + 1
        return predicted + (computed - predicted[self.config.active_idx])[None] * share[..., None]

    def scale(self, active: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The active stream, as the per-layer input's gate sees it."""
        return active * _layers.along_last(self.correct_output_scale, active) if self.config.correct_scale else active

    def _route(self, x: Float[Array, "B T D"]) -> Float[Array, "B T c"]:
        routed = self.modality_router("BTD,Dc->BTc", self.router_norm_layer(x) * self.features**-1.0)
        return jnp.tanh(routed.astype(jnp.float32)).astype(x.dtype)

    def _clipped(self, coefficients: Array, like: Array) -> Array:
        clip = self.config.coef_clip
        return (coefficients if clip is None else jnp.clip(coefficients, -clip, clip)).astype(like.dtype)


def spread(x: Float[Array, "B T D"], projections: list[_layers.Einsum]) -> Float[Array, "a B T D"]:
    """The embeddings as streams: themselves, and a projection for each further stream, of their magnitude."""
    return jnp.stack([x, *(_as_large(p("BTD,DE->BTE", x), x) for p in projections)])


def merge(streams: Float[Array, "a B T D"], projections: list[_layers.Einsum]) -> Float[Array, "B T D"]:
    """The mean of the first stream and the projections of the others, of its magnitude."""
    others = (_as_large(p("BTD,DE->BTE", s), streams[0]) for p, s in zip(projections, streams[1:], strict=True))
    return jnp.mean(jnp.stack([streams[0], *others]), axis=0)


def _as_large(x: Float[Array, "B T D"], like: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`x` with the root mean square of `like`."""
    wanted = jnp.sqrt(jnp.mean(jnp.square(like), axis=-1, keepdims=True))
    own = jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True), _SMALLEST))
    return x * wanted / own
