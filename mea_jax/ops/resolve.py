"""Choose what suits a machine for the options of a model that are "auto"."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig, ResolvedModel, Side
from mea_jax.errors import UserError
from mea_jax.ops import context_parallel, flash, hlc
from mea_jax.ops.backend import EINSUM_LENGTH

# Above this length, cuDNN's mask for segments costs too much: 2 B T^2 bytes, 134 MB per row.
_CUDNN_LENGTH = 8192
# Above this length, the CPU kernel's scores (a block of queries, all keys) exceed any cache.
_CPU_KERNEL_LENGTH = 8192


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
    return "einsum" if length <= EINSUM_LENGTH else "chunked"


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
