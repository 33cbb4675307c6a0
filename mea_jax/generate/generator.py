"""Text generation: one prefill per batch of prompts, then many tokens per call of a jitted loop."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from mea_jax.config.schema import ModelConfig
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.model.kv_cache import RECENT, Cache, count_bytes, flush
from mea_jax.ops.sampling import Sampling, choose
from mea_jax.parallel import sharding

_SHORTEST_PREFILL = (
    16  # prompts are padded to this times a power of two, so that few programs are compiled
)
_EMPTY = -1  # in place of tokens after a row's end


@struct.dataclass
class State:
    """The carry of the decoding loop: the cache, the next logits of each row, and finished rows."""

    cache: Cache
    logits_BV: Any
    keys_B: Any  # random keys, one per row, so that a row's text does not depend on the other rows
    limits_B: Any  # int32, number of cache slots that each row may fill
    done_B: Any


@dataclasses.dataclass
class Report:
    """The number of tokens and the time of all batches, without compilation."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0


def _prefill(served, length, dtype, params, tokens_BP, lengths_B, limits_B, rows_B, seed) -> State:
    # Created inside the jitted function, where a mesh shards it.
    cache = decode.empty_cache(served, tokens_BP.shape[0], length, dtype)
    positions_BP = jnp.broadcast_to(jnp.arange(tokens_BP.shape[1])[None], tokens_BP.shape)
    segments_BP = (positions_BP < lengths_B[:, None]).astype(jnp.int32)
    logits_BV, cache = decode.prefill(served, params, cache, tokens_BP, segments_BP, positions_BP)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows_B)
    return State(cache, logits_BV, keys_B, limits_B, lengths_B >= limits_B)


def _advance(served, sampling, stop, count, params, state: State) -> tuple[State, tuple]:
    """Decode at most `count` <= RECENT more tokens per row; stop early if all rows are done.

    Returns:
      The new state; a pair of the tokens, int32 (B, count), `_EMPTY` after a row's end, and the
      flags of finished rows, bool (B,).
    """
    rows = state.logits_BV.shape[0]
    stop_S = jnp.asarray(stop, jnp.int32)

    def unfinished(carry):
        i, state, _ = carry
        return (i < count) & ~jnp.all(state.done_B)

    def one(carry):
        i, state, out_BC = carry
        cache = state.cache
        lengths_B = cache.lengths_B + cache.recent_count
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, lengths_B)
        chosen_B = choose(state.logits_BV, keys_B, sampling)
        out_BC = out_BC.at[:, i].set(jnp.where(state.done_B, _EMPTY, chosen_B))
        logits_BV, cache = decode.step(served, params, cache, chosen_B)
        stopped_B = jnp.any(chosen_B[:, None] == stop_S[None], axis=1)
        done_B = state.done_B | stopped_B | (lengths_B + 1 >= state.limits_B)
        return i + 1, state.replace(cache=cache, logits_BV=logits_BV, done_B=done_B), out_BC

    start = (jnp.zeros((), jnp.int32), state, jnp.full((rows, count), _EMPTY, jnp.int32))
    _, state, out_BC = jax.lax.while_loop(unfinished, one, start)
    return state, (out_BC, state.done_B)


def _flush(state: State) -> State:
    return dataclasses.replace(state, cache=flush(state.cache))


def _part(x: np.ndarray, index: Any) -> np.ndarray:
    return x[index]


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Return the text of `tokens` after `prompt`.

    They are decoded together with the end of the prompt, because some tokenizers drop the space
    before the first word of a text.
    """
    before = prompt[1:][-8:]
    start, whole = tokenizer.decode(before), tokenizer.decode(before + tokens)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(tokens)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Options for continuing prompts.

    Attributes:
      count: the maximum number of new tokens per prompt.
      sampling: the sampling method.
      seed: the seed for sampling.
      stop: token ids that end a continuation and are not part of it.
      ends: token ids that end a continuation and are part of it.
      chunk: tokens between returns to the host, at most `kv_cache.RECENT`; 0: `kv_cache.RECENT`.
      padded: the length that prompts are padded to; 0: a power of two, at least 16.
    """

    count: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    seed: int = 0
    stop: Sequence[int] = ()
    ends: Sequence[int] = ()
    chunk: int = 0
    padded: int = 0


class Generator:
    """A model that is ready to continue batches of prompts.

    `model` is resolved and `params` are training parameters. `length` is the number of cache slots
    for prompt and new tokens together. `cache_dtype` is the dtype of keys and values; None means
    the model's compute dtype. `form` and `donate` are as in `decode.serve`. Programs are compiled
    once per batch shape.

    With a `mesh`, on which `params` must be placed, rows are sharded over its batch axes. The size
    of these axes must divide the number of rows. `run` must be called under `jax.set_mesh(mesh)`,
    by every host with the same arguments. Without a mesh, rows are replicated on all devices of
    the parameters.

    Raises:
      UserError: `length` exceeds `model.longest_context()`.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        *,
        length: int,
        cache_dtype: Any = None,
        form: str = "auto",
        mesh: Mesh | None = None,
        donate: bool = False,
    ):
        if (longest := model.longest_context()) is not None and length > longest:
            raise UserError(
                f"a cache of {length} positions is longer than the {longest} of the model, "
                f"{model.limit_reason()}: shorten the cache"
            )
        self.served, self.params = decode.serve(model, params, form, donate)
        self.length, self.mesh = length, mesh
        self.cache_dtype = jnp.dtype(cache_dtype or model.dtype)
        self._compiled: dict[Any, Any] = {}

    @property
    def row_multiple(self) -> int:
        """The number of rows of a batch must be a multiple of this."""
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)

    def cache_bytes_per_token(self) -> float:
        """Return the bytes of keys and values per position of a row, over all layers."""
        empty = functools.partial(decode.empty_cache, self.served, 1, self.length)
        shapes = jax.eval_shape(functools.partial(empty, self.cache_dtype))
        return count_bytes(shapes.layers) / self.length

    def place(self, x: np.ndarray) -> Any:
        """Shard an array of rows over the mesh, if there is one; every host has the full array."""
        if self.mesh is None:
            return x
        where = NamedSharding(self.mesh, sharding.spec(("batch", *(None,) * (x.ndim - 1))))
        return jax.make_array_from_callback(x.shape, where, functools.partial(_part, x))

    def _program(
        self, name: str, function: Callable, donate: tuple[int, ...], *arguments, out: Any = None
    ):
        """Return `function` compiled for the shapes of `arguments`, with those at `donate` donated.

        `out` are the shardings of the result: on a mesh, the carry of a loop must have the same
        shardings before and after each iteration.
        """
        leaves = jax.tree.leaves(arguments)
        key = (name, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self._compiled:
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out)
            self._compiled[key] = jitted.lower(*arguments).compile()
        return self._compiled[key]

    def check(self, prompt: Sequence[int], where: str = "the prompt") -> None:
        """Raise `UserError` that starts with `where` if a prompt cannot be continued."""
        if not prompt:
            raise UserError(f"{where} is empty: give at least the tokenizer's `start`")
        if len(prompt) >= self.length:
            raise UserError(
                f"{where} has {len(prompt)} tokens, which leave no room for another in a cache of "
                f"{self.length} positions: shorten it, or set a longer cache (--cache_length)"
            )
        vocab = self.served.model.vocab_size
        if (bad := next((i for i in prompt if not 0 <= i < vocab), None)) is not None:
            raise UserError(
                f"{where} has token {bad}, and the model's vocabulary has {vocab}: use the "
                "tokenizer of the run, config.data.tokenizer"
            )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        rows: Sequence[int] | None = None,
        on_tokens: Callable[[list[list[int]]], Sequence[bool]] | None = None,
        report: Report | None = None,
        counted: int | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each prompt.

        A prompt gets fewer than `decoding.count` if it ends or if its row of the cache is full.

        Args:
          prompts: token ids of each prompt; `check` defines which can be continued.
          decoding: the options.
          rows: the numbers of the prompts for the random keys, so that the text of a prompt does
            not depend on its batch; None counts from 0.
          on_tokens: called with all new tokens so far after each chunk; returns a flag for each
            row that is True if the row is done.
          report: is updated with timings and the number of sampled tokens, including stop tokens.
          counted: the number of leading rows whose tokens are reported; None reports all rows.

        Raises:
          UserError: a prompt cannot be continued.
          ValueError: `decoding.count` is below 1, or `decoding.padded` does not fit the prompts and
            the cache.
        """
        count, chunk, padded = decoding.count, decoding.chunk, decoding.padded
        if count < 1:
            raise ValueError(f"count={count} new tokens: must be at least 1")
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {i + 1}" if len(prompts) > 1 else "the prompt")

        def trimmed(tokens: list[int]) -> list[int]:
            return tokens[:-1] if tokens and tokens[-1] in decoding.stop else tokens[:]

        report, count = Report() if report is None else report, min(count, self.length)
        batch, chunk = len(prompts), min(chunk or RECENT, count, RECENT)
        longest = max(map(len, prompts))
        if padded and not longest <= padded <= self.length:
            raise ValueError(f"padded={padded}: must be between {longest} and {self.length} tokens")
        if not padded:
            padded = _SHORTEST_PREFILL
            while padded < longest:
                padded *= 2
            padded = min(padded, self.length)
        tokens_BP = np.zeros((batch, padded), np.int32)
        for row, prompt in zip(tokens_BP, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        limits = np.minimum(lengths + count, self.length).astype(np.int32)
        numbers = np.asarray(range(batch) if rows is None else rows, np.uint32)
        arrays = (self.place(x) for x in (tokens_BP, lengths, limits, numbers))
        inputs = (self.params, *arrays, np.uint32(decoding.seed))
        fill = functools.partial(_prefill, self.served, self.length, self.cache_dtype)
        prefill = self._program("prefill", fill, (), *inputs)
        began = time.perf_counter()
        state = jax.block_until_ready(prefill(*inputs))
        report.prefill_seconds += time.perf_counter() - began

        ended_by = (*decoding.stop, *decoding.ends) or (_EMPTY,)
        static = (self.served, decoding.sampling, ended_by, chunk)
        loop = functools.partial(_advance, *static)
        same = jax.tree.map(lambda x: x.sharding, state)
        name = f"advance {static[1:]}"
        result_sharding = sharding.replicated(self.mesh) if self.mesh is not None else None
        advance = self._program(name, loop, (1,), self.params, state, out=(same, result_sharding))
        empty_recent = self._program("flush", _flush, (0,), state, out=same)
        used = 0  # recent slots
        new: list[list[int]] = [[] for _ in prompts]
        for _ in range(0, count, chunk):
            began = time.perf_counter()
            if used + chunk > RECENT:
                state, used = empty_recent(state), 0
            used += chunk
            state, results = advance(self.params, state)
            out, done = (np.asarray(x) for x in results)
            report.decode_seconds += time.perf_counter() - began
            for tokens, row in zip(new, out, strict=True):
                tokens += row[row != _EMPTY].tolist()
            report.tokens += int((out[:counted] != _EMPTY).sum())
            if on_tokens is not None:
                done = done | np.asarray(on_tokens([trimmed(t) for t in new]), bool)
                put = functools.partial(_part, done)
                state = state.replace(
                    done_B=jax.make_array_from_callback(done.shape, state.done_B.sharding, put)
                )
            if done.all():
                break
        return [trimmed(t) for t in new]
