"""Initialisation of projections and embeddings."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mea_jax.config.schema import ModelConfig
from mea_jax.parallel.sharding import parameter


def kernel(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str], fan_in: int, gain=1.0
) -> jax.Array:
    """Declare a float32 kernel, truncated normal, of standard deviation gain / sqrt(fan_in)."""
    # Truncation at two deviations reduces the deviation; `truncated_normal` does not correct it.
    stddev = gain * fan_in**-0.5 / 0.87962566103423978
    return parameter(module, name, nn.initializers.truncated_normal(stddev), axes, tuple(shape))


def embedding_stddev(model: ModelConfig) -> float:
    """Return the standard deviation of fresh embeddings: 1, or 1/sqrt(D) if they are tied.

    Tied embeddings of deviation 1 would give initial logits of deviation sqrt(D).
    """
    return model.d_model**-0.5 if model.tie_embeddings else 1.0


def residual_gain(model: ModelConfig) -> float:
    """Return the gain of the projections that write to the residual.

    All 2L of them together add half the deviation of the embedding, so that a fresh model's last
    layer still reads its token. In the quickstart, blocks with larger initial outputs than the
    embedding led to a plateau of the loss: see docs/log.md.
    """
    return 0.5 * embedding_stddev(model) * (2 * model.n_layers) ** -0.5
