"""Import models of transformers and llama.cpp, and export models to transformers.

    python -m mea_jax.convert from_hf --model Qwen3-0.6B --out runs/qwen3
    python -m mea_jax.convert from_gguf --model Qwen3-0.6B-Q8_0.gguf --out runs/qwen3
    python -m mea_jax.convert to_hf --checkpoint runs/qwen3 --out exported/qwen3

Each command is a module of `mea_jax.convert` and has its own --help.
"""

from mea_jax.cli import run_subcommand

COMMANDS = ("from_hf", "from_gguf", "to_hf")


if __name__ == "__main__":
    run_subcommand("convert", COMMANDS, __doc__)
