"""Cached keys and values in few bits: a width of 0 to 8 bits for each slot, packed in bytes.

A slot is one feature of an absorbed cache (model/kv_cache.py). Its values are quantised uniformly
around zero (mid-rise): a code n of b bits stands for (n - (2^b - 1)/2) times the slot's step, which
is a constant of the slot, so that no scale is stored with a token. A slot of 0 bits is always 0.

The codes of a position follow each other without gaps, and a byte that two codes share belongs to
both. Equal bytes of all positions are contiguous, (Y, S): so one shift per slot, the same for all
positions, unpacks a row of codes, in registers as wide as the processor's. m = n - 2^(b-1) is
stored, as b bits in two's complement, so that shifting them to the top of a byte gives an int8
u = m 2^(8-b) without any arithmetic, and the slot's value is

    step (m + 1/2) = step 2^(b-8) u + step/2.

Attention multiplies by u: the query carries the steps, and the sum of step/2 is one number per
head. Steps and offsets are never applied to the cache. The other side of such a product is written
as a sum of int8 digits (`_digits`), as that is the product for which all processors have fast code,
and its sums are exact. It reads one byte per slot and position, where floats would take 2 or 4.

Letters as in model/kv_cache.py; X is the number of slots, Y of bytes of a position.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MOST_BITS = 8
_MOST_TERMS = 1 << 16  # of a sum of products of two int8, which stays below 2^30


@dataclasses.dataclass(frozen=True)
class Layout:
    """The widths of the slots of a layer's keys or values, and the places of their codes.

    `bits` are X integers from 0 to 8. Hashable, so it can be static under `jax.jit`.
    """

    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(0 <= b <= MOST_BITS for b in self.bits):
            raise ValueError(f"bits must be 0 to {MOST_BITS}, not {self.bits}")

    @functools.cached_property
    def bits_X(self) -> np.ndarray:
        """The bits as an array, int64 (X,)."""
        return np.asarray(self.bits, np.int64)

    @functools.cached_property
    def first_X(self) -> np.ndarray:
        """The first bit of each slot, counted from the highest bit of the first byte: (X,)."""
        return np.cumsum(self.bits_X) - self.bits_X

    @property
    def bytes(self) -> int:
        """The bytes of one position, Y."""
        return packed_bytes(self.bits_X)

    @property
    def unit_X(self) -> np.ndarray:
        """The value of one unit of `unpack` in steps, 2^(b-8): float32 (X,), 0 for 0 bits."""
        return np.where(self.bits_X > 0, 2.0 ** (self.bits_X - 8), 0.0).astype(np.float32)

    @property
    def offset_X(self) -> np.ndarray:
        """The value of `unpack`'s zero in steps, 1/2: float32 (X,), 0 for 0 bits."""
        return np.where(self.bits_X > 0, 0.5, 0.0).astype(np.float32)


def packed_bytes(bits_X: np.ndarray) -> int:
    """Return `Layout(bits).bytes`, without the layout."""
    return -(-int(np.sum(bits_X)) // 8)


def quantise(layout: Layout, x: Array, step_X: Array) -> Array:
    """Return the codes of `x` (..., X) with steps (X,): uint8 (..., X), 0 in slots of 0 bits."""
    half_X = np.asarray([2.0 ** (b - 1) for b in layout.bits], np.float32)
    shape = (1,) * (x.ndim - 1) + (-1,)
    code = jnp.floor(x.astype(jnp.float32) / step_X.reshape(shape)) + half_X.reshape(shape)
    most_X = np.asarray([2.0**b - 1 for b in layout.bits], np.float32)
    return jnp.clip(code, 0.0, most_X.reshape(shape)).astype(jnp.uint8)


def dequantise(layout: Layout, codes: Array, step_X: Array) -> Array:
    """Return the values of `codes` (..., X): float32. A cache is read by the functions below."""
    shape = (1,) * (codes.ndim - 1) + (-1,)
    middle_X = np.asarray([(2.0**b - 1) / 2 for b in layout.bits], np.float32)
    return (codes.astype(jnp.float32) - middle_X.reshape(shape)) * step_X.reshape(shape)


def rounded(x: Array, step: Array, levels: Array) -> Array:
    """Return `x` rounded to the nearest of `levels` = 2^b values of its slot, in the dtype of `x`.

    `step` and `levels` are broadcast to `x`. Gradients pass straight through the rounding: that of
    `x` is the identity where it is not clipped, and that of `step` is the error in units of a step,
    or half of the levels where it is clipped (learned step size, arXiv 1902.08153).
    """
    units = x.astype(jnp.float32) / step
    most = (levels - 1) / 2
    clipped = jnp.clip(units, -most, most)
    code = jnp.clip(jnp.floor(units) + 0.5, -most, most)
    return ((clipped + jax.lax.stop_gradient(code - clipped)) * step).astype(x.dtype)


def _rows(table: np.ndarray) -> np.ndarray:
    """Return a constant of each row (R,) as uint8 that is broadcast to (B, R, S)."""
    return table.astype(np.uint8)[None, :, None]


def pack(layout: Layout, codes_BSX: Array) -> Array:
    """Return the bytes of codes, uint8 (B, Y, S)."""
    bits_X, first_X = layout.bits_X, layout.first_X
    stored_BXS = jnp.swapaxes(codes_BSX, 1, 2) ^ _rows((1 << bits_X) >> 1)
    # The codes of each byte: at most 8. `past` is the number of a code's bits behind the byte.
    parts: list[list[tuple[int, int]]] = [[] for _ in range(layout.bytes)]
    for slot in np.flatnonzero(bits_X):
        end = int(first_X[slot] + bits_X[slot])
        for byte in range(int(first_X[slot]) // 8, (end - 1) // 8 + 1):
            parts[byte].append((int(slot), end - 8 * (byte + 1)))
    data_BYS = jnp.zeros((len(codes_BSX), layout.bytes, codes_BSX.shape[1]), jnp.uint8)
    for i in range(max(map(len, parts), default=0)):
        slot_Y = np.asarray([part[i][0] if i < len(part) else 0 for part in parts])
        past_Y = np.asarray([part[i][1] if i < len(part) else 0 for part in parts])
        found_Y = np.asarray([255 * (i < len(part)) for part in parts])
        shifted_BYS = jnp.take(stored_BXS, slot_Y, axis=1) << _rows(np.maximum(-past_Y, 0))
        data_BYS |= (shifted_BYS >> _rows(np.maximum(past_Y, 0))) & _rows(found_Y)
    return data_BYS


def unpack(layout: Layout, data_BYS: Array, after_B11: Array | None = None) -> Array:
    """Return m 2^(8-b) of all slots: int8 (B, X, S).

    XLA may unpack a cache before the query exists. A decode step then unpacks the caches of all
    layers first, which takes their memory and is slower than if each is read soon after. With
    finite `after_B11`, float32, the codes depend on it, and so are unpacked after it is known.
    """
    if not layout.bytes:
        return jnp.zeros((len(data_BYS), len(layout.bits), data_BYS.shape[2]), jnp.int8)
    byte_X, shift_X = np.divmod(layout.first_X, 8)
    last = layout.bytes - 1
    mask: Array | np.ndarray = _rows((0xFF00 >> layout.bits_X) & 0xFF)
    if after_B11 is not None:
        # No compiler may fold 0 x, which is NaN for some x. `optimization_barrier` has no effect.
        mask = mask | (0.0 * after_B11).astype(jnp.uint8)
    # Shifts are below 8, so that they need no check. Of the second byte nothing is used if the code
    # ends in the first.
    this = jnp.take(data_BYS, np.minimum(byte_X, last), axis=1) << _rows(shift_X)
    following = jnp.take(data_BYS, np.minimum(byte_X + 1, last), axis=1) >> np.uint8(1)
    return jax.lax.bitcast_convert_type((this | (following >> _rows(7 - shift_X))) & mask, jnp.int8)


def _digits(x: Array, count: int) -> tuple[Array, Array]:
    """Return `count` int8 digits of float32 `x` (B, N, D), and the value of a unit of the last.

    x = unit (sum over i of 256^i digit_i) within half a unit, which is the largest number of a row
    divided by 127 256^(count - 1). The digits are (B, count N, D), the lowest first; the unit is
    (B, N, 1).
    """
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.maximum(most, 1e-30) / (127 * 256 ** (count - 1))
    rest, found = jnp.round(x / unit).astype(jnp.int32), []
    for _ in range(count - 1):
        low = ((rest + 128) & 255) - 128
        found.append(low)
        rest = (rest - low) >> 8
    return jnp.concatenate([*found, rest], axis=1).astype(jnp.int8), unit


def _product(layout: Layout, x: Array, data_BYS: Array, axis: int, count: int) -> Array:
    """Contract the last axis of `x` (B, N, D) with axis 1 or 2 of `unpack`: float32 (B, N, ..)."""
    digits, unit_BN1 = _digits(x, count)
    codes_BXS = unpack(layout, data_BYS, unit_BN1[:, :1])
    dims = (((2,), (axis,)), ((0,), (0,)))
    sums = jax.lax.dot_general(digits, codes_BXS, dims, preferred_element_type=jnp.int32)
    total = jnp.zeros((), jnp.float32)
    for i, part in enumerate(jnp.split(sums, count, axis=1)):
        total = total + part.astype(jnp.float32) * 256.0**i
    return total * unit_BN1


def count_digits(dtype: jnp.dtype) -> int:
    """Return the digits for products of `dtype`: 24 bits for float32, 16 for bfloat16 (of 8)."""
    return 3 if dtype == jnp.float32 else 2


def logits(layout: Layout, q_BNX: Array, data_BYS: Array, step_X: Array, digits: int) -> Array:
    """Return the products of queries with packed keys: float32 (B, N, S).

    With 3 digits each of the X terms is exact to 2^-24 of the largest that its query can have, with
    2 digits to 2^-16; in `weighted_sums` each of the S terms. Floats round each term as much, or
    more in bfloat16, but relative to itself.
    """
    stepped_BNX = q_BNX.astype(jnp.float32) * step_X[None, None]
    offset_BN1 = jnp.sum(stepped_BNX * layout.offset_X[None, None], axis=2, keepdims=True)
    q_BNX = stepped_BNX * layout.unit_X[None, None]
    return _product(layout, q_BNX, data_BYS, 1, digits) + offset_BN1


def weighted_sums(
    layout: Layout, p_BNS: Array, data_BYS: Array, step_X: Array, digits: int
) -> Array:
    """Return the sums of packed values by weights of positions: float32 (B, N, X)."""
    p_BNS = p_BNS.astype(jnp.float32)
    total_BN1 = jnp.sum(p_BNS, axis=2, keepdims=True)
    found_BNX = jnp.zeros((*p_BNS.shape[:2], len(layout.bits)), jnp.float32)
    for start in range(0, p_BNS.shape[2], _MOST_TERMS):
        part = slice(start, start + _MOST_TERMS)
        found_BNX += _product(layout, p_BNS[:, :, part], data_BYS[:, :, part], 2, digits)
    unit_X, offset_X = step_X * layout.unit_X, step_X * layout.offset_X
    return found_BNX * unit_X[None, None] + total_BN1 * offset_X[None, None]
