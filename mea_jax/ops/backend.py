"""Backends, which compute the products of a model with the kernels that suit a compiler.

`XlaBackend` uses plain einsums in the compute dtype and leaves them to the compiler (TPU, GPU,
sharded meshes). `CpuBackend` computes the same functions in the forms that XLA's CPU compiler
turns into fast code (ops/cpu.py). `attend` selects among separate attention kernels. Modules
depend on their backend, never on the platform; `resolve` inspects the machine once.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig, ResolvedModel, Side
from mea_jax.errors import UserError
from mea_jax.ops import attention, context_parallel, cpu, flash, hlc
from mea_jax.ops.attention import TreeMask
from mea_jax.ops.chunked import chunked_attention
from mea_jax.ops.cross_entropy import Products
from mea_jax.ops.rms_norm import rms_norm
from mea_jax.parallel.sharding import constrain, shard_count

# Above this length, T x T logits are not materialized: 1024^2 float32 take 4 MiB per head.
_EINSUM_LENGTH = 1024
# Above this length, cuDNN's mask for segments costs too much: 2 B T^2 bytes, 134 MB per row.
_CUDNN_LENGTH = 8192
# Above this length, the CPU kernel's scores (a block of queries, all keys) exceed any cache.
_CPU_KERNEL_LENGTH = 8192


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

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Return silu(gate) * up."""
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
    ) -> jax.Array:
        """Compute causal attention within segments, softmax in float32: (B, T, N, W).

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
    kernel: str, q, k, v, segment_ids_BT, scale: float, slopes_N, block: int, shards: int
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
        )
    q, k, v = _gather_sequence(q, k, v)
    if isinstance(segment_ids_BT, TreeMask):
        if slopes_N is not None:
            raise ValueError(
                "slopes_N does not work with a TreeMask, because ALiBi measures distances in the "
                "window, not in the tree: use another kind of positions"
            )
        return attention.tree_attention(q, k, v, segment_ids_BT, scale)
    if kernel == "auto":  # an unresolved config: use a kernel that runs anywhere
        kernel = "einsum" if q.shape[1] <= _EINSUM_LENGTH else "chunked"
    if kernel == "splash":
        return flash.splash_attention(q, k, v, segment_ids_BT, scale=scale)
    if kernel == "cudnn":
        return flash.cudnn_attention(q, k, v, segment_ids_BT, scale=scale)
    if kernel == "chunked":
        return chunked_attention(
            q, k, v, segment_ids_BT, scale=scale, slopes_N=slopes_N, block=block
        )
    return attention.dot_product_attention(q, k, v, segment_ids_BT, scale, slopes_N)


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

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    def dot(self, lhs: jax.Array, rhs: jax.Array, contract: tuple, batch: int) -> jax.Array:
        dims = (contract, (tuple(range(batch)),) * 2)
        return jax.lax.dot_general(
            lhs, rhs, dims, precision=self.precision, preferred_element_type=jnp.float32
        )

    def attend(
        self, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, scale, slopes_N=None, norm=None, shards=1
    ) -> jax.Array:
        arrays = (q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
        o_BTNW = _attend(self.attention_kernel, *arrays, scale, slopes_N, 512, shards)
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

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return cpu.swiglu(gate, up, self.dtype)

    def dot(self, lhs: jax.Array, rhs: jax.Array, contract: tuple, batch: int) -> jax.Array:
        return cpu.thin_product(lhs, rhs, contract, batch)

    def attend(
        self, q_BTNH, k_BSKH, v_BSKW, segment_ids_BT, scale, slopes_N=None, norm=None, shards=1
    ) -> jax.Array:
        kernel = self.attention_kernel
        if kernel in ("auto", "cpu") and slopes_N is None and shards == 1:
            norm_W, eps = norm or (None, 0.0)
            arrays = (*_gather_sequence(q_BTNH, k_BSKH, v_BSKW), segment_ids_BT)
            return cpu.causal_attention(
                *arrays, scale=scale, dtype=self.dtype, norm_W=norm_W, eps=eps
            )
        if kernel == "cpu" and shards == 1:  # the CPU kernel takes no slopes
            kernel = "auto"
        arrays = (q_BTNH, k_BSKH, v_BSKW, segment_ids_BT)
        o_BTNW = _attend(kernel, *arrays, scale, slopes_N, 256, shards)
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


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether this machine's CPU has bfloat16 matrix units (AMX), which XLA then uses."""
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def _reason_unsupported(kernel: str, model: ModelConfig, platform: str, dtype: str) -> str | None:
    """Return why attention cannot run on `kernel` here, or None if it can."""
    homes = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU"), "cpu": ("cpu", "a CPU")}
    if kernel not in homes:
        return None
    home, name = homes[kernel]
    if platform != home:
        return f"it needs {name}, but this machine's devices are {platform.upper()}s"
    if model.positions == "alibi":
        return "it takes no biases, which positions='alibi' needs"
    if kernel == "cpu":
        return None if model.backend in ("auto", "cpu") else "it belongs to backend='cpu'"
    supports = flash.splash_supports
    if kernel == "cudnn":
        supports = flash.cudnn_supports
    return supports(jnp.dtype(dtype), *_head_widths(model))


def _head_widths(model: ModelConfig) -> tuple[int, int]:
    """Return the head widths of queries and of values in attention."""
    if model.variant == "collaborative":
        return max(model.components(Side.KEY)) * model.head_dim, model.head_dim
    return model.head_dim, model.head_dim * (2 if model.variant == "differential_v1" else 1)


def _choose_kernel(
    model: ModelConfig, platform: str, dtype: str, backend: str, length: int, sequence: int
) -> str:
    """Return this machine's fastest attention kernel for windows of `length` positions."""
    if sequence > 1:
        splash = platform == "tpu" and _reason_unsupported("splash", model, platform, dtype) is None
        return "splash" if splash else "chunked"
    fastest = {"tpu": "splash", "gpu": "cudnn" if length <= _CUDNN_LENGTH else None}.get(platform)
    if platform == "cpu" and backend == "cpu" and length <= _CPU_KERNEL_LENGTH:
        fastest = "cpu"
    if fastest and _reason_unsupported(fastest, model, platform, dtype) is None:
        return fastest
    return "einsum" if length <= _EINSUM_LENGTH else "chunked"


def _choose_form(model: ModelConfig) -> str:
    """Return one training form for all layers, the one that suits most of their projections."""
    forms = [
        hlc.training_form(model, side, components)
        for side in Side
        if model.mixes(side)
        for components in model.components(side)
    ]
    return "explicit" if 2 * forms.count("explicit") > len(forms) else "folded"


def resolve(
    model: ModelConfig,
    devices: Sequence[jax.Device],
    length: int,
    tensor: int = 1,
    sequence: int = 1,
) -> ResolvedModel:
    """Return `model` with "auto" replaced by what suits `devices` and windows of `length`.

    `tensor` devices share the heads and `sequence` devices the positions of a window.

    `dtype`: bfloat16 on accelerators and on a single CPU with bfloat16 matrix units, otherwise
    float32.
    `backend`: "cpu" on CPU devices, otherwise "xla".
    `attention_kernel`: splash on TPU; up to 8,192 positions cuDNN on GPU and "cpu" on CPU; where
    none of these applies, "einsum" up to 1,024 positions and "chunked" above. With `sequence` above
    1, splash on TPU, otherwise "chunked". Talking heads always use "einsum".
    `hlc_form`: folded if `tensor` is above 1, otherwise by shapes (`hlc.choose_form`). Keys mixed
    after their norm are explicit in either form.

    Raises `UserError` if a forced value cannot run on this machine, and `TypeError` if the model is
    resolved already.
    """
    if isinstance(model, ResolvedModel):
        raise TypeError(
            "the model is resolved already: pass the ModelConfig that `unresolved` returns"
        )
    platform = devices[0].platform
    dtype, backend, kernel = model.dtype, model.backend, model.attention_kernel
    if dtype == "auto":
        fast = platform != "cpu" or (len(devices) == 1 and _cpu_multiplies_bfloat16())
        dtype = "bfloat16" if fast else "float32"
    if backend == "auto":
        backend = "cpu" if platform == "cpu" else "xla"
    if backend == "cpu" and platform != "cpu":
        raise UserError(
            f"config.model.backend='cpu' needs CPU devices, but this machine's devices are "
            f"{platform.upper()}s: set it to 'auto'"
        )
    if platform == "cpu" and backend == "xla" and dtype == "bfloat16":
        raise UserError(
            "config.model.dtype='bfloat16' with backend='xla' fails in jax's CPU compiler: set "
            "config.model.backend to 'cpu' or config.model.dtype to 'float32'"
        )
    if sequence > 1 and model.variant == "talking_heads":
        raise UserError(
            f"config.mesh.sequence={sequence} splits the positions of a window, but talking_heads "
            "has no kernel for that, because it mixes the logits of all heads: set it to 1"
        )
    if sequence > 1 and kernel not in ("auto", *context_parallel.KERNELS):
        raise UserError(
            f"config.model.attention_kernel={kernel!r} cannot take windows that "
            f"config.mesh.sequence={sequence} splits over devices: set it to 'auto'"
        )
    if model.variant == "talking_heads":
        kernel = "einsum"  # the only kernel for it
    elif kernel == "auto":
        kernel = _choose_kernel(model, platform, dtype, backend, length, sequence)
    elif (reason := _reason_unsupported(kernel, model, platform, dtype)) is not None:
        raise UserError(
            f"config.model.attention_kernel={kernel!r} cannot run here: {reason}; set it to 'auto'"
        )
    form = model.hlc_form
    if form == "auto" and model.hlc != "none":
        form = "folded" if tensor > 1 else _choose_form(model)
    settled = {"dtype": dtype, "backend": backend, "attention_kernel": kernel, "hlc_form": form}
    return ResolvedModel(**(vars(model) | settled))


def resolve_on(model: ModelConfig, mesh: Mesh | None, length: int) -> ResolvedModel:
    """Return `model` resolved for the devices of `mesh`; None stands for the first device."""
    if mesh is None:
        return resolve(model, [jax.devices()[0]], length)
    return resolve(model, list(mesh.devices.flat), length, tensor=mesh.shape["tensor"])
