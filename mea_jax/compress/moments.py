"""Compute second moments of a layer's heads, the only statistics of the text that methods use.

Every method needs only E[k k^T] and E[v v^T], the moments of the keys' and values' features over
tokens: with k = W^T x, W^T E[x x^T] W = E[k k^T], and the components that a method finds are
combinations of the heads themselves. So calibration collects K H x K H numbers per layer instead of
D x D, and no matrix is inverted that the text leaves undetermined.

Letters are those of ops/attention.py, with F = H/2 rotary frequencies. Arrays are float64, on the
host.
"""

import dataclasses

import numpy as np

FLOOR = 1e-9  # times the largest eigenvalue: smaller ones count as unseen in the text


@dataclasses.dataclass(frozen=True)
class Moments:
    """The statistics that calibration collects for one layer.

    Attributes:
      keys: E[k k^T] (K H, K H) of composite keys before any norm and rotation.
      values: E[v v^T] (K H, K H) of composite values.
      queries: E|q_f|^2 (K, F) of queries after any norm, summed over those that read a head.
      key_means: E[k] (K H,) of composite keys.
      outputs: E[o^2] (N,) of each query head's output before any norm, mean over features.
      tokens: the number of tokens; 0 if the moments are those of the weights, for white inputs.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    key_means: np.ndarray
    outputs: np.ndarray
    tokens: int


def of_weights(query_DNH, key_DKH, value_DKH) -> Moments:
    """Return the moments for inputs of unit covariance, which need no text."""
    query, key, value = (np.asarray(w, np.float64) for w in (query_DNH, key_DKH, value_DKH))
    d, heads, _ = key.shape
    power_NF = np.square(np.abs(complex_heads(query))).sum(axis=0)
    flat_key, flat_value = key.reshape(d, -1), value.reshape(d, -1)
    return Moments(
        keys=flat_key.T @ flat_key,
        values=flat_value.T @ flat_value,
        queries=power_NF.reshape(heads, -1, power_NF.shape[-1]).sum(axis=1),
        key_means=np.zeros(flat_key.shape[1]),
        outputs=np.ones(query.shape[1]),
        tokens=0,
    )


def without_mean(moments: Moments) -> Moments:
    """Return the moments of keys minus their mean."""
    mean = moments.key_means
    centre = dataclasses.replace(moments, keys=moments.keys - np.outer(mean, mean))
    return dataclasses.replace(centre, key_means=np.zeros_like(mean))


def unseen(moment: np.ndarray) -> int:
    """Return the number of directions (nearly) absent from the text: eigenvalues below `FLOOR`."""
    values = np.linalg.eigvalsh(moment)
    return int((values < FLOOR * values[-1]).sum())


def ridged(square: np.ndarray, share: float) -> np.ndarray:
    """Return square matrices (.., n, n) with `share` of their mean eigenvalue added as a ridge."""
    size = square.shape[-1]
    ridge = share * np.trace(square, axis1=-2, axis2=-1).real / size + 1e-300
    return square + ridge[..., None, None] * np.eye(size)


def root(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the symmetric square root of (.., H, H) and its inverse, with floored eigenvalues."""
    values, vectors = np.linalg.eigh(moment)
    least = FLOOR * np.maximum(values[..., -1:], np.finfo(np.float64).tiny)
    scale = np.sqrt(np.maximum(values, least))[..., None, :]
    transposed = np.swapaxes(vectors, -1, -2)
    return (vectors * scale) @ transposed, (vectors / scale) @ transposed


def by_head(moment: np.ndarray, heads: int) -> np.ndarray:
    """Reshape (K H, K H) to (K, H, K, H)."""
    width = moment.shape[0] // heads
    return moment.reshape(heads, width, heads, width)


def complex_blocks(moment: np.ndarray, heads: int) -> np.ndarray:
    """Return E[conj(k_gf) k_hf] (F, K, K), with features f and f + H/2 of a key as one complex."""
    moment_KHKH = by_head(moment, heads)
    half = moment_KHKH.shape[1] // 2
    pairs = moment_KHKH.reshape(heads, 2, half, heads, 2, half)
    same = np.einsum("gafhbf->fabgh", pairs)  # equal frequencies only: (F, 2, 2, K, K)
    real = same[:, 0, 0] + same[:, 1, 1]
    return real + 1j * (same[:, 0, 1] - same[:, 1, 0])


def complex_heads(w_DKH: np.ndarray) -> np.ndarray:
    """Return (D, K, F): features f and f + H/2 of a projection as one complex number."""
    half = w_DKH.shape[-1] // 2
    return w_DKH[..., :half] + 1j * w_DKH[..., half:]


def real_heads(w: np.ndarray) -> np.ndarray:
    """Return (D, K, H) from (D, K, F), the inverse of `complex_heads`."""
    return np.concatenate([w.real, w.imag], axis=-1)
