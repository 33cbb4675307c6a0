"""Backends, which compute the products of a model with the kernels that suit a compiler.

`XlaBackend` uses plain einsums in the compute dtype and leaves them to the compiler (TPU, GPU,
sharded meshes). `CpuBackend` computes the same functions in the forms that XLA's CPU compiler
turns into fast code (ops/cpu.py). `attend` selects among separate attention kernels. Modules
depend on their backend, never on the platform; ops/resolve.py inspects the machine once.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mea_jax.config.schema import ModelConfig
from mea_jax.ops import attention, context_parallel, cpu, flash, hlc
from mea_jax.ops.attention import TreeMask
from mea_jax.ops.chunked import chunked_attention
from mea_jax.ops.cross_entropy import Products
from mea_jax.ops.rms_norm import rms_norm
from mea_jax.parallel.sharding import constrain, shard_count

# Above this length, T x T logits are not materialized: 1024^2 float32 take 4 MiB per head.
EINSUM_LENGTH = 1024


class HeadNorm(NamedTuple):
    """An RMSNorm over the width of a head: its learned weight (W,), float32, and epsilon."""

    scale_W: jax.Array
    eps: float

    def apply(self, o_BTNW: jax.Array) -> jax.Array:
        return rms_norm(o_BTNW, self.scale_W, self.eps)


class Backend(Products, Protocol):
    """The products of a decoder.

    `dtype` is the dtype of their inputs, `activation` that of the residual.
    """

    @property
    def activation(self) -> jnp.dtype: ...

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        """Contract the last `axes` axes of `x` with the first `axes` axes of a float32 kernel."""
        ...

    def fold(self, kind: str, kernel_DCH: jax.Array, mix: jax.Array) -> jax.Array:
        """Fold a mixing into a projection with `hlc.fold`: float32 (D, K, H) to composite heads."""
        ...

    def gated(self, activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Return silu(gate) * up, or gelu(gate) * up in the tanh form, by `activation`."""
        ...

    def dot(self, lhs: jax.Array, rhs: jax.Array, contract: tuple, batch: int) -> jax.Array:
        """Compute `lax.dot_general` over `batch` shared leading axes, with a float32 result."""
        ...

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKW: jax.Array,
        segment_ids_BT: jax.Array | TreeMask,
        scale: float,
        slopes_N: jax.Array | None = None,
        norm: HeadNorm | None = None,
        shards: int = 1,
        window: int = 0,
    ) -> jax.Array:
        """Compute causal attention within segments, softmax in float32: (B, T, N, W).

        A position sees at most the last `window` positions, itself included; 0 means all.
        A `TreeMask` in place of segment ids defines which keys each position sees. `slopes_N`
        (ALiBi) adds slope times (s - t) to the scaled logits. `norm` is applied to each head's
        output. `shards` is the number of parts of the sequence: the arrays, but not the segment
        ids, are in zigzag order (context_parallel.py). 1 means natural order, on any mesh. Raises
        `ValueError` if `shards` > 1 differs from the mesh's, and for slopes with a `TreeMask`.
        """
        ...


def _gather_sequence(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the arrays with the entire T on each device, if the mesh splits it.

    The devices of a sequence axis repeat the attention of a window in natural order. Under this
    constraint the partitioner gathers once and does not try to split blocks of it.
    """
    if shard_count("length") == 1:
        return q_BTNH, k_BSKH, v_BSKW

    def whole(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", None, "activation_heads", None)

    return whole(q_BTNH), whole(k_BSKH), whole(v_BSKW)


def _attend(
    kernel: str,
    q,
    k,
    v,
    segment_ids_BT,
    scale: float,
    slopes_N,
    block: int,
    shards: int,
    window: int,
) -> jax.Array:
    """Run `kernel`; "auto" is "einsum", or "chunked" for long or split windows."""
    if shards > 1:
        if shards != shard_count("length"):
            raise ValueError(
                f"{shards} shards of the sequence on a mesh of {shard_count('length')}: "
                "pass the size of the mesh's sequence axis"
            )
        return context_parallel.attention(
            "chunked" if kernel == "auto" else kernel,
            *(q, k, v, segment_ids_BT),
            scale=scale,
            slopes_N=slopes_N,
            block=block,
            window=window,
        )
    q, k, v = _gather_sequence(q, k, v)
    if isinstance(segment_ids_BT, TreeMask):
        if slopes_N is not None:
            raise ValueError(
                "slopes_N does not work with a TreeMask, because ALiBi measures distances in the "
                "window, not in the tree: use another kind of positions"
            )
        return attention.tree_attention(q, k, v, segment_ids_BT, scale, window)
    if kernel == "auto":  # an unresolved config: use a kernel that runs anywhere
        kernel = "einsum" if q.shape[1] <= EINSUM_LENGTH else "chunked"
    if kernel == "splash":
        return flash.splash_attention(q, k, v, segment_ids_BT, scale=scale, window=window)
    if kernel == "cudnn":
        return flash.cudnn_attention(q, k, v, segment_ids_BT, scale=scale, window=window)
    if kernel == "chunked":
        return chunked_attention(
            q, k, v, segment_ids_BT, scale=scale, slopes_N=slopes_N, block=block, window=window
        )
    return attention.dot_product_attention(q, k, v, segment_ids_BT, scale, slopes_N, window)


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """A backend of plain einsums."""

    dtype: jnp.dtype
    attention_kernel: str = "auto"

    @property
    def activation(self) -> jnp.dtype:
        return self.dtype

    @property
    def precision(self) -> jax.lax.Precision | None:
        return attention.full_precision(self.dtype)

    def _einsum(self, letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = attention.full_precision(a.dtype)
        return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.tensordot(x, kernel, axes=axes, precision=self.precision)

    def fold(self, kind: str, kernel_DCH: jax.Array, mix: jax.Array) -> jax.Array:
        return hlc.fold(kind, kernel_DCH, mix)

    def gated(self, activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
        return getattr(jax.nn, activation)(gate) * up  # jax's gelu is the tanh form

    def dot(self, lhs: jax.Array, rhs: jax.Array, contract: tuple, batch: int) -> jax.Array:
        dims = (contract, (tuple(range(batch)),) * 2)
        return jax.lax.dot_general(
            lhs, rhs, dims, precision=self.precision, preferred_element_type=jnp.float32
        )

    def attend(
        self,
        q_BTNH,
        k_BSKH,
        v_BSKW,
        segment_ids_BT,
        scale,
        slopes_N=None,
        norm=None,
        shards=1,
        window=0,
    ) -> jax.Array:
        arrays = (q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
        o_BTNW = _attend(self.attention_kernel, *arrays, scale, slopes_N, 512, shards, window)
        return o_BTNW if norm is None else norm.apply(o_BTNW)

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return self._einsum("...d,df->...f", x, w)

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        return self._einsum("...f,df->...d", g, w)

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return self._einsum("...d,...f->df", x, g)


@dataclasses.dataclass(frozen=True)
class CpuBackend:
    """A backend with `dtype` inside products and float32 between them, as ops/cpu.py explains."""

    dtype: jnp.dtype
    attention_kernel: str = "cpu"

    @property
    def activation(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        outputs = kernel.shape[axes:]
        rows = x.shape[: x.ndim - axes]
        flat_x = x.reshape(*rows, -1)
        flat_kernel = kernel.reshape(flat_x.shape[-1], -1)
        return cpu.dense(flat_x, flat_kernel, self.dtype).reshape(*rows, *outputs)

    def fold(self, kind: str, kernel_DCH: jax.Array, mix: jax.Array) -> jax.Array:
        if kind == "heads":
            return cpu.fold_heads(kernel_DCH, mix)
        return hlc.fold(kind, kernel_DCH, mix)

    def gated(self, activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
        if activation == "silu":
            return cpu.swiglu(gate, up, self.dtype)
        return (jax.nn.gelu(gate) * up).astype(self.dtype)

    def dot(self, lhs: jax.Array, rhs: jax.Array, contract: tuple, batch: int) -> jax.Array:
        return cpu.thin_product(lhs, rhs, contract, batch)

    def attend(
        self,
        q_BTNH,
        k_BSKH,
        v_BSKW,
        segment_ids_BT,
        scale,
        slopes_N=None,
        norm=None,
        shards=1,
        window=0,
    ) -> jax.Array:
        kernel = self.attention_kernel
        windowed_tree = window and isinstance(segment_ids_BT, TreeMask)
        fits = slopes_N is None and shards == 1 and not windowed_tree
        if kernel in ("auto", "cpu") and fits:
            norm_W, eps = norm or (None, 0.0)
            arrays = (*_gather_sequence(q_BTNH, k_BSKH, v_BSKW), segment_ids_BT)
            return cpu.causal_attention(
                *arrays, scale=scale, dtype=self.dtype, norm_W=norm_W, eps=eps, window=window
            )
        if kernel == "cpu" and shards == 1:  # the CPU kernel does not fit
            kernel = "auto"
        arrays = (q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
        o_BTNW = _attend(kernel, *arrays, scale, slopes_N, 256, shards, window)
        return o_BTNW if norm is None else norm.apply(o_BTNW)

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return cpu.matmul(x, w)

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        return cpu.matmul_transposed(g, w)

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return cpu.weight_gradient(x, g)


def make_backend(model: ModelConfig) -> Backend:
    """Return the backend of a config whose `backend` and `dtype` are resolved (not "auto")."""
    backend = CpuBackend if model.backend == "cpu" else XlaBackend
    return backend(jnp.dtype(model.dtype), model.attention_kernel)
