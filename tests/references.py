"""Reference attention in plain einsums, which several tests compare the package with.

It is float32 without grouping, cache or forms of mixing: every query head has its own copy of its
key and value head. Letters as in mea_jax/ops/attention.py.
"""

import jax
import jax.numpy as jnp

from mea_jax.ops import rope


def complex_of(x):
    """Return the rotary pairs, features f and f + H/2, as complex numbers (..., H/2)."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def real_of(z):
    return jnp.concatenate([z.real, z.imag], axis=-1)


def composites(kind, x_BSCH, mixing):
    """Return the composite heads (B, S, K, H), by equation 10 and its extensions."""
    if kind == "heads":
        return jnp.einsum("bsch,ck->bskh", x_BSCH, mixing)
    if kind == "dense":
        return jnp.einsum("bsch,chkj->bskj", x_BSCH, mixing)
    complex_CKF = mixing[..., 0] + 1j * mixing[..., 1]
    return real_of(jnp.einsum("bscf,ckf->bskf", complex_of(x_BSCH), complex_CKF))


def rotated(model, x_BTNH, positions_BT):
    """Rotate the heads by a complex product; return them unchanged if positions are not rotary."""
    if model.positions != "rope":
        return x_BTNH
    frequencies = rope.rope_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
    angles_BTF = positions_BT[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    factor = rope.attention_factor(model.rope_scaling)
    return factor * real_of(complex_of(x_BTNH) * jnp.exp(1j * angles_BTF)[:, :, None])


def rms(x, eps):
    return jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def along_last(scale, like):
    return scale.reshape((1,) * (like.ndim - 1) + (-1,))


def visible(segments_BT, window=0):
    """Return the mask (B, T, S): earlier positions of the same document and the position itself.

    With a `window` above 0 these are that many positions at most.
    """
    t = jnp.arange(segments_BT.shape[1])
    behind_TS = t[:, None] - t[None]
    near_TS = (behind_TS >= 0) & (behind_TS < (window or len(t)))
    return near_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def logits_of(model, q_BTNH, k_BTKH, slopes=None):
    """Return unmasked logits (B, N, T, S), with ALiBi's biases if the model uses ALiBi."""
    n, t = q_BTNH.shape[2], jnp.arange(q_BTNH.shape[1])
    k_BTNH = jnp.repeat(k_BTKH, n // k_BTKH.shape[2], axis=2)
    scale = model.attention_scale or model.head_dim**-0.5
    logits = scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
    if model.positions == "alibi":
        slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)] if slopes is None else slopes
        distance_TS = (t[None] - t[:, None]).astype(jnp.float32)
        logits += (jnp.asarray(slopes)[:, None, None] * distance_TS[None])[None]
    return logits


def maps_of(logits_BNTS, segments_BT, window=0):
    """Return the attention maps (B, N, T, S)."""
    hidden = jnp.where(visible(segments_BT, window)[:, None], logits_BNTS, -1e30)
    return jax.nn.softmax(hidden, axis=-1)


def weighted(maps_BNTS, v_BTKW):
    """Return each head's average of its values, weighted by its map: (B, T, N, W)."""
    v_BTNW = jnp.repeat(v_BTKW, maps_BNTS.shape[1] // v_BTKW.shape[2], axis=2)
    return jnp.einsum("bnts,bsnw->btnw", maps_BNTS, v_BTNW)


def mea(model, params, x_BTD, positions_BT, segments_BT):
    """Return MEA's output (B, T, D), equations 10 to 17, with every option of the "mea" variant."""
    eps = model.norm_eps

    def mixed(side, heads_BTCH):
        if f"{side}_mixing" not in params:
            return heads_BTCH
        return composites(model.mixing_kind(side), heads_BTCH, params[f"{side}_mixing"])

    def projected(side):
        heads_BTCH = jnp.einsum("btd,dch->btch", x_BTD, params[side])
        bias_CH = params.get(f"{side}_bias")
        return heads_BTCH if bias_CH is None else heads_BTCH + bias_CH[None, None]

    def normed(x, name):
        flat = x
        if name != "head_norm" and model.qk_norm_over == "all":
            flat = x.reshape(*x.shape[:2], -1)
        return (flat / rms(flat, eps) * along_last(params[name]["scale"], flat)).reshape(x.shape)

    q, k, v = projected("query"), projected("key"), mixed("value", projected("value"))
    if model.qk_norm:
        q = normed(q, "query_norm")
    if model.hlc_order == "after":
        k = normed(k, "key_norm") if model.qk_norm else k
        k = mixed("key", rotated(model, k, positions_BT))
    else:
        k = mixed("key", k)
        if model.qk_norm and "key_mixing" in params and model.key_mixing == "frequency":
            # A weight per feature does not commute with the rotation of pairs. Keys therefore
            # contain the weight from the start; only their RMS is measured without it.
            k = k / rms(k / along_last(params["key_norm"]["scale"], k), eps)
        elif model.qk_norm:
            k = normed(k, "key_norm")
        k = rotated(model, k, positions_BT)
    logits = logits_of(model, rotated(model, q, positions_BT), k)
    o = weighted(maps_of(logits, segments_BT, model.windows()[0]), v)
    if model.head_norm:
        o = normed(o, "head_norm")
    if model.gate != "none":
        o = o * jax.nn.sigmoid(projected("output_gate"))
    y = jnp.einsum("btnh,nhd->btd", o, params["out"])
    return y + along_last(params["out_bias"], y) if model.out_bias else y
