"""Choice of the next token from logits: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp

from mea_jax.errors import UserError

Array = jax.Array
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options for drawing a token.

    Temperature 0 takes the most likely token and ignores the other options.
    """

    temperature: float = 0.0
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the fewest tokens whose probabilities reach p; 1: all

    def __post_init__(self):
        if not self.temperature >= 0:  # rejects nan too
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")


def restrict(logits_BV: Array, sampling: Sampling) -> Array:
    """Hide the tokens that top-k and top-p exclude, by a logit of -1e30; float32 (B, V).

    `logits_BV` are already divided by the temperature, so top-p sums probabilities at that
    temperature, after top-k. The most likely token is always kept. Tokens as likely as the last one
    that is kept are kept too.
    """
    vocab = logits_BV.shape[-1]
    k = min(sampling.top_k or vocab, vocab)
    if k == vocab and sampling.top_p == 1:
        return logits_BV
    # Only the k largest logits are sorted.
    top_Bk = jax.lax.top_k(logits_BV, k)[0]
    least_B1 = top_Bk[:, -1:]
    if sampling.top_p < 1:
        p_Bk = jax.nn.softmax(top_Bk, axis=-1)
        before_Bk = jnp.cumsum(p_Bk, axis=-1) - p_Bk
        kept_Bk = before_Bk < sampling.top_p
        least_B1 = jnp.min(jnp.where(kept_Bk, top_Bk, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, _HIDDEN, logits_BV)


def choose(logits_BV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """Choose one token per row, (B,) int32, with one random key per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = restrict(logits_BV / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)
