"""Attention by the accelerators' own flash kernels: no (T, T) array of logits per head.

`splash_attention` is Pallas's kernel for TPUs, `cudnn_attention` is cuDNN's for NVIDIA GPUs. Both
compute what `attention.dot_product_attention` does: causal within segments, query head n reads
key/value head n // (N / K), softmax in float32. Letters as there; W is the width of a value, which
may differ from H. On a mesh each device runs its kernel on its own rows and heads.
"""

import functools
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding

from mea_jax.parallel.sharding import on_a_mesh, shard_count, spec

# A TPU's vector registers are 128 wide: the kernel's blocks of positions are multiples of it.
LANES = 128


def splash_supports(dtype: jnp.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the TPU kernel does not take heads of these widths and type; None if it does.

    What the compiler of libtpu 0.0.51 took for v4, v5e, v5p and v6e with the blocks used here.
    Widths need not be multiples of anything: the kernel pads them in registers.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if max(head_dim, value_dim) > 256:
        return f"heads wider than 256 ({max(head_dim, value_dim)}) exceed a TPU's vector memory"
    return None


def cudnn_supports(dtype: jnp.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why cuDNN's kernel does not take heads of these widths and type; None if it does.

    From the checks of jax 0.10.2 and cuDNN's table of supported heads, on the first device. Widths
    that are no multiple of 8 are padded (`cudnn_attention`), and so is an odd T. Not tested here:
    whether cuDNN is installed.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    # "8.0" is an A100, "9.0" a Hopper; a device that is no GPU has none.
    capability = float(getattr(jax.devices()[0], "compute_capability", None) or 8.0)
    if capability < 8.0:
        return f"cuDNN's kernel needs compute capability 8.0 (Ampere), this GPU has {capability}"
    # Later generations take 256 forward, but 128 backward.
    widest, limit = max(head_dim, value_dim), 256 if 9.0 <= capability < 10.0 else 128
    if widest > limit:
        hopper = " (256 on Hopper)" if limit == 128 else ""
        return f"cuDNN's kernel takes heads up to {limit} wide{hopper}, not {widest}"
    return None


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments by the TPU's splash kernel: (B, T, N, W), dtype of q.

    q, k and v share one dtype (`splash_supports`). T is filled up to a multiple of 128.
    `interpret` runs the kernel's code on any backend, for tests.

    The kernel takes no scale, so q is multiplied in float32 and rounded to its dtype once more:
    exact where the scale is a power of two (H 16, 64, 256), else as much error as q itself has.
    For a gradient the forward pass writes its log-sum-exps 128 lanes wide, 512 B N T bytes that
    live until the next operation has read one lane of them.
    """
    length = q_BTNH.shape[1]
    full = _round_up(length, LANES)
    q_BTNH = scaled(q_BTNH, scale)
    q_BTNH, k_BSKH, v_BSKW = (_fill(x, 1, full) for x in (q_BTNH, k_BSKH, v_BSKW))
    segment_ids_BT = _fill(segment_ids_BT, 1, full)

    def attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT):
        heads, blocks = q_BTNH.shape[2], _splash_blocks(full, _widest(q_BTNH, v_BSKW))
        kernel = _splash_kernel(np.arange(full), heads, blocks, interpret=interpret)
        return run_splash(kernel, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, segment_ids_BT)

    return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)[:, :length]


def scaled(q_BTNH: jax.Array, scale: float) -> jax.Array:
    """Queries as splash takes them, in their own dtype."""
    return (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)


def run_splash(
    kernel: splash.SplashAttentionKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    q_ids_BT: jax.Array,
    k_ids_BS: jax.Array,
) -> jax.Array:
    """A splash kernel on the rows and heads of one device: (B, T, N, W)."""
    q_BNTH, k_BKSH, v_BKSW = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKW))
    ids = splash.SegmentIds(q_ids_BT, k_ids_BS)
    o_BNTW = cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSW, ids))
    return jnp.swapaxes(o_BNTW, 1, 2)


def sharded_splash(
    q_BTNH: jax.Array,
    v_BTKW: jax.Array,
    order_T: np.ndarray,
    shards: int,
    saved: str,
    interpret: bool,
) -> tuple[splash.SplashAttentionKernel, splash.SplashAttentionKernel]:
    """A kernel for queries in the order `order_T`, split over `shards`, and its specs.

    The arrays in a kernel say for each block of queries which blocks of keys it sees; the specs
    give each device of the mesh its own, so that it skips what its queries cannot see. Pass the
    kernel through `jax.shard_map` with them, then to `run_splash` with all keys in natural order.
    `saved` names what it leaves for its gradient, for a policy of `jax.checkpoint`. Raises
    `ValueError` unless T divides into whole blocks, 256 positions a shard.
    """
    length = order_T.size
    if length % (2 * shards * LANES):
        raise ValueError(f"{length} positions do not divide into 2 x {shards} x {LANES}")
    # A block lies within one of a shard's two chunks, or it would see far more than it must.
    blocks = _splash_blocks(length // (2 * shards), _widest(q_BTNH, v_BTKW), length)
    heads = q_BTNH.shape[2] // shard_count("activation_heads")
    kernel = _splash_kernel(order_T, heads, blocks, shards, saved, interpret)
    where = NamedSharding(jax.sharding.get_abstract_mesh(), spec((None, "length")))
    return kernel, kernel.manual_sharding_spec(where)


class _CausalAt(splash_mask.CausalMask):
    """A mask of the keys, in natural order, that queries at positions `order_T` see.

    splash looks at every block of it when a kernel is made. Of those that are all seen or all
    hidden, nearly all, none is computed: at 131,072 positions that would take most of a minute.
    """

    def __init__(self, order_T: np.ndarray):
        super().__init__((order_T.size, order_T.size))
        self.q_sequence = order_T.astype(np.int32)

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[idx[0]], range(self.shape[1])[idx[1]]
        if keys[-1] <= queries.min():
            return _uniform((queries.size, len(keys)), True)
        if keys[0] > queries.max():
            return _uniform((queries.size, len(keys)), False)
        return super().__getitem__(idx)


@functools.cache
def _uniform(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


def _splash_kernel(
    order_T: np.ndarray,
    heads: int,
    blocks: splash.BlockSizes,
    shards: int = 1,
    saved: str | None = None,
    interpret: bool = False,
) -> splash.SplashAttentionKernel:
    """A causal kernel for queries that stand at `order_T`, among all keys in natural order."""
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([_CausalAt(order_T)] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=saved,
        interpret=interpret,
    )


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    one_segment: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal attention within segments by cuDNN's kernel: (B, T, N, W), dtype of q.

    q, k and v share one dtype (`cudnn_supports`). jax.nn's function wants W = H in multiples of 8,
    so the narrower are filled with zeros: one pass over the logits, where splitting wide values
    would take the softmax once per piece.

    **Memory.** jax's public function has no argument for segments: they go in as a boolean mask
    (B, 1, T, T), which jax turns into a bias of q's dtype, shared by all heads: 2 B T^2 bytes, B
    being a device's rows (67 MB for B 8, T 2048; 1.1 GB for T 8192). With jax 0.10 a gradient adds
    as many again while it runs: the kernel is asked for the gradient of that bias, though no one
    reads it (0.12 no longer asks). Causality costs nothing, and the kernel skips what it hides;
    what segments hide it computes. Rows of a single segment need no mask: `one_segment=True`
    ignores the ids, and is right where a row's padding, if any, comes last.

    `implementation="xla"` is the same arguments without the kernel, for tests on a CPU.
    """
    length, value_dim = q_BTNH.shape[1], v_BSKW.shape[-1]
    width = _round_up(max(q_BTNH.shape[-1], value_dim), 8)
    # With a mask the kernel's backward pass refuses an odd length.
    full = length if one_segment else _round_up(length, 2)
    q_BTNH, k_BSKH, v_BSKW = (_fill(_fill(x, 3, width), 1, full) for x in (q_BTNH, k_BSKH, v_BSKW))

    def attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT):
        same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKW,
            mask=None if one_segment else same_BTS[:, None],
            is_causal=True,
            scale=scale,
            implementation=implementation,
        )

    segment_ids_BT = _fill(segment_ids_BT, 1, full)
    o_BTNW = _on_each_device(attend, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
    return o_BTNW[:, :length, :, :value_dim]


def _widest(q_BTNH: jax.Array, v_BSKW: jax.Array) -> int:
    """Bytes of the wider of a query and a value head."""
    return max(q_BTNH.shape[-1], v_BSKW.shape[-1]) * q_BTNH.dtype.itemsize


def _splash_blocks(piece: int, widest: int, keys: int = 0) -> splash.BlockSizes:
    """Blocks that divide `piece` positions (a multiple of 128), for heads of up to `widest` bytes.

    `keys` is the number of key positions, if `piece` is but one chunk of the window.

    A block of q stays in vector memory while the blocks of k and v that it sees stream past, so
    bytes read go down as the block grows: 1024 is the largest power of two that the compiler fits
    into v4, v5e, v5p and v6e alike (bfloat16 to width 256, float32 to 128; then 512), with logits
    of 512 keys at a time, which leaves room for them. A length without such a divisor gets
    smaller blocks: keep to multiples of 1024, or of 512.

    The fused backward kernel does 5 products per block where separate ones for dq and for dk, dv
    do 7, but writes one partial dq, in q's dtype, per block of keys: worth it while they are few.
    Which is faster has not been measured on a TPU.
    """
    block = _largest_divisor(piece, 1024 if widest <= 512 else 512)
    compute = _largest_divisor(block, 512)
    fused = max(keys, piece) // block <= 4
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def _on_each_device(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """`attend` on each device's rows and heads; rows and K must divide (jax raises otherwise).

    jax refuses to partition a Pallas kernel by itself. cuDNN's call has a partitioning rule, which
    raises where q, k, v and the mask are not split alike: stated here, they always are. Windows in
    natural order are whole on each device: where the mesh splits them, devices do the same work
    (context_parallel.py shares it).
    """
    if not on_a_mesh():
        return attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
    heads = spec(("batch", None, "activation_heads", None))
    split = jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, spec(("batch", None))),
        out_specs=heads,
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )
    return split(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _largest_divisor(length: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides `length`."""
    return max(b for b in range(LANES, limit + 1, LANES) if length % b == 0)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`x` with its `axis` filled up to `size` with zeros, at the end.

    Zeros in a width change no product. Positions at the end are seen by none before them, whatever
    their segment, and their own outputs are cut off.
    """
    if x.shape[axis] == size:
        return x
    pads = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, pads)
