"""Fit the steps of slots to text: a slot's values have heavier tails than a Gaussian's.

`bits.STEPS` are best for a Gaussian. A few slots have rare values of ten times their standard
deviation, often at tokens that many others attend to, and a step that clips them costs more than
all rounding: on SmolLM2-135M, fitting a factor of each slot's step halves the divergence at 4 bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.compress.repair import Layer, OriginalLayer
from mea_jax.compress.stream import LayerSpec, apply_attention
from mea_jax.config.schema import Side
from mea_jax.model.heads import SINKS, digits
from mea_jax.ops import slots

Tree = dict[str, Any]
FITTED = 16384  # tokens on which steps are fitted
# Factors of a Gaussian's step that are tried, from a range of half its size to ten times.
_FACTORS = tuple(float(x) for x in np.geomspace(0.6, 10.0, 24))


@functools.partial(jax.jit, static_argnums=0)
def _errors(spec: LayerSpec, attention: Tree, normed_BTD, batch, index):
    """Return the sum of squared errors of each slot with each factor: {side: (factors, X)}."""
    _, heads = apply_attention(spec, attention, normed_BTD, batch, index, heads=True)
    later_BT1 = (batch["segment_ids"] > 0) & (batch["positions"] >= SINKS)
    weight_BT1 = later_BT1.astype(jnp.float32)[..., None]
    found = {}
    for side in Side:
        rows = spec.model.bits(side)
        assert rows is not None
        table_LX = 2.0 ** np.asarray([digits(row) for row in rows], np.float32)
        levels_X = jnp.asarray(table_LX)[index if len(rows) > 1 else 0]
        x_BTCH = heads[f"{side}_slots"][0].astype(jnp.float32)
        x_BTX = x_BTCH.reshape(*weight_BT1.shape[:2], -1)
        step_X = attention[f"{side}_steps"].reshape(-1)

        def error(factor, x_BTX=x_BTX, step_X=step_X, levels_X=levels_X):
            rounded_BTX = slots.rounded(x_BTX, (factor * step_X)[None, None], levels_X[None, None])
            return jnp.sum(jnp.square(rounded_BTX - x_BTX) * weight_BT1, axis=(0, 1))

        found[side.value] = jax.lax.map(error, jnp.asarray(_FACTORS, jnp.float32))
    return found


def fitted(original: OriginalLayer, compressed: Layer) -> Tree:
    """Return the attention parameters with the factor of each slot's step that loses least.

    Errors are those of values that the original layer's inputs make, on `FITTED` tokens.
    """
    (spec, attention), stream = compressed, original.stream
    placed, totals = stream.place(attention), {side.value: np.zeros(()) for side in Side}
    most = max(FITTED // stream.batches[0]["inputs"].size, 1)
    with jax.set_mesh(stream.mesh):
        for number in range(len(stream))[:most]:
            batch, normed, _ = original.batch(number)
            sums = jax.device_get(_errors(spec, placed, normed, batch, original.index))
            totals = {side: totals[side] + np.asarray(sums[side], np.float64) for side in sums}
    new = dict(attention)
    for side, total in totals.items():
        factor_X = np.asarray(_FACTORS, np.float32)[np.argmin(total, axis=0)]
        steps_CH = attention[f"{side}_steps"]
        new[f"{side}_steps"] = steps_CH * factor_X.reshape(steps_CH.shape)
    return new
