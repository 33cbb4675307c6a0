"""Study learning rates and model sizes, and analyse the head mixing of trained models.

    python -m mea_jax.study run --config configs/lr_study.py
    python -m mea_jax.study report --store runs/lr_study
    python -m mea_jax.study heads --checkpoint runs/quickstart

Each command is a module of `mea_jax.study` and has its own --help.
"""

from mea_jax.cli import run_subcommand

COMMANDS = (
    "run",
    "fit",
    "report",
    "heads",
)


if __name__ == "__main__":
    run_subcommand("study", COMMANDS, __doc__)
