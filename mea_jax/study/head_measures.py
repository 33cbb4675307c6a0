"""Compute measures of a mixing and of its heads: pure functions of arrays, on the host.

The shape of a mixing is (C, K) for the kind "heads", complex (C, K, F) for "frequency" and
(C, H, K, H) for "dense" (ops/hlc.py). A trained model has gauge freedom, so each measure is chosen
for what it should not depend on:

- For any invertible R (C, C), multiplying the components by R^-1 and the mixing M by R leaves the
  function unchanged. So distance and singular values of M describe training, which starts at block
  identity, and not the function. `composite_values` does not depend on R.
- The basis of a head is arbitrary: W_O absorbs a rotation of a value head, W_q a complex factor for
  each frequency of a key head. So heads are compared by linear CKA, which is invariant to rotations
  of each head, and by canonical correlations, which are invariant to any invertible map of each.

Letters are those of ops/attention.py, with F = H/2 rotary frequencies. Arrays are float64.
"""

import numpy as np

from mea_jax.compress.moments import by_head, complex_blocks, ridged, root
from mea_jax.ops import hlc

# Relative to a head's mean variance, so that directions absent from the text have correlation 0.
_RIDGE = 1e-6


def as_mixing(kind: str, parameter: np.ndarray) -> np.ndarray:
    """Return a mixing's parameter in the shapes above: (C, K, F, 2) becomes complex (C, K, F)."""
    mix = np.asarray(parameter, np.float64)
    return mix[..., 0] + 1j * mix[..., 1] if kind == "frequency" else mix


def block_identity_redundancy(
    kind: str, components: int, composites: int, head_dim: int
) -> np.ndarray:
    """Return block identity, where training begins unless `hlc_init` changes it."""
    return as_mixing(kind, np.asarray(hlc.initial(kind, components, composites, head_dim)))


def by_pair(kind: str, mix: np.ndarray) -> np.ndarray:
    """Reduce a mixing to one number for each component and composite head, (C, K).

    It is W_lc itself for "heads", the root mean square over frequencies for "frequency", and the
    Frobenius norm of the map divided by sqrt(H) for "dense". No rotation of either head changes the
    last two. A W_lc gives the same number in every kind, except for its sign.
    """
    if kind == "heads":
        return mix
    if kind == "frequency":
        return np.sqrt(np.mean(np.square(np.abs(mix)), axis=-1))
    return np.sqrt(np.sum(np.square(mix), axis=(1, 3)) / mix.shape[1])


def distance(mix: np.ndarray, start: np.ndarray) -> float:
    """Return the Frobenius norm of `mix - start`, relative to the norm of `start`."""
    return float(np.linalg.norm(mix - start) / np.linalg.norm(start))


def own_weight(kind: str, mix: np.ndarray) -> float:
    """Return the mean weight over the entries where block identity is 1.

    It is only a scale, which neighbouring weights could absorb as well.
    """
    pair_CK = by_pair(kind, mix)
    return float(pair_CK[np.asarray(hlc.block_identity(*pair_CK.shape)) > 0].mean())


def from_others(kind: str, mix: np.ndarray) -> float:
    """Return the share of the squared weights outside block identity.

    These are the weights of components that are not a head's own. The share is 0 at the start, and
    1 - 1/C if all weights are equal.
    """
    power_CK = np.square(by_pair(kind, mix))
    own_CK = np.asarray(hlc.block_identity(*power_CK.shape)) > 0
    return float(1 - power_CK[own_CK].sum() / power_CK.sum())


def head_level(kind: str, mix: np.ndarray) -> float:
    """Return the share of the squared weights that the nearest W_lc explains.

    It is 1 for a mixing of entire heads. The nearest W_lc is the mean real part over frequencies,
    or the mean of the map's diagonal over features.
    """
    total = np.square(np.abs(mix)).sum()
    if kind == "heads":
        return 1.0
    if kind == "frequency":
        nearest_CK = mix.real.mean(axis=-1)
        return float(np.square(nearest_CK).sum() * mix.shape[-1] / total)
    nearest_CK = np.einsum("chkh->ck", mix) / mix.shape[1]
    return float(np.square(nearest_CK).sum() * mix.shape[1] / total)


def effective_rank(values: np.ndarray) -> np.ndarray:
    """Return the effective rank (..) of singular values (.., n) (Roy & Vetterli, 2007).

    It is exp of the entropy of the values as shares of their sum: n if all are equal, 1 if only one
    is not 0.
    """
    total = np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    share = values / total
    logs = np.log(np.where(share > 0, share, 1.0))
    return np.exp(-(share * logs).sum(axis=-1))


def singular_values(kind: str, mix: np.ndarray) -> np.ndarray:
    """Return the singular values of a mixing, descending, with n = min(C, K).

    The shape is (n,) for "heads", (F, n) for "frequency", and (n H,) for "dense", which is
    decomposed as a matrix (C H, K H).
    """
    if kind == "frequency":
        return np.linalg.svd(np.moveaxis(mix, -1, 0), compute_uv=False)
    if kind == "dense":
        c, h, k, _ = mix.shape
        mix = mix.reshape(c * h, k * h)
    return np.linalg.svd(mix, compute_uv=False)


def composite_values(kind: str, covariance: np.ndarray, heads: int) -> np.ndarray:
    """Return the singular values of the composite heads, descending.

    `covariance` (K H, K H) is that of the composite heads over text, or of their weights alone. The
    shape of the result is (K,) for "heads", (F, K) for "frequency", (K H,) for "dense". If the
    components have the Gram matrix G, these are the singular values of G^1/2 M, and G^1/2 absorbs
    any R. A head's power (for frequency mixing: its power at each frequency) is arbitrary too, and
    is set to 1.
    """
    if kind == "frequency":
        gram = complex_blocks(covariance, heads)  # (F, K, K)
    elif kind == "heads":
        gram = np.einsum("ahbh->ab", by_head(covariance, heads))
    else:
        gram = covariance
    power = np.diagonal(gram, axis1=-2, axis2=-1).real
    if kind == "dense":
        width = covariance.shape[0] // heads
        power = np.repeat(power.reshape(heads, width).mean(axis=1), width)
    scale = 1 / np.sqrt(np.maximum(power, np.finfo(np.float64).tiny))
    values = np.linalg.eigvalsh(gram * scale[..., :, None] * scale[..., None, :])
    return np.sqrt(np.maximum(values[..., ::-1], 0.0))


def rank_in_heads(kind: str, values: np.ndarray, head_dim: int) -> float:
    """Return the effective rank in heads: the mean over frequencies, or divided by H if dense."""
    rank = effective_rank(values)
    return float(rank / head_dim if kind == "dense" else np.mean(rank))


def covariance_of(kernel_DXH: np.ndarray, inputs_DD: np.ndarray) -> np.ndarray:
    """Return the covariance (X H, X H) of heads with a projection, from that of their inputs."""
    flat = np.asarray(kernel_DXH, np.float64).reshape(kernel_DXH.shape[0], -1)
    return flat.T @ inputs_DD @ flat


def cka(covariance: np.ndarray, heads: int) -> np.ndarray:
    """Return the linear centred kernel alignment of all pairs of heads, (X, X) in [0, 1].

    It is |S_ab|^2 / (|S_aa| |S_bb|) with Frobenius norms of blocks of the covariance (Kornblith et
    al., 2019, arXiv 1905.00414). It is invariant to a rotation or a scale of either head.
    """
    blocks = by_head(covariance, heads)
    square_XX = np.einsum("ahbi,ahbi->ab", blocks, blocks)
    norm_X = np.sqrt(np.maximum(np.diagonal(square_XX), np.finfo(np.float64).tiny))
    return square_XX / (norm_X[:, None] * norm_X[None])


def canonical(covariance: np.ndarray, heads: int) -> np.ndarray:
    """Return the mean squared canonical correlation of all pairs of heads, (X, X) in [0, 1].

    It is the share of a whitened head that the other head predicts, and is invariant to any
    invertible map of either head. Canonical correlations are the cosines of the principal angles
    between the spans of both heads.
    """
    blocks = by_head(covariance, heads)  # (X, H, X, H)
    own = np.stack([blocks[a, :, a] for a in range(heads)])
    inverse = root(ridged(own, _RIDGE))[1]
    white = np.einsum("ahi,aibj,bjk->ahbk", inverse, blocks, inverse, optimize=True)
    return np.square(white).sum(axis=(1, 3)) / blocks.shape[1]


def off_diagonal(square_XX: np.ndarray) -> float:
    """Return the mean over pairs of different heads; nan if there is one head."""
    count = square_XX.shape[0]
    if count < 2:
        return float("nan")
    return float((square_XX.sum() - np.trace(square_XX)) / (count * (count - 1)))


def effective_heads(cka_XX: np.ndarray) -> float:
    """Return exp of the entropy of the eigenvalues of CKA / X (the Vendi score, arXiv 2210.02410).

    It ranges from 1, if all heads are the same, to X, if no two heads are similar.
    """
    values = np.maximum(np.linalg.eigvalsh(cka_XX), 0.0)
    return float(effective_rank(values))


def redundancy(covariance: np.ndarray, heads: int) -> dict[str, float]:
    """Return the similarity of heads: mean `cka` and `canonical` of pairs, `effective_heads`."""
    alike_XX = cka(covariance, heads)
    return {
        "cka": off_diagonal(alike_XX),
        "canonical": off_diagonal(canonical(covariance, heads)),
        "effective_heads": effective_heads(alike_XX),
    }


def chance(inputs_DD: np.ndarray, heads: int, head_dim: int, seed: int) -> dict[str, float]:
    """Return the `redundancy` of heads that are random projections of the same inputs.

    Heads that read one residual of D features are never independent. This is the part of their
    similarity that the common input explains.
    """
    rng = np.random.default_rng(seed)
    random_DXH = rng.standard_normal((inputs_DD.shape[0], heads, head_dim))
    return redundancy(covariance_of(random_DXH, inputs_DD), heads)
