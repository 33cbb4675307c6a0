"""Head-level linear composition (arXiv 2601.19611, eq. 10-11) and its two extensions.

A mixing builds K composite heads from C component heads, linearly and alike at every position.
Three kinds, by what a composite head may take from a component head:

- "heads": `mix_CK`, the paper's W_lc. One number for each pair of heads.
- "frequency" (keys): `mix_CKFR`, R = 2: one complex number for each pair of heads and rotary
  frequency F = H/2, real and imaginary part. It turns a component's rotary pairs and so commutes
  with rotary positions, as W_lc does; W_lc is the case of equal, real numbers.
- "dense" (values): `mix_CHKJ`, J = H. Every feature of every component head to each feature of a
  composite head: the components are one latent of width C H.

One function in four forms (tested equal). *Explicit* mixes activations: `mix`. *Folded* mixes the
projection's weights once a step: `fold`. *Absorbed* leaves keys and values unmixed in the cache and
moves the mixing to the query, `absorb`, and to the output, `mix` again. The *reference* is
the tests' own einsum. Letters as in attention.py.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mea_jax.config.schema import ModelConfig
from mea_jax.ops.rms_norm import along_last

Array = jax.Array

# FLOPs that an accelerator does in the time it moves a byte: 197 T/s over 0.82 TB/s on a TPU v5e,
# 295 on an H100. Only an order of magnitude is needed of it.
_FLOPS_PER_BYTE = 240


def block_identity(components: int, composites: int) -> Array:
    """W_lc at the start (C, K), float32: component c serves K/C consecutive composite heads.

    The identity for C = K, so a fresh MEA is MHA (or GQA with C groups) without a head norm. A
    truncated identity would leave composite heads at zero, which the head norm would divide by.
    Where C does not divide K (only in compressed models, whose mixing comes from a checkpoint)
    some components serve one head more than others.
    """
    serving_K = jnp.arange(composites) * components // composites
    return (jnp.arange(components)[:, None] == serving_K[None]).astype(jnp.float32)


def initial(kind: str, components: int, composites: int, head_dim: int) -> Array:
    """Block identity as a mixing of `kind`, float32."""
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
    """A fresh mixing of `kind`, float32: "identity" (`initial`), or "normal".

    Normal entries have the variance at which composite heads are as large as component heads that
    do not correlate: 1/C for mixings of heads, divided between the real and the imaginary part of
    complex ones; 1/(C H) for dense maps.
    """
    start = initial(kind, components, composites, head_dim)
    if init == "identity":
        return start
    terms = {"heads": 1, "frequency": 2, "dense": head_dim}[kind] * components
    return jax.random.normal(key, start.shape) * terms**-0.5


AXES = {  # logical axes; the C side is not split: the K side is split like the heads it makes
    "heads": ("mixing", "heads"),
    "frequency": ("mixing", "heads", "head_dim", "complex"),
    "dense": ("mixing", "head_dim", "heads", "head_dim"),
}


def mix(kind: str, x_BSCH: Array, mixing: Array, precision=None) -> Array:
    """Component heads (B, S, C, H) to composite heads (B, S, K, H), eq. 10, in x's dtype."""
    mixing = mixing.astype(x_BSCH.dtype)
    if kind == "heads":
        return jnp.einsum("bsch,ck->bskh", x_BSCH, mixing, precision=precision)
    if kind == "dense":
        return jnp.einsum("bsch,chkj->bskj", x_BSCH, mixing, precision=precision)
    return _complex_mix("bscf,ckf->bskf", x_BSCH, mixing, 1.0, precision)


def fold(kind: str, kernel_DCH: Array, mixing: Array) -> Array:
    """The projection (D, K, H) straight to composite heads, computed in float32.

    x (W M) = (x W) M, so mixing weights once a step equals mixing heads at every token: D C K H
    multiply-adds a step in place of C K H a token.
    """
    # Without a stated precision an accelerator would round float32 inputs to bfloat16 or TF32.
    highest = jax.lax.Precision.HIGHEST
    return mix(kind, kernel_DCH[None].astype(jnp.float32), mixing, highest)[0]


def composite_heads(model: ModelConfig, which: str, attention: Mapping[str, Any]) -> Array:
    """The "key" or "value" projection (D, K, H) to a layer's composite heads, float32.

    `attention` holds the parameters of one layer of `model`, without the axis of layers. This is
    where serving, compression, analysis and export read what a layer's heads are; training folds
    through the backend (`Backend.fold`), which has a kernel for it.

    Under a key norm, keys mixed per frequency are projected times the norm's weight (see
    `model.attention.Attention.key_inverse_rms`): that is divided out.
    """
    kernel_DCH = jnp.asarray(attention[which])
    if not model.mixes(which):
        return kernel_DCH.astype(jnp.float32)
    kind = model.mixing_kind(which)
    kernel_DKH = fold(kind, kernel_DCH, jnp.asarray(attention[f"{which}_mixing"]))
    if kind == "frequency" and model.qk_norm:
        gamma_H = jnp.asarray(attention["key_norm"]["scale"])
        kernel_DKH = kernel_DKH / along_last(gamma_H, 3)
    return kernel_DKH


def absorb(kind: str, q_BTKGH: Array, mixing: Array) -> Array:
    """Queries for unmixed keys, (B, T, K, G, C, H): q . mix(k) = sum over c of absorb(q)_c . k_c.

    `kind` is that of keys: "heads" or "frequency" (whose transpose conjugates).
    """
    mixing = mixing.astype(q_BTKGH.dtype)
    if kind == "heads":
        return jnp.einsum("btkgh,ck->btkgch", q_BTKGH, mixing)
    return _complex_mix("btkgf,ckf->btkgcf", q_BTKGH, mixing, -1.0, None)


def mix_groups(kind: str, o_BTKGCH: Array, mixing: Array) -> Array:
    """Each query head's sums of unmixed values to its own composite head: (B, T, K, G, H).

    sum_s p_s mix(v_s)_k = mix(sum_s p_s v_s)_k, so values are mixed after the weighted sum.
    `kind` is that of values: "heads" or "dense".
    """
    mixing = mixing.astype(o_BTKGCH.dtype)
    letters = "btkgch,ck->btkgh" if kind == "heads" else "btkgch,chkj->btkgj"
    precision = jax.lax.Precision.HIGHEST if o_BTKGCH.dtype == jnp.float32 else None
    return jnp.einsum(letters, o_BTKGCH, mixing, precision=precision)


def _complex_mix(letters: str, x: Array, mixing: Array, sign: float, precision) -> Array:
    """Rotary pairs (feature f with f + H/2) times complex numbers, conjugated if sign is -1."""
    real, imaginary = mixing[..., 0], sign * mixing[..., 1]
    x1, x2 = jnp.split(x, 2, axis=-1)

    def product(x, m):
        return jnp.einsum(letters, x, m, precision=precision)

    y1 = product(x1, real) - product(x2, imaginary)
    y2 = product(x2, real) + product(x1, imaginary)
    return jnp.concatenate([y1, y2], axis=-1)


def choose_form(kind: str, d_model: int, components: int, composites: int, head_dim: int) -> str:
    """The faster training form of one projection: "folded" or "explicit".

    Folded projects every token to K heads; explicit to C heads only, and then mixes, which takes
    one more pass over the C heads. So for C = K folding always wins, and for C < K explicit mixing
    wins once the multiply-adds it saves, D (K - C) less the mixing itself, outweigh those bytes:
    for C = K/2, wide models only. With heads split over devices fold always: explicit mixing would
    gather activations, folding gathers weights (`backend.resolve` sees to that).
    """
    mixing = {"heads": 1, "frequency": 2, "dense": head_dim}[kind] * components * composites
    saved_flops = 2 * (d_model * (composites - components) - mixing)  # per token and feature
    more_bytes = 4 * components  # bfloat16, written once and read once
    return "explicit" if saved_flops > _FLOPS_PER_BYTE * more_bytes else "folded"


def training_form(model: ModelConfig, which: str, components: int) -> str:
    """The form in which `components` "key" or "value" heads are mixed in training."""
    if which == "key" and model.hlc_order == "after":
        return "explicit"
    if model.hlc_form != "auto":
        return model.hlc_form
    kind = model.mixing_kind(which)
    return choose_form(kind, model.d_model, components, model.n_kv_heads, model.head_dim)
