"""Measure held-out loss by source of text and by the length of a token's context.

Letters: U documents, P buckets of positions, C positions of a chunk; others as in architecture.md.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.data.pipeline import held_out_batches
from mea_jax.data.prepare import Prepared
from mea_jax.errors import UserError
from mea_jax.model.transformer import apply_hidden
from mea_jax.ops.backend import make_backend
from mea_jax.ops.cross_entropy import positions_within
from mea_jax.ops.statistics import ratio_of_sums
from mea_jax.parallel import sharding
from mea_jax.parallel.batches import BatchPlacer

ALL = "all"  # name of the total over all sources
_LOGITS = 256  # MiB of logits in memory at the same time if the config sets no limit


def token_nll(model: ModelConfig, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """Return the negative log-likelihood of each target in nats, float32 (B, T); 0 in padding.

    `model` is resolved. `model.loss_chunk` limits the MiB of logits in memory at the same time. On
    a mesh, which must divide B, that holds for each shard of the batch.
    """
    targets_BT = jnp.asarray(batch["targets"])
    segment_ids_BT = jnp.asarray(batch["segment_ids"])
    x_BTD, kernel_DV = apply_hidden(
        model, params, batch["inputs"], batch["positions"], segment_ids_BT
    )
    backend = make_backend(model)
    kernel_DV = kernel_DV.astype(backend.dtype)
    shards = sharding.shard_count("batch")
    positions = targets_BT.size // shards
    chunk = min(positions_within(model.loss_chunk or _LOGITS, kernel_DV.shape[1]), positions)
    count = -(-positions // chunk)

    def chunks(y):  # (B, T, ...) to (chunks, positions of a chunk of all shards, ...), padded
        y = y.reshape(shards, positions, *y.shape[2:])
        y = jnp.pad(y, ((0, 0), (0, count * chunk - positions)) + ((0, 0),) * (y.ndim - 2))
        y = jnp.swapaxes(y.reshape(shards, count, chunk, *y.shape[2:]), 0, 1)
        return y.reshape(count, shards * chunk, *y.shape[3:])

    def of_chunk(xs):
        x_CD, targets_C = xs
        x_CD = sharding.constrain(x_CD, "batch", None).astype(backend.dtype)
        logits_CV = backend.matmul(x_CD, kernel_DV)
        right_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_CV, axis=1) - right_C

    nll = jax.lax.map(of_chunk, (chunks(x_BTD), chunks(targets_BT)))
    nll = jnp.swapaxes(nll.reshape(count, shards, chunk), 0, 1).reshape(shards, -1)
    nll_BT = nll[:, :positions].reshape(targets_BT.shape)
    return jnp.where(segment_ids_BT > 0, nll_BT, 0.0)


@functools.cache
def _compiled_nll(model: ModelConfig, mesh: Mesh | None) -> Any:
    out = None if mesh is None else sharding.replicated(mesh)
    return jax.jit(functools.partial(token_nll, model), out_shardings=out)


def _batch_nll(
    model: ModelConfig, params: Any, batch: Mapping[str, np.ndarray], mesh: Mesh | None
) -> np.ndarray:
    """Return `token_nll` of a batch (B, T); on a mesh, its rows are divided."""
    compiled = _compiled_nll(model, mesh)
    if mesh is None:
        return np.asarray(compiled(params, batch))
    rows, length = batch["targets"].shape
    size = -(-rows // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    padded = {name: np.pad(x, ((0, size - rows), (0, 0))) for name, x in batch.items()}
    return np.asarray(compiled(params, BatchPlacer(mesh, size, length)(padded)))[:rows]


def bucket_edges(length: int) -> tuple[int, ...]:
    """Return the bounds of buckets over `length` positions: 0, 16, 32, 64, ..., `length`."""
    edges = [0]
    while (edge := max(16, 2 * edges[-1])) < length:
        edges.append(edge)
    return (*edges, length)


@dataclass(frozen=True)
class Losses:
    """Sums over one source's held-out text, by document and bucket.

    Bucket p contains the targets whose input has edges[p] to edges[p + 1] - 1 earlier tokens of the
    same document in the window, which attention can read.
    """

    name: str
    nats_UP: np.ndarray  # float64
    tokens_UP: np.ndarray  # float64
    edges: tuple[int, ...]
    bits_per_nat: float | None  # bits per byte for one nat per token; None without text

    @property
    def tokens(self) -> int:
        return int(self.tokens_UP.sum())

    @property
    def documents(self) -> int:
        return len(self.tokens_UP)

    @property
    def loss(self) -> float:
        """The loss in nats per token."""
        return ratio_of_sums(self.nats_UP.sum(1), self.tokens_UP.sum(1))[0]

    @property
    def error(self) -> float:
        """The standard error of `loss` in nats per token, over documents; nan for one document."""
        return ratio_of_sums(self.nats_UP.sum(1), self.tokens_UP.sum(1))[1]

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.bits_per_nat is None else self.loss * self.bits_per_nat

    def increase(self, base: "Losses") -> tuple[float, float]:
        """Return the nats per token above `base` on the same text, and its standard error.

        Differences are paired by document, so the error excludes the documents' varying difficulty.
        """
        return ratio_of_sums((self.nats_UP - base.nats_UP).sum(1), self.tokens_UP.sum(1))

    def by_position(self, base: "Losses | None" = None) -> list[tuple[float, float]]:
        """Return (nats per token, standard error) of each bucket, or its increase over `base`."""
        nats_UP = self.nats_UP if base is None else self.nats_UP - base.nats_UP
        return [ratio_of_sums(n, t) for n, t in zip(nats_UP.T, self.tokens_UP.T, strict=True)]


def domain_losses(
    model: ModelConfig,
    params: Any,
    prepared: Prepared,
    *,
    batch_size: int = 8,
    max_batches: int | None = None,
    skip_bad: bool = False,
    progress: str = "",
    mesh: Mesh | None = None,
) -> dict[str, Losses]:
    """Measure the held-out loss of each source of `prepared` by name; the last is the total, "all".

    Args:
      model: resolved for windows of `prepared.context_length` positions.
      params: training parameters.
      prepared: its held-out windows are read; sources without any are left out.
      batch_size: B, windows per batch.
      max_batches: maximum number of batches per source, spread evenly; None reads every window. If
        it skips windows, the part of a document in one window counts as one document.
      skip_bad: as in `pipeline.held_out_batches`.
      progress: title of a progress bar on stderr if that is a terminal; "" for no bar.
      mesh: the mesh of `jax.set_mesh`, on which `params` are placed; None for one device.

    Raises:
      UserError: there is no held-out text, or a window cannot be read.
    """
    edges = bucket_edges(prepared.context_length)
    found: dict[str, Losses] = {}
    for name, source in zip(source_names(prepared), prepared.sources, strict=True):
        if not source.held_out_windows:
            continue
        one = dataclasses.replace(prepared, sources=(source,))
        batches = held_out_batches(
            one, batch_size=batch_size, max_batches=max_batches, skip_bad=skip_bad
        )
        total = -(-source.held_out_windows // batch_size)
        bar = tqdm.tqdm(
            batches,
            total=min(total, max_batches or total),
            desc=f"{progress}: {name}",
            disable=None if progress else True,
            leave=False,
        )
        sampled = max_batches is not None and max_batches < total
        sums = _Sums(edges, prepared.tokenizer.start, sampled)
        for batch in bar:
            sums.add(batch, _batch_nll(model, params, batch, mesh))
        found[name] = Losses(name, *sums.arrays(), edges, _bits_per_nat([source]))
    if not found:
        raise UserError(
            "the data have no held-out text: train with config.data.held_out_fraction above 0"
        )
    found[ALL] = Losses(
        ALL,
        np.concatenate([losses.nats_UP for losses in found.values()]),
        np.concatenate([losses.tokens_UP for losses in found.values()]),
        edges,
        _bits_per_nat(prepared.sources),
    )
    return found


def source_names(prepared: Prepared) -> list[str]:
    """Return the sources' names, numbered if two are equal."""
    seen: Counter[str] = Counter()
    names = []
    for source in prepared.sources:
        seen[source.name] += 1
        again = seen[source.name] > 1 or source.name == ALL
        names.append(f"{source.name} ({seen[source.name]})" if again else source.name)
    return names


def _bits_per_nat(sources: Sequence[Any]) -> float | None:
    tokens = sum(source.held_out_tokens for source in sources)
    size = sum(source.held_out_bytes for source in sources)
    return tokens / size / log(2) if size else None


class _Sums:
    """Nats and tokens by document and bucket, of windows in the order of the text.

    A document begins at a `start` token and continues in the next window unless windows are
    `sampled`.
    """

    def __init__(self, edges: tuple[int, ...], start: int, sampled: bool):
        self.edges, self.start, self.sampled = edges, start, sampled
        self.documents = 0
        self.parts: list[tuple[np.ndarray, ...]] = []  # cells, their nats, their tokens

    def add(self, batch: Mapping[str, np.ndarray], nll_BT: np.ndarray) -> None:
        real_BT = batch["segment_ids"] > 0
        begins_BT = (batch["inputs"] == self.start) & real_BT
        if self.sampled:
            begins_BT[:, 0] |= real_BT[:, 0]
        document = self.documents + np.cumsum(begins_BT.reshape(-1))[real_BT.reshape(-1)] - 1
        # A stream begins with `start`. If that was in a window that could not be read, the tokens
        # that follow count for the first document.
        document = np.maximum(document, 0)
        self.documents += int(begins_BT.sum())
        buckets = len(self.edges) - 1
        bucket = np.searchsorted(self.edges, batch["positions"][real_BT], side="right") - 1
        cells, where = np.unique(document * buckets + bucket, return_inverse=True)
        nats = np.bincount(where, weights=nll_BT[real_BT].astype(np.float64))
        self.parts.append((cells, nats, np.bincount(where).astype(np.float64)))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        buckets = len(self.edges) - 1
        shape = (max(self.documents, 1), buckets)
        nats, tokens = np.zeros(shape), np.zeros(shape)
        for cells, some_nats, some_tokens in self.parts:
            nats.flat[cells] += some_nats
            tokens.flat[cells] += some_tokens
        kept = tokens.sum(1) > 0  # documents whose windows could not be read have none
        return nats[kept], tokens[kept]
