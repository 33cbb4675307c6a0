"""The CPU devices that tests and campaigns stand on. Imports no jax: it reads the flags once."""


def flags(devices: int) -> str:
    """What XLA_FLAGS has to hold for so many devices, and for programs that compile fast.

    Programs of tests run for milliseconds and compile for seconds, so the code generator's
    expensive passes are left out; HLO is optimised as ever.
    """
    return (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
