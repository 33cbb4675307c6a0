"""Describe TPU slices that need not exist, to compile for them on a machine without a TPU.

A program lowered for `ShapeDtypeStruct`s with shardings on these devices compiles with the TPU's
own compiler (libtpu), which then reports memory, collectives and whether a kernel fits. Nothing
runs. Start such a process with JAX_PLATFORMS=cpu.
"""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from mea_jax.errors import UserError

# libtpu reads these once, when it is loaded. When jax is imported on a machine without a TPU, it
# sets TPU_SKIP_MDS_QUERY=1; only then is there no device to share, and no host to describe.
_WITHOUT_A_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by default one process may load it, even for CPU runs
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # this and the next: only to suppress its warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def describe(name: str) -> list[jax.Device]:
    """Return the compile-only devices of a topology, "<generation>:<chips along each axis>".

    "v5e:2x2" and "v6e:4x4" have 4 and 16 devices, "v5p:4x4x4" has 64; "2*v5e:4x4" is two slices
    of 16, joined by the data-centre network. Raise `UserError` if libtpu is missing or in use, or
    does not have this topology.
    """
    slices, slice_name = 1, name
    if match := re.fullmatch(r"([1-9]\d*)\*(.+)", name):
        slices, slice_name = int(match[1]), match[2]
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            "compiling for a TPU needs its compiler, libtpu, which is not installed: "
            "pip install 'jax[tpu]'"
        )
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for key, value in _WITHOUT_A_TPU.items():
            os.environ.setdefault(key, value)
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(slice_name, platform="tpu", **several)
        return list(found.devices)
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                f"libtpu is loaded by another process, so {name!r} cannot be described: wait for "
                "it to end, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from error
        raise UserError(
            f"libtpu has no TPU topology {name!r} ({str(error).splitlines()[0]}): write the "
            "generation and the chips along each axis, as in 'v5e:4x4', 'v5p:4x4x4' or 'v6e:8x8', "
            "with '2*' before it for two slices"
        ) from error
