"""Measure time and memory of compressing Qwen3-30B-A3B's attention shapes with random weights.

    python -m benchmarks.compression [--methods svd,aligned] [--layers 48] [--folder /scratch]

The model has 48 layers, D 2048, 32 query and 4 key/value heads of width 128, with normed queries
and keys. Its feed-forward layers are small, because compression only reads and writes them. The
checkpoint, 3.8 GB, is created once below the folder. Each method runs as the user's command in a
separate process. Its memory is sampled while it runs: anonymous memory, without the pages of mapped
files. The loss is meaningless here.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write_json
from mea_jax.checkpoint.layerwise import Writer, places
from mea_jax.config.schema import DataConfig, ModelConfig, TrainConfig
from mea_jax.data.prepare import prepare
from mea_jax.model.params import abstract_params
from mea_jax.ops.resolve import resolve

MODEL = ModelConfig(
    vocab_size=257,
    d_model=2048,
    n_layers=48,
    n_heads=32,
    n_kv_heads=4,
    head_dim=128,
    d_ff=256,
    hlc="none",
    head_norm=False,
    qk_norm=True,
    tie_embeddings=True,
)
TEXT = DataConfig(tokenizer="bytes", context_length=256)
TOKENS = {"svd": 0, "frequency": 16384, "aligned": 16384}  # for calibration


def make_checkpoint(run: Path, layers: int) -> None:
    """Write a run directory with random weights, layer by layer."""
    import jax

    config = TrainConfig(name="stack", model=dataclasses.replace(MODEL, n_layers=layers), data=TEXT)
    config = dataclasses.replace(config, model=resolve(config.model, jax.devices(), 256))
    prepared = prepare(TEXT, MODEL.vocab_size)
    rng, shapes = np.random.default_rng(0), abstract_params(config.model)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "scale":
            return np.ones(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)

    def tree(node: Any, skip: int) -> Any:
        return {
            name: tree(leaf, skip) if isinstance(leaf, dict) else values(name, leaf.shape[skip:])
            for name, leaf in node.items()
        }

    with tempfile.TemporaryDirectory(dir=run.parent) as scratch:
        writer = Writer(Path(scratch), config.model)
        top = {name: leaf for name, leaf in shapes.items() if not name.startswith("layers")}
        writer.write_non_layer(tree(top, 0))
        for index, (stack, _) in enumerate(places(config.model)):
            writer.write_layer(index, tree(shapes[stack], 1))
        (run / "checkpoints").mkdir(parents=True)
        (run / "tokenizer").mkdir()
        prepared.tokenizer.save(run / "tokenizer")
        writer.save(run / "checkpoints" / "1", config, prepared.digest)


def anonymous(pid: int) -> float:
    """Return the GiB of anonymous memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    return 0.0


def compress(run: Path, method: str) -> dict[str, Any]:
    """Run the command and return its seconds and peak memory."""
    command = [
        *(sys.executable, "-m", "mea_jax.compress", "--checkpoint", str(run)),
        *("--out", str(run.parent / f"stack-{method}"), "--method", method),
        *("--calibration_tokens", str(TOKENS[method]), "--held_out_tokens", "2048"),
    ]
    began, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, anonymous(process.pid))
        except OSError:  # the process has just ended
            break
        time.sleep(0.05)
    if process.wait():
        sys.exit(f"{method} failed: see its messages above")
    return {"seconds": time.monotonic() - began, "peak_gib": peak, "tokens": TOKENS[method]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default="svd,aligned")
    parser.add_argument("--layers", type=int, default=MODEL.n_layers)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        run = Path(scratch) / "stack"
        run.parent.mkdir(exist_ok=True)
        make_checkpoint(run, arguments.layers)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        print(f"{arguments.layers} layers, {size / 1e9:.2f} GB")
        found = {method: compress(run, method) for method in arguments.methods.split(",")}
    for method, row in found.items():
        print(
            f"{method:<10} {row['seconds']:7.0f} s   peak {row['peak_gib']:.2f} GiB anonymous, "
            f"{row['tokens']:,} calibration tokens"
        )
    if arguments.json:
        rows = [
            {"method": m, "layers": arguments.layers, "bytes": size} | r for m, r in found.items()
        ]
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
