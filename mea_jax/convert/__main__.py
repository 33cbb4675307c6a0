"""Import models of Hugging Face transformers, and export them again.

    python -m mea_jax.convert from_hf --model Qwen3-0.6B --out runs/qwen3
    python -m mea_jax.convert to_hf --checkpoint runs/qwen3 --out exported/qwen3

Each command is a module of `mea_jax.convert` and has its own --help.
"""

from mea_jax.cli import run_subcommand

COMMANDS = ("from_hf", "to_hf")


if __name__ == "__main__":
    run_subcommand("convert", COMMANDS, __doc__)
