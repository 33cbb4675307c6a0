"""Initialisation of projections and embeddings."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mea_jax.config.schema import ModelConfig
from mea_jax.parallel.sharding import parameter


def kernel(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str], fan_in: int, gain=1.0
) -> jax.Array:
    """A float32 projection, truncated normal of standard deviation gain / sqrt(fan_in)."""
    # Truncation at two deviations shrinks the spread; jax's initialiser does not correct for it.
    stddev = gain * fan_in**-0.5 / 0.87962566103423978
    return parameter(module, name, nn.initializers.truncated_normal(stddev), axes, tuple(shape))


def embedding_stddev(model: ModelConfig) -> float:
    """Spread of fresh embeddings: 1, or 1/sqrt(D) where they are the unembedding too.

    Tied embeddings of spread 1 would start with logits of spread sqrt(D).
    """
    return model.d_model**-0.5 if model.tie_embeddings else 1.0


def residual_gain(model: ModelConfig) -> float:
    """Gain of the projections that write to the residual: all 2L together half the embedding.

    So a fresh model still knows its token at the last layer. Blocks that start louder than the
    embedding cost the quickstart dearly: see docs/log.md.
    """
    return 0.5 * embedding_stddev(model) * (2 * model.n_layers) ** -0.5
