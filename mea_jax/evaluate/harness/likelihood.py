"""Compute log-probabilities of requests' targets with one jitted program per shape, on a mesh.

Letters: B rows, T positions, S shards of the batch, P pairs (position, next token) of a shard,
C pairs of a chunk.
Rows are sharded over the mesh's batch axes, on any number of hosts. All hosts have the same
requests, each supplies its own rows, and the results are replicated to every host.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig
from mea_jax.evaluate.harness import prefix_trees
from mea_jax.evaluate.harness.prefix_trees import Request, Rows, Tree
from mea_jax.model.transformer import apply_hidden
from mea_jax.ops.attention import TreeMask
from mea_jax.ops.backend import make_backend
from mea_jax.ops.cross_entropy import positions_within
from mea_jax.ops.resolve import resolve_on
from mea_jax.parallel import sharding

_LOGITS_MEBIBYTES = 64  # float32 logits of a shard in memory at the same time
_CHUNK = 128  # a chunk's pairs are a multiple of this, unless _LOGITS_MEBIBYTES allows fewer
_PENDING = 2  # batches in flight; more would only occupy memory
_ROWS = (512, 4096)  # bounds of a row's positions, chosen by width; longer requests exceed them


@dataclasses.dataclass
class ScoringCost:
    """The cost of scoring requests, in tokens processed by the model."""

    requests: int = 0
    requested_tokens: int = 0  # sum over the requests' own lengths
    real: int = 0  # after common prefixes were merged
    computed: int = 0  # including padding
    programs: int = 0  # compiled shapes

    def real_share(self) -> float:
        return self.real / self.computed if self.computed else float("nan")


def shares_beginnings(model: ModelConfig) -> bool:
    """Return whether the model's attention supports a `TreeMask`.

    ALiBi does not, because its biases depend on positions in the row. Talking heads do not, because
    they have their own form of attention.
    """
    return model.positions != "alibi" and model.variant != "talking_heads"


def _log_probabilities(
    model: ModelConfig, chunk: int, params: Any, tokens_BT, positions_BT, mask, pairs, count
):
    """Return the log-probability of each pair's token, and whether it is the most likely one.

    `pairs`, int32 (S, P, 2), contains indices into the shard's flattened rows and the next tokens.
    `count` is the number of chunks of `chunk` pairs to compute; the others stay 0 and False. Both
    results are (S, P): float32 natural logarithms, and bool.
    """
    hidden_BTD, kernel_DV = apply_hidden(model, params, tokens_BT, positions_BT, mask)
    backend = make_backend(model)
    kernel_DV = kernel_DV.astype(backend.dtype)
    shards, width = pairs.shape[0], hidden_BTD.shape[-1]
    hidden_SND = sharding.constrain(hidden_BTD.reshape(shards, -1, width), "batch", None, None)
    zeros_SP = jnp.zeros(pairs.shape[:2])

    def one(i, results):
        part_SC2 = jax.lax.dynamic_slice_in_dim(pairs, i * chunk, chunk, axis=1)
        x_SCD = jnp.take_along_axis(hidden_SND, part_SC2[:, :, :1], axis=1)
        x_SCD = sharding.constrain(x_SCD, "batch", None, None).astype(backend.dtype)
        logits_SCV = backend.matmul(x_SCD, kernel_DV)
        right_SC = jnp.take_along_axis(logits_SCV, part_SC2[:, :, 1:], axis=2)[..., 0]
        found_SC = right_SC - jax.nn.logsumexp(logits_SCV, axis=2)
        greedy_SC = jnp.argmax(logits_SCV, axis=2) == part_SC2[:, :, 1]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, new, i * chunk, axis=1)
            for whole, new in zip(results, (found_SC, greedy_SC), strict=True)
        )

    return jax.lax.fori_loop(0, count, one, (zeros_SP, zeros_SP > 0))


class Scorer:
    """A model that scores requests.

    Args:
      model: not resolved.
      params: on `mesh`, sharded as by `params.param_shardings`.
      mesh: of all devices.
      budget: approximate number of positions of a batch for each shard.
    """

    def __init__(self, model: ModelConfig, params: Any, mesh: Mesh, budget: int):
        self.model, self.params, self.mesh, self.budget = model, params, mesh, budget
        with jax.set_mesh(mesh):
            self.batch_shards = sharding.shard_count("batch")
        self.branches = shares_beginnings(model)
        self._compiled: dict[Any, Any] = {}

    def _resolved(self, length: int) -> ModelConfig:
        return resolve_on(self.model, self.mesh, length)

    def _program(self, rows: Rows, pairs: int, chunk: int) -> Any:
        key = rows.size, rows.length, pairs, chunk
        if key not in self._compiled:
            static = self._resolved(rows.length), chunk
            whole = sharding.replicated(self.mesh)
            self._compiled[key] = jax.jit(
                functools.partial(_log_probabilities, *static), out_shardings=(whole, whole)
            )
        return self._compiled[key]

    def _place(self, x: np.ndarray) -> jax.Array:
        """Shard the rows of `x` over the batch axes; each process supplies its own shards."""
        names = ("batch", *(None,) * (x.ndim - 1))
        where = jax.sharding.NamedSharding(self.mesh, sharding.spec(names))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def _dispatch(self, rows: Rows, number: int, trees: Sequence[Tree], shape: tuple[int, int]):
        """Start one batch; return its results and (shard, first entry, tree) for each tree."""
        pairs, chunk = shape
        *arrays, starts = prefix_trees.batch_arrays(
            rows.batch(number), trees, rows.length, rows.size, self.branches
        )
        of_shard = rows.size // self.batch_shards
        pairs_SP2 = np.zeros((self.batch_shards, pairs, 2), np.int32)
        filled, where = [0] * self.batch_shards, []
        for row, start, tree in starts:
            shard, place = divmod(row, of_shard)
            first, size = filled[shard], len(tree.places_m)
            part = pairs_SP2[shard, first : first + size]
            part[:, 0] = place * rows.length + start + tree.places_m
            part[:, 1] = tree.targets_m
            filled[shard] += size
            where.append((shard, first, tree))
        tokens_BT, positions_BT, marks_BT, placed_SP2 = map(self._place, (*arrays, pairs_SP2))
        mask = TreeMask(marks_BT, positions_BT) if self.branches else marks_BT
        count = np.int32(-(-max(filled) // chunk))
        with jax.set_mesh(self.mesh):
            return self._program(rows, pairs, chunk)(
                self.params, tokens_BT, positions_BT, mask, placed_SP2, count
            ), where

    def _shape(self, rows: Rows, trees: Sequence[Tree]) -> tuple[int, int]:
        """Return (pairs per shard, pairs per chunk), enough for every batch of `rows`."""
        of_shard, most = rows.size // self.batch_shards, 1
        for number in range(rows.batches):
            batch = rows.batch(number)
            for first in range(0, len(batch), of_shard):
                members = (i for row in batch[first : first + of_shard] for i in row)
                most = max(most, sum(len(trees[i].places_m) for i in members))
        within = max(1, positions_within(_LOGITS_MEBIBYTES, self.model.vocab_size))
        chunk = min(within, max(_CHUNK, -(-most // (8 * _CHUNK)) * _CHUNK))
        return -(-most // chunk) * chunk, chunk

    def score(
        self,
        requests: Sequence[Request],
        work: ScoringCost | None = None,
        on_done: Callable[[int], Any] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """Score each request, in order.

        Return (total log-probability of its targets in nats, whether every target is the most
        likely token) for each. `work` accumulates the cost. `on_done` is called with the number of
        requests finished since the last call.
        """
        work = ScoringCost() if work is None else work
        low, high = _ROWS
        capacity = min(max(4 * self.model.d_model, low), high)
        trees = prefix_trees.build_trees(requests, capacity, self.branches)
        planned = prefix_trees.plan(
            [tree.size for tree in trees],
            capacity=capacity,
            width=self.model.d_model,
            budget=self.budget * self.batch_shards,
            batch_shards=self.batch_shards,
        )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)

        def collect(results, where):
            logs_SP, greedy_SP = (np.asarray(x) for x in results)
            done = 0
            for shard, first, tree in where:
                logs_m = logs_SP[shard, first:].astype(np.float64)
                for number, entries in tree.scored:
                    greedy = bool(greedy_SP[shard, first:][entries].all())
                    found[number] = float(logs_m[entries].sum()), greedy
                done += len(tree.scored)
            on_done(done)

        pending: list[Any] = []
        before = len(self._compiled)
        for rows in planned:
            shape = self._shape(rows, trees)
            for number in range(rows.batches):
                pending.append(self._dispatch(rows, number, trees, shape))
                if len(pending) >= _PENDING:
                    collect(*pending.pop(0))
        for batch in pending:
            collect(*batch)
        work.requests += len(requests)
        work.requested_tokens += sum(len(request.tokens) for request in requests)
        work.real += sum(tree.size for tree in trees)
        work.computed += sum(rows.computed for rows in planned)
        work.programs += len(self._compiled) - before
        return found
