"""The baselines of MEA with the same interface, selected by `config.variant`.

Each class implements the definition of the paper that it cites. Only `make_attention` refers to all
of them. Gated attention has no separate class: `config.gate` adds the gate to any MEA or MHA.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mea_jax.config.schema import ModelConfig
from mea_jax.model import norms
from mea_jax.model.attention import Attention
from mea_jax.model.attention_layer import AttentionLayer
from mea_jax.model.context import Context
from mea_jax.model.heads import HeadLayout
from mea_jax.model.kv_cache import CachedLayer
from mea_jax.ops import attention
from mea_jax.parallel.sharding import parameter

Array = jax.Array


def lambda_init(index) -> Array:
    """Return differential attention's initial lambda of layer `index` (arXiv 2410.05258)."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(index, jnp.float32))


class DifferentialV1(AttentionLayer):
    """Differential attention (arXiv 2410.05258): N/2 pairs of heads, values of width 2H.

    Pair p has two attention maps, of heads 2p and 2p + 1. Its output is (map_1 - lambda map_2) v,
    normed over 2H and multiplied by 1 - lambda_init. Each layer has one lambda. Each of the K/2
    pairs of keys and values is shared by a group of G query pairs.
    """

    @nn.nowrap
    def cache_layout(self) -> tuple[HeadLayout, HeadLayout, int]:
        c = self.config
        key = HeadLayout("direct", c.n_kv_heads, c.head_dim)
        return key, HeadLayout("direct", c.n_kv_heads // 2, 2 * c.head_dim), 0

    def learned_lambda(self, index) -> Array:
        """Return exp(q1 . k1) - exp(q2 . k2) + lambda_init, a float32 scalar."""

        def vector(name):
            normal = nn.initializers.normal(0.1)
            return parameter(self, f"lambda_{name}", normal, ("norm",), (self.config.head_dim,))

        first = jnp.exp(jnp.vdot(vector("q1"), vector("k1")))
        return first - jnp.exp(jnp.vdot(vector("q2"), vector("k2"))) + lambda_init(index)

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, index, stored: CachedLayer | None = None):
        c = self.config
        n, k, h, pairs = c.n_heads, c.n_kv_heads, c.head_dim, c.n_kv_heads // 2
        q_BTNH = self.apply_positions(self.project_heads("query", x_BTD, n, h), context)
        k_BTKH = self.apply_positions(self.project_heads("key", x_BTD, k, h), context)
        v_BTPW = self.project_heads("value", x_BTD, pairs, 2 * h)
        weight = self.learned_lambda(index)
        # Order query heads so that those of one key head are adjacent: (K/2, 2, G).
        b, t = q_BTNH.shape[:2]
        grouped = q_BTNH.reshape(b, t, pairs, n // k, 2, h)
        q_BTNH = jnp.swapaxes(grouped, 3, 4).reshape(b, t, n, h)
        slopes_N = self.slopes(n // 2)
        if slopes_N is not None:  # one slope per pair
            slopes_N = jnp.repeat(slopes_N.reshape(pairs, 1, n // k), 2, axis=1).reshape(n)
        if stored is not None:
            stored = self.store(stored, k_BTKH, v_BTPW, context)
        if context.slot is None:
            v_BTKW = jnp.repeat(v_BTPW, 2, axis=2)
            o_BTNW = self.attend(q_BTNH, k_BTKH, v_BTKW, context, slopes_N)
            o_BTP2GW = o_BTNW.reshape(b, t, pairs, 2, n // k, 2 * h)
            o_BTPGW = o_BTP2GW[:, :, :, 0] - weight.astype(o_BTNW.dtype) * o_BTP2GW[:, :, :, 1]
            o_BTNW = o_BTPGW.reshape(b, t, n // 2, 2 * h)
        else:
            logits = self.cached_logits(q_BTNH, stored, context, slopes_N)
            weights, total_BKG = self.cached_softmax(logits, context)

            def subtract(p_BKGS):  # the two maps of a pair, so that values are read once
                p_BP2GS = (p_BKGS / total_BKG[..., None]).reshape(b, pairs, 2, n // k, -1)
                return p_BP2GS[:, :, 0] - weight * p_BP2GS[:, :, 1]

            o_BTNW = self.cached_sum([subtract(p) for p in weights], stored).astype(x_BTD.dtype)
        o_BTNW = norms.RMSNorm(2 * h, 1e-5, name="head_norm")(o_BTNW)
        remaining = (1.0 - lambda_init(index)).astype(o_BTNW.dtype)
        return self.write_residual(o_BTNW * remaining), stored


class DifferentialV2(AttentionLayer):
    """Differential attention, second version (microsoft/unilm, Diff-Transformer-V2).

    2N query heads attend to the same K heads. Output n is that of head 2n minus sigmoid(x W)_n
    times that of head 2n + 1, for each token. There is no norm.
    """

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, index, stored: CachedLayer | None = None):
        c = self.config
        n, h = c.n_heads, c.head_dim
        q_BTNH = self.apply_positions(self.project_heads("query", x_BTD, 2 * n, h), context)
        k_BTKH = self.apply_positions(self.project_heads("key", x_BTD, c.n_kv_heads, h), context)
        v_BTKH = self.project_heads("value", x_BTD, c.n_kv_heads, h)
        gate_BTN1 = self.project_heads("subtraction_gate", x_BTD, n, 1)
        slopes_N = self.slopes(n)
        slopes_N = None if slopes_N is None else jnp.repeat(slopes_N, 2)
        if stored is not None:
            stored = self.store(stored, k_BTKH, v_BTKH, context)
        if context.slot is None:
            o_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, context, slopes_N)
        else:
            o_BTNH = self.cached_attention(q_BTNH, stored, context, slopes_N)
        o_BTN2H = o_BTNH.reshape(*o_BTNH.shape[:2], n, 2, h)
        weight = jax.nn.sigmoid(gate_BTN1.astype(jnp.float32)).astype(o_BTNH.dtype)
        return self.write_residual(o_BTN2H[:, :, :, 0] - weight * o_BTN2H[:, :, :, 1]), stored


class TalkingHeads(AttentionLayer):
    """Talking heads (arXiv 2003.02436): mixing of logits and of probabilities across heads.

    Logits are mixed before the softmax, probabilities after it. Both mixings start from the
    identity, which is MHA. No flash kernel can run this layer; see ops/attention.py.
    """

    def talk(self, name: str) -> Array:
        """Declare a mixing (N, N), which starts from the identity."""

        def init(_, heads):
            return jnp.eye(heads)

        return parameter(self, name, init, ("mixing", "heads"), self.config.n_heads)

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, index, stored: CachedLayer | None = None):
        c = self.config
        k, h = c.n_kv_heads, c.head_dim
        q_BTNH = self.apply_positions(self.project_heads("query", x_BTD, c.n_heads, h), context)
        k_BTKH = self.apply_positions(self.project_heads("key", x_BTD, k, h), context)
        v_BTKH = self.project_heads("value", x_BTD, k, h)
        before_NN, after_NN = self.talk("logit_mixing"), self.talk("probability_mixing")
        slopes_N, scale = self.slopes(c.n_heads), h**-0.5
        if stored is not None:
            stored = self.store(stored, k_BTKH, v_BTKH, context)
        if context.slot is None:
            o_BTNH = attention.talking_heads_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                context.segment_ids_BT,
                scale,
                before_NN,
                after_NN,
                slopes_N,
            )
            if self.is_mutable_collection("statistics"):
                self.record_statistics(q_BTNH, k_BTKH, o_BTNH, context, slopes_N, scale)
        else:
            logits = self.cached_logits(q_BTNH, stored, context, slopes_N)
            mixed = [attention.mix_logits(part, before_NN) for part in logits]
            weights, total_BKG = self.cached_softmax(mixed, context)
            p = [attention.mix_logits(w / total_BKG[..., None], after_NN) for w in weights]
            o_BTNH = self.cached_sum(p, stored).astype(x_BTD.dtype)
        return self.write_residual(o_BTNH), stored


class Collaborative(AttentionLayer):
    """Collaborative attention (arXiv 2006.16362): scores (Q diag(m_n)) K^T, Q and K shared.

    The shared keys are C_k heads of width H, one row of C_k H numbers per position. Query head n is
    the shared query times its row m_n. Rows start as block identity, which is MHA if C_k = K = N.
    """

    @nn.nowrap
    def cache_layout(self) -> tuple[HeadLayout, HeadLayout, int]:
        c = self.config
        key = HeadLayout("absorbed", self.key_components, c.head_dim)
        return key, HeadLayout("direct", c.n_kv_heads, c.head_dim), 0

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, index, stored: CachedLayer | None = None):
        c = self.config
        n, k, h, shared = c.n_heads, c.n_kv_heads, c.head_dim, self.key_components

        def init(_, shape):
            heads, components, width = shape
            serving_N = jnp.arange(heads) * components // heads
            own_NC = serving_N[:, None] == jnp.arange(components)[None]
            return jnp.repeat(own_NC[..., None], width, axis=2).astype(jnp.float32)

        axes = ("heads", "mixing", "head_dim")
        rows_NCH = parameter(self, "query_mixing", init, axes, (n, shared, h))
        b, t = x_BTD.shape[:2]
        q_BTCH = self.backend.project(x_BTD, self.head_kernel("query", shared, h, "mixing"))
        k_BTCH = self.backend.project(x_BTD, self.head_kernel("key", shared, h, "mixing"))
        v_BTKH = self.project_heads("value", x_BTD, k, h)
        q_BTNCH = q_BTCH[:, :, None] * rows_NCH[None, None].astype(q_BTCH.dtype)
        q_BTNX = self.apply_positions(q_BTNCH.reshape(b, t, n * shared, h), context).reshape(
            b, t, n, -1
        )
        k_BTCH = self.apply_positions(k_BTCH, context)
        slopes_N = self.slopes(n)
        if stored is not None:
            stored = self.store(stored, k_BTCH, v_BTKH, context)
        if context.slot is None:
            k_BTKX = jnp.broadcast_to(k_BTCH.reshape(b, t, 1, -1), (b, t, k, shared * h))
            o_BTNH = self.attend(q_BTNX, k_BTKX, v_BTKH, context, slopes_N, scale=h**-0.5)
        else:
            o_BTNH = self.cached_attention(q_BTNX, stored, context, slopes_N)
        return self.write_residual(o_BTNH), stored


LAYERS: dict[str, type[AttentionLayer]] = {
    "mea": Attention,
    "differential_v1": DifferentialV1,
    "differential_v2": DifferentialV2,
    "talking_heads": TalkingHeads,
    "collaborative": Collaborative,
}


def make_attention(
    config: ModelConfig, key_components: int, value_components: int, **options
) -> AttentionLayer:
    """Return the attention layer of `config`, with its C_k and C_v."""
    return LAYERS[config.variant](config, key_components, value_components, **options)
