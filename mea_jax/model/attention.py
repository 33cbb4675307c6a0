"""Multi-head Explicit Attention, and plain attention, as a thin Linen module.

MEA and its baselines (variants.py) have one interface: `layer(x_BTD, context, index, stored)`
returns the layer's output (B, T, D) and its updated cache. A call without a cache is training. With
a cache but no slot in the context it is prefill, T positions from slot 0 on. With a slot it is one
decode step.

Apply a layer with the collection "heads" mutable to get its queries, composite keys and values
before rotary positions, its outputs before the head norm, the input of the output projection, and
the slots of few bits before they are rounded.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mea_jax.config.schema import Side
from mea_jax.model import norms
from mea_jax.model.attention_layer import AttentionLayer
from mea_jax.model.context import Context
from mea_jax.model.heads import HeadLayout, Heads, add_bias, digits
from mea_jax.model.kv_cache import CachedLayer
from mea_jax.ops import hlc, rms_norm
from mea_jax.ops.backend import HeadNorm
from mea_jax.parallel.sharding import parameter

Array = jax.Array


class Attention(AttentionLayer):
    """MEA (arXiv 2601.19611): HLC on keys and values, causal attention, per-head RMSNorm.

    With `config.hlc == "none"` and no head norm this is MHA, GQA or MQA, and its parameter tree
    contains no HLC parameters. Optional: a norm of queries and keys (Qwen3), and a gate on each
    head's output (gated attention, arXiv 2505.06708).

    HLC commutes with rotary positions and is applied before them, unless `hlc_order` is "after". It
    does not commute with a key norm. If a key norm follows HLC, the cache contains components,
    rotated and multiplied by the norm's weight, and the missing factor 1/rms of each composite head
    and position.
    """

    @nn.nowrap
    def cache_layout(self) -> tuple[HeadLayout, HeadLayout, int]:
        c = self.config
        key, value = (
            HeadLayout(
                self.cached_form if c.mixes(side) else "direct",
                components,
                c.head_dim,
                digits(rows[0]) if (rows := c.bits(side)) else None,
                c.slots(side) if c.mixes(side) else None,
            )
            for side, components in (
                (Side.KEY, self.key_components),
                (Side.VALUE, self.value_components),
            )
        )
        return key, value, c.n_kv_heads if self.scalar_norm else 0

    @property
    def scalar_norm(self) -> bool:
        """True if keys are normed after mixing; cached components then lack the factor 1/rms."""
        c = self.config
        return c.qk_norm and c.mixes(Side.KEY) and c.hlc_order == "before"

    def heads(self, side: Side) -> Heads:
        """Declare the parameters of "key" or "value" heads."""
        c = self.config
        components = self.key_components if side == Side.KEY else self.value_components
        kernel_DCH = self.head_kernel(side.value, components, c.head_dim, "components")
        has_mean = side == Side.KEY and c.key_mean  # components are biased by minus the mean
        kernel_DCH = hlc.cached_only(c, side, kernel_DCH)
        bias_CH = self.head_bias(side.value, components, "components", c.qkv_bias or has_mean)
        bias_CH = None if bias_CH is None else hlc.cached_only(c, side, bias_CH)
        if not c.mixes(side):
            return Heads(kernel_DCH, "heads", None, bias_CH)
        kind = c.mixing_kind(side)

        def init(key, *shape):
            return hlc.draw(c.hlc_init, key, kind, *shape)

        shape = (components, c.n_kv_heads, c.head_dim)
        mixing = parameter(self, f"{side}_mixing", init, hlc.AXES[kind], *shape)
        steps_CH, mean_KH = None, None
        if c.bits(side) is not None:
            ones, axes = nn.initializers.ones, ("components", "head_dim")
            steps_CH = parameter(self, f"{side}_steps", ones, axes, (components, c.head_dim))
        if has_mean:
            zeros, axes = nn.initializers.zeros, ("heads", "head_dim")
            mean_KH = parameter(self, "key_mean", zeros, axes, (c.n_kv_heads, c.head_dim))
        return Heads(kernel_DCH, kind, mixing, bias_CH, steps_CH, mean_KH)

    def key_inverse_rms(self, heads: Heads, k_BTKH: Array, gamma_H: Array) -> Array:
        """Return 1/rms of composite keys, (B, T, K, 1), float32.

        Complex mixing commutes with a weight per feature only if both features of a rotary pair
        have the same weight. So under "frequency" mixing the projection is assumed to include the
        norm's weight already: the key without it is k / gamma.
        """
        if heads.kind == "frequency":
            k_BTKH = k_BTKH.astype(jnp.float32) / rms_norm.along_last(gamma_H, 4)
        return rms_norm.inverse_rms(k_BTKH, self.config.norm_eps)

    def with_error(self, name: str, x: Array) -> Array:
        """Return `x` plus the variable `name` of the collection "errors", if it exists.

        Its gradient is that of the keys before rotation (after a norm) if `name` is "key", and of
        the values if it is "value".
        """
        if not self.has_variable("errors", name):
            return x
        return x + self.get_variable("errors", name).astype(x.dtype)

    def composed(
        self, heads: Heads, k_BTCH: Array, inverse_BTK: Array | None, context: Context
    ) -> Array:
        """Return keys (B, T, K, H) from what is cached.

        They are mixed, then their rotated mean is added, then 1/rms multiplied, where they exist.
        """
        k_BTKH = heads.mix(k_BTCH)
        if heads.mean_KH is not None:
            mean_BTKH = jnp.broadcast_to(heads.mean_KH[None, None], k_BTKH.shape)
            mean_BTKH = self.apply_positions(mean_BTKH, context)
            k_BTKH = (k_BTKH.astype(jnp.float32) + mean_BTKH).astype(k_BTKH.dtype)
        if inverse_BTK is None:
            return k_BTKH
        return (k_BTKH.astype(jnp.float32) * inverse_BTK[..., None]).astype(k_BTKH.dtype)

    def training_keys(self, heads: Heads, x_BTD: Array, gamma_H, context: Context, index) -> Array:
        """Return keys (B, T, K, H) as attention reads them: mixed, normed, rotated."""
        c = self.config
        if c.key_bits is not None:
            k_BTCH, inverse_BTK = self.cached_keys(heads, x_BTD, gamma_H, context)
            self.sow("heads", "key_slots", k_BTCH)
            k_BTCH = heads.rounded(c.key_bits, k_BTCH, context.positions_BT, index)
            return self.composed(heads, k_BTCH, inverse_BTK, context)
        if c.hlc_order == "after":
            return heads.mix(self.cached_keys(heads, x_BTD, gamma_H, context)[0])
        k_BTKH = heads.composites(self.backend, c, Side.KEY, x_BTD)
        self.sow("heads", "key", k_BTKH)
        if gamma_H is not None and not self.scalar_norm:
            k_BTKH = rms_norm.norm_heads(k_BTKH, gamma_H, c.norm_eps)
            k_BTKH = self.with_error("key", k_BTKH)
        elif gamma_H is not None:
            inverse_BTK1 = self.key_inverse_rms(heads, k_BTKH, gamma_H)
            normed = k_BTKH.astype(jnp.float32) * inverse_BTK1
            if heads.kind != "frequency":
                normed = normed * rms_norm.along_last(gamma_H, 4)
            k_BTKH = normed.astype(k_BTKH.dtype)
        else:
            k_BTKH = self.with_error("key", k_BTKH)
        return self.apply_positions(k_BTKH, context)

    def cached_keys(self, heads: Heads, x_BTD: Array, gamma_H, context: Context):
        """Return the arrays to cache: component keys (B, T, C, H), and 1/rms (B, T, K) or None."""
        k_BTCH, inverse_BTK = heads.components(self.backend, x_BTD), None
        if gamma_H is not None and not self.scalar_norm:
            k_BTCH = rms_norm.norm_heads(k_BTCH, gamma_H, self.config.norm_eps)
        elif gamma_H is not None:
            whole_BTKH = add_bias(heads.mix(k_BTCH), heads.mean_KH)
            inverse_BTK = self.key_inverse_rms(heads, whole_BTKH, gamma_H)[..., 0]
            if heads.kind != "frequency":
                scaled = k_BTCH.astype(jnp.float32) * rms_norm.along_last(gamma_H, 4)
                k_BTCH = scaled.astype(k_BTCH.dtype)
        return self.apply_positions(k_BTCH, context), inverse_BTK

    def with_cache(self, q_BTNH, x_BTD, key: Heads, value: Heads, gamma_H, norm, context, stored):
        """Run prefill or a decode step: normed head outputs (B, T, N, H), and the cache."""
        c = self.config
        k_BTCH, inverse_BTK = self.cached_keys(key, x_BTD, gamma_H, context)
        v_BTCH = value.components(self.backend, x_BTD)
        steps = (key.steps_CH, value.steps_CH)
        stored = self.store(stored, k_BTCH, v_BTCH, context, inverse_BTK, steps)
        slopes_N = self.slopes(c.n_heads)
        if context.slot is None:
            k_BTKH, v_BTKH = self.composed(key, k_BTCH, inverse_BTK, context), value.mix(v_BTCH)
            return self.attend(q_BTNH, k_BTKH, v_BTKH, context, slopes_N, norm=norm), stored
        o_BTNH = self.cached_attention(q_BTNH, stored, context, slopes_N, key, value)
        return o_BTNH if norm is None else norm.apply(o_BTNH), stored

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, index, stored: CachedLayer | None = None):
        c = self.config
        bias_NH = self.head_bias("query", c.n_heads)
        q_BTNH = self.project_heads("query", x_BTD, c.n_heads, c.head_dim, bias_NH)
        key, value, gamma_H = self.heads(Side.KEY), self.heads(Side.VALUE), None
        if c.qk_norm:
            joint = c.qk_norm_over == "all"
            scale_H = norms.Scale(c.head_dim * (c.n_heads if joint else 1), name="query_norm")()
            q_BTNH = rms_norm.norm_heads(q_BTNH, scale_H, c.norm_eps)
            gamma_H = norms.Scale(c.head_dim * (c.n_kv_heads if joint else 1), name="key_norm")()
        self.sow("heads", "query", q_BTNH)
        q_BTNH, head_norm = self.apply_positions(q_BTNH, context), None
        if c.head_norm:
            head_norm = HeadNorm(norms.Scale(c.head_dim, name="head_norm")(), c.norm_eps)
        if stored is None:
            k_BTKH = self.training_keys(key, x_BTD, gamma_H, context, index)
            if c.value_bits is None:
                v_BTKH = value.composites(self.backend, c, Side.VALUE, x_BTD)
                v_BTKH = self.with_error("value", v_BTKH)
            else:
                v_BTCH = value.components(self.backend, x_BTD)
                self.sow("heads", "value_slots", v_BTCH)
                v_BTCH = value.rounded(c.value_bits, v_BTCH, context.positions_BT, index)
                v_BTKH = value.mix(v_BTCH)
            self.sow("heads", "value", v_BTKH)
            slopes_N = self.slopes(c.n_heads)
            o_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, context, slopes_N, norm=head_norm)
        else:
            o_BTNH, stored = self.with_cache(
                q_BTNH, x_BTD, key, value, gamma_H, head_norm, context, stored
            )
        if c.gate != "none":
            width = c.head_dim if c.gate == "feature" else 1
            gate_BTNH = self.project_heads("output_gate", x_BTD, c.n_heads, width)
            o_BTNH = o_BTNH * jax.nn.sigmoid(gate_BTNH.astype(jnp.float32)).astype(o_BTNH.dtype)
        return self.write_residual(o_BTNH), stored
