"""Attention with the accelerators' own flash kernels, without a (T, T) array of logits per head.

`splash_attention` is Pallas's kernel for TPUs, `cudnn_attention` is cuDNN's for NVIDIA GPUs. Both
compute the same as `attention.dot_product_attention`: causal within segments, query head n reads
key/value head n // (N / K), softmax in float32. Letters are those of attention.py; W is the width
of a value, which may differ from H. On a mesh each device runs its kernel on its own rows and
heads.
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

from mea_jax.ops.attention import visible
from mea_jax.parallel.sharding import has_mesh, shard_count, spec

# A TPU's vector registers are 128 wide, so the kernel's blocks are multiples of 128 positions.
LANES = 128


def splash_supports(dtype: jnp.dtype, head_dim: int, value_dim: int) -> str | None:
    """Return why the TPU kernel cannot take heads of these widths and dtype; None if it can.

    The limits are those of libtpu 0.0.51's compiler for v4, v5e, v5p and v6e with the blocks used
    here. Widths can be any number, because the kernel pads them in registers.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if max(head_dim, value_dim) > 256:
        return f"heads wider than 256 ({max(head_dim, value_dim)}) exceed a TPU's vector memory"
    return None


def cudnn_supports(dtype: jnp.dtype, head_dim: int, value_dim: int) -> str | None:
    """Return why cuDNN's kernel cannot take heads of these widths and dtype; None if it can.

    The limits are from the checks of jax 0.10.2 and cuDNN's table of supported heads, for the first
    device. Widths that are not multiples of 8 are padded (`cudnn_attention`), and so is an odd T.
    This does not check whether cuDNN is installed.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    # "8.0" is an A100, "9.0" a Hopper; devices other than GPUs have none.
    capability = float(getattr(jax.devices()[0], "compute_capability", None) or 8.0)
    if capability < 8.0:
        return f"cuDNN's kernel needs compute capability 8.0 (Ampere), this GPU has {capability}"
    # Generations after Hopper support 256 forward, but only 128 backward.
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
    window: int = 0,
) -> jax.Array:
    """Compute causal attention within segments with the TPU's splash kernel: (B, T, N, W).

    A position sees the last `window` positions, itself included; 0 means all.

    The result has the dtype of q; q, k and v share one dtype (`splash_supports`). T is padded to a
    multiple of 128. `interpret` runs the kernel's code on any backend, for tests.

    The kernel takes no scale, so q is multiplied by it in float32 and rounded to its dtype again.
    This is exact if the scale is a power of two (H 16, 64, 256); otherwise the error is as large as
    that of q itself. For a gradient the forward pass writes its log-sum-exps 128 lanes wide: 512 B
    N T bytes, which live until the next operation has read one lane of them.
    """
    length = q_BTNH.shape[1]
    full = _round_up(length, LANES)
    q_BTNH = scaled(q_BTNH, scale)
    q_BTNH, k_BSKH, v_BSKW = (_fill(x, 1, full) for x in (q_BTNH, k_BSKH, v_BSKW))
    segment_ids_BT = _fill(segment_ids_BT, 1, full)

    def attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT):
        heads, blocks = q_BTNH.shape[2], _splash_blocks(full, _widest(q_BTNH, v_BSKW))
        kernel = _splash_kernel(np.arange(full), heads, blocks, interpret=interpret, window=window)
        return run_splash(kernel, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, segment_ids_BT)

    return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)[:, :length]


def scaled(q_BTNH: jax.Array, scale: float) -> jax.Array:
    """Multiply queries by `scale` in float32 and return them in their own dtype, for splash."""
    return (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)


def run_splash(
    kernel: splash.SplashAttentionKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKW: jax.Array,
    q_ids_BT: jax.Array,
    k_ids_BS: jax.Array,
) -> jax.Array:
    """Run a splash kernel on the rows and heads of one device: (B, T, N, W)."""
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
    window: int = 0,
) -> tuple[splash.SplashAttentionKernel, splash.SplashAttentionKernel]:
    """Return a kernel for queries in the order `order_T`, split over `shards`, and its specs.

    The arrays in a kernel list for each block of queries the blocks of keys that it sees. The specs
    give each device of the mesh its own part, so that it skips what its queries cannot see. Pass
    the kernel through `jax.shard_map` with the specs, then to `run_splash` with all keys in natural
    order. `saved` names the residuals of the kernel's gradient, for a policy of `jax.checkpoint`.
    Raises `ValueError` unless T is a multiple of 256 positions per shard.
    """
    length = order_T.size
    if length % (2 * shards * LANES):
        raise ValueError(
            f"{length} positions do not divide into 2 x {shards} x {LANES}: choose a multiple of it"
        )
    # A block is within one of a shard's two chunks; otherwise it would see far too many keys.
    blocks = _splash_blocks(length // (2 * shards), _widest(q_BTNH, v_BTKW), length)
    heads = q_BTNH.shape[2] // shard_count("activation_heads")
    kernel = _splash_kernel(order_T, heads, blocks, shards, saved, interpret, window)
    where = NamedSharding(jax.sharding.get_abstract_mesh(), spec((None, "length")))
    return kernel, kernel.manual_sharding_spec(where)


class _CausalAt(splash_mask.CausalMask):
    """A mask of the keys, in natural order, that queries at positions `order_T` see.

    With a `window` above 0 they see that many positions, themselves included.

    splash inspects every block of the mask when a kernel is made. Nearly all blocks are entirely
    visible or entirely hidden, and come from a cache. Computing them would take most of a minute at
    131,072 positions.
    """

    def __init__(self, order_T: np.ndarray, window: int = 0):
        super().__init__((order_T.size, order_T.size))
        self.q_sequence, self.window = order_T.astype(np.int32), window
        if window:  # the kernel evaluates this function too

            def seen(queries, keys):
                return (queries >= keys) & (queries - keys < window)  # a sum would overflow

            self.mask_function = seen

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) is True and self.window == getattr(other, "window", None)

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.window))

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[idx[0]], range(self.shape[1])[idx[1]]
        shape, window = (queries.size, len(keys)), self.window or self.shape[1]
        if keys[-1] <= queries.min() and queries.max() < keys[0] + window:
            return _uniform(shape, True)
        if keys[0] > queries.max() or keys[-1] + window <= queries.min():
            return _uniform(shape, False)
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
    window: int = 0,
) -> splash.SplashAttentionKernel:
    """Make a causal kernel for queries at positions `order_T` and all keys in natural order."""
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([_CausalAt(order_T, window)] * heads),
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
    window: int = 0,
    one_segment: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Compute causal attention within segments with cuDNN's kernel: (B, T, N, W).

    The result has the dtype of q; q, k and v share one dtype (`cudnn_supports`). jax.nn's function
    requires W = H, a multiple of 8, so the narrower arrays are padded with zeros. This takes one
    pass over the logits; splitting wide values would compute the softmax once per piece.

    Memory: jax's public function has no argument for segments. They are passed as a boolean mask
    (B, 1, T, T), which jax turns into a bias of q's dtype, shared by all heads: 2 B T^2 bytes,
    where B is the number of a device's rows (67 MB for B 8, T 2048; 1.1 GB for T 8192). With jax
    0.10 a gradient takes the same amount again while it runs, because it includes the gradient of
    that bias, which nothing reads (0.12 omits it). Causality costs nothing: the kernel skips the
    keys that it hides, but computes those that segments hide. Rows of a single segment need no
    mask: `one_segment=True` ignores the ids, which is correct if a row's padding, if any, comes
    last. A `window` above 0 is that many positions, which a position sees, itself included.

    `implementation="xla"` computes the same without the kernel, for tests on a CPU.
    """
    length, value_dim = q_BTNH.shape[1], v_BSKW.shape[-1]
    width = _round_up(max(q_BTNH.shape[-1], value_dim), 8)
    # With a mask the kernel's backward pass rejects an odd length.
    full = length if one_segment else _round_up(length, 2)
    q_BTNH, k_BSKH, v_BSKW = (_fill(_fill(x, 3, width), 1, full) for x in (q_BTNH, k_BSKH, v_BSKW))

    def attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT):
        same_BTS = visible(segment_ids_BT, window)  # causality again costs nothing
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKW,
            mask=None if one_segment else same_BTS[:, None],
            is_causal=True,
            local_window_size=(window - 1, 0) if window and one_segment else None,
            scale=scale,
            implementation=implementation,
        )

    segment_ids_BT = _fill(segment_ids_BT, 1, full)
    o_BTNW = _on_each_device(attend, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
    return o_BTNW[:, :length, :, :value_dim]


def _widest(q_BTNH: jax.Array, v_BSKW: jax.Array) -> int:
    """Return the bytes of the wider of a query head and a value head."""
    return max(q_BTNH.shape[-1], v_BSKW.shape[-1]) * q_BTNH.dtype.itemsize


def _splash_blocks(piece: int, widest: int, keys: int = 0) -> splash.BlockSizes:
    """Return blocks that divide `piece` positions, for heads of up to `widest` bytes.

    `piece` is a multiple of 128. `keys` is the number of key positions if `piece` is only one chunk
    of the window.

    A block of q stays in vector memory while the blocks of k and v that it sees stream past, so
    larger blocks read fewer bytes. 1024 is the largest power of two that the compiler fits into
    each of v4, v5e, v5p and v6e (bfloat16 to width 256, float32 to 128; above that, 512). Logits
    are computed for 512 keys at a time, which leaves room for such blocks. A length without such a
    divisor gets smaller blocks: prefer multiples of 1024, or of 512.

    The fused backward kernel computes 5 products per block, and separate kernels for dq and for dk,
    dv compute 7. But the fused one writes one partial dq, in q's dtype, per block of keys, so it is
    used only if these are few. Which one is faster has not been measured on a TPU.
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
    """Run `attend` on each device's rows and heads.

    Rows and K must be divisible by the axes that split them (jax raises otherwise). jax does not
    partition a Pallas kernel by itself. cuDNN's call has a partitioning rule, which raises if q, k,
    v and the mask are split differently; the specs here always split them the same way. Windows in
    natural order are complete on each device: if the mesh splits them, devices repeat the same work
    (context_parallel.py divides it).
    """
    if not has_mesh():
        return attend(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
    heads = spec(("batch", None, "activation_heads", None))
    split = jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, spec(("batch", None))),
        out_specs=heads,
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )
    return split(q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _largest_divisor(length: int, limit: int) -> int:
    """Return the largest multiple of 128 up to `limit` that divides `length`."""
    return max(b for b in range(LANES, limit + 1, LANES) if length % b == 0)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pad `x` with zeros at the end of `axis`, up to `size`.

    Zeros in a width change no product. Positions at the end are hidden from all before them,
    whatever their segment, and their own outputs are cut off.
    """
    if x.shape[axis] == size:
        return x
    pads = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, pads)
