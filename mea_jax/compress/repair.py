"""Local repair: fit a compressed layer to the original layer, without labels.

A temperature restores the sharpness of attention. "output" refits the output projection in closed
form. "layerwise" then updates all projections of the attention with a few hundred small steps, to
match the original's output on the original model's inputs. "blockwise" then updates all parameters
of the block, on the inputs from the compressed model, to match the residual of the original model
after the block. So each block also compensates for the losses of earlier layers. No gradient goes
through more than one layer. "joint" is "layerwise", after which all layers are trained together
(joint.py).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from mea_jax.cli import progress
from mea_jax.compress.stream import (
    LayerSpec,
    Stream,
    apply_attention,
    run_attention,
    run_block,
)

Tree = dict[str, Any]
Layer = tuple[LayerSpec, Tree]  # the static part of a layer, and its parameters
REPAIRS = ("none", "output", "layerwise", "blockwise", "joint")
STEPWISE = ("layerwise", "blockwise", "joint")  # those that take gradient steps
STEPS, WARMUP = 400, 20
# Factors of the queries. Least squares shrinks keys towards the part that it can rebuild, so logits
# are too small by a few percent, and by more if more is lost.
_TEMPERATURES = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6)
TEMPERED = 4096  # tokens on which a temperature is chosen
# A step's size is a share of the parameter's root mean square. With Muon the share is
# min(_MOST, _RATE * sqrt(lost share of the output)): its directions have a fixed size, so one rate
# for all would damage a layer that has lost little. Runs of fewer than `_FEW` steps use Adam at
# `_FEW_RATE`, because orthogonal directions need more steps to average out their noise.
_MOST, _RATE = 0.02, 0.05
_FEW, _FEW_RATE = 100, 0.01
_RIDGE = 1e-4  # relative to the mean square of the outputs
_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnums=0)
def _normal_equations(spec: LayerSpec, attention: Tree, normed_BTD, target_BTD, batch, index):
    """Return sums of o o^T, o y^T and 1 over tokens.

    o (N H) is the output projection's input, and y (D) the target without the projection's bias.
    """
    _, heads = apply_attention(spec, attention, normed_BTD, batch, index, heads=True)
    o_BTX = heads["written"][0].astype(jnp.float32)
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    o = (o_BTX.reshape(*weight_BT1.shape[:2], -1) * weight_BT1).reshape(weight_BT1.size, -1)
    target_BTD = target_BTD.astype(jnp.float32)
    if "out_bias" in attention:
        target_BTD = target_BTD - attention["out_bias"][None, None]
    y = (target_BTD * weight_BT1).reshape(weight_BT1.size, -1)
    dot = functools.partial(jnp.dot, precision=_HIGHEST)
    return dot(o.T, o), dot(o.T, y), weight_BT1.sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(whole: bool, spec: LayerSpec, params, x_BTD, target_BTD, base_BTD, batch, index):
    """Return |f(x) - target|^2 and |target - base|^2, summed over tokens.

    f is the complete block if `whole`, otherwise its attention, which reads normed inputs.
    """
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    target_BTD = target_BTD.astype(jnp.float32)
    run = run_block if whole else apply_attention
    y_BTD = run(spec, params, x_BTD, batch, index).astype(jnp.float32)

    def total(difference_BTD):
        return jnp.sum(jnp.square(difference_BTD) * weight_BT1)

    return total(y_BTD - target_BTD), total(target_BTD - base_BTD)


class OriginalLayer:
    """An original layer, applied to the text of a stream that has reached that layer.

    The layer's inputs and outputs are kept once computed: two arrays (B, T, D) per batch.
    """

    def __init__(self, spec: LayerSpec, attention: Tree, norm_scale_D, stream: Stream):
        self.spec, self.stream, self.index = spec, stream, stream.done
        self._attention, self._scale = stream.place(attention), stream.place(norm_scale_D)
        self._known: dict[int, tuple] = {}

    def batch(self, number: int) -> tuple:
        """Return a batch on the mesh, the attention's normed input and its output.

        The caller sets the mesh.
        """
        if number not in self._known:
            batch = self.stream.put(self.stream.batches[number])
            x_BTD = self.stream.residual(number, self.spec.model)
            inputs = (self.spec, self._attention, self._scale, x_BTD, batch, self.index)
            self._known[number] = (batch, *run_attention(*inputs))
        return self._known[number]

    def error(self, compressed: Layer, most: int | None = None) -> float:
        """Return |attn'(x) - attn(x)|^2 / |attn(x)|^2 over the first `most` batches (None: all)."""
        placed, lost, whole = self.stream.place(compressed[1]), 0.0, 0.0
        with jax.set_mesh(self.stream.mesh):
            for number in range(len(self.stream))[:most]:
                batch, normed, target = self.batch(number)
                read = (normed, target, 0.0, batch, self.index)
                sums = jax.device_get(_squares(False, compressed[0], placed, *read))
                lost, whole = lost + float(sums[0]), whole + float(sums[1])
        return lost / max(whole, 1e-30)


def sharpened(attention: Tree, temperature: float) -> Tree:
    """Return the attention parameters with the logits multiplied by `temperature`."""
    if "query_norm" in attention:
        scale_H = attention["query_norm"]["scale"] * np.float32(temperature)
        return attention | {"query_norm": {"scale": scale_H}}
    names = [name for name in ("query", "query_bias") if name in attention]
    return attention | {name: attention[name] * np.float32(temperature) for name in names}


def temperature(original: OriginalLayer, compressed: Layer) -> float:
    """Return the one of `_TEMPERATURES` with the least error of the compressed layer.

    The error is measured on the first `TEMPERED` tokens.
    """
    most = max(TEMPERED // original.stream.batches[0]["inputs"].size, 1)
    best, least = 1.0, np.inf
    for value in _TEMPERATURES:
        now = original.error((compressed[0], sharpened(compressed[1], value)), most)
        if now >= least:  # the error has a single minimum
            break
        best, least = value, now
    return best


def refit_output(original: OriginalLayer, compressed: Layer) -> Tree:
    """Return the compressed layer with W_O refitted to the original's outputs by least squares.

    A ridge keeps directions that the text does not determine at their current values.
    """
    (spec, attention), stream = compressed, original.stream
    placed = stream.place(attention)
    totals: list[np.ndarray] = []
    with jax.set_mesh(stream.mesh):
        for number in range(len(stream)):
            batch, normed, target = original.batch(number)
            sums = _normal_equations(spec, placed, normed, target, batch, original.index)
            new = [np.asarray(value, np.float64) for value in jax.device_get(sums)]
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
    square, side = totals[0] / totals[2], totals[1] / totals[2]
    out_NHD = np.asarray(attention["out"], np.float64)
    ridge = _RIDGE * np.trace(square) / len(square)
    flat = out_NHD.reshape(len(square), -1)
    found = np.linalg.solve(square + ridge * np.eye(len(square)), side + ridge * flat)
    return attention | {"out": found.reshape(out_NHD.shape).astype(np.float32)}


def _matrix(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
    """Return the axes of a parameter's rows and columns for Muon, or None if it is not a matrix.

    Each head of a projection is a separate matrix, and so is each expert.
    """
    name = path[-1].key
    if name.endswith(("_mixing", "_bias", "_steps")) or leaf.ndim < 2:
        return None
    if name in ("query", "key", "value"):  # (D, heads, H)
        return MuonDimensionNumbers(0, 2)
    return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _even(path: tuple, leaf: jax.Array) -> jax.Array:
    """Scale a matrix whose singular values are all 1 to a root mean square of 1."""
    matrix = _matrix(path, leaf)
    assert matrix is not None
    return leaf * math.sqrt(max(leaf.shape[axis] for axis in matrix))


def _optimizer(steps: int) -> optax.GradientTransformation:
    """Return an optimizer whose updates have a root mean square near 1, times the schedule.

    It uses Muon for matrices and Adam for the rest, or Adam for all if `steps` is below `_FEW`. The
    caller multiplies the updates by the sizes of the parameters.
    """
    over = jax.tree_util.tree_map_with_path

    def kinds(params):
        return over(lambda *leaf: "matrix" if _matrix(*leaf) else "other", params)

    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=functools.partial(over, _matrix)),
        optax.stateless(lambda updates, _: over(_even, updates)),
    )
    adam = optax.scale_by_adam(b1=0.9, b2=0.98)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(WARMUP, steps // 2), steps)
    directions = adam
    if steps >= _FEW:
        directions = optax.partition({"matrix": muon, "other": adam}, kinds)
    return optax.chain(directions, optax.scale_by_learning_rate(schedule))


def _size(rate: float, fixed: tuple[str, ...], path: tuple, leaf: jax.Array) -> jax.Array:
    """Return the size of a parameter's updates: `rate` times its root mean square.

    Steps of slots differ by orders of magnitude, so each is its own size. Parameters named in
    `fixed` stay: the mean of keys, and the bias that takes it out, are much larger than the rest.
    """
    name = path[-1].key
    if name in fixed:
        return jnp.zeros(())
    if name.endswith("_steps"):
        return rate * jnp.abs(leaf)
    return rate * jnp.sqrt(jnp.mean(jnp.square(leaf)))


def _lost(*inputs):
    """Return the ratio of the two results of `_squares`."""
    lost, change = _squares(*inputs)
    return lost / change


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(whole: bool, spec: LayerSpec, steps: int, params, state, sizes, *read):
    """Take one step that reduces `_lost` on the batch `read`; return parameters and state."""
    gradient = jax.grad(_lost, argnums=2)(whole, spec, params, *read)
    updates, state = _optimizer(steps).update(gradient, state, params)
    return optax.apply_updates(params, jax.tree.map(jnp.multiply, updates, sizes)), state


def _descend(
    whole: bool,
    spec: LayerSpec,
    tree: Tree,
    stream: Stream,
    steps: int,
    words: str,
    read: Any,
    index: int,
) -> Tree:
    """Return the parameters `tree` after `steps` updates.

    A step takes the next batch of the stream, read by `read(number)`, and changes each parameter by
    a share of its root mean square. The caller sets the mesh. `words` labels the progress bar.
    """
    params = stream.place(jax.tree.map(jnp.array, tree))
    rate = _FEW_RATE
    if steps >= _FEW:
        lost = float(_lost(whole, spec, params, *read(0), index))
        rate = min(_MOST, _RATE * math.sqrt(lost))
    state = _optimizer(steps).init(params)
    attention = params.get("attention", params)
    fixed = ("key_mean", "key_bias") if "key_mean" in attention else ()
    sizes = jax.tree_util.tree_map_with_path(functools.partial(_size, rate, fixed), params)
    for number in progress(range(steps), words):
        params, state = _step(
            whole, spec, steps, params, state, sizes, *read(number % len(stream)), index
        )
    return jax.tree.map(np.asarray, jax.device_get(params))


def reconstruct(
    original: OriginalLayer, compressed: Layer, steps: int = STEPS, words: str = "repair"
) -> Tree:
    """Return the compressed attention after `steps` towards the original's output.

    Both read the inputs that the original layer has in the original model.
    """
    spec, attention = compressed
    stream = original.stream

    def read(number: int) -> tuple:
        batch, normed, target = original.batch(number)
        return normed, target, jnp.float32(0), batch

    with jax.set_mesh(stream.mesh):
        return _descend(False, spec, attention, stream, steps, words, read, original.index)


class RepairedBlock:
    """A block applied to the same text in the original model and in the compressed model.

    `block` is the original's: its spec and all its parameters. Both streams have reached it.
    """

    def __init__(self, block: Layer, text: Stream, compressed: Stream):
        assert text.done == compressed.done
        self.spec, self.text, self.compressed, self.index = block[0], text, compressed, text.done
        self._tree = text.place(block[1])
        self._known: dict[int, tuple] = {}

    def batch(self, number: int) -> tuple:
        """Return the compressed block's input, its target, the original's input, and the batch.

        The target is the residual after the original block. The caller sets the mesh.
        """
        if number not in self._known:
            batch = self.text.put(self.text.batches[number])
            x_BTD = self.text.residual(number, self.spec.model)
            target_BTD = run_block(self.spec, self._tree, x_BTD, batch, self.index)
            read_BTD = self.compressed.residual(number, self.spec.model)
            self._known[number] = (read_BTD, target_BTD, x_BTD, batch)
        return self._known[number]

    def rebuild(self, compressed: Layer, steps: int, words: str = "repair") -> Tree:
        """Return all parameters of the compressed block after `steps` towards the target."""
        spec, tree = compressed
        with jax.set_mesh(self.text.mesh):
            return _descend(True, spec, tree, self.text, steps, words, self.batch, self.index)
