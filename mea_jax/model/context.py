"""The positions of a call's tokens, and what each may read."""

from typing import Any, NamedTuple

import jax
from flax import struct

from mea_jax.ops import attention

Array = jax.Array


class Slots(NamedTuple):
    """A decode step's view of one part of the cache."""

    seen_BS: Array  # bool, True for slots that the row's token may read (including its own)
    distance_BS: Array  # int32, a slot's position minus the token's: 0 or less where seen

    def within(self, window: int) -> Array:
        """Return the slots (B, S) that are seen and among the last `window`; 0: all seen ones."""
        return self.seen_BS & (self.distance_BS > -window) if window else self.seen_BS


@struct.dataclass
class Context:
    """The positions, segments and cache slots of a call's tokens; shared by all layers.

    `rope` is a table of ops/rope.py or None. Tokens are ordered for `shards` shards of the sequence
    (ops/context_parallel.py); 1 means natural order. Segment ids are always in natural order.
    In a decode step, `slot` () int32 is the token's slot in `Cache.recent`; `main` and `recent` are
    the `Slots` it may read.
    """

    segment_ids_BT: Any  # or a `TreeMask`
    rope: Any = None
    positions_BT: Any = None  # within segments; needed by slots of few bits
    slot: Any = None
    main: Any = None
    recent: Any = None
    shards: int = struct.field(pytree_node=False, default=1)

    @property
    def real_BT(self) -> Array:
        """The mask (B, T) of positions that hold tokens, not padding."""
        ids = self.segment_ids_BT
        return (ids.reach_BT if isinstance(ids, attention.TreeMask) else ids) > 0
