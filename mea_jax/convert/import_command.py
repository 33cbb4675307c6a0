"""The flags and the summary that `from_hf` and `from_gguf` share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax.cli import si, table
from mea_jax.convert.importing import DTYPES, import_model
from mea_jax.errors import UserError, nearest

OUT = flags.DEFINE_string("out", None, "new run directory to write")
DTYPE = flags.DEFINE_string(
    "dtype", "float32", "dtype of the stored parameters: " + ", ".join(DTYPES)
)
CONTEXT = flags.DEFINE_integer(
    "context_length", 0, "positions of a text window; 0: the model's maximum, at most 2048"
)
TEXT = flags.DEFINE_string(
    "text",
    "python_stdlib",
    "text that evaluate and compress read instead of the model's own training text, such as "
    "text:FOLDER or jsonl:FILE",
)


def run(model: str | None, example: str, locate: Callable[[str], Path]) -> None:
    """Check the flags, import the model and print a summary.

    `example` is a value of --model for the error message without one. `locate` returns the path of
    a model's files, or raises `UserError`.
    """
    if model is None or OUT.value is None:
        raise UserError(
            f"--model or --out is missing: give --model {example} and --out RUN, such as "
            "--out runs/qwen3"
        )
    if DTYPE.value not in DTYPES:
        raise UserError(f"--dtype={DTYPE.value}: {nearest(DTYPE.value, DTYPES)}")
    if CONTEXT.value < 0:
        raise UserError(f"--context_length={CONTEXT.value} must be 1 or more, or 0 for the default")
    out = Path(OUT.value)
    print(_summary(import_model(locate(model), out, DTYPE.value, CONTEXT.value, TEXT.value), out))


def _summary(found: Mapping[str, Any], out: Path) -> str:
    rows = [
        ("architecture", found["architecture"]),
        ("parameters", f"{found['parameters']:,} in {found['tensors']:,} tensors"),
        *_vocabulary(found["vocab_size"], found["new_tokens"]),
        ("stored", f"{si(found['bytes'], 'B')} of {DTYPE.value}"),
        ("windows", f"{found['context_length']:,} positions"),
        ("run directory", f"{out}, for generate, evaluate, compress and configs/recover.py"),
    ]
    return table(rows)


def _vocabulary(size: int, new: list[str]) -> list[tuple[str, str]]:
    """Return a row about new tokens, whose rows the model's embedding lacked, if there are any."""
    if not new:
        return []
    names = ", ".join(new[:4]) + (", ..." if len(new) > 4 else "")
    count = "1 row is new" if len(new) == 1 else f"{len(new)} rows are new"
    why = f"the tokenizer has {names} beyond the embedding; they get the mean of the other rows"
    return [("vocabulary", f"{size:,} tokens, of which {count}: {why}")]
