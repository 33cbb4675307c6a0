"""Head-level linear composition (arXiv 2601.19611, eq. 10-11) and its two extensions.

A mixing computes K composite heads from C component heads, linearly and identically at every
position. There are three kinds, by what a composite head may take from a component head:

- "heads": `mix_CK`, the paper's W_lc. One number per pair of heads.
- "frequency" (keys): `mix_CKFR`, R = 2: one complex number per pair of heads and rotary frequency
  F = H/2, real and imaginary part. It rotates a component's rotary pairs and so commutes with
  rotary positions, as W_lc does; W_lc is the case of equal, real numbers.
- "dense" (values): `mix_CHKJ`, J = H. Each feature of a composite head reads every feature of every
  component head: the components are one latent of width C H.

One function has four forms (tested equal). *Explicit* mixes activations: `mix`. *Folded* mixes the
projection's weights once per step: `fold`. *Absorbed* leaves keys and values unmixed in the cache
and moves the mixing to the query, `absorb`, and to the output, `mix_groups`. The *reference* is an
einsum in the tests. Letters as in attention.py.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.schema import ModelConfig, Side
from mea_jax.ops.rms_norm import along_last

Array = jax.Array

# FLOPs that an accelerator computes in the time it moves a byte: 197 T/s over 0.82 TB/s on a TPU
# v5e, 295 on an H100. Only the order of magnitude matters.
_FLOPS_PER_BYTE = 240


def block_identity(components: int, composites: int) -> Array:
    """Return the initial W_lc (C, K), float32: component c serves K/C consecutive composite heads.

    It is the identity for C = K, so a new MEA without a head norm is MHA (or GQA with C groups). A
    truncated identity would leave composite heads at zero, by which the head norm would divide. If
    C does not divide K (only in compressed models, whose mixing comes from a checkpoint), some
    components serve one head more than others.
    """
    serving_K = jnp.arange(composites) * components // composites
    return (jnp.arange(components)[:, None] == serving_K[None]).astype(jnp.float32)


def initial(kind: str, components: int, composites: int, head_dim: int) -> Array:
    """Return the block identity as a mixing of `kind`, float32."""
    mix_CK = block_identity(components, composites)
    if kind == "heads":
        return mix_CK
    if kind == "frequency":
        real_CKF = jnp.repeat(mix_CK[:, :, None], head_dim // 2, axis=2)
        return jnp.stack([real_CKF, jnp.zeros_like(real_CKF)], axis=-1)
    return mix_CK[:, None, :, None] * jnp.eye(head_dim)[None, :, None, :]


def draw(
    init: str, key: Array, kind: str, components: int, composites: int, head_dim: int
) -> Array:
    """Return a new mixing of `kind`, float32: "identity" (`initial`) or "normal".

    The variance of normal entries makes composite heads as large as component heads, if these are
    uncorrelated: 1/C for mixings of heads, split equally between the real and the imaginary part of
    complex ones; 1/(C H) for dense maps.
    """
    start = initial(kind, components, composites, head_dim)
    if init == "identity":
        return start
    terms = {"heads": 1, "frequency": 2, "dense": head_dim}[kind] * components
    return jax.random.normal(key, start.shape) * terms**-0.5


AXES = {  # logical axes; C is not split, K is split like the composite heads
    "heads": ("mixing", "heads"),
    "frequency": ("mixing", "heads", "head_dim", "complex"),
    "dense": ("mixing", "head_dim", "heads", "head_dim"),
}


def mix(kind: str, x_BSCH: Array, mixing: Array, precision=None) -> Array:
    """Mix component heads (B, S, C, H) into composite heads (B, S, K, H), eq. 10, in x's dtype."""
    mixing = mixing.astype(x_BSCH.dtype)
    if kind == "heads":
        return jnp.einsum("bsch,ck->bskh", x_BSCH, mixing, precision=precision)
    if kind == "dense":
        return jnp.einsum("bsch,chkj->bskj", x_BSCH, mixing, precision=precision)
    return _complex_mix("bscf,ckf->bskf", x_BSCH, mixing, 1.0, precision)


def fold(kind: str, kernel_DCH: Array, mixing: Array) -> Array:
    """Fold a mixing into a projection (D, C, H), in float32: (D, K, H) to composite heads.

    x (W M) = (x W) M, so mixing weights once per step equals mixing heads at every token: D C K H
    multiply-adds per step instead of C K H per token.
    """
    # Without this precision an accelerator would round float32 inputs to bfloat16 or TF32.
    highest = jax.lax.Precision.HIGHEST
    return mix(kind, kernel_DCH[None].astype(jnp.float32), mixing, highest)[0]


def composite_heads(model: ModelConfig, side: Side, attention: Mapping[str, Any]) -> Array:
    """Return a layer's "key" or "value" projection (D, K, H) to composite heads, float32.

    `attention` contains the parameters of one layer of `model`, without the axis of layers.
    Serving, compression, analysis and export get a layer's heads here; training folds through the
    backend (`Backend.fold`), which has a kernel for it.

    With a key norm, the projection of keys mixed per frequency includes the norm's weight (see
    `model.attention.Attention.key_inverse_rms`), which is divided out.
    """
    return _composite(model, side, attention, jnp.asarray(attention[side]))


def composite_bias(model: ModelConfig, side: Side, attention: Mapping[str, Any]) -> Array:
    """Return the bias (K, H), float32, of the composite heads of `composite_heads`."""
    return _composite(model, side, attention, jnp.asarray(attention[f"{side}_bias"])[None])[0]


def cached_only(model: ModelConfig, side: Side, x: Array) -> Array:
    """Return component heads, or a projection to them, (..., C, H), 0 where nothing is cached."""
    kept_R = model.slots(side)
    if kept_R is None:
        return x
    mask_X = np.zeros(x.shape[-2] * x.shape[-1], bool)
    mask_X[list(kept_R)] = True
    return jnp.where(mask_X.reshape((1,) * (x.ndim - 2) + x.shape[-2:]), x, 0)


def _composite(model: ModelConfig, side: Side, attention, kernel_DCH: Array) -> Array:
    if not model.mixes(side):
        return kernel_DCH.astype(jnp.float32)
    kernel_DCH = cached_only(model, side, kernel_DCH)
    kind = model.mixing_kind(side)
    kernel_DKH = fold(kind, kernel_DCH, jnp.asarray(attention[f"{side}_mixing"]))
    if kind == "frequency" and model.qk_norm:
        gamma_H = jnp.asarray(attention["key_norm"]["scale"])
        kernel_DKH = kernel_DKH / along_last(gamma_H, 3)
    return kernel_DKH


def absorb(kind: str, q_BTKGH: Array, mixing: Array) -> Array:
    """Absorb the keys' mixing into queries, for unmixed keys: (B, T, K, G, C, H).

    q . mix(k) = sum over c of absorb(q)_c . k_c. `kind` is that of keys: "heads" or "frequency"
    (whose transpose conjugates).
    """
    mixing = mixing.astype(q_BTKGH.dtype)
    if kind == "heads":
        return jnp.einsum("btkgh,ck->btkgch", q_BTKGH, mixing)
    return _complex_mix("btkgf,ckf->btkgcf", q_BTKGH, mixing, -1.0, None)


def mix_groups(kind: str, o_BTKGCH: Array, mixing: Array) -> Array:
    """Mix each query head's sums of unmixed values into its composite head: (B, T, K, G, H).

    sum_s p_s mix(v_s)_k = mix(sum_s p_s v_s)_k, so values are mixed after the weighted sum. `kind`
    is that of values: "heads" or "dense".
    """
    mixing = mixing.astype(o_BTKGCH.dtype)
    letters = "btkgch,ck->btkgh" if kind == "heads" else "btkgch,chkj->btkgj"
    precision = jax.lax.Precision.HIGHEST if o_BTKGCH.dtype == jnp.float32 else None
    return jnp.einsum(letters, o_BTKGCH, mixing, precision=precision)


def _complex_mix(letters: str, x: Array, mixing: Array, sign: float, precision) -> Array:
    """Multiply rotary pairs (features f, f + H/2) by complex numbers, conjugated if sign is -1."""
    real, imaginary = mixing[..., 0], sign * mixing[..., 1]
    x1, x2 = jnp.split(x, 2, axis=-1)

    def product(x, m):
        return jnp.einsum(letters, x, m, precision=precision)

    y1 = product(x1, real) - product(x2, imaginary)
    y2 = product(x2, real) + product(x1, imaginary)
    return jnp.concatenate([y1, y2], axis=-1)


def choose_form(kind: str, d_model: int, components: int, composites: int, head_dim: int) -> str:
    """Return the faster training form of one projection: "folded" or "explicit".

    Folded projects every token to K heads. Explicit projects to only C heads and then mixes, which
    takes one more pass over the C heads. So folding always wins for C = K. For C < K explicit
    mixing wins once the multiply-adds it saves, D (K - C) less the mixing itself, outweigh the
    bytes of that pass; for C = K/2 this is so in wide models only. With heads split over devices
    always fold: explicit mixing would gather activations, folding gathers weights
    (`ops.resolve` ensures it).
    """
    mixing = {"heads": 1, "frequency": 2, "dense": head_dim}[kind] * components * composites
    saved_flops = 2 * (d_model * (composites - components) - mixing)  # per token and feature
    more_bytes = 4 * components  # bfloat16, written once and read once
    return "explicit" if saved_flops > _FLOPS_PER_BYTE * more_bytes else "folded"


def training_form(model: ModelConfig, side: Side, components: int) -> str:
    """Return the form in which training mixes `components` "key" or "value" heads."""
    if side == Side.KEY and model.hlc_order == "after":
        return "explicit"
    if model.hlc_form != "auto":
        return model.hlc_form
    kind = model.mixing_kind(side)
    return choose_form(kind, model.d_model, components, model.n_kv_heads, model.head_dim)
