"""Second moments of a layer's heads: all that the methods know of the text.

Every method works on E[k k^T] and E[v v^T], the moments of the keys' and values' features over
tokens, and nothing wider: with k = W^T x, W^T E[x x^T] W = E[k k^T], and the components that a
method finds are combinations of the heads themselves. So K H x K H numbers a layer are collected in
place of D x D, and nothing is inverted that the text leaves undetermined.

Letters as in ops/attention.py, F = H/2 rotary frequencies; float64, on the host.
"""

import dataclasses

import numpy as np

FLOOR = 1e-9  # of the largest eigenvalue: what lies below counts as not seen in the text


@dataclasses.dataclass(frozen=True)
class Moments:
    """What calibration collects of one layer.

    Attributes:
      keys: E[k k^T] (K H, K H) of composite keys before any norm and rotation.
      values: E[v v^T] (K H, K H) of composite values.
      queries: E|q_f|^2 (K, F) of queries after any norm, summed over those that read a head.
      outputs: E[o^2] (N,) of each query head's output before any norm, mean over features.
      tokens: that were seen; 0: the moments are those of the weights, as if inputs were white.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    outputs: np.ndarray
    tokens: int


def of_weights(query_DNH, key_DKH, value_DKH) -> Moments:
    """Moments for inputs of unit covariance: what is known without any text."""
    query, key, value = (np.asarray(w, np.float64) for w in (query_DNH, key_DKH, value_DKH))
    d, heads, _ = key.shape
    power_NF = np.square(np.abs(complex_heads(query))).sum(axis=0)
    flat_key, flat_value = key.reshape(d, -1), value.reshape(d, -1)
    return Moments(
        keys=flat_key.T @ flat_key,
        values=flat_value.T @ flat_value,
        queries=power_NF.reshape(heads, -1, power_NF.shape[-1]).sum(axis=1),
        outputs=np.ones(query.shape[1]),
        tokens=0,
    )


def unseen(moment: np.ndarray) -> int:
    """Directions that the text (nearly) lacks: eigenvalues of a moment under the floor."""
    values = np.linalg.eigvalsh(moment)
    return int((values < FLOOR * values[-1]).sum())


def ridged(square: np.ndarray, share: float) -> np.ndarray:
    """Square matrices (.., n, n) with `share` of their mean eigenvalue added to each."""
    size = square.shape[-1]
    ridge = share * np.trace(square, axis1=-2, axis2=-1).real / size + 1e-300
    return square + ridge[..., None, None] * np.eye(size)


def root(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root of (.., H, H) and its inverse, eigenvalues floored."""
    values, vectors = np.linalg.eigh(moment)
    least = FLOOR * np.maximum(values[..., -1:], np.finfo(np.float64).tiny)
    scale = np.sqrt(np.maximum(values, least))[..., None, :]
    transposed = np.swapaxes(vectors, -1, -2)
    return (vectors * scale) @ transposed, (vectors / scale) @ transposed


def by_head(moment: np.ndarray, heads: int) -> np.ndarray:
    """(K H, K H) as (K, H, K, H)."""
    width = moment.shape[0] // heads
    return moment.reshape(heads, width, heads, width)


def complex_blocks(moment: np.ndarray, heads: int) -> np.ndarray:
    """E[conj(k_gf) k_hf] (F, K, K) of keys as complex numbers, feature f with f + H/2."""
    moment_KHKH = by_head(moment, heads)
    half = moment_KHKH.shape[1] // 2
    pairs = moment_KHKH.reshape(heads, 2, half, heads, 2, half)
    same = np.einsum("gafhbf->fabgh", pairs)  # of one frequency: (F, 2, 2, K, K)
    real = same[:, 0, 0] + same[:, 1, 1]
    return real + 1j * (same[:, 0, 1] - same[:, 1, 0])


def complex_heads(w_DKH: np.ndarray) -> np.ndarray:
    """Features f and f + H/2 of a projection as one complex number: (D, K, F)."""
    half = w_DKH.shape[-1] // 2
    return w_DKH[..., :half] + 1j * w_DKH[..., half:]


def real_heads(w: np.ndarray) -> np.ndarray:
    """The inverse of `complex_heads`."""
    return np.concatenate([w.real, w.imag], axis=-1)
