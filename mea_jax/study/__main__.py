"""Studies of learning rates and sizes, and of what trained models have learned.

    python -m mea_jax.study run --config configs/lr_study.py
    python -m mea_jax.study report --store runs/lr_study
    python -m mea_jax.study heads --checkpoint runs/quickstart

Each word is a module of `mea_jax.study` and has its own --help.
"""

from mea_jax.cli import run_word

COMMANDS = (
    "run",
    "fit",
    "report",
    "heads",
)


if __name__ == "__main__":
    run_word("study", COMMANDS, __doc__)
