"""Engines of `benchmarks.generation`: each loads a model and continues prompts in its own process.

    python benchmarks/generation_engines.py '{"engine": "transformers", "model": "exported", ...}'

A process reads one job per line from stdin, a JSON object, and answers each with a JSON line on
stdout. It imports only its own engine, so that the thread pools of XLA, torch and llama.cpp stay
apart, and needs nothing of this project unless the engine is ours. All engines decode greedily and
do not stop at the end of a text.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (prompts, new tokens) -> (seconds of prefill, seconds of decoding, new tokens of each prompt)
Engine = Callable[[list[list[int]], int], tuple[float, float, list[list[int]]]]

_KEPT: list[Any] = []  # callbacks that C code calls later


def ours(settings: dict[str, Any]) -> tuple[Engine, Callable[[int], float]]:
    """Return our engine, and a function that returns bytes/s of a plain read of `size` bytes."""
    from benchmarks.bandwidth import plain_read
    from mea_jax.checkpoint.load import open_trained
    from mea_jax.generate.generator import Decoding, Generator, Report
    from mea_jax.ops.sampling import Sampling

    length = settings["length"]
    trained = open_trained(Path(settings["model"]), lambda line: print(line, file=sys.stderr))
    model, params = trained.on_first_device(settings["dtype"], length)
    generator = Generator(model, params, length=length)

    def run(prompts: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
        report = Report()  # without compilation
        decoding = Decoding(count, Sampling(temperature=0.0))
        new = generator.run(prompts, decoding, report=report)
        return report.prefill_seconds, report.decode_seconds, new

    def read(size: int) -> float:
        total = plain_read(size)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            total().block_until_ready()
            times.append(time.perf_counter() - start)
        return size / min(times)

    return run, read


def transformers(settings: dict[str, Any]) -> Engine:
    """Return transformers' model with sdpa attention and a `DynamicCache`, stepped by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    loaded = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    model = loaded.eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
        start = time.perf_counter()
        out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        chosen = [out.logits[:, -1].argmax(-1)]
        middle = time.perf_counter()
        for _ in range(count):
            out = model(chosen[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
            chosen.append(out.logits[:, -1].argmax(-1))
        new = torch.stack(chosen[:count], 1).tolist()
        return middle - start, time.perf_counter() - middle, new

    return run


def llama_cpp(settings: dict[str, Any]) -> Engine:
    """Return llama.cpp with its default cache (float16) and batches, through its C interface."""
    import llama_cpp as lib
    import numpy as np

    @lib.llama_log_callback
    def silent(level: int, text: bytes, data: Any) -> None: ...

    _KEPT.append(silent)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    loading = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(settings["model"].encode(), loading)
    if not model:
        sys.exit(f"llama.cpp cannot load {settings['model']}")
    words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}

    def context(rows: int) -> Any:
        if rows not in contexts:
            options = lib.llama_context_default_params()
            options.n_ctx, options.n_seq_max = settings["length"] * rows, rows
            options.n_threads = options.n_threads_batch = settings["threads"]
            contexts[rows] = lib.llama_init_from_model(model, options)
        return contexts[rows]

    def decode(place: Any, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Process tokens: (id, position, row, whether its logits are needed)."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, row, needed) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, needed
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if lib.llama_decode(place, batch) != 0:
            sys.exit("llama_decode failed")
        lib.llama_batch_free(batch)

    def best(place: Any, index: int) -> int:
        logits = lib.llama_get_logits_ith(place, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, (words,))))

    def run(prompts: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
        place, length = context(len(prompts)), len(prompts[0])
        lib.llama_memory_clear(lib.llama_get_memory(place), True)
        start = time.perf_counter()
        chosen, most = [], lib.llama_n_batch(place)
        for row, prompt in enumerate(prompts):
            tokens = [(token, i, row, i == length - 1) for i, token in enumerate(prompt)]
            for first in range(0, length, most):
                decode(place, tokens[first : first + most])
            chosen.append(best(place, -1))
        new, middle = [[token] for token in chosen], time.perf_counter()
        for step in range(count):
            rows = enumerate(new)
            decode(place, [(chain[-1], length + step, row, True) for row, chain in rows])
            for row, chain in enumerate(new):
                chain.append(best(place, row))
        return middle - start, time.perf_counter() - middle, [chain[:count] for chain in new]

    return run


def peak_memory() -> float:
    """Return the largest resident memory of this process since the last call, in GiB."""
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return int(peak.split()[1]) / 2**20


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to stdout
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    read: Callable[[int], float] | None = None
    if settings["engine"] == "ours":
        run, read = ours(settings)
    else:
        run = {"transformers": transformers, "llama.cpp": llama_cpp}[settings["engine"]](settings)
    print("{}", file=answers, flush=True)  # loaded
    for line in sys.stdin:
        job = json.loads(line)
        if "read" in job:
            assert read is not None
            found: dict[str, Any] = {"bytes_per_s": read(job["read"])}
        else:
            peak_memory()
            began, processor = time.perf_counter(), time.process_time()
            prefill, decoding, new = run(job["prompts"], job["count"])
            found = {"prefill_s": prefill, "decode_s": decoding, "tokens": new}
            found["total_s"] = time.perf_counter() - began
            found["processor_s"] = time.process_time() - processor
            found["peak_gib"] = peak_memory()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
