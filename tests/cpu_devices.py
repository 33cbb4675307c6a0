"""XLA flags for the CPU devices of tests and campaigns.

This module does not import jax, which reads the flags only once.
"""


def flags(devices: int) -> str:
    """Return XLA_FLAGS for this number of devices and for fast compilation.

    Programs of tests run for milliseconds and compile for seconds, so the code generator's
    expensive passes are disabled; HLO is optimized as usual.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
