"""The flags and the summary that `from_hf` and `from_gguf` share."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from mea_jax.cli import si, table
from mea_jax.convert.importing import DTYPES, import_model
from mea_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of an import, defined when this is made."""

    model: flags.FlagHolder
    out: flags.FlagHolder
    dtype: flags.FlagHolder
    context: flags.FlagHolder
    text: flags.FlagHolder


def define_flags(model: str) -> Flags:
    """Define the flags of an import; `model` is the help of --model."""
    return Flags(
        flags.DEFINE_string("model", None, model),
        flags.DEFINE_string("out", None, "new run directory to write"),
        flags.DEFINE_enum("dtype", "float32", DTYPES, "dtype of the stored parameters"),
        flags.DEFINE_integer(
            "context_length", 0, "positions of a text window; 0: the model's maximum, at most 2048"
        ),
        flags.DEFINE_string(
            "text",
            "python_stdlib",
            "text that evaluate and compress read instead of the model's own training text, such "
            "as text:FOLDER or jsonl:FILE",
        ),
    )


def run(given: Flags, example: str, locate: Callable[[str], Path]) -> None:
    """Check the flags, import the model and print a summary.

    `example` is a value of --model for the error message without one. `locate` returns the path of
    a model's files, or raises `UserError`.
    """
    model, out, dtype = given.model.value, given.out.value, given.dtype.value
    if model is None or out is None:
        raise UserError(
            f"--model or --out is missing: give --model {example} and --out RUN, such as "
            "--out runs/qwen3"
        )
    if (context := given.context.value) < 0:
        raise UserError(f"--context_length={context} must be 1 or more, or 0 for the default")
    found = import_model(locate(model), Path(out), dtype, context, given.text.value)
    print(_summary(found, out, dtype))


def _summary(found: Mapping[str, Any], out: str, dtype: str) -> str:
    rows = [
        ("architecture", found["architecture"]),
        ("parameters", f"{found['parameters']:,} in {found['tensors']:,} tensors"),
        *_vocabulary(found["vocab_size"], found["new_tokens"]),
        ("stored", f"{si(found['bytes'], 'B')} of {dtype}"),
        ("windows", f"{found['context_length']:,} positions"),
        *_limit(found),
        ("run directory", f"{out}, for generate, evaluate, compress and configs/recover.py"),
    ]
    return table(rows)


def _limit(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row about the positions that the model has, if their number is limited."""
    if found["limit"] is None:
        return []
    return [("limit", f"{found['limit']:,} positions, {found['limit_reason']}")]


def _vocabulary(size: int, new: list[str]) -> list[tuple[str, str]]:
    """Return a row about new tokens, whose rows the model's embedding lacked, if there are any."""
    if not new:
        return []
    names = ", ".join(new[:4]) + (", ..." if len(new) > 4 else "")
    count = "1 row is new" if len(new) == 1 else f"{len(new)} rows are new"
    why = f"the tokenizer has {names} beyond the embedding; they get the mean of the other rows"
    return [("vocabulary", f"{size:,} tokens, of which {count}: {why}")]
