"""The base class of attention layers: projections, attention to a window or a cache, the output."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import ModelConfig
from mea_jax.model import kv_cache
from mea_jax.model.context import Context, Slots
from mea_jax.model.heads import HeadLayout, Heads, add_bias
from mea_jax.model.init import kernel, residual_gain
from mea_jax.model.kv_cache import CachedLayer, LayerCache
from mea_jax.ops import attention, mean_key
from mea_jax.ops import rope as ops_rope
from mea_jax.ops.backend import Backend, HeadNorm, make_backend
from mea_jax.parallel.sharding import constrain, parameter

Array = jax.Array
HEADS = ("batch", "length", "activation_heads", None)


class AttentionLayer(nn.Module):
    """The base class of MEA and of the other variants.

    `key_components` and `value_components` are C_k and C_v of the layer.
    `cached_form` is the form of cached components: "absorbed" or "explicit" (kv_cache.py).
    """

    config: ModelConfig
    key_components: int
    value_components: int
    cached_form: str = "absorbed"

    @property
    def backend(self) -> Backend:
        return make_backend(self.config)

    @nn.nowrap
    def cache_layout(self) -> tuple[HeadLayout, HeadLayout, int]:
        """Return the layouts of cached keys and values, and the number of 1/rms per position."""
        c = self.config
        heads = HeadLayout("direct", c.n_kv_heads, c.head_dim)
        return heads, heads, 0

    @property
    def logit_scale(self) -> float:
        """The factor of logits."""
        return self.config.attention_scale or self.config.head_dim**-0.5

    @property
    def window(self) -> int:
        """The number of positions that a token sees, itself included; 0: all."""
        return self.config.windows()[0]

    @nn.nowrap
    def slopes(self, n_heads: int) -> Array | None:
        """Return ALiBi's slopes of the query heads, or None if positions are not "alibi"."""
        return ops_rope.alibi_slopes(n_heads) if self.config.positions == "alibi" else None

    def head_kernel(self, name: str, heads: int, width: int, axis: str = "heads") -> Array:
        """Declare a float32 projection (D, heads, width) from the residual."""
        d_model = self.config.d_model
        return kernel(self, name, (d_model, heads, width), ("embed", axis, "head_dim"), d_model)

    def head_bias(
        self, name: str, heads: int, axis: str = "heads", exists: bool | None = None
    ) -> Array | None:
        """Declare the float32 bias (heads, H) of a projection; None if the model has none."""
        if not (self.config.qkv_bias if exists is None else exists):
            return None
        shape = (heads, self.config.head_dim)
        return parameter(self, f"{name}_bias", nn.initializers.zeros, (axis, "head_dim"), shape)

    def project_heads(
        self, name: str, x_BTD: Array, heads: int, width: int, bias: Array | None = None
    ) -> Array:
        """Return heads (B, T, heads, width), projected by the separate kernel `name`."""
        x_BTNH = self.backend.project(x_BTD, self.head_kernel(name, heads, width))
        return constrain(add_bias(x_BTNH, bias), *HEADS)

    @staticmethod
    def apply_positions(x_BTNH: Array, context: Context) -> Array:
        """Rotate heads by their positions, if positions are rotary."""
        return x_BTNH if context.rope is None else ops_rope.apply_rope(x_BTNH, context.rope)

    def attend(
        self,
        q_BTNH,
        k_BTKH,
        v_BTKW,
        context: Context,
        slopes_N=None,
        scale: float | None = None,
        norm: HeadNorm | None = None,
    ) -> Array:
        """Compute attention of T positions to themselves (B, T, N, W), in training and prefill.

        `scale` defaults to `logit_scale`. `norm` is applied to the outputs. If the collection
        "statistics" is mutable, `record_statistics` records into it; if "heads" is, the outputs
        before `norm` are recorded.
        """
        scale = scale or self.logit_scale
        q, k, v = (constrain(x, *HEADS) for x in (q_BTNH, k_BTKH, v_BTKW))
        arrays = (q, k, v, context.segment_ids_BT, scale, slopes_N)
        place: dict[str, Any] = {"shards": context.shards, "window": self.window}
        if self.is_mutable_collection("statistics") or self.is_mutable_collection("heads"):
            o_BTNW = self.backend.attend(*arrays, **place)
            if self.is_mutable_collection("statistics"):
                self.record_statistics(q, k, o_BTNW, context, slopes_N, scale)
            self.sow("heads", "output", o_BTNW)
            o_BTNW = o_BTNW if norm is None else norm.apply(o_BTNW)
        else:
            o_BTNW = self.backend.attend(*arrays, norm, **place)
        return constrain(o_BTNW, *HEADS)

    def record_statistics(
        self, q_BTNH, k_BTKH, o_BTNW, context: Context, slopes_N, scale: float
    ) -> None:
        """Record attention entropy, largest logit and output RMS of each head, (N,).

        The outputs are those before any norm. Tokens must be in natural order.
        """
        assert context.shards == 1
        weight_BT = context.real_BT.astype(jnp.float32)
        square_BTN = jnp.mean(jnp.square(o_BTNW.astype(jnp.float32)), axis=-1)
        mean_N = jnp.einsum("btn,bt->n", square_BTN, weight_BT) / jnp.maximum(weight_BT.sum(), 1)
        statistics = attention.attention_statistics(
            q_BTNH, k_BTKH, context.segment_ids_BT, scale, slopes_N, self.window
        )
        self.sow("statistics", "attention", statistics | {"output_rms": jnp.sqrt(mean_N)})

    def store(
        self,
        stored: CachedLayer,
        key_BTCH,
        value_BTCW,
        context: Context,
        inverse_rms_BTK=None,
        steps=(None, None),
    ) -> CachedLayer:
        """Return `stored` with new positions: a prompt in `main`, a decode step in `recent`.

        `steps` are those of the slots of keys and of values that are packed.
        """
        prefill = context.slot is None
        part, slot = (stored.main, 0) if prefill else (stored.recent, context.slot)
        scalars = part.inverse_rms_BKS
        if inverse_rms_BTK is not None:
            scalars = kv_cache.write_scalars(scalars, inverse_rms_BTK, slot)
        part = LayerCache(
            key=kv_cache.write_heads(part.key, key_BTCH, slot, steps[0]),
            value=kv_cache.write_heads(part.value, value_BTCW, slot, steps[1]),
            inverse_rms_BKS=scalars,
        )
        return stored._replace(main=part) if prefill else stored._replace(recent=part)

    def cached_logits(
        self,
        q_B1NX,
        stored: CachedLayer | None,
        context: Context,
        slopes_N=None,
        heads: Heads | None = None,
    ) -> list[Array]:
        """Return one position's logits of both parts, with ALiBi: float32 (B, K, G, S) each."""
        assert stored is not None
        b, _, n, width = q_B1NX.shape
        k = self.config.n_kv_heads
        q_BKGX = q_B1NX.astype(jnp.float32) * self.logit_scale
        q_BKGX = q_BKGX.astype(q_B1NX.dtype).reshape(b, k, n // k, width)
        kind, mix = (heads.kind, heads.mixing) if heads else ("heads", None)
        found = []
        for part, slots in zip(stored, (context.main, context.recent), strict=True):
            mean_BKGS = self.mean_logits(q_BKGX, context, slots, heads)
            logits_BKGS = kv_cache.read_logits(self.backend, q_BKGX, part, kind, mix, mean_BKGS)
            found.append(kv_cache.add_slopes(logits_BKGS, slots.distance_BS, slopes_N))
        return found

    def mean_logits(self, q_BKGH, context: Context, slots: Slots, heads: Heads | None):
        """Return the logits (B, K, G, S) of the constant part of keys, or None without one."""
        if heads is None or heads.mean_KH is None:
            return None
        c, start_B = self.config, context.positions_BT[:, 0] + slots.distance_BS[:, 0]
        frequencies_F, factor = np.zeros(c.head_dim // 2), 1.0
        if context.rope is not None:
            frequencies_F = ops_rope.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
            factor = ops_rope.attention_factor(c.rope_scaling)
        length = slots.distance_BS.shape[1]
        return mean_key.mean_logits(q_BKGH, heads.mean_KH, start_B, length, frequencies_F, factor)

    def cached_softmax(self, logits: list[Array], context: Context) -> tuple[list[Array], Array]:
        """Return exp(logit - maximum) of both parts, and the sum of all these weights (B, K, G).

        Weights of slots that a row may not see are 0.
        """
        seen = [slots.within(self.window) for slots in (context.main, context.recent)]
        hidden = [
            kv_cache.mask_logits(part, seen_BS) for part, seen_BS in zip(logits, seen, strict=True)
        ]
        top_BKG1 = functools.reduce(
            jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in hidden]
        )
        weights = [jnp.exp(part - top_BKG1) for part in hidden]
        main_BKG, recent_BKG = (jnp.sum(part, axis=-1) for part in weights)
        return weights, main_BKG + recent_BKG

    def cached_sum(
        self, weights: list[Array], stored: CachedLayer | None, heads: Heads | None = None
    ) -> Array:
        """Sum the values of both parts by weights (B, K, G, S): float32 (B, 1, N, W)."""
        assert stored is not None
        kind, mix = (heads.kind, heads.mixing) if heads else ("heads", None)
        main, recent = (
            kv_cache.read_values(self.backend, p_BKGS, part.value, kind, mix)
            for p_BKGS, part in zip(weights, stored, strict=True)
        )
        b, k, g, width = main.shape
        return (main + recent).reshape(b, 1, k * g, width)

    def cached_attention(
        self,
        q_B1NX,
        stored: CachedLayer | None,
        context: Context,
        slopes_N=None,
        key: Heads | None = None,
        value: Heads | None = None,
    ) -> Array:
        """Compute attention of one position to all slots it may see: (B, 1, N, W)."""
        logits = self.cached_logits(q_B1NX, stored, context, slopes_N, key)
        # Divide by the softmax's sum last, on N W numbers instead of N S. This saves one pass over
        # the weights, which at small K H are a considerable part of the bytes read.
        weights, total_BKG = self.cached_softmax(logits, context)
        o_B1NW = self.cached_sum(weights, stored, value)
        o_B1NW = o_B1NW / total_BKG.reshape(*o_B1NW.shape[:3], 1)
        return o_B1NW.astype(self.backend.activation)

    def write_residual(self, o_BTNW: Array) -> Array:
        """Project head outputs (B, T, N, W) to the residual (B, T, D)."""
        self.sow("heads", "written", o_BTNW)
        n, width = o_BTNW.shape[2:]
        shape, axes = (n, width, self.config.d_model), ("heads", "head_dim", "embed")
        gain = residual_gain(self.config)
        o_NWD = kernel(self, "out", shape, axes, n * width, gain=gain)
        y_BTD, bias_D = self.backend.project(o_BTNW, o_NWD, axes=2), None
        if self.config.out_bias:
            width_D = (self.config.d_model,)
            bias_D = parameter(self, "out_bias", nn.initializers.zeros, ("norm",), width_D)
        return add_bias(y_BTD, bias_D)
