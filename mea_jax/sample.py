"""A continuation of a prompt by recomputing its window: enough to look at a model in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config import ModelConfig
from mea_jax.transformer import apply_logits


def sample(
    model: ModelConfig,
    params,
    prompt: list[int],
    *,
    count: int,
    length: int,
    temperature: float,
    seed: int,
    stop: int,
) -> list[int]:
    """At most `count` token ids that continue `prompt`, ended before the id `stop`.

    The last `length` - `count` tokens of the prompt are kept, so that the whole text fits one
    window of `length` positions. Temperature 0 takes the most likely token. One compiled loop;
    every step recomputes the window, which costs `length` times a step with a cache.
    """
    count = min(count, length - 1)
    prompt = prompt[-(length - count) :]
    start = len(prompt)
    tokens_1T = np.zeros((1, length), np.int32)
    tokens_1T[0, :start] = prompt
    positions_1T = jnp.arange(length)[None]
    segments_1T = jnp.ones((1, length), jnp.int32)

    def body(params, i, tokens_1T):
        logits_1TV = apply_logits(model, params, tokens_1T, positions_1T, segments_1T)
        logits_V = logits_1TV[0, i - 1]
        if temperature > 0:
            key = jax.random.fold_in(jax.random.key(seed), i)
            chosen = jax.random.categorical(key, logits_V / temperature)
        else:
            chosen = jnp.argmax(logits_V)
        return tokens_1T.at[0, i].set(chosen.astype(jnp.int32))

    @jax.jit
    def loop(params, tokens_1T):
        return jax.lax.fori_loop(start, start + count, functools.partial(body, params), tokens_1T)

    new = np.asarray(loop(params, tokens_1T))[0, start : start + count].tolist()
    return new[: new.index(stop)] if stop in new else new
