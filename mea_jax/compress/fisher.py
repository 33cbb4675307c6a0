"""Measure what a small error of each cached key and value costs: the Fisher information.

If keys and values are changed by small errors e, the predictions move by

    KL(original || changed) = 1/2 E (g . e)^2,

with g the gradient of -log p(y) for labels y that are drawn from the model's own predictions. So
E[g g^T] of a layer's keys and of its values says how much each direction matters, in nats, through
all later layers. It takes one pass forward and one backward through the model, a layer at a time.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.cli import progress
from mea_jax.compress.stream import Stream, context_of, head_of
from mea_jax.config.schema import ModelConfig, Side
from mea_jax.model.heads import SINKS
from mea_jax.model.layer_spec import LayerSpec
from mea_jax.model.transformer import Block
from mea_jax.ops import rms_norm

Tree = dict[str, Any]
_HIGHEST = jax.lax.Precision.HIGHEST
_ROWS = 256  # positions whose logits are in memory at once
TOKENS = 16384  # on which the information is measured


@dataclasses.dataclass(frozen=True)
class Information:
    """The Fisher information of one layer, per token.

    Attributes:
      keys: E[g g^T] (K H, K H) of keys before rotation, times the norm's weight if there is one.
      values: E[g g^T] (K H, K H) of values.
    """

    keys: np.ndarray
    values: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _top_gradient(model: ModelConfig, top: Tree, x_BTD, batch, key):
    """Return the gradient (B, T, D) of the sum of -log p of labels drawn from the model."""
    hidden, kernel_DV = head_of(model, top)
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    rows = min(_ROWS, weights_BT.size)

    def gradient(parts):
        x_1RD, weight_R, key = parts

        def loss(x_1RD):
            logits_RV = (hidden(x_1RD)[0] @ kernel_DV.astype(x_1RD.dtype)).astype(jnp.float32)
            labels_R = jax.random.categorical(key, jax.lax.stop_gradient(logits_RV))
            chosen_R = jnp.take_along_axis(logits_RV, labels_R[:, None], axis=1)[:, 0]
            return jnp.sum((jax.nn.logsumexp(logits_RV, axis=1) - chosen_R) * weight_R)

        return jax.grad(loss)(x_1RD)

    x_C1RD = x_BTD.reshape(-1, 1, rows, x_BTD.shape[-1])
    keys_C = jax.random.split(key, len(x_C1RD))
    found = jax.lax.map(gradient, (x_C1RD, weights_BT.reshape(-1, rows), keys_C))
    return found.reshape(x_BTD.shape)


@functools.partial(jax.jit, static_argnums=0)
def _pull_back(spec: LayerSpec, params: Tree, x_BTD, d_BTD, batch, index):
    """Return the gradient (B, T, D) of a layer's input, and sums over tokens of g g^T by side."""
    model, block = spec.model, Block(spec.alone, *spec.components)
    shape = (*x_BTD.shape[:2], model.n_kv_heads, model.head_dim)
    errors = {side.value: jnp.zeros(shape, jnp.float32) for side in Side}

    def run(x_BTD, errors):
        variables = {"params": params, "errors": {"attention": errors}}
        context = context_of(model, batch)
        out: Any = block.apply(variables, x_BTD, context, index, mutable=["heads"])
        (y_BTD, _), seen = out
        return y_BTD, seen["heads"]["attention"]["key"][0]

    _, pull, key_BTKH = jax.vjp(run, x_BTD, errors, has_aux=True)
    d_BTD, gradients = pull(d_BTD)
    if model.qk_norm:  # components lack 1/rms, which is cached exactly
        inverse_BTK1 = rms_norm.inverse_rms(key_BTKH.astype(jnp.float32), model.norm_eps)
        gradients[Side.KEY.value] = gradients[Side.KEY.value] * inverse_BTK1
    real_BT = (batch["segment_ids"] > 0) & (batch["positions"] >= SINKS)

    def squares(g_BTKH):
        g = (g_BTKH * real_BT[..., None, None]).reshape(real_BT.size, -1)
        return jnp.dot(g.T, g, precision=_HIGHEST)

    return d_BTD, {side: squares(g) for side, g in gradients.items()}, real_BT.sum()


def measure(
    model: ModelConfig,
    specs: list[LayerSpec],
    layer: Any,
    top: Tree,
    stream: Stream,
    seed: int,
    folder: Path,
) -> None:
    """Write the information of every layer to `folder`, as information-<layer>.npz.

    Args:
      model: the resolved config.
      specs: one spec for each layer, without mixing (`plain_specs`).
      layer: returns a layer's parameters for its spec.
      top: the parameters outside the layers.
      stream: the text; its folder is removed at the end.
      seed: of the labels.
      folder: of the results.
    """
    stream.keep_all = True
    stream.embed(model, top)
    for index in progress(range(len(specs)), "information, forward, layers"):
        stream.advance(specs[index], layer(index))
    placed_top = stream.place(top)
    seeds = jax.random.split(jax.random.key(seed), len(stream))
    with jax.set_mesh(stream.mesh):
        batches = [stream.put(batch) for batch in stream.batches]
        slopes = [
            jax.device_get(
                _top_gradient(model, placed_top, stream.residual(i, model), batches[i], seeds[i])
            )
            for i in range(len(stream))
        ]
        for index in progress(range(len(specs) - 1, -1, -1), "information, backward, layers"):
            stream.resume(index)
            placed, tokens = stream.place(layer(index)), 0.0
            sums = {side.value: np.zeros(()) for side in Side}
            for i, batch in enumerate(batches):
                read = (stream.residual(i, model), stream.put(slopes[i]), batch, index)
                d_BTD, new, count = jax.device_get(_pull_back(specs[index], placed, *read))
                slopes[i], tokens = d_BTD, tokens + float(count)
                sums = {n: sums[n] + np.asarray(new[n], np.float64) for n in sums}
            scratch = folder / "information.npz"
            keys, values = (sums[side.value] / tokens for side in Side)
            np.savez(scratch, keys=keys, values=values)
            scratch.rename(folder / f"information-{index}.npz")
    shutil.rmtree(stream.folder)


def read(folder: Path, index: int) -> Information:
    """Read the information of layer `index`, which `measure` wrote."""
    with np.load(folder / f"information-{index}.npz") as stored:
        return Information(stored["keys"], stored["values"])
