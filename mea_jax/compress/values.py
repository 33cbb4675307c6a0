"""Solve for C component value heads, or one vector of their width, that rebuild K composite values.

Values have no position, so the features of a head can be mixed freely: v_g ~ sum_c M_cg z_c B_g,
where the gauge B_g (H, H) goes into the output projection, or v_g ~ z N_g with any N_g (C H, H).
Errors are weighted by the output projection: with Q_g = sum of W_O W_O^T over the group's query
heads, the methods minimise

    sum_g E|(v_g - v'_g) Q_g^(1/2)|^2.

Under a head norm only the direction of a head's output matters. Q_g is then divided by the power
of the heads, and a gauge must be orthogonal to commute with the norm. All methods need only
E[v v^T], (K H, K H).
"""

import dataclasses

import numpy as np

from mea_jax.compress.grouping import one_hot, partition
from mea_jax.compress.moments import by_head, ridged, root
from mea_jax.ops.hlc import block_identity

_SWEEPS = 120
_CHECK_EVERY = 10
_SETTLED = 1e-6


@dataclasses.dataclass(frozen=True)
class Values:
    """A solution for the values of one layer.

    Attributes:
      combine: (K H, C H), which maps composite heads to components.
      mix: (C, K), the paper's W_lc; or (C, H, K, H), the dense map.
      gauge: (K, H, H), multiplied into each head's output from the right; None means identity.
      residual: the lost share of the (weighted) energy of the values.
    """

    combine: np.ndarray
    mix: np.ndarray
    gauge: np.ndarray | None
    residual: float

    def components(self, w_DKH: np.ndarray) -> np.ndarray:
        """Return the component heads (D, C, H) of composite heads (D, K, H)."""
        d, _, width = w_DKH.shape
        return (w_DKH.reshape(d, -1) @ self.combine).reshape(d, -1, width)

    def back(self) -> np.ndarray:
        """Return the map (C H, K H) from components to composite heads in the model's own basis."""
        if self.mix.ndim == 4:
            c, width, heads, _ = self.mix.shape
            return self.mix.reshape(c * width, heads * width)
        c, heads = self.mix.shape
        width = self.combine.shape[0] // heads
        gauge = (
            np.broadcast_to(np.eye(width), (heads, width, width))
            if self.gauge is None
            else self.gauge
        )
        return np.einsum("cg,ghj->chgj", self.mix, gauge).reshape(c * width, heads * width)

    def rebuilt(self, w_DKH: np.ndarray) -> np.ndarray:
        """Return the composite heads (D, K, H) rebuilt from their components."""
        flat = w_DKH.reshape(w_DKH.shape[0], -1) @ self.combine @ self.back()
        return flat.reshape(w_DKH.shape)


def output_weights(out_NHD, norm_scale_H, power_N, heads: int) -> np.ndarray:
    """Return Q_g (K, H, H), the weights of errors of value features in the residual.

    `norm_scale_H` is the head norm's weight, or None without one. `power_N` is the mean square of
    each query head's output.
    """
    out = out_NHD.astype(np.float64)
    if norm_scale_H is not None:
        out = out * norm_scale_H[None, :, None] / np.sqrt(np.maximum(power_N, 1e-30))[:, None, None]
    of_query = np.einsum("nhd,njd->nhj", out, out, optimize=True)
    return of_query.reshape(heads, -1, *of_query.shape[1:]).sum(axis=1)


def _scalars(weights_KHH: np.ndarray) -> np.ndarray:
    return np.trace(weights_KHH, axis1=1, axis2=2) / weights_KHH.shape[-1]


def _weigh(moment: np.ndarray, roots_KHH: np.ndarray) -> np.ndarray:
    """Return E[x x^T] of x_g = v_g Q_g^(1/2)."""
    heads, width, _ = roots_KHH.shape
    blocks = by_head(moment, heads)
    weighed = np.einsum("gih,gikl,klj->ghkj", roots_KHH, blocks, roots_KHH, optimize=True)
    return weighed.reshape(heads * width, heads * width)


def _loss(gram: np.ndarray, combine: np.ndarray, back: np.ndarray) -> float:
    rest = np.eye(gram.shape[0]) - combine @ back
    return float(np.einsum("ij,ij->", rest, gram @ rest) / np.trace(gram))


def _spread(mix_CK: np.ndarray, width: int) -> np.ndarray:
    """Return a mixing of heads (C, K) as a mixing of features (C H, K H)."""
    return np.kron(mix_CK, np.eye(width))


def _plain(gram, mix_CK, combine_KC, heads: int) -> Values:
    width = gram.shape[0] // heads
    combine = _spread(combine_KC, width)
    return Values(combine, mix_CK, None, _loss(gram, combine, _spread(mix_CK, width)))


def head_mixing(moment: np.ndarray, components: int, weights_K: np.ndarray) -> Values:
    """Solve for one number per pair of heads: leading eigenvectors of the K x K Gram matrix."""
    heads = len(weights_K)
    root_K = np.sqrt(weights_K)
    gram_KK = root_K[:, None] * np.einsum("ghkh->gk", by_head(moment, heads)) * root_K
    leading = np.linalg.eigh(gram_KK)[1][:, ::-1][:, :components]
    return _plain(moment, (leading / root_K[:, None]).T, leading * root_K[:, None], heads)


def mean_groups(moment: np.ndarray, components: int, heads: int) -> Values:
    """Replace neighbouring heads by their mean."""
    mix = np.asarray(block_identity(components, heads), np.float64)
    return _plain(moment, mix, (mix / mix.sum(axis=1, keepdims=True)).T, heads)


def dense(moment: np.ndarray, components: int, weights_KHH: np.ndarray) -> Values:
    """Solve for one latent of width C H with any map to each head: a whitened SVD, closed form."""
    heads, width, _ = weights_KHH.shape
    roots, inverses = root(weights_KHH)
    gram = _weigh(moment, roots)
    leading = np.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1][:, : components * width]
    combine = np.einsum("gih,ghr->gir", roots, leading.reshape(heads, width, -1)).reshape(
        leading.shape
    )
    back = np.einsum("rgh,ghj->rgj", leading.T.reshape(-1, heads, width), inverses)
    loss = _loss(gram, leading, leading.T)
    return Values(combine, back.reshape(components, width, heads, width), None, loss)


def dense_costs(moment: np.ndarray, costs_XX: np.ndarray, heads: int) -> Values:
    """Solve `dense` with all K H slots, for an error e of the features that costs e costs e^T."""
    one = dense(moment, 1, costs_XX[None])
    width = len(moment) // heads
    return dataclasses.replace(one, mix=one.mix.reshape(heads, width, heads, width))


def aligned_groups(moment, components: int, weights_KHH, orthogonal: bool) -> Values:
    """Solve for one component and a gauge per head: GQA with the best groups and gauges."""
    return _aligned(moment, components, weights_KHH, orthogonal, move_mix=False)


def aligned(moment, components: int, weights_KHH, orthogonal: bool) -> Values:
    """Solve for the paper's architecture with a gauge: v_g ~ sum_c M_cg z_c B_g.

    The solver is alternating least squares from two starts: the eigenvectors of the heads' Gram
    matrix, and the best groups. If `orthogonal`, B_g is orthogonal, to commute with a norm of the
    head's output, and errors are weighted by one number per head.
    """
    return _aligned(moment, components, weights_KHH, orthogonal, move_mix=True)


def _aligned(moment, components, weights_KHH, orthogonal: bool, move_mix: bool) -> Values:
    heads, width, _ = weights_KHH.shape
    if orthogonal:
        weights_KHH = _scalars(weights_KHH)[:, None, None] * np.eye(width)
    roots, inverses = root(weights_KHH)
    gram = _weigh(moment, roots)
    blocks = by_head(gram, heads)
    identity = np.broadcast_to(np.eye(width), (heads, width, width))
    starts = []
    if move_mix or components == heads:
        leading = np.linalg.eigh(np.einsum("ghkh->gk", blocks))[1][:, ::-1][:, :components]
        starts.append((leading.T, identity))
    if components < heads:
        mix, gauge = _grouped_start(blocks, components)
        noise = 0.02 * np.random.default_rng(0).normal(size=mix.shape) if move_mix else 0.0
        starts.append((mix + noise, gauge))
    found = [_alternate(gram, *start, orthogonal=orthogonal, move_mix=move_mix) for start in starts]
    combine, mix, gauge, loss = min(found, key=lambda solution: solution[-1])
    combine = np.einsum("gih,ghr->gir", roots, combine.reshape(heads, width, -1)).reshape(
        combine.shape
    )
    if (
        orthogonal
    ):  # the weights are one number per head: they go into the mixing, the gauge stays orthogonal
        mix = mix * np.sqrt(1 / _scalars(weights_KHH))
    else:
        gauge = gauge @ inverses
    return Values(combine, mix, gauge, loss)


def _grouped_start(blocks_KHKH, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best groups as a mixing matrix (C, K), and their gauges (K, H, H)."""
    heads, width = blocks_KHKH.shape[:2]

    def of(group: tuple[int, ...]) -> np.ndarray:
        part = blocks_KHKH[list(group)][:, :, list(group)]
        return part.reshape(len(group) * width, len(group) * width)

    def cost(group: tuple[int, ...]) -> float:
        if len(group) == 1:
            return 0.0
        return float(np.linalg.eigvalsh(of(group))[:-width].sum())

    groups = partition(heads, components, cost)
    gauge = np.broadcast_to(np.eye(width), (heads, width, width)).copy()
    for group in groups:
        leading = np.linalg.eigh(of(group))[1][:, -width:].reshape(len(group), width, width)
        gauge[list(group)] = np.swapaxes(leading, 1, 2)
    return one_hot(groups, heads), gauge


def _alternate(gram, mix, gauge, orthogonal: bool, move_mix: bool):
    """Return (combine, mix, gauge, loss) for the weighted values."""
    heads, width, _ = gauge.shape
    components, last = mix.shape[0], np.inf
    size = components * width
    if orthogonal:
        gauge = _rotation(gauge)

    def combined(mix, gauge):
        back = np.einsum("cg,ghj->chgj", mix, gauge).reshape(size, heads * width)
        return back, np.linalg.solve(ridged(back @ back.T, 1e-10), back).T

    for sweep in range(_SWEEPS):
        back, combine = combined(mix, gauge)
        if sweep % _CHECK_EVERY == 0:
            now = _loss(gram, combine, back)
            if now > last * (1 - _SETTLED) or now < 1e-14:
                break
            last = now
        crossed = (combine.T @ gram).reshape(components, width, heads, width)  # A^T X
        among = crossed.reshape(size, -1) @ combine  # A^T A
        # Rows are pairs of components and columns are pairs of features, so that both halves of a
        # sweep are matrix products.
        among = among.reshape(components, width, components, width).transpose(0, 2, 1, 3)
        among = among.reshape(components**2, width**2)
        side = np.tensordot(mix.T, crossed, (1, 0))  # (K, H, K, H), then its equal heads:
        side = side[np.arange(heads), :, np.arange(heads)]  # Y_g^T X_g
        if orthogonal:
            gauge = _rotation(side)
        else:
            pairs = np.einsum("cg,dg->gcd", mix, mix).reshape(heads, -1)
            square = (pairs @ among).reshape(heads, width, width)
            gauge = np.linalg.solve(ridged(square, 1e-10), side)
        if not move_mix:
            continue
        shapes = (gauge @ np.swapaxes(gauge, 1, 2)).reshape(heads, -1)
        square = (shapes @ among.T).reshape(heads, components, components)
        side = np.einsum("chgj,ghj->gc", crossed, gauge, optimize=True)
        mix = np.linalg.solve(ridged(square, 1e-12), side[..., None])[..., 0].T
        if not orthogonal:
            length = np.linalg.norm(mix, axis=0) + 1e-300
            mix, gauge = mix / length, gauge * length[:, None, None]
    back, combine = combined(mix, gauge)
    return combine, mix, gauge, _loss(gram, combine, back)


def _rotation(x_KHH: np.ndarray) -> np.ndarray:
    """Return the orthogonal matrix nearest to each matrix (Procrustes)."""
    u, _, v = np.linalg.svd(x_KHH)
    return u @ v
