"""Fits of learning-rate laws to finished runs, with intervals or the reason for having no fit."""

from mea_jax.study.laws.all_fits import fit_all
from mea_jax.study.laws.gains import Gain, fit_gains
from mea_jax.study.laws.intervals import Estimate
from mea_jax.study.laws.optimum import Optimum, fit_optima
from mea_jax.study.laws.results import Result, parse
from mea_jax.study.laws.robustness import Sensitivity, Stability, fit_sensitivity, fit_stability
from mea_jax.study.laws.sizes import LearningRateLaw, fit_laws
from mea_jax.study.laws.tokens import LossInTokens, fit_tokens

__all__ = [
    "Estimate",
    "Gain",
    "LearningRateLaw",
    "LossInTokens",
    "Optimum",
    "Result",
    "Sensitivity",
    "Stability",
    "fit_all",
    "fit_gains",
    "fit_laws",
    "fit_optima",
    "fit_sensitivity",
    "fit_stability",
    "fit_tokens",
    "parse",
]
