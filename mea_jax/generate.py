"""Continues prompts with a trained model, from its KV cache.

python -m mea_jax.generate --checkpoint runs/quickstart --prompt "def main("
python -m mea_jax.generate --checkpoint runs/quickstart --prompts prompts.txt --output out.jsonl
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import flags

from mea_jax import cli, decode
from mea_jax.cache import RECENT
from mea_jax.config import ModelConfig
from mea_jax.cpu_kernels import keep_freed_memory
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError, nearest
from mea_jax.generation import Generator, Report, continuation
from mea_jax.report import si
from mea_jax.sampling import Sampling
from mea_jax.trained import open_trained

CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")
_STREAM = 8  # tokens between two pieces of streamed text
_BATCH = 64  # tokens between two looks at the stop texts of a file's prompts


def load(
    path: Path, length: int = 0, dtype: str = "auto"
) -> tuple[ModelConfig, Any, Tokenizer, int]:
    """Model, parameters, tokenizer and cache length of a checkpoint, on the first device.

    `length` 0: the window that the model was trained on. Raises `UserError`.
    """
    trained = open_trained(path, lambda line: print(line, file=sys.stderr))
    length = length or trained.config.data.context_length
    model, params = trained.on_first_device(dtype, length)
    return model, params, trained.tokenizer, length


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: "prompt" of each line of *.jsonl, else each line that is not empty.

    Raises `UserError` that names the line.
    """
    try:
        # A byte-order mark is no text; other separators may stand within a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number}: expected an object such as {{"prompt": "..."}}'
                ) from error
            if not isinstance(prompts[-1], str):
                raise UserError(f"{path}, line {number}: its prompt is no text")
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


def cut_at(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` up to the first of `stops` in it, and whether there was one."""
    found = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(found)], True) if found else (text, False)


class Stream:
    """Prints a growing text piece by piece; what may still change is held back."""

    def __init__(
        self, tokenizer: Tokenizer, stops: list[str], out: TextIO, prompt: Sequence[int] = ()
    ):
        self.tokenizer, self.stops, self.out, self.printed = tokenizer, stops, out, 0
        self.prompt = list(prompt)

    def show(self, tokens: list[int], last: bool = False) -> bool:
        """Prints what is new; returns whether a stop text has come."""
        text, stopped = cut_at(continuation(self.tokenizer, self.prompt, tokens), self.stops)
        if not (last or stopped):
            # The end may be half a character, or the beginning of a stop text.
            text = text.rstrip("\ufffd")
            longest = max(map(len, self.stops), default=1)
            for size in range(min(longest - 1, len(text)), 0, -1):
                if any(stop.startswith(text[-size:]) for stop in self.stops):
                    text = text[:-size]
                    break
        self.out.write(text[self.printed :])
        self.out.flush()
        self.printed = max(self.printed, len(text))
        return stopped


def encode(
    generator: Generator, tokenizer: Tokenizer, prompts: list[str], where: str
) -> list[list[int]]:
    """Token ids with the start before them, as a document starts in training; checked.

    `where` names a prompt for a `UserError`; "{}" in it becomes its number.
    """
    for i, prompt in enumerate(prompts, start=1):
        named = where.replace("{}", str(i))
        if not prompt:
            raise UserError(f"{named} is empty: there is nothing to continue")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{named} is not valid Unicode: {error.reason}") from error
    ids = [[tokenizer.start] + ids for ids in tokenizer.encode_batch(prompts)]
    for i, prompt_ids in enumerate(ids, start=1):
        generator.check(prompt_ids, where.replace("{}", str(i)))
    return ids


def stream_one(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt: str,
    stops: list[str],
    options: dict[str, Any],
) -> str:
    """Prints a prompt and its continuation as it comes; returns why it ended."""
    ids = encode(generator, tokenizer, [prompt], "the prompt")
    stream = Stream(tokenizer, stops, sys.stdout, ids[0])
    sys.stdout.write(prompt)

    def on_tokens(new):
        return [stream.show(new[0])]

    new = generator.run(ids, chunk=_STREAM, on_tokens=on_tokens, **options)
    stopped = stream.show(new[0], last=True)
    sys.stdout.write("\n")
    return "stop" if stopped else ended_by(generator, ids[0], new[0], options["count"])


def ended_by(generator: Generator, prompt: list[int], tokens: list[int], count: int) -> str:
    """Why a continuation without a stop text is no longer."""
    if len(tokens) == count:
        return "max_tokens"
    return "cache" if len(prompt) + len(tokens) >= generator.length else "end_of_document"


def continue_file(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: list[str],
    ids: list[list[int]],
    batch: int,
    stops: list[str],
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """One record a prompt, in order."""
    for start in range(0, len(prompts), batch):
        rows = list(range(start, min(start + batch, len(prompts))))
        padded = rows + rows[-1:] * (batch - len(rows))  # one shape, compiled once

        def on_tokens(new, padded=padded):
            texts = (continuation(tokenizer, ids[i], t) for i, t in zip(padded, new, strict=True))
            return [cut_at(text, stops)[1] for text in texts]

        new = generator.run(
            [ids[i] for i in padded],
            rows=padded,
            chunk=_BATCH if stops else 0,
            on_tokens=on_tokens if stops else None,
            counted=len(rows),
            **options,
        )
        for i, tokens in zip(rows, new, strict=False):
            text, stopped = cut_at(continuation(tokenizer, ids[i], tokens), stops)
            while stopped and cut_at(continuation(tokenizer, ids[i], tokens[:-1]), stops)[1]:
                tokens = tokens[:-1]  # drawn after the stop text, before anyone looked
            yield {
                "prompt": prompts[i],
                "text": text,
                "prompt_tokens": len(ids[i]),
                "tokens": len(tokens),
                "ended_by": "stop"
                if stopped
                else ended_by(generator, ids[i], tokens, options["count"]),
            }


def summary(generator: Generator, report: Report, batch: int) -> str:
    """Speed and cache, for stderr."""
    served = generator.served
    rate = report.tokens / max(report.decode_seconds, 1e-9)
    size, dtype = generator.cache_bytes_per_token(), generator.cache_dtype
    rows = f" in batches of {batch}" if batch > 1 else ""
    return (
        f"{report.tokens} tokens{rows}: {rate:,.1f} tokens/s, "
        f"prompt {report.prefill_seconds:.2f} s; "
        f"cache {size:,.0f} bytes per token ({dtype}, {served.describe()}), "
        f"{si(size * (generator.length + RECENT), 'B')} for {generator.length} positions and "
        f"{RECENT} recent; "
        f"{served.model.backend} backend, {served.model.attention_kernel} attention"
    )


def _check_flags() -> None:
    if CHECKPOINT.value is None:
        raise UserError("no checkpoint given: add --checkpoint runs/quickstart")
    if (PROMPT.value is None) == (PROMPTS.value is None):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if PROMPT.value == "":
        raise UserError("--prompt is empty: there is nothing to continue")
    for name, choice, known in (
        ("cache_dtype", CACHE_DTYPE.value, CACHE_DTYPES),
        ("cache_form", CACHE_FORM.value, decode.FORMS),
        ("dtype", DTYPE.value, ("auto", "float32", "bfloat16")),
    ):
        if choice not in known:
            raise UserError(f"--{name}={choice}: {nearest(choice, known)}")
    if not 0 <= SEED.value < 2**32:
        raise UserError(f"--seed={SEED.value} must lie in [0, 2^32)")
    for name, value in (("max_tokens", MAX_TOKENS.value), ("batch_size", BATCH_SIZE.value)):
        if value < 1:
            raise UserError(f"--{name}={value} must be 1 or more")
    if not 0 <= CACHE_LENGTH.value < 2**31:
        raise UserError(
            f"--cache_length={CACHE_LENGTH.value} must lie in [1, 2^31), or be 0: chosen"
        )
    if OUTPUT.value and PROMPTS.value is None:
        raise UserError("--output takes the JSON lines of --prompts; --prompt is printed")


def _write_records(records: Iterator[dict[str, Any]], out: TextIO, total: int) -> None:
    escaped = not (out.encoding or "").lower().startswith("utf")  # for a terminal without UTF-8
    for done, record in enumerate(records, start=1):
        out.write(json.dumps(record, ensure_ascii=escaped) + "\n")
        out.flush()
        if out is not sys.stdout and sys.stderr.isatty():
            print(f"\r{done} of {total} prompts", end="", file=sys.stderr)


def _generate(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: list[str],
    stops: list[str],
    options: dict[str, Any],
    report: Report,
) -> None:
    batch = min(BATCH_SIZE.value, len(prompts))
    if PROMPTS.value is None:
        reason = stream_one(generator, tokenizer, prompts[0], stops, options)
        print(f"\n{summary(generator, report, 1)}; ended by {reason}", file=sys.stderr)
        return
    # Refused before a file of results is opened, so that an old one is not lost.
    ids = encode(generator, tokenizer, prompts, f"prompt {{}} of {PROMPTS.value}")
    records = continue_file(generator, tokenizer, prompts, ids, batch, stops, options)
    if OUTPUT.value is None:
        _write_records(records, sys.stdout, len(prompts))
    else:
        try:
            with open(OUTPUT.value, "w", encoding="utf-8") as out:
                _write_records(records, out, len(prompts))
        except OSError as error:
            raise UserError(f"--output {OUTPUT.value}: {error.strerror}") from error
        print(f"{len(prompts)} lines in {OUTPUT.value}", file=sys.stderr)
    print(summary(generator, report, batch), file=sys.stderr)


def main() -> None:
    _check_flags()
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    path = Path(PROMPTS.value or "")
    prompts = [PROMPT.value or ""] if PROMPTS.value is None else read_prompts(path)
    cli.enable_compilation_cache()
    if jax.devices()[0].platform == "cpu":
        keep_freed_memory()
    model, params, tokenizer, length = load(
        Path(CHECKPOINT.value or ""), CACHE_LENGTH.value, DTYPE.value
    )
    generator = Generator(
        model,
        params,
        length=length,
        cache_dtype=None if CACHE_DTYPE.value == "auto" else CACHE_DTYPE.value,
        form=CACHE_FORM.value,
    )
    stops, report = [stop for stop in STOP.value if stop], Report()
    options = {
        "count": MAX_TOKENS.value,
        "sampling": sampling,
        "seed": SEED.value,
        "stop": tokenizer.stops,
        "report": report,
    }
    try:
        _generate(generator, tokenizer, prompts, stops, options, report)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = generator.cache_bytes_per_token() * (generator.length + RECENT)
        rows = min(BATCH_SIZE.value, len(prompts))
        raise UserError(
            f"out of memory with a cache of {si(size * rows, 'B')} for {rows} rows of "
            f"{generator.length} positions: lower --cache_length or --batch_size, or take "
            "--cache_dtype int8"
        ) from error


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory, or one of its steps")
    PROMPT = flags.DEFINE_string("prompt", None, "text to continue; the result is streamed")
    PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts: lines, or *.jsonl")
    OUTPUT = flags.DEFINE_string("output", None, "file for the JSON lines of --prompts")
    MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "new tokens, at most")
    TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the most likely token")
    TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: all")
    TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens that reach p; 1: all")
    SEED = flags.DEFINE_integer("seed", 0, "of the random draws")
    STOP = flags.DEFINE_multi_string("stop", [], "text that ends a continuation; may be repeated")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "prompts of a file taken at once")
    CACHE_LENGTH = flags.DEFINE_integer(
        "cache_length", 0, "positions of the cache; 0: the window of training"
    )
    CACHE_DTYPE = flags.DEFINE_string("cache_dtype", "auto", "auto, float32, bfloat16 or int8")
    CACHE_FORM = flags.DEFINE_string(
        "cache_form", "auto", "auto, folded, absorbed or explicit: how mixed heads are cached"
    )
    DTYPE = flags.DEFINE_string("dtype", "auto", "of products: auto, float32 or bfloat16")
    cli.run(main, "stopped")
