"""Cached keys and values in few bits: a width of 0 to 8 bits for each slot, packed in bytes.

A slot is one feature of an absorbed cache (model/kv_cache.py). Its values are quantised uniformly
around zero (mid-rise): a code n of b bits stands for (n - (2^b - 1)/2) times the slot's step, which
is a constant of the slot, so that no scale is stored with a token. A slot of 0 bits is always 0.

Codes are stored in pieces of 8, 4, 2 and 1 bits, one for each 1 in the binary number b: 7 bits are
a piece of 4, one of 2 and one of 1. Pieces of equal width share bytes. As

    n - (2^b - 1)/2 = sum over pieces of 2^shift (piece - (2^width - 1)/2),

a product with a vector q of all slots equals one with q repeated for each piece, times 2^shift and
the step: `expand_query`. So attention multiplies by small integers as they are unpacked, and
neither steps nor offsets are ever applied to the cache. `collapse_values` puts sums of values by
weights together again.

Letters as in model/kv_cache.py; X is the number of slots, P of pieces, Y of bytes of a position.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MOST_BITS = 8
WIDTHS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The widths of the slots of a layer's keys or values, and the places of their pieces.

    `bits` are X integers from 0 to 8. Hashable, so it can be static under `jax.jit`.
    """

    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(0 <= b <= MOST_BITS for b in self.bits):
            raise ValueError(f"bits must be 0 to {MOST_BITS}, not {self.bits}")

    @functools.cached_property
    def pieces(self) -> dict[int, np.ndarray]:
        """For each width, the (slot, shift) of its pieces: int32 (n, 2).

        n is a multiple of 8 / width: pieces that fill a byte have slot -1.
        """
        found = {}
        for width in WIDTHS:
            rows = [(slot, b % width) for slot, b in enumerate(self.bits) if b & width]
            rows += [(-1, 0)] * (-len(rows) % (8 // width))
            found[width] = np.asarray(rows, np.int32).reshape(-1, 2)
        return found

    @functools.cached_property
    def places(self) -> np.ndarray:
        """All pieces in the order in which `unpack` returns them: (slot, shift), int32 (P, 2)."""
        return np.concatenate([self.pieces[width] for width in WIDTHS])

    @property
    def bytes(self) -> int:
        """The bytes of one position, Y."""
        return sum(len(rows) * width // 8 for width, rows in self.pieces.items())


def packed_bytes(bits_X: np.ndarray) -> int:
    """Return `Layout(bits).bytes`, without the layout."""
    return sum(-(-int(np.count_nonzero(bits_X & width)) * width // 8) for width in WIDTHS)


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


def pack(layout: Layout, codes: Array) -> Array:
    """Return the bytes (..., Y) of codes (..., X), uint8.

    A byte holds pieces that are Y apart, not neighbours: so `unpack` concatenates whole arrays.
    """
    parts = []
    for width, rows in layout.pieces.items():
        if not len(rows):
            continue
        shape = (1,) * (codes.ndim - 1) + (-1,)
        shift = rows[:, 1].astype(np.uint8).reshape(shape)
        piece = (jnp.take(codes, rows[:, 0], axis=-1) >> shift) & np.uint8(2**width - 1)
        piece = jnp.where((rows[:, 0] >= 0).reshape(shape), piece, np.uint8(0))
        each = jnp.split(piece, 8 // width, axis=-1)
        parts.append(sum((p << np.uint8(width * i) for i, p in enumerate(each)), start=each[0] * 0))
    return jnp.concatenate(parts, axis=-1) if parts else codes[..., :0]


def unpack(layout: Layout, data: Array, dtype: jnp.dtype) -> Array:
    """Return 2 piece - (2^width - 1) of all pieces (..., P): odd integers, exact in bfloat16."""
    parts, first = [], 0
    for width, rows in layout.pieces.items():
        count = len(rows) * width // 8
        part, first = data[..., first : first + count], first + count
        mask = np.uint8(2**width - 1)
        for i in range(8 // width if count else 0):
            piece = ((part >> np.uint8(width * i)) & mask).astype(jnp.int16)
            parts.append((2 * piece - np.int16(2**width - 1)).astype(dtype))
    return jnp.concatenate(parts, axis=-1) if parts else data.astype(dtype)


def _weights(layout: Layout) -> np.ndarray:
    """Return the weight of each piece in its slot, (P,): 2^shift / 2, 0 for pieces of no slot."""
    slot_P, shift_P = layout.places.T
    return np.where(slot_P >= 0, 2.0 ** (shift_P - 1.0), 0.0).astype(np.float32)


def expand_query(layout: Layout, q: Array, step_X: Array) -> Array:
    """Return `q` (..., X) for the pieces of `unpack`: float32 (..., P).

    Its product with them equals that of `q` with the values.
    """
    shape = (1,) * (q.ndim - 1) + (-1,)
    stepped = q.astype(jnp.float32) * step_X.reshape(shape)
    return jnp.take(stepped, layout.places[:, 0], axis=-1) * _weights(layout).reshape(shape)


def collapse_values(layout: Layout, o: Array, step_X: Array) -> Array:
    """Return sums of values (..., X) from sums of the pieces of `unpack` (..., P): float32."""
    slot_P = layout.places[:, 0]
    shape = (1,) * (o.ndim - 1) + (-1,)
    weighted = o.astype(jnp.float32) * _weights(layout).reshape(shape)
    total = jnp.zeros((*o.shape[:-1], len(layout.bits)), jnp.float32)
    return total.at[..., slot_P].add(weighted) * step_X.reshape(shape)
