"""What is asked of a compression."""

import dataclasses

from mea_jax.compress import methods
from mea_jax.compress.repair import STEPS as REPAIR_STEPS
from mea_jax.compress.repair import STEPWISE
from mea_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for; see the flags of the command."""

    keep: float = 0.5  # share of the cache that stays, of the layers chosen
    method: str = "aligned"  # methods.METHODS
    budget: str = "uniform"  # budgets.BUDGETS
    layers: str = "full"  # budgets.choose_layers
    repair: str = "none"  # repair.REPAIRS
    repair_steps: int = REPAIR_STEPS  # of each layer
    repair_tokens: int = 0  # of text for them; 0: as many as for calibration
    calibration_tokens: int = 131072  # 0: methods see weights alone
    calibration_source: str = ""  # "kind:path", as config.data.sources; "": the checkpoint's own
    measure_tokens: int = 16384  # on which budgets are measured
    held_out_tokens: int = 131072  # at most, of all sources together, looked at before and after
    dtype: str = "auto"  # of products
    seed: int = 0  # of the choice of calibration text


def check(options: Options) -> None:
    """Raises `UserError` for options that do not belong together."""
    if options.method in methods.NEED_TEXT and not options.calibration_tokens:
        raise UserError(
            f"--method {options.method} is made of activations: give --calibration_tokens"
        )
    if options.budget in ("measured", "repaired") and not options.calibration_tokens:
        raise UserError(
            f"--budget {options.budget} needs text: give --calibration_tokens, or take "
            "--budget residual"
        )
    if options.budget == "repaired" and options.repair not in STEPWISE:
        raise UserError(
            "--budget repaired divides the cache for a model to be repaired: add --repair "
            "layerwise or blockwise, or take --budget measured"
        )
    if options.repair != "none" and not options.calibration_tokens:
        raise UserError(f"--repair {options.repair} needs text: give --calibration_tokens")
    if options.repair_tokens and options.repair == "none":
        raise UserError(
            f"--repair_tokens={options.repair_tokens} is text for a repair: add --repair layerwise"
        )


def repair_text(options: Options) -> int:
    """Tokens on which layers are repaired."""
    return options.repair_tokens or options.calibration_tokens
