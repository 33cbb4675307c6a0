"""Logits of the constant part of keys, at all positions, without a cache.

Keys before rotation are mostly a constant: three quarters of the energy of SmolLM2-135M's keys is
their mean over tokens. A key that is the rotated sum of a mean m and a rest has the logit of the
rest plus

    Re sum_f conj(q_f) m_f e^(i s theta_f)

at position s, with a head's rotary pairs as complex numbers. It needs nothing that is cached for a
sequence. With s = p + n j + r, j from 0 to S/n - 1 and r from 0 to n - 1, the exponential is a
product of three, so a table of n positions is enough.

Letters as in ops/attention.py; S is the number of positions.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_BLOCK = 512  # positions of the table: it stays in a core's cache


def _turned(x: tuple[Array, Array], angles: Array) -> tuple[Array, Array]:
    """Multiply complex numbers, real and imaginary parts, by e^(i angles)."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos


def mean_logits(
    q_BKGH: Array,
    mean_KH: Array,
    start_B: Array,
    length: int,
    frequencies_F: np.ndarray,
    factor: float = 1.0,
) -> Array:
    """Return the products of rotated queries with a rotated mean key.

    Args:
      q_BKGH: rotated queries, times the scale of logits.
      mean_KH: the mean of each composite key before rotation, float32.
      start_B: the position of the first of S slots in each row, int32.
      length: S.
      frequencies_F: radians per position of each pair, float64; zeros without positions.
      factor: of rotated keys (`rope.attention_factor`).

    Returns:
      float32 (B, K, G, S).
    """
    b, k, g, _ = q_BKGH.shape
    q1, q2 = jnp.split(q_BKGH.astype(jnp.float32) * factor, 2, axis=-1)
    m1, m2 = jnp.split(mean_KH.astype(jnp.float32)[None, :, None], 2, axis=-1)
    product = (q1 * m1 + q2 * m2, q1 * m2 - q2 * m1)  # conj(q) m
    angles_BF = start_B.astype(jnp.float32)[:, None] * jnp.asarray(frequencies_F, jnp.float32)[None]
    product = _turned(product, angles_BF[:, None, None])
    count = min(_BLOCK, length)
    # Angles of whole blocks are rounded once, in float64.
    first_J = np.arange(0, length, count, dtype=np.float64)
    angles_JF = np.mod(first_J[:, None] * frequencies_F, 2 * np.pi).astype(np.float32)
    angles_JF = jnp.asarray(angles_JF)[None, None, None]
    real, imaginary = _turned((product[0][..., None, :], product[1][..., None, :]), angles_JF)
    x_NH = jnp.concatenate([real, -imaginary], axis=-1).reshape(b * k * g * len(first_J), -1)
    angles_RF = np.arange(count)[:, None] * frequencies_F
    table_RH = np.concatenate([np.cos(angles_RF), np.sin(angles_RF)], axis=1).astype(np.float32)
    found = jax.lax.dot_general(
        x_NH,
        jnp.asarray(table_RH),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return found.reshape(b, k, g, -1)[..., :length]
