"""The two halves of a block: multi-head explicit attention and SwiGLU, as thin Linen modules."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mea_jax import attention, positions
from mea_jax.backends import make_backend
from mea_jax.config import ModelConfig
from mea_jax.norms import RMSNorm
from mea_jax.sharding import constrain, parameter


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


class Attention(nn.Module):
    """MEA (arXiv 2601.19611): HLC on keys and values, causal attention, per-head RMSNorm.

    With `config.hlc == "none"` and no head norm this is MHA, GQA or MQA, and its parameter tree
    holds nothing of HLC. `key_components` and `value_components` are C_k and C_v of this layer.
    """

    config: ModelConfig
    key_components: int
    value_components: int

    def composite(self, which: str, components: int, x_BTD: jax.Array) -> jax.Array:
        """Composite key or value heads (B, T, K, H), folded or explicit."""
        c = self.config
        shape = (c.d_model, components, c.head_dim)
        kernel_DCH = kernel(self, which, shape, ("embed", "components", "head_dim"), c.d_model)
        backend = make_backend(c)
        if not c.mixes(which):
            return backend.project(x_BTD, kernel_DCH)

        def init(_, components, composites):
            return attention.initial_mixing(components, composites)

        mix_CK = parameter(
            self, f"{which}_mixing", init, ("mixing", "heads"), components, c.n_kv_heads
        )
        if c.hlc_form == "folded":
            return backend.project(x_BTD, attention.fold(kernel_DCH, mix_CK))
        return attention.mix_heads(backend.project(x_BTD, kernel_DCH), mix_CK)

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        table: tuple[jax.Array, jax.Array],
        segment_ids_BT: jax.Array,
    ) -> jax.Array:
        c, backend = self.config, make_backend(self.config)
        q_DNH = kernel(
            self,
            "query",
            (c.d_model, c.n_heads, c.head_dim),
            ("embed", "heads", "head_dim"),
            c.d_model,
        )
        heads = ("batch", "length", "activation_heads", None)
        q_BTNH = constrain(backend.project(x_BTD, q_DNH), *heads)
        k_BTKH = constrain(self.composite("key", self.key_components, x_BTD), *heads)
        v_BTKH = constrain(self.composite("value", self.value_components, x_BTD), *heads)
        q_BTNH = positions.apply_rope(q_BTNH, table)
        k_BTKH = positions.apply_rope(k_BTKH, table)
        o_BTNH = constrain(backend.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT), *heads)
        if self.is_mutable_collection("statistics"):
            self.sow_statistics(q_BTNH, k_BTKH, o_BTNH, segment_ids_BT)
        if c.head_norm:
            o_BTNH = RMSNorm(c.head_dim, c.norm_eps, name="head_norm")(o_BTNH)
        o_NHD = kernel(
            self,
            "out",
            (c.n_heads, c.head_dim, c.d_model),
            ("heads", "head_dim", "embed"),
            c.n_heads * c.head_dim,
            gain=residual_gain(c),
        )
        return backend.project(o_BTNH, o_NHD, axes=2)

    def sow_statistics(self, q_BTNH, k_BTKH, o_BTNH, segment_ids_BT) -> None:
        """Per head (N,): attention entropy, largest logit, output RMS before the head norm."""
        weight_BT = (segment_ids_BT > 0).astype(jnp.float32)
        square_BTN = jnp.mean(jnp.square(o_BTNH.astype(jnp.float32)), axis=-1)
        mean_N = jnp.einsum("btn,bt->n", square_BTN, weight_BT) / jnp.maximum(weight_BT.sum(), 1)
        statistics = attention.attention_statistics(
            q_BTNH, k_BTKH, segment_ids_BT, self.config.head_dim**-0.5
        )
        self.sow("statistics", "attention", statistics | {"output_rms": jnp.sqrt(mean_N)})


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, backend = self.config, make_backend(self.config)
        wide = (c.d_model, c.d_ff)
        gate_DF = kernel(self, "gate", wide, ("embed", "mlp"), c.d_model)
        up_DF = kernel(self, "up", wide, ("embed", "mlp"), c.d_model)
        down_FD = kernel(
            self,
            "down",
            (c.d_ff, c.d_model),
            ("mlp", "embed"),
            c.d_ff,
            gain=residual_gain(c),
        )
        hidden = ("batch", "length", "activation_mlp")
        gate_BTF = constrain(backend.project(x_BTD, gate_DF), *hidden)
        up_BTF = constrain(backend.project(x_BTD, up_DF), *hidden)
        return backend.project(backend.swiglu(gate_BTF, up_BTF), down_FD)
