"""Estimate the work of a compression before it starts."""

import time

import jax
import jax.numpy as jnp

from mea_jax.compress import fisher
from mea_jax.compress.options import Options, fitting_tokens, joint_tokens, repairs_layers
from mea_jax.compress.probe import TRIED
from mea_jax.compress.rates import POINTS
from mea_jax.compress.repair import STEPWISE, TEMPERED
from mea_jax.config.schema import ModelConfig
from mea_jax.model.flops import forward_flops_per_token

_SIZE = 1024  # of the product that is timed


def passes(
    model: ModelConfig, options: Options, layers: int, batch_tokens: int
) -> dict[str, float]:
    """Return the tokens of each stage, in tokens of one forward pass through all layers.

    A gradient counts as two more passes. `layers` is the number of layers that are compressed,
    `batch_tokens` the number of tokens of a repair step.
    """
    share = layers / model.n_layers
    found = {
        "calibrating": options.calibration_tokens + options.held_out_tokens,
        "compressing": 0.0,
        "evaluating": options.held_out_tokens,
    }
    if options.budget in ("measured", "repaired"):
        # A candidate of layer l runs the layers above it: half of them on average.
        each = len(POINTS) if options.method == "bits" else model.n_kv_heads - 1
        candidates = 2 * each * layers
        found["dividing"] = candidates * options.measure_tokens / 2
        if options.budget == "repaired":
            found["dividing"] += candidates * TRIED * 3 * batch_tokens / model.n_layers
    if options.method == "bits":  # forward, and then again with gradients
        found["informing"] = 4.0 * min(options.calibration_tokens, fisher.TOKENS)
    if options.calibration_tokens:
        tempered = min(options.calibration_tokens, TEMPERED)
        found["compressing"] += share * 4 * tempered
        if repairs_layers(options):
            found["compressing"] += share * 4 * fitting_tokens(options)
        if repairs_layers(options) and options.repair in STEPWISE:
            found["compressing"] += share * options.repair_steps * 3 * batch_tokens
    if options.repair == "joint":  # the teacher's pass, the model's, and its gradients
        found["training"] = 4 * joint_tokens(options) + options.held_out_tokens
    return found


def describe(model: ModelConfig, options: Options, layers: int, batch: int, length: int) -> str:
    """Return a line with the work of a compression and about how long it takes on these devices.

    A repair step reads `batch` windows of `length` tokens. The time is that of the products alone,
    at the speed of one product that is timed here.
    """
    tokens = sum(passes(model, options, layers, batch * length).values())
    flops = tokens * forward_flops_per_token(model, length)
    speed = product_speed(jnp.dtype(model.dtype)) * len(jax.devices())
    seconds = flops / speed
    least = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    return (
        f"expected: {flops / 1e12:,.1f} TFLOP, at least {least} at the {speed / 1e9:,.0f} GFLOP/s "
        f"of this machine's {model.dtype} products"
    )


def product_speed(dtype: jnp.dtype) -> float:
    """Return FLOP/s of one product of matrices (1024, 1024) on the first device."""
    x = jnp.ones((_SIZE, _SIZE), dtype)
    multiply = jax.jit(lambda x: (x @ x).astype(x.dtype))
    multiply(x).block_until_ready()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < 0.05:
        multiply(x).block_until_ready()
        count += 1
    return count * 2 * _SIZE**3 / (time.perf_counter() - began)
