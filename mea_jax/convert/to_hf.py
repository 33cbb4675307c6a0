"""Export a checkpoint as a model of transformers: a stock class, or with its own code.

python -m mea_jax.convert to_hf --checkpoint runs/qwen3 --out exported/qwen3
python -m mea_jax.convert to_hf --checkpoint runs/half --form absorbed --out exported/half
"""

import re
import sys
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax import cli
from mea_jax.cli import si, table
from mea_jax.convert.absorbed import CPU_WIDTHS, FLASH_WIDTH
from mea_jax.convert.exporting import FORMS, export_model
from mea_jax.errors import UserError, nearest

DTYPES = ("auto", "float32", "bfloat16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "5GB" (10^9 each). Raise `UserError` if malformed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--shard_size={text} is no size: give one such as 5GB or 500MB")
    return size


def serving(found: dict[str, Any]) -> str:
    """Return what serves the exported model, in words."""
    widths = sorted(set(found["widths"]))
    cpu = "on CPUs and " if set(widths) <= set(CPU_WIDTHS) else ""
    flashes = all(width <= FLASH_WIDTH and width % 8 == 0 for width in widths)
    flash = "with FlashAttention" if flashes else "without FlashAttention"
    path = f"PYTHONPATH={OUT.value} " if found["form"] == "vllm" else ""
    named = " and ".join(map(str, widths))
    return f"{path}vllm serve {OUT.value}: heads of width {named}, {cpu}on GPUs {flash}"


def main() -> None:
    """Run the command: check the flags, export the checkpoint and print a summary."""
    if CHECKPOINT.value is None or OUT.value is None:
        raise UserError(
            "--checkpoint or --out is missing: give --checkpoint RUN and --out FOLDER, such as "
            "--checkpoint runs/half"
        )
    for name, value, known in (("form", FORM.value, FORMS), ("dtype", DTYPE.value, DTYPES)):
        if value not in known:
            raise UserError(f"--{name}={value}: {nearest(value, known)}")
    found = export_model(
        Path(CHECKPOINT.value),
        Path(OUT.value),
        lambda line: print(line, file=sys.stderr, flush=True),
        form=FORM.value,
        dtype=DTYPE.value,
        shard_size=parse_size(SHARD_SIZE.value),
    )
    code = ", loaded with trust_remote_code=True" if found["form"] == "mea" else ""
    share = found["cached"] / found["uncompressed"]
    rows = [
        ("class", f"{found['class']}{code}"),
        ("parameters", f"{found['parameters']:,}"),
        ("written", f"{si(found['bytes'], 'B')} of {found['dtype']}"),
        ("cached", f"{found['cached']:,} numbers per token, {share:.1%} of the composite heads'"),
        *([("served", serving(found))] if found["form"] in ("absorbed", "vllm") else []),
        ("folder", OUT.value),
    ]
    print(table(rows))


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory, or one of its steps")
    OUT = flags.DEFINE_string("out", None, "new folder to write")
    FORM = flags.DEFINE_string(
        "form",
        "auto",
        "stock: a class of transformers, composite heads rebuilt; absorbed: such a class, with "
        "component heads in its cache; vllm: that with a plug-in for vLLM, for unequal layers, "
        "head norms and gates; mea: the model with its own code, component heads in its "
        "cache; auto: stock if no head is mixed and a class fits, otherwise mea",
    )
    DTYPE = flags.DEFINE_string("dtype", "auto", "dtype of the tensors: " + ", ".join(DTYPES))
    SHARD_SIZE = flags.DEFINE_string("shard_size", "5GB", "largest size of a file")
    cli.run(main, "stopped; the same command starts from the beginning", training=False)
