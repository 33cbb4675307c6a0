"""Continuation of one prompt as a stream, or of a file of prompts in batches."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mea_jax.cli import si
from mea_jax.data.chat import encode_chat
from mea_jax.data.tokenizers import Tokenizer
from mea_jax.errors import UserError
from mea_jax.generate.generator import Decoding, Generator, Report, continuation
from mea_jax.model.kv_cache import RECENT

CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")
_STREAM = 8  # tokens between two pieces of streamed text
_BATCH = 64  # tokens between two searches for stop texts, for a file of prompts


@dataclasses.dataclass(frozen=True)
class Session:
    """A model and the options with which it continues prompts.

    Attributes:
      generator: the generator of the model.
      tokenizer: the tokenizer of the model.
      decoding: the options for decoding.
      stops: texts that end a continuation and are not part of it.
      report: the number of tokens and the time so far.
    """

    generator: Generator
    tokenizer: Tokenizer
    decoding: Decoding
    stops: list[str]
    report: Report = dataclasses.field(default_factory=Report)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: the field "prompt" of each line of *.jsonl, otherwise lines.

    Empty lines are skipped.

    Raises:
      UserError: the file cannot be read, has no prompt, or has a malformed line (the message has
        its number).
    """
    try:
        # "utf-8-sig" drops a byte-order mark. Lines may contain other separators than "\n".
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {path} cannot be read: {error}; give a readable file in UTF-8"
        ) from error
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
                raise UserError(f"{path}, line {number}: its prompt must be a string")
    if not prompts:
        raise UserError(f"--prompts {path} contains no prompt: add one per line")
    return prompts


def cut_at(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return `text` up to the first of `stops` in it, and whether there was one."""
    found = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(found)], True) if found else (text, False)


class Stream:
    """A printer of a growing text that holds back characters that may still change."""

    def __init__(
        self, tokenizer: Tokenizer, stops: list[str], out: TextIO, prompt: Sequence[int] = ()
    ):
        self.tokenizer, self.stops, self.out, self.printed = tokenizer, stops, out, 0
        self.prompt = list(prompt)

    def show(self, tokens: list[int], last: bool = False) -> bool:
        """Print the text that is new and final; return whether a stop text has occurred."""
        text, stopped = cut_at(continuation(self.tokenizer, self.prompt, tokens), self.stops)
        if not (last or stopped):
            # The end may be part of a character, or the beginning of a stop text.
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
    tokenizer: Tokenizer,
    prompts: list[str],
    where: str,
    chat: bool = False,
    system: str | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts, each after the tokenizer's `prefix`.

    With `chat`, each prompt is a user's message, after that of the `system` if there is one.

    Raises:
      UserError: a prompt cannot be encoded. The message starts with `where`, in which "{}" is
        replaced by the number of the prompt.
    """
    for i, prompt in enumerate(prompts, start=1):
        named = where.replace("{}", str(i))
        if not prompt:
            raise UserError(f"{named} is empty: --prompt and --prompts must contain text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{named} is not valid Unicode ({error.reason}): correct --prompt or --prompts"
            ) from error
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        ids = [
            encode_chat(
                tokenizer,
                [*before, {"role": "user", "content": prompt}],
                where.replace("{}", str(i)),
            )
            for i, prompt in enumerate(prompts, start=1)
        ]
    else:
        ids = [[*tokenizer.prefix, *ids] for ids in tokenizer.encode_batch(prompts)]
    return ids


def stream_one(session: Session, shown: str, ids: list[int]) -> str:
    """Stream the continuation of a prompt to stdout, and return the reason why it ended.

    `shown` is printed before it. `ids` are the token ids of the prompt.
    """
    generator, tokenizer = session.generator, session.tokenizer
    rows = generator.row_multiple  # equal ones: a mesh may need several
    stream = Stream(tokenizer, session.stops, sys.stdout, ids)
    sys.stdout.write(shown)

    def on_tokens(new):
        return [stream.show(new[0])] * rows

    decoding = dataclasses.replace(session.decoding, chunk=_STREAM)
    new = generator.run(
        [ids] * rows,
        decoding,
        rows=[0] * rows,
        on_tokens=on_tokens,
        report=session.report,
        counted=1,
    )
    stopped = stream.show(new[0], last=True)
    sys.stdout.write("\n")
    return "stop" if stopped else ended_by(generator, ids, new[0], decoding.count)


def ended_by(generator: Generator, prompt: list[int], tokens: list[int], count: int) -> str:
    """Return the reason why a continuation without a stop text ended."""
    if len(tokens) == count:
        return "max_tokens"
    return "cache" if len(prompt) + len(tokens) >= generator.length else "end_of_document"


def continue_file(
    session: Session, prompts: list[str], ids: list[list[int]], batch: int
) -> Iterator[dict[str, Any]]:
    """Yield one record per prompt, in order; `ids` are the token ids of `prompts`."""
    generator, tokenizer, stops = session.generator, session.tokenizer, session.stops
    decoding = dataclasses.replace(session.decoding, chunk=_BATCH if stops else 0)
    batch = -(-batch // generator.row_multiple) * generator.row_multiple
    for start in range(0, len(prompts), batch):
        rows = list(range(start, min(start + batch, len(prompts))))
        padded = rows + rows[-1:] * (batch - len(rows))  # one shape, so one compilation

        def on_tokens(new, padded=padded):
            texts = (continuation(tokenizer, ids[i], t) for i, t in zip(padded, new, strict=True))
            return [cut_at(text, stops)[1] for text in texts]

        new = generator.run(
            [ids[i] for i in padded],
            decoding,
            rows=padded,
            on_tokens=on_tokens if stops else None,
            report=session.report,
            counted=len(rows),
        )
        for i, tokens in zip(rows, new, strict=False):
            text, stopped = cut_at(continuation(tokenizer, ids[i], tokens), stops)
            while stopped and cut_at(continuation(tokenizer, ids[i], tokens[:-1]), stops)[1]:
                tokens = tokens[:-1]  # sampled after the stop text, before the next search
            yield {
                "prompt": prompts[i],
                "text": text,
                "prompt_tokens": len(ids[i]),
                "tokens": len(tokens),
                "ended_by": "stop"
                if stopped
                else ended_by(generator, ids[i], tokens, decoding.count),
            }


def summary(session: Session, batch: int) -> str:
    """Return a line about speed and cache size, for stderr."""
    generator, report = session.generator, session.report
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


def _write_records(records: Iterator[dict[str, Any]], out: TextIO, total: int) -> None:
    escaped = not (out.encoding or "").lower().startswith("utf")  # for terminals without UTF-8
    for done, record in enumerate(records, start=1):
        out.write(json.dumps(record, ensure_ascii=escaped) + "\n")
        out.flush()
        if out is not sys.stdout and sys.stderr.isatty():
            print(f"\r{done} of {total} prompts", end="", file=sys.stderr)
