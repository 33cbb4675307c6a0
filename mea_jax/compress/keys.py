"""Solve for C component key heads from which K composite keys are rebuilt.

Keys can be rebuilt before or after rotation. With features f and f + H/2 of a head as one complex
number k_gf, a rotary position is a factor e^(i t theta_f), and a score is
Re sum_f conj(q_gf) k_gf. So any complex mixing per frequency

    k_gf ~ sum_c N_cgf z_cf,    z_cf = sum_g T_gcf k_gf

commutes with positions. The methods differ in the N that they allow: real and the same for all
frequencies, that times one complex number per head and frequency, or any N. All minimise

    sum_f sum_g w_gf E|k_gf - sum_c N_cgf z_cf|^2

for which they need only the complex moments of `moments.complex_blocks`: Gram matrices (F, K, K).
"""

import dataclasses

import numpy as np

from mea_jax.compress.grouping import one_hot, partition
from mea_jax.compress.moments import ridged
from mea_jax.ops.hlc import block_identity

_SWEEPS = 300
_CHECK_EVERY = 10  # sweeps between two checks of the residual
_SETTLED = 1e-6  # the iteration ends when the relative gain between two checks is below this


@dataclasses.dataclass(frozen=True)
class Keys:
    """A solution for the keys of one layer.

    Attributes:
      combine: T (F, K, C), complex, which maps composite heads to components.
      mix: (C, K) float64, the paper's W_lc, with N = `mix` * `gauge`; or N itself, (F, C, K)
        complex.
      gauge: (K, F) complex; None means all ones.
      residual: the lost share of the (weighted) energy of the keys.
    """

    combine: np.ndarray
    mix: np.ndarray
    gauge: np.ndarray | None
    residual: float

    def full_mix(self) -> np.ndarray:
        """Return N (F, C, K), complex."""
        if self.mix.ndim == 3:
            return self.mix
        whole_FCK = np.broadcast_to(self.mix, (self.combine.shape[0], *self.mix.shape))
        return whole_FCK if self.gauge is None else whole_FCK * self.gauge.T[:, None]

    def components(self, w_DKF: np.ndarray) -> np.ndarray:
        """Return the component heads (D, C, F) of complex composite heads (D, K, F)."""
        return np.einsum("dgf,fgc->dcf", w_DKF, self.combine, optimize=True)

    def rebuilt(self, w_DKF: np.ndarray) -> np.ndarray:
        """Return the composite heads (D, K, F), complex, rebuilt from their components."""
        return np.einsum("dcf,fcg->dgf", self.components(w_DKF), self.full_mix(), optimize=True)


def _loss(gram_FKK: np.ndarray, combine: np.ndarray, mix: np.ndarray) -> float:
    """Return sum_f tr (1 - T N)^H Gram (1 - T N) over sum_f tr Gram, with T `combine`, N `mix`."""
    rest = np.eye(gram_FKK.shape[-1]) - combine @ mix
    lost = np.einsum("fhg,fhk,fkg->", rest.conj(), gram_FKK, rest, optimize=True).real
    return float(lost / np.einsum("fgg->", gram_FKK).real)


def _weighted(gram_FKK: np.ndarray, weights_KF: np.ndarray) -> np.ndarray:
    root_FK = np.sqrt(weights_KF).T
    return root_FK[:, :, None] * gram_FKK * root_FK[:, None, :]


def _solution(gram, weights_KF, combine, mix, gauge) -> Keys:
    found = Keys(combine, mix, gauge, 0.0)
    root_FK = np.sqrt(weights_KF).T
    loss = _loss(
        _weighted(gram, weights_KF),
        combine / root_FK[:, :, None],
        found.full_mix() * root_FK[:, None],
    )
    return dataclasses.replace(found, residual=loss)


def head_mixing(gram_FKK: np.ndarray, components: int, weights_K: np.ndarray) -> Keys:
    """Solve for one real number per pair of heads: leading eigenvectors of the K x K Gram matrix.

    With moments of the weights and equal `weights_K`, this is the paper's SVD of (D H, K).
    """
    frequencies, heads = gram_FKK.shape[:2]
    weights_KF = np.repeat(weights_K[:, None], frequencies, axis=1)
    _, vectors = np.linalg.eigh(_weighted(gram_FKK, weights_KF).real.sum(axis=0))
    leading = vectors[:, ::-1][:, :components]
    root_K1 = np.sqrt(weights_K)[:, None]
    combine = np.broadcast_to(leading * root_K1, (frequencies, heads, components))
    return _solution(gram_FKK, weights_KF, combine, (leading / root_K1).T, None)


def mean_groups(gram_FKK: np.ndarray, components: int) -> Keys:
    """Replace neighbouring heads by their mean, as arXiv 2305.13245 converts MHA to GQA."""
    frequencies, heads = gram_FKK.shape[:2]
    mix = np.asarray(block_identity(components, heads), np.float64)
    combine = np.broadcast_to(
        (mix / mix.sum(axis=1, keepdims=True)).T, (frequencies, heads, components)
    )
    return _solution(gram_FKK, np.ones((heads, frequencies)), combine, mix, None)


def per_frequency(gram_FKK: np.ndarray, components: int, weights_KF: np.ndarray) -> Keys:
    """Solve for any complex N, in closed form: leading eigenvectors per frequency's Gram matrix."""
    costs_FKK = weights_KF.T[:, :, None] * np.eye(weights_KF.shape[0])
    return per_frequency_costs(gram_FKK, components, costs_FKK)


def per_frequency_costs(gram_FKK: np.ndarray, components: int, costs_FKK: np.ndarray) -> Keys:
    """Solve `per_frequency` for an error e of the keys of a frequency that costs e costs e^H.

    `costs_FKK` are Hermitian and positive definite.
    """
    root_FKK = np.linalg.cholesky(costs_FKK)
    adjoint_FKK = np.swapaxes(root_FKK.conj(), 1, 2)
    weighted_FKK = adjoint_FKK @ gram_FKK @ root_FKK
    leading = np.linalg.eigh(weighted_FKK)[1][:, :, ::-1][:, :, :components]
    back = np.swapaxes(leading.conj(), 1, 2)
    loss = _loss(weighted_FKK, leading, back)
    return Keys(root_FKK @ leading, back @ np.linalg.inv(root_FKK), None, loss)


def aligned_groups(gram_FKK, components: int, weights_KF, unit: bool) -> Keys:
    """Solve for one component and a gauge per head: GQA with the best groups and gauges."""
    start = _grouped_start(_weighted(gram_FKK, weights_KF), components)
    return _alternate(gram_FKK, weights_KF, *start, unit=unit, move_mix=False)


def aligned(gram_FKK: np.ndarray, components: int, weights_KF: np.ndarray, unit: bool) -> Keys:
    """Solve for the paper's architecture with a gauge: N_cgf = M_cg b_gf, M real, b complex.

    A gauge does not change the model: its conjugate goes into the queries. The solver is
    alternating least squares (each step in closed form, so the loss never rises) from two starts:
    the eigenvectors of the Gram matrix, and the best groups. Ten random starts differ by a few
    percent.

    Args:
      gram_FKK: complex moments of the keys.
      components: C.
      weights_KF: weights of the error of each head and frequency.
      unit: whether the gauge has modulus 1, which keeps the norms of heads (for a key norm).
    """
    weighted, heads = _weighted(gram_FKK, weights_KF), gram_FKK.shape[-1]
    plain = np.linalg.eigh(weighted.real.sum(axis=0))[1][:, ::-1][:, :components].T
    starts = [(plain, np.sqrt(weights_KF).astype(complex))]
    if components < heads:
        mix, gauge = _grouped_start(weighted, components)
        noise = np.random.default_rng(0).normal(size=mix.shape)
        starts.append((mix + 0.02 * noise, gauge))
    found = [_alternate(gram_FKK, weights_KF, *start, unit=unit) for start in starts]
    return min(found, key=lambda keys: keys.residual)


def _grouped_start(weighted_FKK, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best groups as a mixing matrix (C, K) of 0 and 1, and their gauges (K, F)."""
    frequencies, heads = weighted_FKK.shape[:2]

    def cost(group: tuple[int, ...]) -> float:
        part = weighted_FKK[:, group][:, :, group]
        return float(
            np.trace(part, axis1=1, axis2=2).real.sum() - np.linalg.eigvalsh(part)[:, -1].sum()
        )

    groups = partition(heads, components, cost)
    gauge = np.ones((heads, frequencies), complex)
    for group in groups:
        leading_Fg = np.linalg.eigh(weighted_FKK[:, group][:, :, group])[1][:, :, -1]
        gauge[list(group)] = leading_Fg.conj().T
    return one_hot(groups, heads), gauge


def _alternate(gram_FKK, weights_KF, mix, gauge, unit: bool, move_mix: bool = True) -> Keys:
    gram = _weighted(gram_FKK, weights_KF)
    root_KF, last = np.sqrt(weights_KF), np.inf
    if unit:  # for weighted keys, the modulus of the gauge is that of the weights
        gauge = root_KF * _phase(gauge)

    def combined(mix, gauge):
        whole = mix * gauge.T[:, None]  # N (F, C, K)
        adjoint = np.swapaxes(whole.conj(), 1, 2)
        return whole, adjoint @ np.linalg.inv(ridged(whole @ adjoint, 1e-10))  # N, T (F, K, C)

    for sweep in range(_SWEEPS):
        whole, combine = combined(mix, gauge)
        if sweep % _CHECK_EVERY == 0:
            now = _loss(gram, combine, whole)
            if now > last * (1 - _SETTLED) or now < 1e-14:
                break
            last = now
        crossed = gram @ combine  # X^H u (F, K, C)
        among = np.swapaxes(combine.conj(), 1, 2) @ crossed  # u^H u (F, C, C)
        numerator = np.einsum("fgc,cg->gf", crossed.conj(), mix)
        if unit:
            gauge = root_KF * _phase(numerator)
        else:
            energy = np.einsum("cg,fcd,dg->gf", mix, among.real, mix, optimize=True)
            gauge = numerator / np.maximum(energy, 1e-300)
        if not move_mix:
            continue
        square = np.einsum("gf,fcd->gcd", np.abs(gauge) ** 2, among.real, optimize=True)
        side = np.einsum("gf,fgc->gc", gauge.conj(), crossed.conj(), optimize=True).real
        mix = np.linalg.solve(ridged(square, 1e-12), side[..., None])[..., 0].T
        if not unit:
            length = np.linalg.norm(mix, axis=0) + 1e-300
            mix, gauge = mix / length, gauge * length[:, None]
    _, combine = combined(mix, gauge)
    root_FK1 = root_KF.T[:, :, None]
    return _solution(gram_FKK, weights_KF, combine * root_FK1, mix, gauge / root_KF)


def _phase(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    return np.where(size > 0, x / np.maximum(size, 1e-300), 1.0)
