"""Rotary positions (arXiv 2104.09864) with scaled frequencies, and ALiBi's slopes.

Learned positions are a table, which model/transformer.py adds to the embeddings.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return the radians per position of each rotary pair: float64 (H/2,).

    The rule depends on `scaling.kind`:

    - "linear" (arXiv 2306.15595) divides all frequencies by the factor.
    - "llama3" (Llama 3.1) multiplies wavelengths longer than original_context / low_freq_factor by
      the factor and keeps those shorter than original_context / high_freq_factor. Between the two
      the frequency is interpolated linearly in original_context / wavelength.
    - "yarn" (arXiv 2309.00071) interpolates linearly in the index of the pair, from the pair that
      turns beta_fast times within the original context, which is kept, to the one that turns
      beta_slow times, which is divided by the factor.
    - "none" and "dynamic" keep them. "dynamic" would change them beyond the original context, where
      there are no positions (`ModelConfig.longest_context`).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind in ("none", "dynamic"):
        return frequencies
    if scaling.kind == "linear":
        keep = np.zeros_like(frequencies)
    elif scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    elif scaling.kind == "yarn":
        first, last = _yarn_ramp(head_dim, theta, scaling)
        keep = 1.0 - np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)
    else:
        raise ValueError(f"unknown kind of rotary scaling {scaling.kind!r}")
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the indices of the rotary pairs between which YaRN interpolates, as transformers."""

    def pair(turns: float) -> float:  # that turns so often within the original context
        longest = scaling.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(longest) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last


def attention_factor(scaling: RopeScaling) -> float:
    """Return the factor of rotated queries and keys: 1 except for "yarn" (arXiv 2309.00071, 3.4).

    Logits change by its square. It is `scaling.attention_factor` if that is not 0, otherwise
    0.1 ln(factor) + 1, or a quotient of two such terms if both mscales are not 0.
    """
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return term(scaling.mscale) / term(scaling.mscale_all_dim)
    return term(1.0)


def rope_table(
    positions_BT: jax.Array, frequencies: np.ndarray, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines (B, T, 1, H/2), float32, shared by every layer and head.

    Both are multiplied by `factor` (`attention_factor`).
    """
    frequencies_11F = jnp.asarray(frequencies, jnp.float32)[None, None]
    angles_BTF = positions_BT[..., None].astype(jnp.float32) * frequencies_11F
    cos_BT1F, sin_BT1F = jnp.cos(angles_BTF)[:, :, None], jnp.sin(angles_BTF)[:, :, None]
    return (cos_BT1F, sin_BT1F) if factor == 1.0 else (cos_BT1F * factor, sin_BT1F * factor)


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
