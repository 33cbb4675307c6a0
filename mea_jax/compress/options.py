"""Define and check the options of a compression."""

import dataclasses

from mea_jax.compress import methods
from mea_jax.compress.repair import STEPS as REPAIR_STEPS
from mea_jax.compress.repair import STEPWISE, TEMPERED
from mea_jax.compress.step_sizes import FITTED
from mea_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a compression, which are also the flags of the command."""

    keep: float = 0.5  # share of the cache to keep in the chosen layers
    method: str = "aligned"  # methods.METHODS
    budget: str = "uniform"  # budgets.BUDGETS
    layers: str = "full"  # budgets.choose_layers
    repair: str = "none"  # repair.REPAIRS
    repair_steps: int = REPAIR_STEPS  # for each layer
    repair_tokens: int = 0  # text for the repair; 0: as many as for calibration
    calibration_tokens: int = 131072  # 0: methods use the weights only
    calibration_source: str = ""  # "kind:path,..", as config.data.sources; "": the checkpoint's own
    held_out_source: str = ""  # sources as above; "": the checkpoint's own
    measure_tokens: int = 16384  # text on which budgets are measured
    held_out_tokens: int = 131072  # at most, in all sources together, compared before and after
    dtype: str = "auto"  # of matrix products
    seed: int = 0  # for the choice of calibration text


def check(options: Options) -> None:
    """Raise `UserError` for options that contradict each other."""
    if options.method in methods.NEED_TEXT and not options.calibration_tokens:
        raise UserError(
            f"--method {options.method} needs activations: give --calibration_tokens above 0"
        )
    if options.method == "bits":
        _check_bits(options)
    elif options.budget == "information":
        raise UserError("--budget information divides bits: add --method bits, or give measured")
    if options.budget in ("measured", "repaired") and not options.calibration_tokens:
        raise UserError(
            f"--budget {options.budget} needs text: give --calibration_tokens above 0, or use "
            "--budget residual"
        )
    if options.budget == "repaired" and options.repair not in STEPWISE:
        raise UserError(
            "--budget repaired divides the cache for a model that is repaired afterwards: add "
            "--repair layerwise or blockwise, or use --budget measured"
        )
    if options.repair != "none" and not options.calibration_tokens:
        raise UserError(f"--repair {options.repair} needs text: give --calibration_tokens above 0")
    if options.repair_tokens and options.repair == "none":
        raise UserError(
            f"--repair_tokens={options.repair_tokens} has no effect with --repair none: add "
            "--repair layerwise"
        )


def _check_bits(options: Options) -> None:
    if options.budget not in ("uniform", "information", "measured") or options.layers != "full":
        raise UserError(
            f"--budget {options.budget} --layers {options.layers}: --method bits divides all "
            "layers: leave these options out, or give --budget information alone"
        )
    if not 0 < options.keep <= 0.5:
        raise UserError(
            f"--keep={options.keep} with --method bits must be in (0, 0.5]: a slot has at most 8 "
            "of bfloat16's 16 bits"
        )


def repairs_layers(options: Options) -> bool:
    """Return whether layers are repaired one by one.

    "joint" does so first, except with "bits": rounding is noise, which a fit of one layer can only
    shrink away, and shrinking adds up over layers.
    """
    return options.repair not in ("none", "joint" if options.method == "bits" else "none")


def fitting_tokens(options: Options) -> int:
    """Return the number of tokens that single layers are fitted to."""
    if options.repair == "joint" and repairs_layers(options):
        return options.calibration_tokens
    if repairs_layers(options):
        return options.repair_tokens or options.calibration_tokens
    most = FITTED if options.method == "bits" else TEMPERED
    fits = options.method == "bits" or options.method in methods.SHARPENED
    return min(options.calibration_tokens, most) if fits else 0


def joint_tokens(options: Options) -> int:
    """Return the number of tokens on which all layers are trained jointly."""
    if options.repair != "joint":
        return 0
    return options.repair_tokens or options.calibration_tokens
