"""Describe the machine that a plan is made for: the devices to compile for, and their chips.

"v5p:4x4x4" is one TPU slice, "2*v5e:16x16" two of them. Both use the TPU's own compiler.
"h100:8" (or "gpu:8") is a machine of GPUs. The compiler for GPUs needs a GPU, so the same number of
virtual CPU devices replaces them: sharding, collectives and products are those of the real program,
but fusion and memory are approximate. "local" means the devices of this machine and their own
compiler.
"""

import dataclasses
import os
import re

from mea_jax.errors import UserError
from mea_jax.plan.chips import CHIPS, GPUS, TPUS, Chip

EXAMPLES = "'v5e:16x16', 'v5p:4x4x4', 'v6e:8x8', '2*v5e:16x16', 'h100:8', 'gpu:8' or 'local'"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind. `chip` is None if its data sheet is not known (a CPU)."""

    name: str
    devices: list
    chip: Chip | None
    exact: bool  # compiled by the devices' own compiler


def prepare_environment(name: str) -> None:
    """Set the variables that jax reads once. Call this before jax is imported.

    No accelerator of this machine is used unless the plan is for "local".
    """
    if name == "local":
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    if (machine := re.fullmatch(r"(\w+):(\d+)", name)) and machine.group(1) in (*GPUS, "gpu"):
        flags = os.environ.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={machine.group(2)}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


def find(name: str) -> Target:
    """Return the target called `name`. Raises `UserError` if the name is not known."""
    import jax  # after prepare_environment

    from mea_jax.parallel import topology
    from mea_jax.plan.chips import chip_of

    if name == "local":
        devices = jax.devices()
        return Target(name, devices, chip_of(devices[0].device_kind), exact=True)
    if machine := re.fullmatch(r"(\w+):(\d+)", name):
        kind, count = machine.group(1), int(machine.group(2))
        if kind in (*GPUS, "gpu"):
            devices = jax.devices()
            if len(devices) != count:
                raise UserError(
                    f"--topology {name}: jax has already started with {len(devices)} CPU devices: "
                    "run python -m mea_jax.plan, which sets their number first"
                )
            return Target(name, devices, CHIPS["h100" if kind == "gpu" else kind], exact=False)
    generation = re.fullmatch(r"(?:\d+\*)?(\w+):\d+(x\d+)*", name)
    if generation is None or generation.group(1) not in TPUS:
        raise UserError(
            f"--topology {name!r} is not known: TPUs are {', '.join(TPUS)}, GPUs "
            f"{', '.join(GPUS)}; write it as {EXAMPLES}"
        )
    return Target(name, topology.describe(name), CHIPS[generation.group(1)], exact=True)
