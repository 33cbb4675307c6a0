"""What can be said of a mixing and of the heads it makes: pure functions of arrays, on the host.

A mixing is (C, K) of kind "heads", complex (C, K, F) of kind "frequency", (C, H, K, H) of kind
"dense" (ops/hlc.py). What a measure means depends on what is only a convention in a trained model:

- For any invertible R (C, C), components R^-1 and mixing R M are the same function. So distance and
  singular values of M are facts about training, which starts at block identity, and not about the
  function; `composite_values` is blind to R.
- A head's basis is a convention: a rotation of a value head is taken by W_O, a complex number for
  each frequency of a key head by W_q. So heads are compared by linear CKA, blind to rotations of
  each head, and by canonical correlations, blind to any invertible map of each.

Letters as in ops/attention.py, F = H/2 rotary frequencies; float64.
"""

import numpy as np

from mea_jax.compress.moments import by_head, complex_blocks, ridged, root
from mea_jax.ops import hlc

_RIDGE = 1e-6  # of a head's mean variance: directions which the text lacks correlate with nothing


def as_mixing(kind: str, parameter: np.ndarray) -> np.ndarray:
    """A mixing's parameter as the arrays above: (C, K, F, 2) becomes complex."""
    mix = np.asarray(parameter, np.float64)
    return mix[..., 0] + 1j * mix[..., 1] if kind == "frequency" else mix


def starting(kind: str, components: int, composites: int, head_dim: int) -> np.ndarray:
    """Block identity, where training begins unless `hlc_init` says otherwise."""
    return as_mixing(kind, np.asarray(hlc.initial(kind, components, composites, head_dim)))


def by_pair(kind: str, mix: np.ndarray) -> np.ndarray:
    """One number for each component and composite head (C, K), alike for W_lc in all kinds.

    W_lc itself; of the others the root mean square over frequencies, or the Frobenius norm of the
    map over sqrt(H), which no rotation of either head changes.
    """
    if kind == "heads":
        return mix
    if kind == "frequency":
        return np.sqrt(np.mean(np.square(np.abs(mix)), axis=-1))
    return np.sqrt(np.sum(np.square(mix), axis=(1, 3)) / mix.shape[1])


def distance(mix: np.ndarray, start: np.ndarray) -> float:
    """Frobenius norm of what training changed, over that of the start."""
    return float(np.linalg.norm(mix - start) / np.linalg.norm(start))


def own_weight(kind: str, mix: np.ndarray) -> float:
    """Mean over the entries where block identity is 1: only a scale, which neighbouring weights
    could take as well."""
    pair_CK = by_pair(kind, mix)
    return float(pair_CK[np.asarray(hlc.block_identity(*pair_CK.shape)) > 0].mean())


def from_others(kind: str, mix: np.ndarray) -> float:
    """Share of the squared weights that lies outside block identity: what heads take from
    components that are not their own. 0 at the start, 1 - 1/C where all weigh the same."""
    power_CK = np.square(by_pair(kind, mix))
    own_CK = np.asarray(hlc.block_identity(*power_CK.shape)) > 0
    return float(1 - power_CK[own_CK].sum() / power_CK.sum())


def head_level(kind: str, mix: np.ndarray) -> float:
    """Share of the squared weights that the nearest W_lc explains: 1 for what mixes whole heads.

    The nearest W_lc: the mean real part over frequencies, or of the map's diagonal over features.
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
    """exp of the entropy of singular values (.., n) as shares of their sum (Roy & Vetterli, 2007).

    n where all are equal, 1 where there is one.
    """
    total = np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    share = values / total
    logs = np.log(np.where(share > 0, share, 1.0))
    return np.exp(-(share * logs).sum(axis=-1))


def singular_values(kind: str, mix: np.ndarray) -> np.ndarray:
    """Descending: (n,) of W_lc, (F, n) of a frequency mixing, (n H,) of a dense one as the matrix
    (C H, K H); n = min(C, K)."""
    if kind == "frequency":
        return np.linalg.svd(np.moveaxis(mix, -1, 0), compute_uv=False)
    if kind == "dense":
        c, h, k, _ = mix.shape
        mix = mix.reshape(c * h, k * h)
    return np.linalg.svd(mix, compute_uv=False)


def composite_values(kind: str, covariance: np.ndarray, heads: int) -> np.ndarray:
    """The singular values of the composite heads themselves, shaped as `singular_values`'.

    `covariance` (K H, K H) is theirs over the text, or their weights' alone. With components of
    Gram matrix G these are the singular values of G^1/2 M: G^1/2 absorbs any R. A head's
    power (for frequency mixing: its power at each frequency) is a convention too and set to 1.
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
    """The effective rank of singular values, in heads: mean over frequencies, or over H."""
    rank = effective_rank(values)
    return float(rank / head_dim if kind == "dense" else np.mean(rank))


def covariance_of(kernel_DXH: np.ndarray, inputs_DD: np.ndarray) -> np.ndarray:
    """Of heads with this projection, (X H, X H), for inputs of a covariance."""
    flat = np.asarray(kernel_DXH, np.float64).reshape(kernel_DXH.shape[0], -1)
    return flat.T @ inputs_DD @ flat


def cka(covariance: np.ndarray, heads: int) -> np.ndarray:
    """Linear centred kernel alignment of all pairs of heads, (X, X) in [0, 1].

    |S_ab|^2 / (|S_aa| |S_bb|), Frobenius norms of blocks of the covariance (Kornblith et al., 2019,
    arXiv 1905.00414). A rotation or a scale of either head changes nothing.
    """
    blocks = by_head(covariance, heads)
    square_XX = np.einsum("ahbi,ahbi->ab", blocks, blocks)
    norm_X = np.sqrt(np.maximum(np.diagonal(square_XX), np.finfo(np.float64).tiny))
    return square_XX / (norm_X[:, None] * norm_X[None])


def canonical(covariance: np.ndarray, heads: int) -> np.ndarray:
    """Mean squared canonical correlation of all pairs of heads, (X, X) in [0, 1]: the share of a
    whitened head that the other predicts. No invertible map of either head changes it.

    The canonical correlations are the cosines of the principal angles between both heads' spans.
    """
    blocks = by_head(covariance, heads)  # (X, H, X, H)
    own = np.stack([blocks[a, :, a] for a in range(heads)])
    inverse = root(ridged(own, _RIDGE))[1]
    white = np.einsum("ahi,aibj,bjk->ahbk", inverse, blocks, inverse, optimize=True)
    return np.square(white).sum(axis=(1, 3)) / blocks.shape[1]


def off_diagonal(square_XX: np.ndarray) -> float:
    """Mean over pairs of different heads; nan where there is one head."""
    count = square_XX.shape[0]
    if count < 2:
        return float("nan")
    return float((square_XX.sum() - np.trace(square_XX)) / (count * (count - 1)))


def effective_heads(cka_XX: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of CKA over X (as Vendi, arXiv 2210.02410): from 1,
    all heads alike, to X, none like another."""
    values = np.maximum(np.linalg.eigvalsh(cka_XX), 0.0)
    return float(effective_rank(values))


def redundancy(covariance: np.ndarray, heads: int) -> dict[str, float]:
    """How alike heads are: mean `cka` and `canonical` of pairs, `effective_heads`."""
    alike_XX = cka(covariance, heads)
    return {
        "cka": off_diagonal(alike_XX),
        "canonical": off_diagonal(canonical(covariance, heads)),
        "effective_heads": effective_heads(alike_XX),
    }


def chance(inputs_DD: np.ndarray, heads: int, head_dim: int, seed: int) -> dict[str, float]:
    """`redundancy` of heads with random projections of the same inputs.

    Heads that read one residual of D features are never independent: this is what is due to it.
    """
    rng = np.random.default_rng(seed)
    random_DXH = rng.standard_normal((inputs_DD.shape[0], heads, head_dim))
    return redundancy(covariance_of(random_DXH, inputs_DD), heads)
