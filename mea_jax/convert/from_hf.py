"""Import a model of transformers (Llama 3, Qwen3 or Qwen3-MoE) as a run directory.

python -m mea_jax.convert from_hf --model Qwen3-0.6B --out runs/qwen3
python -m mea_jax.convert from_hf --model Qwen/Qwen3-0.6B --out runs/qwen3 --dtype bfloat16
"""

from absl import flags

from mea_jax import cli
from mea_jax.convert import import_command
from mea_jax.convert.importing import locate


def main() -> None:
    """Import the model of --model."""
    import_command.run(FLAGS, "FOLDER", locate)


if __name__ == "__main__":
    FLAGS = import_command.define_flags(
        "folder with config.json and safetensors, or a model's name on the hub"
    )
    flags.adopt_module_key_flags(import_command)
    cli.run(main, "stopped; the same command starts from the beginning", training=False)
