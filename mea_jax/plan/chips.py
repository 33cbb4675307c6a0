"""List the data-sheet values of accelerators: memory, peak rates, links. Not measurements.

TPU sources: cloud.google.com/tpu/docs (v5e, v5p, v6e). A link's rate is the "Bidirectional ICI
bandwidth per chip" divided by links and directions. Usable memory is the limit of libtpu 0.0.51.
The clock is peak / (2 x multiply-adds per cycle).

GPU sources: NVIDIA's data sheets, SXM forms, dense rates, NVLink in one direction. 5% of GPU memory
is left to the driver and the libraries (a guess).
"""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Rates are per second; links are in bytes per second and direction."""

    name: str
    kind: str  # a prefix of `jax.Device.device_kind`
    flops: float  # bfloat16, dense
    memory: float  # bytes that a program may use
    hbm: float  # bytes per second
    link: float  # one link of the torus (TPU), or all of NVLink (GPU), one direction
    network: float  # data-centre network, bytes per second and chip, between slices or machines
    torus: int = 0  # axes of the torus; 0: every device reaches every other through a switch
    wraps_at: int = 0  # an axis of a multiple of this many chips is closed to a ring
    clock: float = 0.0  # Hz, of the compiler's cycle estimates
    host: int = 8  # chips of the largest machine that one process drives


CHIPS = {
    "v5e": Chip("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 2, 16, 1.5e9),
    "v5p": Chip("v5p", "TPU v5", 459e12, 95.73 * GIB, 2765e9, 100e9, 6.25e9, 3, 4, 1.75e9, 4),
    "v6e": Chip("v6e", "TPU v6 lite", 918e12, 31.24 * GIB, 1638e9, 100e9, 12.5e9, 2, 16, 1.75e9),
    "a100": Chip("a100", "NVIDIA A100", 312e12, 0.95 * 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip("h100", "NVIDIA H100", 989e12, 0.95 * 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip("h200", "NVIDIA H200", 989e12, 0.95 * 141e9, 4800e9, 450e9, 50e9),
    "b200": Chip("b200", "NVIDIA B200", 2250e12, 0.95 * 180e9, 8000e9, 900e9, 50e9),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus)
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.torus)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with the longest `kind` that starts `device_kind`, or None."""
    matches = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)
