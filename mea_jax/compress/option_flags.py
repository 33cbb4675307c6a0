"""Define the flags of compressions: one for each option, for all commands that have it."""

from typing import Any

from absl import flags

from mea_jax.compress import budgets, methods, repair
from mea_jax.compress.options import Options

flags.disclaim_key_flags()  # --help of the module that calls `define` lists them

CHECKPOINT = "run directory, or one of its checkpoint steps"
MEASUREMENTS = "folder for measurements of the original, shared by compressions"

_CHOICES = {
    "method": (methods.METHODS, "how heads are rebuilt"),
    "budget": (budgets.BUDGETS, "how the cache is divided over layers, keys and values"),
    "repair": (repair.REPAIRS, "what is fitted to the original model"),
    "dtype": (("auto", "float32", "bfloat16"), "dtype of matrix products"),
}
_WORDS = {
    "layers": "layers to compress: full, deep, half (as in the paper), or 2,4-7",
    "calibration_source": "text in place of the checkpoint's own, such as jsonl:FILE,text:FOLDER, "
    "in equal parts",
    "held_out_source": "other text to measure the loss on, such as jsonl:FILE,text:FOLDER; a "
    "row for each",
}
_NUMBERS = {  # the least, and the help
    "repair_steps": (1, "steps for each layer, with --repair layerwise or blockwise"),
    "repair_tokens": (
        0,
        "tokens of text for repair or training; 0: as many as --calibration_tokens",
    ),
    "calibration_tokens": (
        0,
        "tokens of text for calibration; 0: none, use the weights only",
    ),
    "measure_tokens": (1, "tokens on which --budget measured or repaired tries each layer"),
    "held_out_tokens": (1, "maximum number of held-out tokens on which the loss is compared"),
    "seed": (None, "seed for the choice of calibration text"),
}


def define(*names: str) -> None:
    """Define a flag for each of these fields of `Options`, or for all of them."""
    for name in names or Options.__dataclass_fields__:
        default = getattr(Options, name)
        if name == "keep":
            flags.DEFINE_float(name, default, "share of the cache to keep in the chosen layers")
        elif name in _CHOICES:
            flags.DEFINE_enum(name, default, *_CHOICES[name])
        elif name in _WORDS:
            flags.DEFINE_string(name, default, _WORDS[name])
        else:
            least, words = _NUMBERS[name]
            flags.DEFINE_integer(name, default, words, lower_bound=least)


def options(**others: Any) -> Options:
    """Return the options that the defined flags give, and `others`."""
    values = flags.FLAGS.flag_values_dict()
    given = {name: values[name] for name in Options.__dataclass_fields__ if name in values}
    return Options(**given | others)
