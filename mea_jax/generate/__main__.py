"""Continue prompts with a trained model, using a KV cache.

python -m mea_jax.generate --checkpoint runs/quickstart --prompt "def main("
python -m mea_jax.generate --checkpoint runs/quickstart --prompts prompts.txt --output out.jsonl
"""

import contextlib
import sys
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh

from mea_jax import cli
from mea_jax.checkpoint.load import Trained, open_trained
from mea_jax.cli import si
from mea_jax.errors import UserError
from mea_jax.generate import decode
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.generate.run import (
    CACHE_DTYPES,
    Session,
    _write_records,
    continue_file,
    encode,
    read_prompts,
    stream_one,
    summary,
)
from mea_jax.model.kv_cache import RECENT
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import sharding


def _check_flags() -> None:
    if CHECKPOINT.value is None:
        raise UserError("no checkpoint given: add --checkpoint runs/quickstart")
    if (PROMPT.value is None) == (PROMPTS.value is None):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if SYSTEM.value is not None and not CHAT.value:
        raise UserError("--system works only with --chat: add --chat, or remove --system")
    if PROMPT.value == "":
        raise UserError("--prompt is empty: give at least one character")
    if OUTPUT.value and PROMPTS.value is None:
        raise UserError("--output works only with --prompts: replace --prompt, or remove --output")


def _generate(session: Session, prompts: list[str], ids: list[list[int]]) -> None:
    batch = min(BATCH_SIZE.value, len(prompts))
    if PROMPTS.value is None:
        reason = stream_one(session, "" if CHAT.value else prompts[0], ids[0])
        print(f"\n{summary(session, 1)}; ended by {reason}", file=sys.stderr)
        return
    records = continue_file(session, prompts, ids, batch)
    if OUTPUT.value is None:
        _write_records(records, sys.stdout, len(prompts))
    else:
        try:
            with open(OUTPUT.value, "w", encoding="utf-8") as out:
                _write_records(records, out, len(prompts))
        except OSError as error:
            raise UserError(
                f"--output {OUTPUT.value}: {error.strerror}; choose another file"
            ) from error
        print(f"{len(prompts)} lines written to {OUTPUT.value}", file=sys.stderr)
    print(summary(session, batch), file=sys.stderr)
    model = session.generator.served.model
    if model.variant == "mea" and model.key_bits is None:  # it can be exported
        words = "to serve many requests: python -m mea_jax.convert to_hf, then vllm serve"
        print(words, file=sys.stderr)


def main() -> None:
    """Run the command."""
    _check_flags()
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    path = Path(PROMPTS.value or "")
    prompts = [PROMPT.value or ""] if PROMPTS.value is None else read_prompts(path)
    cli.enable_compilation_cache()
    trained = open_trained(
        Path(CHECKPOINT.value or ""), lambda line: print(line, file=sys.stderr, flush=True)
    )
    tokenizer = trained.tokenizer
    where = "the prompt" if PROMPTS.value is None else f"prompt {{}} of {PROMPTS.value}"
    ids = encode(tokenizer, prompts, where, CHAT.value, SYSTEM.value)
    window = trained.config.data.context_length
    needed = max(window, max(map(len, ids)) + MAX_TOKENS.value)
    length = CACHE_LENGTH.value or min(needed, trained.context_limit)
    mesh = None if MESH.value is None else sharding.requested_mesh(MESH.value, "--mesh")
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        generator = _generator(trained, length, mesh)
        # Check all prompts before the output file is opened, so that errors overwrite no old one.
        for i, prompt in enumerate(ids, start=1):
            generator.check(prompt, where.replace("{}", str(i)))
        decoding = Decoding(MAX_TOKENS.value, sampling, SEED.value, stop=tokenizer.stops)
        session = Session(generator, tokenizer, decoding, [stop for stop in STOP.value if stop])
        _run(session, prompts, ids)


def _generator(trained: Trained, length: int, mesh: Mesh | None) -> Generator:
    if mesh is None:
        model, params = trained.on_first_device(DTYPE.value, length)
    else:
        model, params = trained.on_mesh(mesh, DTYPE.value, length)
    return Generator(
        model,
        params,
        length=length,
        cache_dtype=None if CACHE_DTYPE.value == "auto" else CACHE_DTYPE.value,
        form=CACHE_FORM.value,
        mesh=mesh,
        donate=True,
    )


def _run(session: Session, prompts: list[str], ids: list[list[int]]) -> None:
    """Generate; raise `UserError` if the device has too little memory."""
    generator = session.generator
    try:
        _generate(session, prompts, ids)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = generator.cache_bytes_per_token() * (generator.length + RECENT)
        rows = min(BATCH_SIZE.value, len(prompts))
        raise UserError(
            f"out of memory with a cache of {si(size * rows, 'B')} for {rows} rows of "
            f"{generator.length} positions: lower --cache_length or --batch_size, or set "
            "--cache_dtype=int8"
        ) from error


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "run directory, or one of its steps")
    PROMPT = flags.DEFINE_string("prompt", None, "text to continue; the result is streamed")
    PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts: one per line, or *.jsonl")
    CHAT = flags.DEFINE_bool("chat", False, "apply the model's chat template to each prompt")
    SYSTEM = flags.DEFINE_string("system", None, "system message of --chat")
    OUTPUT = flags.DEFINE_string("output", None, "file for the JSON lines of --prompts")
    MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "maximum of new tokens", lower_bound=1)
    TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0: the most likely token")
    TOP_K = flags.DEFINE_integer("top_k", 0, "sample from the k most likely tokens; 0: all")
    TOP_P = flags.DEFINE_float("top_p", 1.0, "sample from the fewest tokens that reach p; 1: all")
    SEED = flags.DEFINE_integer(
        "seed", 0, "seed for sampling", lower_bound=0, upper_bound=2**32 - 1
    )
    STOP = flags.DEFINE_multi_string("stop", [], "text that ends a continuation; may be repeated")
    BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", 8, "number of prompts continued at the same time", lower_bound=1
    )
    MESH = flags.DEFINE_string(
        "mesh",
        None,
        "devices to divide the model over, such as tensor=4 or fsdp=2,tensor=4; default: the first",
    )
    CACHE_LENGTH = flags.DEFINE_integer(
        "cache_length",
        0,
        "positions of the cache; 0: as many as the prompts and --max_tokens need, at least a "
        "training window and at most the longest context of the model",
        lower_bound=0,
        upper_bound=2**31 - 1,
    )
    CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", "auto", CACHE_DTYPES, "dtype of the cache")
    CACHE_FORM = flags.DEFINE_enum("cache_form", "auto", decode.FORMS, "how mixed heads are cached")
    DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "compute dtype")
    cli.run(main, "stopped")
