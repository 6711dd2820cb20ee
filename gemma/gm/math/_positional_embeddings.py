# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (RoPE), half-split form: pair j is (j, j + H/2).

Angles are float32 from integer positions, divided in the order `position / base**(2j/H) / scale`, whatever the dtype of
the network: in bfloat16 the positions 256 and 257 would be one. Which base and scale a layer uses is in its
`LayerSpec` (gemma/config.py). Source: https://arxiv.org/abs/2104.09864.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ConfigError
from gemma.gm.typing import Array, Float, Int


def rope_angles(
    positions: Int[Array, "*B T"], *, head_dim: int, base: float, scale: float = 1.0, share: float = 1.0
) -> Float[Array, "*B T H/2"]:
    """Rotation angles in radians, float32: `position / base**(2j/H) / scale`, and 0 for pairs that do not rotate."""
    pairs, rotating = head_dim // 2, int(share * head_dim // 2)
    exact = np.float64(base) ** (2.0 * np.arange(rotating) / head_dim)
    timescale = np.concatenate([exact, np.full(pairs - rotating, np.inf)]).astype(np.float32)
    shape = (*positions.shape, pairs)
    position = jnp.broadcast_to(positions.astype(jnp.float32)[..., None], shape)
    divisor = jnp.broadcast_to(jnp.asarray(timescale).reshape((1,) * positions.ndim + (pairs,)), shape)
    # Without the barrier, XLA multiplies by the rounded reciprocal of the broadcast divisor instead, which moves an
    # angle at position 30,000 by up to 0.002. The published scale is 8, exact either way.
    return position / jax.lax.optimization_barrier(divisor) / scale


def rope_table(
    positions: Int[Array, "*B T"],
    *,
    head_dim: int,
    base_frequency: float,
    scale_factor: float = 1.0,
    rope_proportion: float = 1.0,
) -> tuple[Float[Array, "*B T H/2"], Float[Array, "*B T H/2"]]:
    """Sine and cosine of the rotation angles, float32; one table serves every layer of a kind.

    Args:
      positions: 0-based positions, in tokens.
      head_dim: H, even.
      base_frequency: the wavelength's base (10,000 or 1,000,000).
      scale_factor: positions are divided by it; at least 1.
      rope_proportion: share of the H/2 pairs that rotate, the first ones; the others keep the angle 0.
    """
    if scale_factor < 1.0:
        raise ConfigError(f"scale_factor must be >= 1.0, got {scale_factor}")
    angles = rope_angles(positions, head_dim=head_dim, base=base_frequency, scale=scale_factor, share=rope_proportion)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    inputs: Float[Array, "*B T N H"], sin: Float[Array, "*B T H/2"], cos: Float[Array, "*B T H/2"]
) -> Float[Array, "*B T N H"]:
    """Rotates the pairs of every head by a table of `rope_table`: float32 inside, returned in the input's dtype."""
    # The halves as an axis of their own: exchanging them is a reversal, which fuses with the products into one loop.
    halves = inputs.astype(jnp.float32).reshape(*inputs.shape[:-1], 2, -1)
    cos = cos[..., None, None, :]
    sin = jnp.stack([-sin, sin], axis=-2)[..., None, :, :]
    turned = halves * cos + halves[..., ::-1, :] * sin
    return turned.reshape(inputs.shape).astype(inputs.dtype)


def apply_rope(
    inputs: Float[Array, "*B T N H"],
    positions: Int[Array, "*B T"],
    *,
    base_frequency: float,
    scale_factor: float = 1.0,
    rope_proportion: float = 1.0,
) -> Float[Array, "*B T N H"]:
    """Applies RoPE to queries or keys.

    Args:
      inputs: one vector of size H per head.
      positions: 0-based positions, in tokens.
      base_frequency: the wavelength's base.
      scale_factor: positions are divided by it (linear scaling); at least 1, else ConfigError (a ValueError).
      rope_proportion: share of the pairs that rotate.

    Returns:
      The rotated vectors, in the dtype of `inputs`.
    """
    sin, cos = rope_table(
        positions,
        head_dim=inputs.shape[-1],
        base_frequency=base_frequency,
        scale_factor=scale_factor,
        rope_proportion=rope_proportion,
    )
    return rotate(inputs, sin, cos)
