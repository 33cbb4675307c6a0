"""Local repair: a compressed layer is brought nearer to the original layer, without labels.

A temperature makes attention as sharp as it was; "output" refits the output projection in closed
form; "layerwise" moves all of the attention's projections by a few hundred small steps, so that it
gives what the original gives on the original model's inputs. "blockwise" then moves all parameters
of the block, on the inputs that the compressed model gives it, towards the residual that the
original has after it: what earlier layers have lost is made up for as far as one block can. No
gradient goes through more than one layer.
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

from mea_jax.compress.stream import (
    LayerSpec,
    Stream,
    apply_attention,
    progress,
    run_attention,
    run_block,
)

Tree = dict[str, Any]
Layer = tuple[LayerSpec, Tree]  # what is static about an attention layer, and its parameters
REPAIRS = ("none", "output", "layerwise", "blockwise")
STEPWISE = ("layerwise", "blockwise")  # those by gradient steps
STEPS, WARMUP = 400, 20
# What queries are multiplied by. Least squares shrinks keys towards what it can rebuild of them, so
# logits come out too small by a few percent, more where more is lost.
_TEMPERATURES = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6)
TEMPERED = 4096  # tokens on which one is chosen
# Steps are shares of a parameter's root mean square: of Muon `_MOST` where much is lost, less where
# little is (directions have a size of their own: at one rate a layer that is nearly whole would be
# shaken). Fewer than `_FEW` are Adam's: orthogonal directions need more to average their noise out.
_MOST, _RATE = 0.02, 0.05  # the second times the root of the share of the output that is lost
_FEW, _FEW_RATE = 100, 0.01
_RIDGE = 1e-4  # of the mean square of the outputs
_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnums=0)
def _normal_equations(spec: LayerSpec, attention: Tree, normed_BTD, target_BTD, batch, index):
    """Sums of o o^T and o y^T over tokens, o (N H) what the output projection reads."""
    _, heads = apply_attention(spec, attention, normed_BTD, batch, index, heads=True)
    o_BTX = heads["written"][0].astype(jnp.float32)
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    o = (o_BTX.reshape(*weight_BT1.shape[:2], -1) * weight_BT1).reshape(weight_BT1.size, -1)
    y = (target_BTD.astype(jnp.float32) * weight_BT1).reshape(weight_BT1.size, -1)
    dot = functools.partial(jnp.dot, precision=_HIGHEST)
    return dot(o.T, o), dot(o.T, y), weight_BT1.sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(whole: bool, spec: LayerSpec, params, x_BTD, target_BTD, base_BTD, batch, index):
    """|f(x) - target|^2 and |target - base|^2; f is the attention (of normed inputs), or the
    `whole` block."""
    weight_BT1 = (batch["segment_ids"] > 0).astype(jnp.float32)[..., None]
    target_BTD = target_BTD.astype(jnp.float32)
    run = run_block if whole else apply_attention
    y_BTD = run(spec, params, x_BTD, batch, index).astype(jnp.float32)

    def total(difference_BTD):
        return jnp.sum(jnp.square(difference_BTD) * weight_BT1)

    return total(y_BTD - target_BTD), total(target_BTD - base_BTD)


class Original:
    """An original layer on the text of a stream, which has come to that layer.

    What the layer reads and gives is kept once it is known: two arrays (B, T, D) a batch.
    """

    def __init__(self, spec: LayerSpec, attention: Tree, norm_scale_D, stream: Stream):
        self.spec, self.stream, self.index = spec, stream, stream.done
        self._attention, self._scale = stream.place(attention), stream.place(norm_scale_D)
        self._known: dict[int, tuple] = {}

    def batch(self, number: int) -> tuple:
        """A batch on the mesh, the layer's normed input and its output. Under the mesh."""
        if number not in self._known:
            batch = self.stream.put(self.stream.batches[number])
            x_BTD = self.stream.residual(number, self.spec.model)
            inputs = (self.spec, self._attention, self._scale, x_BTD, batch, self.index)
            self._known[number] = (batch, *run_attention(*inputs))
        return self._known[number]

    def error(self, compressed: Layer, most: int | None = None) -> float:
        """|attn'(x) - attn(x)|^2 / |attn(x)|^2 over the first `most` batches."""
        placed, lost, whole = self.stream.place(compressed[1]), 0.0, 0.0
        with jax.set_mesh(self.stream.mesh):
            for number in range(len(self.stream))[:most]:
                batch, normed, target = self.batch(number)
                read = (normed, target, 0.0, batch, self.index)
                sums = jax.device_get(_squares(False, compressed[0], placed, *read))
                lost, whole = lost + float(sums[0]), whole + float(sums[1])
        return lost / max(whole, 1e-30)


def sharpened(attention: Tree, temperature: float) -> Tree:
    """The layer with its logits multiplied by `temperature`."""
    if "query_norm" in attention:
        scale_H = attention["query_norm"]["scale"] * np.float32(temperature)
        return attention | {"query_norm": {"scale": scale_H}}
    return attention | {"query": attention["query"] * np.float32(temperature)}


def temperature(original: Original, compressed: Layer) -> float:
    """The one of `_TEMPERATURES` at which the compressed layer's error is least, over the first
    `TEMPERED` tokens."""
    most = max(TEMPERED // original.stream.batches[0]["inputs"].size, 1)
    best, least = 1.0, np.inf
    for value in _TEMPERATURES:
        now = original.error((compressed[0], sharpened(compressed[1], value)), most)
        if now >= least:  # one valley
            break
        best, least = value, now
    return best


def refit_output(original: Original, compressed: Layer) -> Tree:
    """The compressed layer with W_O refitted: least squares of the original's outputs.

    A ridge holds what the text leaves open where it was.
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
    """Which axes of a parameter are a matrix's rows and columns; None: it is no matrix.

    Each head of a projection is one, as is each expert.
    """
    name = path[-1].key
    if name.endswith("_mixing") or leaf.ndim < 2:
        return None
    if name in ("query", "key", "value"):  # (D, heads, H)
        return MuonDimensionNumbers(0, 2)
    return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _even(path: tuple, leaf: jax.Array) -> jax.Array:
    """A matrix of equal singular values 1, to a root mean square of 1."""
    matrix = _matrix(path, leaf)
    assert matrix is not None
    return leaf * math.sqrt(max(leaf.shape[axis] for axis in matrix))


def _optimizer(steps: int) -> optax.GradientTransformation:
    """Muon's directions for matrices and Adam's for the rest (of few steps for all), each of a root
    mean square near 1, times the schedule; what they are shares of comes later."""
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


def _lost(*inputs):
    """The ratio of `_squares`."""
    lost, change = _squares(*inputs)
    return lost / change


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(whole: bool, spec: LayerSpec, steps: int, params, state, sizes, *read):
    """One step down `_lost` of what `read` holds: parameters and state."""
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
    """`tree` after `steps`. A step takes one batch of the stream, in turn, as `read(number)` gives
    it, and moves each parameter by a share of its own root mean square. Under the mesh."""
    params = stream.place(jax.tree.map(jnp.array, tree))
    rate = _FEW_RATE
    if steps >= _FEW:
        lost = float(_lost(whole, spec, params, *read(0), index))
        rate = min(_MOST, _RATE * math.sqrt(lost))
    state = _optimizer(steps).init(params)
    sizes = jax.tree.map(lambda p: rate * jnp.sqrt(jnp.mean(jnp.square(p))), params)
    for number in progress(range(steps), words):
        params, state = _step(
            whole, spec, steps, params, state, sizes, *read(number % len(stream)), index
        )
    return jax.tree.map(np.asarray, jax.device_get(params))


def reconstruct(
    original: Original, compressed: Layer, steps: int = STEPS, words: str = "repair"
) -> Tree:
    """The compressed attention after `steps` towards the original's output on its own inputs."""
    spec, attention = compressed
    stream = original.stream

    def read(number: int) -> tuple:
        batch, normed, target = original.batch(number)
        return normed, target, jnp.float32(0), batch

    with jax.set_mesh(stream.mesh):
        return _descend(False, spec, attention, stream, steps, words, read, original.index)


class Followed:
    """A block on the same text twice: as the original model reads it, and the compressed one.

    `block` is the original's: its spec and all its parameters.
    """

    def __init__(self, block: Layer, text: Stream, compressed: Stream):
        assert text.done == compressed.done
        self.spec, self.text, self.compressed, self.index = block[0], text, compressed, text.done
        self._tree = text.place(block[1])
        self._known: dict[int, tuple] = {}

    def batch(self, number: int) -> tuple:
        """What the compressed block reads, where it is to lead, where the original begins; the
        batch. Under the mesh."""
        if number not in self._known:
            batch = self.text.put(self.text.batches[number])
            x_BTD = self.text.residual(number, self.spec.model)
            target_BTD = run_block(self.spec, self._tree, x_BTD, batch, self.index)
            read_BTD = self.compressed.residual(number, self.spec.model)
            self._known[number] = (read_BTD, target_BTD, x_BTD, batch)
        return self._known[number]

    def rebuild(self, compressed: Layer, steps: int, words: str = "repair") -> Tree:
        """The compressed block, all its parameters, after `steps` towards the original's output."""
        spec, tree = compressed
        with jax.set_mesh(self.text.mesh):
            return _descend(True, spec, tree, self.text, steps, words, self.batch, self.index)
