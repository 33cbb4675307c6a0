"""Rotary positions (arXiv 2104.09864) with Llama 3.1's frequency scaling, and ALiBi's slopes.

Learned positions are a table, which model/transformer.py adds to the embeddings.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return the radians per position of each rotary pair: float64 (H/2,).

    With `scaling.factor` above 1, wavelengths longer than original_context / low_freq_factor are
    multiplied by the factor, and those shorter than original_context / high_freq_factor are kept.
    Between the two the frequency is interpolated linearly in original_context / wavelength.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.factor == 1.0:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_table(positions_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines (B, T, 1, H/2), float32, shared by every layer and head."""
    frequencies_11F = jnp.asarray(frequencies, jnp.float32)[None, None]
    angles_BTF = positions_BT[..., None].astype(jnp.float32) * frequencies_11F
    return jnp.cos(angles_BTF)[:, :, None], jnp.sin(angles_BTF)[:, :, None]


def apply_rope(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate feature f with feature f + H/2 in float32; return the dtype of `x_BTNH`."""
    cos, sin = table
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def alibi_slopes(n_heads: int) -> jax.Array:
    """Return the ALiBi slope of each head (N,), float32: 2^(-8 (n + 1) / N) (arXiv 2108.12409).

    If N is not a power of two, the authors combine slopes of two such series; this one series
    covers the same range.
    """
    return jnp.asarray(2.0 ** (-8.0 * np.arange(1, n_heads + 1) / n_heads), jnp.float32)
