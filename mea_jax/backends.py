"""The products of a step, once for every compiler: which kernel a backend runs for each.

`XlaBackend` writes plain einsums in the compute dtype and leaves them to the compiler (TPU, GPU,
sharded meshes). `CpuBackend` computes the same functions in the forms that XLA's CPU compiler
turns into fast code (`cpu_kernels`). A module asks its backend, never the platform.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from mea_jax import attention, cpu_kernels
from mea_jax.config import ModelConfig
from mea_jax.errors import UserError
from mea_jax.losses import Products


class Backend(Products, Protocol):
    """Products of a decoder. `dtype` is that of their inputs, `activation` of the residual."""

    @property
    def activation(self) -> jnp.dtype: ...

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        """Contracts the last `axes` axes of `x` with the first `axes` of a float32 kernel."""
        ...

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """silu(gate) * up."""
        ...

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """Causal attention within segments, scale 1/sqrt(H), softmax in float32."""
        ...


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """Einsums as they stand."""

    dtype: jnp.dtype

    @property
    def activation(self) -> jnp.dtype:
        return self.dtype

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        return jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=axes)

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    def attend(self, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT) -> jax.Array:
        scale = q_BTNH.shape[-1] ** -0.5
        return attention.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, scale)

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("...d,df->...f", x, w, preferred_element_type=jnp.float32)

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("...f,df->...d", g, w, preferred_element_type=jnp.float32)

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.einsum("...d,...f->df", x, g, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class CpuBackend:
    """Float32 between products, `dtype` inside them; see `cpu_kernels` for why."""

    dtype: jnp.dtype

    @property
    def activation(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def project(self, x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
        outputs = kernel.shape[axes:]
        rows = x.shape[: x.ndim - axes]
        flat_x = x.reshape(*rows, -1)
        flat_kernel = kernel.reshape(flat_x.shape[-1], -1)
        return cpu_kernels.dense(flat_x, flat_kernel, self.dtype).reshape(*rows, *outputs)

    def swiglu(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return cpu_kernels.swiglu(gate, up, self.dtype)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT) -> jax.Array:
        scale = q_BTNH.shape[-1] ** -0.5
        return cpu_kernels.causal_attention(
            q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, scale=scale, dtype=self.dtype
        )

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return cpu_kernels.matmul(x, w)

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        return cpu_kernels.matmul_transposed(g, w)

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        return cpu_kernels.weight_gradient(x, g)


def make_backend(model: ModelConfig) -> Backend:
    """The backend of a config whose `backend` and `dtype` are no longer "auto" (`resolve`)."""
    dtype = jnp.dtype(model.dtype)
    return CpuBackend(dtype) if model.backend == "cpu" else XlaBackend(dtype)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has bfloat16 matrix units (AMX), which XLA then uses."""
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def resolve(model: ModelConfig, devices: list[jax.Device]) -> ModelConfig:
    """`model` with "auto" replaced by what suits `devices`.

    `dtype`: bfloat16 on accelerators and on a CPU with bfloat16 matrix units, else float32.
    `backend`: "cpu" on CPU devices, "xla" everywhere else.
    """
    platform = devices[0].platform
    dtype, backend = model.dtype, model.backend
    if dtype == "auto":
        fast = platform != "cpu" or (len(devices) == 1 and _cpu_multiplies_bfloat16())
        dtype = "bfloat16" if fast else "float32"
    if backend == "auto":
        backend = "cpu" if platform == "cpu" else "xla"
    if platform == "cpu" and backend == "xla" and dtype == "bfloat16":
        raise UserError(
            "config.model.dtype='bfloat16' with backend='xla' fails in jax's CPU compiler: set "
            "config.model.backend to 'cpu' or config.model.dtype to 'float32'"
        )
    return dataclasses.replace(model, dtype=dtype, backend=backend)
