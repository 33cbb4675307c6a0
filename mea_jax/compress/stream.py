"""Run windows of text through a stored model, with one layer in memory at a time.

The residuals of all windows are stored on disk between two layers, so memory limits neither the
depth nor the amount of text. Each layer runs as one compiled function over batches split over the
mesh's devices. Its parameters are on every device while it runs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mea_jax.cli import progress
from mea_jax.compress.moments import Moments
from mea_jax.config.schema import ModelConfig
from mea_jax.model.context import Context
from mea_jax.model.layer_spec import LayerSpec, layer_specs
from mea_jax.model.transformer import Block, Decoder, rope_of
from mea_jax.model.variants import make_attention
from mea_jax.ops.backend import make_backend
from mea_jax.ops.cross_entropy import (
    LossOptions,
    cross_entropy,
    distilled_cross_entropy,
    positions_within,
)
from mea_jax.ops.rms_norm import rms_norm
from mea_jax.parallel import sharding

Tree = dict[str, Any]
Batch = dict[str, np.ndarray]
# By label, for each batch: nats, tokens and, if two models are compared, KL(original || changed).
Losses = dict[str, list[list[float]]]
_HIGHEST = jax.lax.Precision.HIGHEST


def context_of(model: ModelConfig, batch: Any) -> Context:
    """Return the attention context of a batch: its segment ids and rotary table, if any."""
    positions_BT = batch["positions"]
    return Context(batch["segment_ids"], rope_of(model, positions_BT), positions_BT)


@functools.partial(jax.jit, static_argnums=0)
def run_block(spec: LayerSpec, params: Tree, x_BTD, batch, index):
    """Return the residual (B, T, D) after a layer."""
    block = Block(spec.alone, *spec.components)
    out: Any = block.apply({"params": params}, x_BTD, context_of(spec.model, batch), index)
    return out[0]


@functools.partial(jax.jit, static_argnums=0)
def watch_block(spec: LayerSpec, params: Tree, x_BTD, batch, index):
    """Return `run_block`'s residual and float32 sums over tokens, whose means are `Moments`."""
    block = Block(spec.alone, *spec.components)
    out: Any = block.apply(
        {"params": params}, x_BTD, context_of(spec.model, batch), index, mutable=["heads"]
    )
    (x_BTD, _), seen = out
    heads = {name: leaf[0].astype(jnp.float32) for name, leaf in seen["heads"]["attention"].items()}
    weight_BT = (batch["segment_ids"] > 0).astype(jnp.float32)

    def moment(x_BTKH):
        x = (x_BTKH * weight_BT[..., None, None]).reshape(weight_BT.size, -1)
        return jnp.dot(x.T, x, precision=_HIGHEST)

    power_NH = jnp.einsum("btnh,bt->nh", jnp.square(heads["query"]), weight_BT)
    output_N = jnp.einsum("btnh,bt->n", jnp.square(heads["output"]), weight_BT)
    sums = {
        "keys": moment(heads["key"]),
        "key_means": jnp.einsum("btkh,bt->kh", heads["key"], weight_BT, precision=_HIGHEST),
        "values": moment(heads["value"]),
        "queries": power_NH,
        "outputs": output_N / heads["output"].shape[-1],
        "tokens": weight_BT.sum(),
    }
    return x_BTD, sums


def normed_input(spec: LayerSpec, norm_scale_D, x_BTD):
    """Return what a layer's attention reads (B, T, D): its input, normed if it has a norm."""
    return x_BTD if norm_scale_D is None else rms_norm(x_BTD, norm_scale_D, spec.model.norm_eps)


@functools.partial(jax.jit, static_argnums=0)
def run_attention(spec: LayerSpec, attention: Tree, norm_scale_D, x_BTD, batch, index):
    """Return the normed input of a layer's attention and its output, (B, T, D) each."""
    normed_BTD = normed_input(spec, norm_scale_D, x_BTD)
    return normed_BTD, apply_attention(spec, attention, normed_BTD, batch, index)


def apply_attention(
    spec: LayerSpec, attention: Tree, normed_BTD, batch, index, heads: bool = False
):
    """Return an attention layer's output (B, T, D), with `heads` also its collection "heads"."""
    module = make_attention(spec.alone, *spec.components)
    inputs = ({"params": attention}, normed_BTD, context_of(spec.model, batch), index)
    if heads:
        out: Any = module.apply(*inputs, mutable=["heads"])
        return out[0][0], out[1]["heads"]
    plain: Any = module.apply(*inputs)
    return plain[0]


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: ModelConfig, top: Tree, batch):
    read = (batch["inputs"], batch["positions"])
    return cast(jax.Array, Decoder(model).apply({"params": top}, *read, method=Decoder.embed))


def _unembedding(model: ModelConfig, top: Tree) -> tuple[jax.Array, int]:
    """Return the unembedding kernel (D, V), and the number of positions per chunk of logits."""
    kernel_DV = top["embedding"].T if model.tie_embeddings else top["head"]
    return kernel_DV, positions_within(model.loss_chunk, kernel_DV.shape[1])


def head_of(model: ModelConfig, top: Tree) -> tuple[Callable, jax.Array]:
    """Return the function from last residuals to hidden states, and the kernel (D, V) of logits."""
    return functools.partial(_hidden, model, top), _unembedding(model, top)[0]


def _hidden(model: ModelConfig, top: Tree, x_BTD) -> jax.Array:
    return rms_norm(x_BTD, top["final_norm"]["scale"], model.norm_eps)


@functools.partial(jax.jit, static_argnums=0)
def loss_sums(model: ModelConfig, top: Tree, x_BTD, batch) -> tuple[jax.Array, jax.Array]:
    """Return the sum of nats and the number of tokens of a batch with last residual `x_BTD`."""
    kernel_DV, chunk = _unembedding(model, top)
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    read = (_hidden(model, top, x_BTD), kernel_DV, batch["targets"], weights_BT)
    _, nll = cross_entropy(*read, make_backend(model), chunk, 0.0)
    return nll, weights_BT.sum()


@functools.partial(jax.jit, static_argnums=0)
def compared_sums(
    model: ModelConfig, top: Tree, x_BTD, original_BTD, batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `loss_sums` of a changed model and the sum over tokens of KL(original || changed).

    All but the number of tokens are in nats. `x_BTD` and `original_BTD` are the last residuals of
    the changed and of the original model.
    """
    kernel_DV, chunk = _unembedding(model, top)
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    changed, original = (_hidden(model, top, x) for x in (x_BTD, original_BTD))
    read = (changed, kernel_DV, batch["targets"], weights_BT)
    options = LossOptions(make_backend(model), chunk, share=1.0)
    _, nll, divergence = distilled_cross_entropy(*read, (original, kernel_DV), options)
    return nll, weights_BT.sum(), divergence


class Stream:
    """Batches of windows that pass through a model, with their residuals on disk.

    Attributes:
      batches: batches of equal shape, each with `inputs`, `targets`, `segment_ids`, `positions`.
      labels: a name for each batch, such as its domain.
      done: the number of layers that the residuals have passed.
      keep_all: whether the residuals before each layer stay on disk; otherwise only the last do.
    """

    keep_all = False

    def __init__(self, batches: Sequence[Batch], labels: Sequence[str], folder: Path, mesh: Mesh):
        self.batches, self.labels, self.folder, self.mesh = (
            list(batches),
            list(labels),
            folder,
            mesh,
        )
        self.done = 0
        self._residuals: np.ndarray | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.batches)

    def put(self, batch: Batch) -> Any:
        """Return a batch on the mesh, split over its devices."""
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))

    def place(self, tree: Any) -> Any:
        """Return parameters replicated on every device of the mesh."""
        return jax.device_put(tree, sharding.replicated(self.mesh))

    def _file(self, layer: int) -> Path:
        return self.folder / f"residual-{layer}.npy"

    def _new(self, layer: int, x: np.ndarray) -> np.memmap:
        shape = (len(self.batches), *x.shape)
        # numpy's file format has no bfloat16, so the bits are stored as uint16.
        kind = x.dtype if x.dtype == np.float32 else np.dtype(np.uint16)
        path = self._file(layer).with_suffix(".part")
        return np.lib.format.open_memmap(path, "w+", kind, shape)

    def _keep(self, layer: int, array: np.memmap) -> None:
        array.flush()
        self._file(layer).with_suffix(".part").rename(self._file(layer))
        for old in self.folder.glob("residual-*.npy"):
            if old != self._file(layer) and not self.keep_all:
                old.unlink()
        self.done = layer
        self._residuals = np.load(self._file(layer), mmap_mode="r")

    def resume(self, layer: int) -> bool:
        """Load residuals after `layer` layers from an earlier start; return whether they exist."""
        if not self._file(layer).exists():
            return False
        self.done, self._residuals = layer, np.load(self._file(layer), mmap_mode="r")
        return True

    def start(
        self, model: ModelConfig, top: Tree, layer: int, layers_done: Callable[[int], Tree]
    ) -> None:
        """Move to after `layer` layers: load stored residuals, or compute them again.

        `layers_done(index)` returns the parameters of a layer that has been passed.
        """
        if self.resume(layer):
            return
        self.embed(model, top)
        for index in range(layer):
            self.advance(layer_specs(model)[index], layers_done(index))

    def residual(self, number: int, model: ModelConfig) -> jax.Array:
        """Return the residual (B, T, D) of one batch, on the mesh."""
        assert self._residuals is not None
        x = np.asarray(self._residuals[number])
        if x.dtype == np.uint16:
            x = x.view(jnp.bfloat16)
        return jax.device_put(x, sharding.batch_sharding(self.mesh))

    def _store(self, layer: int, results: Iterable[jax.Array]) -> None:
        array = None
        for number, result in enumerate(results):
            x = np.asarray(result)
            array = self._new(layer, x) if array is None else array
            array[number] = x if x.dtype == np.float32 else x.view(np.uint16)
        assert array is not None
        self._keep(layer, array)

    def embed(self, model: ModelConfig, top: Tree) -> None:
        """Compute the residuals before the first layer."""
        placed = self.place(top)
        with jax.set_mesh(self.mesh):
            self._store(0, (_embed(model, placed, self.put(batch)) for batch in self.batches))

    def advance(
        self,
        spec: LayerSpec,
        layer: Tree,
        collect: bool = False,
        block: Callable[..., jax.Array] = run_block,
    ) -> dict[str, np.ndarray] | None:
        """Run the next layer, of parameters `layer`; with `collect`, return sums for `Moments`.

        `block` is `run_block`, or a function of the same arguments that runs a changed layer.
        """
        placed, index = self.place(layer), self.done
        sums: dict[str, np.ndarray] = {}

        def results() -> Iterator[jax.Array]:
            for number, batch in enumerate(self.batches):
                x_BTD = self.residual(number, spec.model)
                inputs = (spec, placed, x_BTD, self.put(batch), index)
                if not collect:
                    yield block(*inputs)
                    continue
                x_BTD, new = watch_block(*inputs)
                for name, value in jax.device_get(new).items():
                    sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
                yield x_BTD

        with jax.set_mesh(self.mesh):
            self._store(index + 1, results())
        return sums if collect else None

    def losses(self, model: ModelConfig, top: Tree, original: "Stream | None" = None) -> Losses:
        """Return nats and tokens of each batch, by label, from the residuals after the last layer.

        With the `original` model's stream, which is after its last layer too, a batch also has the
        sum of KL(original || this model), in nats.
        """
        placed = self.place(top)
        found: Losses = {label: [] for label in self.labels}
        with jax.set_mesh(self.mesh):
            pairs = list(zip(self.batches, self.labels, strict=True))
            for number, (batch, label) in enumerate(progress(pairs, "held-out loss, batches")):
                x_BTD, on = self.residual(number, model), self.put(batch)
                if original is None:
                    sums = loss_sums(model, placed, x_BTD, on)
                else:
                    before_BTD = original.residual(number, model)
                    sums = compared_sums(model, placed, x_BTD, before_BTD, on)
                found[label].append([float(value) for value in jax.device_get(sums)])
        return found


def moments_of(sums: dict[str, np.ndarray], heads: int) -> Moments:
    """Return the means of the sums that `Stream.advance` returns; `heads` is K."""
    tokens = max(float(sums["tokens"]), 1.0)
    power_NH = sums["queries"] / tokens
    half = power_NH.shape[1] // 2
    power_NF = power_NH[:, :half] + power_NH[:, half:]
    return Moments(
        keys=sums["keys"] / tokens,
        values=sums["values"] / tokens,
        queries=power_NF.reshape(heads, -1, half).sum(axis=1),
        key_means=sums["key_means"].ravel() / tokens,
        outputs=sums["outputs"] / tokens,
        tokens=int(sums["tokens"]),
    )
