"""Number formats of a KV cache: keys and values in few bits, as other methods store them.

These are the baselines of `mea_jax.compress --method bits`. A format is a pure function of the keys
(after RoPE) or values (B, T, K, H) of a layer, which returns what attention reads back from the
cache, so a model needs no new checkpoint. A group of G numbers shares a scale and a zero point, in
float16 both, from its minimum and maximum:

- `int8_g32` and similar: G features of one head and token. At G = H, that is a scale per head and
  token.
- `kivi4`, `kivi2` (KIVI, arXiv 2402.02750): keys in groups of 32 tokens of one channel, values in
  groups of 32 features of one token, and the most recent 128 tokens in full precision.
- `hadamard_int4_g32` and similar (QuaRot, arXiv 2404.00456): features of a head are rotated by a
  Hadamard matrix, then quantised in groups of G. QuaRot has one group per head.

By default the first positions of a text are stored exactly as well, as in our own packed caches
(`SINKS` in mea_jax/model/heads.py). KIVI and QuaRot do not publish that, and it helps them. Bytes
are counted at 4,096 positions. In shorter windows of text KIVI's recent positions are a larger part
of what a query reads, so its loss there is lower than at that length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.compress.budgets import POSITIONS
from mea_jax.config.schema import ModelConfig
from mea_jax.errors import UserError, nearest
from mea_jax.model.heads import SINKS

Array = jax.Array
RECENT = 128  # KIVI's residual length
KIVI_GROUP = 32
GROUPS = (64, 32, 16)
_PARAMETERS = 4  # bytes of a group's scale and zero point
_EXACT = 2  # bytes of a number in bfloat16


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """One format of cached keys and values; hashable, so it can be static under `jax.jit`.

    Attributes:
      name: the name in the registry.
      bits: of a number, without its share of the group's scale and zero point.
      group: the numbers that share a scale and a zero point.
      keys_along: the axis of a group of keys, "features" or "tokens". Values are always grouped
        along features.
      rotated: True if features are rotated before they are quantised.
      recent: the number of most recent positions that are exact; 0: none.
      sinks: the number of first positions of a text that are exact.
    """

    name: str
    bits: int
    group: int
    keys_along: str = "features"
    rotated: bool = False
    recent: int = 0
    sinks: int = SINKS


def _registry() -> dict[str, CacheFormat]:
    found = [CacheFormat(f"int{b}_g{g}", b, g) for b in (8, 4, 3, 2) for g in GROUPS]
    found += [
        CacheFormat(f"hadamard_{plain.name}", plain.bits, plain.group, rotated=True)
        for plain in found
        if plain.bits < 8
    ]
    found += [
        CacheFormat(f"kivi{b}", b, KIVI_GROUP, keys_along="tokens", recent=RECENT) for b in (4, 2)
    ]
    return {one.name: one for one in found}


FORMATS = _registry()


def named(words: str, sinks: bool = True) -> list[CacheFormat]:
    """Return the formats named in `words`, separated by commas.

    Without `sinks` no first position is exact, and "-no_sinks" is added to the names. Raise
    `UserError` for an unknown name.
    """
    found = []
    for name in words.split(","):
        if name not in FORMATS:
            close = nearest(name, FORMATS)
            close = "" if close.startswith("known") else f"{close} "
            raise UserError(f"--formats {name} is unknown: {close}known: {', '.join(FORMATS)}")
        one = FORMATS[name]
        found.append(one if sinks else dataclasses.replace(one, name=f"{name}-no_sinks", sinks=0))
    return found


def check_model(form: CacheFormat, model: ModelConfig) -> None:
    """Raise `UserError` if a cache of the resolved `model` cannot have this format."""
    if model.variant != "mea" or model.hlc != "none":
        raise UserError(
            f"config.model.variant={model.variant} with config.model.hlc={model.hlc}: number "
            "formats are for models that cache plain heads; choose a checkpoint with "
            "variant=mea and hlc=none"
        )
    if any(model.windows()) or model.positions == "alibi":
        raise UserError(
            f"config.model.window={model.window}, config.model.positions={model.positions}: number "
            "formats are for layers that see all positions, without ALiBi; choose another "
            "checkpoint"
        )
    width = model.head_dim
    if width % form.group:
        fitting = [name for name, other in FORMATS.items() if width % other.group == 0]
        raise UserError(
            f"--formats {form.name} needs heads of a multiple of {form.group} features, but "
            f"config.model.head_dim={width}: choose one of {', '.join(fitting) or 'no format'}"
        )
    if form.rotated and width & (width - 1):
        raise UserError(
            f"--formats {form.name} rotates heads by a Hadamard matrix of a power of two, but "
            f"config.model.head_dim={width}: choose a format without rotation"
        )


def bytes_per_position(form: CacheFormat, heads: int, width: int) -> int:
    """Return the bytes of one position of a layer's keys, or of its values, rounded up.

    They are the mean over a cache of `POSITIONS` positions with `heads` heads of `width` features:
    codes, scales and zero points, the most recent positions, and the exact first positions in
    addition to their codes. KIVI's buffer of recent keys is counted as full, as that of values is.
    """
    packed = heads * (width * form.bits / 8 + width / form.group * _PARAMETERS)
    exact = heads * width * _EXACT
    total = (POSITIONS - form.recent) * packed + (form.recent + form.sinks) * exact
    return math.ceil(total / POSITIONS)


def share(form: CacheFormat) -> float:
    """Return the bytes of `POSITIONS` positions as a fraction of bfloat16's, not rounded."""
    packed = form.bits / 16 + _PARAMETERS / (_EXACT * form.group)
    exact = form.recent + form.sinks
    return ((POSITIONS - form.recent) * packed + exact) / POSITIONS


def to_levels(x: Array, low: Array, high: Array, bits: int) -> Array:
    """Return `x` rounded to the nearest of 2^bits levels from `low` to `high`, float32.

    `low` and `high` are broadcast to `x`. The lowest level and the step are rounded to float16, as
    they are stored. So an error is at most half a step, plus 2^-11 of |low| and of high - low.
    """
    most = 2.0**bits - 1
    zero = low.astype(jnp.float16).astype(jnp.float32)
    step = ((high - low) / most).astype(jnp.float16).astype(jnp.float32)
    step = jnp.where(step > 0, step, 1.0)
    return jnp.clip(jnp.round((x - zero) / step), 0.0, most) * step + zero


def quantise_features(x_BTKH: Array, bits: int, group: int) -> Array:
    """Return heads with each `group` features of a head and token quantised, float32."""
    *rest, width = x_BTKH.shape
    x_BTKgG = x_BTKH.astype(jnp.float32).reshape(*rest, width // group, group)
    low, high = (f(x_BTKgG, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    return to_levels(x_BTKgG, low, high, bits).reshape(x_BTKH.shape)


def quantise_tokens(
    x_BTKH: Array, positions_BT: Array, bits: int, group: int, sinks: int = 0
) -> Array:
    """Return heads with each feature of `group` tokens of one text quantised, float32.

    Groups begin at multiples of `group` of `positions_BT`, so that texts packed in one window share
    none. The first `sinks` positions do not count for the minimum and maximum; what is returned for
    them is not meaningful. A text's last group may have fewer tokens.
    """
    length = x_BTKH.shape[1]

    def one(x_TKH, positions_T):
        first_T = jnp.maximum(jnp.arange(length) - positions_T % group, 0)
        hidden_T11 = (positions_T < sinks)[:, None, None]
        low, high = (
            reduce(jnp.where(hidden_T11, fill, x_TKH), first_T, num_segments=length)[first_T]
            for reduce, fill in ((jax.ops.segment_min, jnp.inf), (jax.ops.segment_max, -jnp.inf))
        )
        return to_levels(x_TKH, low, high, bits)

    return jax.vmap(one)(x_BTKH.astype(jnp.float32), positions_BT)


def hadamard(width: int) -> np.ndarray:
    """Return Sylvester's Hadamard matrix over sqrt(width): float32, symmetric, its own inverse.

    `width` is a power of two.
    """
    found = np.ones((1, 1))
    while len(found) < width:
        found = np.block([[found, found], [found, -found]])
    return (found / np.sqrt(width)).astype(np.float32)


def rotate(x_BTKH: Array) -> Array:
    """Return heads with their features rotated by `hadamard`, float32; twice, the input.

    QuaRot rotates queries like keys, and rotates head outputs back. Rotating what was read from
    the cache back gives the same attention.
    """
    turn_HH = jnp.asarray(hadamard(x_BTKH.shape[-1]))
    return jnp.matmul(x_BTKH.astype(jnp.float32), turn_HH, precision=jax.lax.Precision.HIGHEST)


def stored(form: CacheFormat, x_BTKH: Array, positions_BT: Array, keys: bool) -> Array:
    """Return the keys or values that a cache returns at positions that are not recent, float32.

    `positions_BT` are those within texts, whose first `form.sinks` are exact.
    """
    x = x_BTKH.astype(jnp.float32)
    turned = rotate(x) if form.rotated else x
    if keys and form.keys_along == "tokens":
        found = quantise_tokens(turned, positions_BT, form.bits, form.group, form.sinks)
    else:
        found = quantise_features(turned, form.bits, form.group)
    found = rotate(found) if form.rotated else found
    return jnp.where((positions_BT < form.sinks)[..., None, None], x, found)


def attend_recent(
    q_BTNH: Array,
    keys: tuple[Array, Array],
    values: tuple[Array, Array],
    positions_BT: Array,
    segment_ids_BT: Array,
    scale: float,
    recent: int,
) -> Array:
    """Compute causal attention whose recent keys and values are exact: float32 (B, T, N, H).

    `keys` and `values` are (exact, stored) pairs of arrays (B, T, K, H). As in KIVI's algorithm 1,
    a query at position p reads values after p - recent exactly, and keys from the last multiple of
    `recent` up to p + 1, because keys are quantised `recent` at a time.
    """
    (_, length, n, width), count = q_BTNH.shape, keys[0].shape[2]
    chunks = -(-length // recent)
    # A chunk of R = `recent` queries reads exact keys and values in its own and the preceding chunk
    # only. So there is one more chunk in front, and the last one is filled up. S = R (chunks + 1).
    front, behind = recent, chunks * recent - length

    def padded(x: Array, fill: int = 0) -> Array:
        rest = [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, [(0, 0), (front, behind), *rest], constant_values=fill)

    def by_head(x_BTKH: Array) -> Array:  # (B, K, S, H)
        return padded(x_BTKH.astype(jnp.float32)).swapaxes(1, 2)

    def one_row(row):
        q_NSH, key_KSH, coarse_KSH, value_KSH, rough_KSH, at_S, segment_S = row

        def one_chunk(start):
            def cut(x, first, size, axis):
                return jax.lax.dynamic_slice_in_dim(x, first, size, axis)

            q_KXH = cut(q_NSH, start + recent, recent, 1).reshape(count, -1, width) * scale
            at_R1, segment_R1 = (
                cut(x, start + recent, recent, 0)[:, None] for x in (at_S, segment_S)
            )
            seen_RS = (segment_R1 == segment_S[None]) & (at_S[None] <= at_R1)
            near = (start, 2 * recent)  # the columns that can be exact
            at_1Y = cut(at_S, *near, 0)[None]
            fresh_RY = at_1Y >= (at_R1 + 1) // recent * recent
            late_RY = (at_1Y > at_R1 - recent) & cut(seen_RS, *near, 1)

            def grouped(x_KXS):  # (N, R, S)
                return x_KXS.reshape(n, recent, -1)

            logits_NRS = grouped(q_KXH @ coarse_KSH.swapaxes(1, 2))
            exact_NRY = grouped(q_KXH @ cut(key_KSH, *near, 1).swapaxes(1, 2))
            exact_NRY = jnp.where(fresh_RY[None], exact_NRY, cut(logits_NRS, *near, 2))
            logits_NRS = jax.lax.dynamic_update_slice_in_dim(logits_NRS, exact_NRY, start, 2)
            p_NRS = jax.nn.softmax(jnp.where(seen_RS[None], logits_NRS, -1e30), axis=-1)
            p_NRY = cut(p_NRS, *near, 2) * late_RY[None]
            change_KYH = cut(value_KSH - rough_KSH, *near, 1)
            o_KXH = p_NRS.reshape(count, -1, p_NRS.shape[-1]) @ rough_KSH
            o_KXH += p_NRY.reshape(count, -1, 2 * recent) @ change_KYH
            return o_KXH.reshape(n, recent, width)

        o_XNRH = jax.lax.map(one_chunk, jnp.arange(chunks) * recent)
        return o_XNRH.swapaxes(1, 2).reshape(-1, n, width)[:length]

    arrays = [by_head(x) for x in (q_BTNH, *keys, *values)]
    rows = (*arrays, padded(positions_BT), padded(segment_ids_BT, fill=-1))
    return jax.lax.map(one_row, rows)
