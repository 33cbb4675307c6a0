"""Solve for the component keys and values of a layer with a method chosen by name.

| method | keys | values |
|---|---|---|
| svd | the paper's: one number per pair of heads, from the weights | the same |
| calibrated | the same, from activations, weighted by queries | by the output projection |
| aligned | that with a complex gauge, which goes into the queries | a gauge, into the output |
| frequency | a complex number per pair of heads and frequency | a dense map from one latent |
| gqa_mean | neighbouring heads are replaced by their mean | the same |
| gqa_aligned | the best groups share a head, through gauges | the same |
| bits | all heads, as `frequency`, each slot with bits by what its errors cost | the same |
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from mea_jax.compress import keys as key_solvers
from mea_jax.compress import layer as layers
from mea_jax.compress import values as value_solvers
from mea_jax.compress.fisher import Information
from mea_jax.compress.keys import Keys
from mea_jax.compress.layer import Heads
from mea_jax.compress.moments import (
    Moments,
    complex_blocks,
    of_weights,
    ridged,
    without_mean,
)
from mea_jax.compress.values import Values
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.errors import UserError

METHODS = ("svd", "calibrated", "aligned", "frequency", "gqa_mean", "gqa_aligned", "bits")
# The queries of these get a temperature if there is text. The baselines stay as published.
SHARPENED = ("aligned", "frequency")
_RIDGE = 1e-3  # of information, relative to its mean eigenvalue: it is a sample's
_LEAST = 1e-9  # lower bound of a frequency's weight (the mean is 1): no frequency is ignored
NEED_TEXT = ("calibrated", "bits")  # without text these would be another method


def target_model(
    model: ModelConfig, method: str, keys: list[int], values: list[int]
) -> ModelConfig:
    """Return the compressed model's config, with `keys` and `values` components per layer.

    Raise `UserError` if `method` does not apply to the model's attention.
    """
    check_model(model, method)
    wide = method in ("frequency", "bits")
    return dataclasses.replace(
        model,
        key_mean=method == "bits",
        hlc="kv",
        hlc_order="before",
        key_mixing="frequency" if wide else "heads",
        value_mixing="dense" if wide else "heads",
        key_slots="",
        value_slots="",
        key_components=tuple(keys),
        value_components=tuple(values),
    )


def check_model(model: ModelConfig, method: str) -> None:
    """Raise `UserError` if `method` does not apply to the model's attention."""
    if model.variant != "mea":
        raise UserError(
            f"config.model.variant={model.variant!r} cannot be compressed: choose a model with "
            "MEA, MHA, GQA or MQA"
        )
    if model.qk_norm and model.hlc_order == "after" and model.mixes(Side.KEY):
        raise UserError(
            "config.model.hlc_order='after' mixes keys after their norm, so they are not linear in "
            "the input and cannot be rebuilt from fewer heads: choose a model with 'before'"
        )
    if model.key_bits is not None or model.value_bits is not None or model.key_mean:
        raise UserError(
            "config.model.key_bits: the cache is packed by bits per slot already; compress the "
            "checkpoint from before that"
        )
    if model.qk_norm_over == "all":
        raise UserError(
            "config.model.qk_norm_over='all' (OLMo 2) norms all key heads together with a weight "
            "for each, so a key cannot be rebuilt from mixed heads: choose a model with 'head' or "
            "without qk_norm"
        )
    if model.head_dim % 2:
        raise UserError(
            f"config.model.head_dim={model.head_dim} is odd, but keys are taken in pairs of "
            "features: choose a model with an even head_dim"
        )
    if model.gate == "feature" and method in ("aligned", "gqa_aligned"):
        raise UserError(
            f"--method {method} rotates each head's features, which config.model.gate='feature' "
            "does not allow: use --method frequency or calibrated"
        )


def _scaled(moment: np.ndarray, scale_H: np.ndarray, heads: int) -> np.ndarray:
    scale = np.tile(scale_H, heads)
    return scale[:, None] * moment * scale


def _key_problem(heads: Heads, moments: Moments, weigh: str) -> tuple[np.ndarray, np.ndarray]:
    """Return Gram matrices (F, K, K) of the keys that `layer.with_keys` uses, and weights (K, F).

    At each frequency, an error of a key is weighted by the power of the queries that read it. Under
    a key norm the length of a key does not matter, so each head's errors are relative to its power.
    `weigh` selects the part of the norm's weight that is included in the keys: "tied" is the ratio
    to the weight tied within rotary pairs, "whole" is all of it, and "none" is nothing.
    """
    count, moment = heads.key_DKH.shape[1], moments.keys
    weights_KF = moments.queries
    if heads.key_norm_H is not None and heads.query_norm_H is not None:
        if not moments.tokens:  # moments of weights do not include the query norm
            weights_KF = np.broadcast_to(
                np.square(layers.tie_pairs(heads.query_norm_H)), moments.queries.shape
            )
        power_K = np.trace(
            moment.reshape(count, -1, count, heads.key_DKH.shape[2])[
                np.arange(count), :, np.arange(count)
            ],
            axis1=1,
            axis2=2,
        )
        weights_KF = weights_KF / np.maximum(power_K, 1e-300)[:, None]
        alike_F = layers.tie_pairs(heads.key_norm_H)
        if weigh == "tied":
            ratio_H = heads.key_norm_H / layers.repeat_pairs(np.where(alike_F == 0, 1, alike_F))
            moment, weights_KF = _scaled(moment, ratio_H, count), weights_KF * np.square(alike_F)
        elif weigh == "whole":
            moment = _scaled(moment, heads.key_norm_H, count)
    weights_KF = weights_KF / weights_KF.mean()
    return complex_blocks(moment, count), np.maximum(weights_KF, _LEAST)


def solve_keys(method: str, heads: Heads, moments: Moments, components: int) -> Keys:
    """Return `components` component keys by `method`."""
    count = heads.key_DKH.shape[1]
    unit = heads.key_norm_H is not None
    with threadpool_limits(1, "blas"):  # for many small products, synchronising threads is slower
        if method in ("svd", "gqa_mean"):
            moments = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH)
            gram_FKK, _ = _key_problem(heads, moments, "none")
            if method == "gqa_mean":
                return key_solvers.mean_groups(gram_FKK, components)
            return key_solvers.head_mixing(gram_FKK, components, np.ones(count))
        if method == "calibrated":
            gram_FKK, weights_KF = _key_problem(heads, moments, "none")
            weights_K = weights_KF.mean(axis=1)
            return key_solvers.head_mixing(gram_FKK, components, weights_K)
        if method == "frequency":
            problem = _key_problem(heads, moments, "whole")
            return key_solvers.per_frequency(problem[0], components, problem[1])
        problem = _key_problem(heads, moments, "tied")
        solve = key_solvers.aligned if method == "aligned" else key_solvers.aligned_groups
        return solve(problem[0], components, problem[1], unit)


def solve_values(method: str, heads: Heads, moments: Moments, components: int) -> Values:
    """Return `components` component values by `method`."""
    count = heads.value_DKH.shape[1]
    norm_H = heads.head_norm_H
    weights_KHH = value_solvers.output_weights(heads.out_NHD, norm_H, moments.outputs, count)
    with threadpool_limits(1, "blas"):
        if method in ("svd", "gqa_mean"):
            moment = of_weights(heads.query_DNH, heads.key_DKH, heads.value_DKH).values
            if method == "gqa_mean":
                return value_solvers.mean_groups(moment, components, count)
            return value_solvers.head_mixing(moment, components, np.ones(count))
        if method == "calibrated":
            weights_K = np.trace(weights_KHH, axis1=1, axis2=2) / weights_KHH.shape[-1]
            return value_solvers.head_mixing(moments.values, components, weights_K)
        if method == "frequency":
            return value_solvers.dense(moments.values, components, weights_KHH)
        solve: Callable = value_solvers.aligned
        if method == "gqa_aligned":
            solve = value_solvers.aligned_groups
        return solve(moments.values, components, weights_KHH, norm_H is not None)


@dataclasses.dataclass(frozen=True)
class Solved:
    """The solution of a layer by one method. With "bits", keys are without their mean."""

    heads: Heads
    moments: Moments
    keys: Keys
    values: Values

    @functools.cached_property
    def variances(self) -> tuple[np.ndarray, np.ndarray]:
        """The variances of the slots of component keys (C, H) and of component values (C, H)."""
        gram_FKK, _ = _key_problem(self.heads, self.moments, "whole")
        combine, back = self.keys.combine, self.values.combine
        power_CF = np.einsum("fgc,fgh,fhc->cf", combine.conj(), gram_FKK, combine, optimize=True)
        value_X = np.einsum("xr,xy,yr->r", back, self.moments.values, back, optimize=True)
        key_CH = np.concatenate([power_CF.real, power_CF.real], axis=1) / 2
        return np.maximum(key_CH, 0), np.maximum(value_X, 0).reshape(key_CH.shape[0], -1)

    @property
    def costs(self) -> tuple[np.ndarray, np.ndarray]:
        """The loss without each slot (C, H) of "bits", in nats per token (fisher.py).

        Slots are such that an error e of a value costs e^2 / 2. One of a real or an imaginary part
        of a key costs half of that, as its gradient has random phases.
        """
        key_CH, value_CH = self.variances
        return key_CH / 4, value_CH / 2


def solve(
    method: str,
    heads: Heads,
    moments: Moments,
    counts: tuple[int, int],
    information: Information | None = None,
) -> Solved:
    """Return the solution with C_k and C_v = `counts`; "bits" needs the layer's `information`."""
    if method == "bits":
        assert information is not None
        return _solve_bits(heads, moments, information)
    keys = solve_keys(method, heads, moments, counts[0])
    return Solved(heads, moments, keys, solve_values(method, heads, moments, counts[1]))


def _solve_bits(heads: Heads, moments: Moments, information: Information) -> Solved:
    """Return all slots, in the basis in which neither they nor what their errors cost correlate."""
    heads, moments = layers.centred(heads, moments.key_means), without_mean(moments)
    count = heads.key_DKH.shape[1]
    gram_FKK, _ = _key_problem(heads, moments, "whole")
    costs_FKK = ridged(complex_blocks(information.keys, count), _RIDGE)
    costs_XX = ridged(information.values, _RIDGE)
    with threadpool_limits(1, "blas"):
        keys = key_solvers.per_frequency_costs(gram_FKK, count, costs_FKK)
        values = value_solvers.dense_costs(moments.values, costs_XX, count)
    return Solved(heads, moments, keys, values)


def rebuilt_keys(heads: Heads, keys: Keys) -> np.ndarray:
    """Return the projection (D, K, H) of composite keys rebuilt from components, without gauges.

    It is in the model's original basis, so it can replace the original keys while all other
    parameters stay the same.
    """
    width = heads.key_DKH.shape[2]
    carried_H = np.ones(width)
    if heads.key_norm_H is not None and keys.mix.ndim == 3:
        carried_H = heads.key_norm_H
    elif heads.key_norm_H is not None and keys.gauge is not None:
        alike_F = layers.tie_pairs(heads.key_norm_H)
        carried_H = heads.key_norm_H / layers.repeat_pairs(np.where(alike_F == 0, 1, alike_F))
    carried_H = np.where(carried_H == 0, 1, carried_H)
    from_complex = keys.rebuilt(layers.complex_heads(heads.key_DKH * carried_H))
    return layers.real_heads(from_complex) / carried_H
