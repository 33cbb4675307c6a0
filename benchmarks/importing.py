"""Measure time and memory of importing a model of Qwen3-30B-A3B's shapes with small experts.

    python -m benchmarks.importing [--layers 48] [--experts 128] [--width 8] [--folder /scratch]

The model has 48 layers of 128 experts, D 2048, 32 query and 4 key/value heads of width 128, and a
vocabulary of 151,936 with an untied unembedding. All shapes are the published ones except the
experts' width, which is 8 instead of 768. Its 18,867 bfloat16 tensors, 3.7 GB in shards of 1 GB
with an index, are created once below the folder. The user's command runs in a separate process. Its
memory is sampled while it runs: anonymous memory, without the pages of mapped files, which the
system reclaims when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compression import anonymous
from benchmarks.harness import write_json
from mea_jax.convert import config_reading, shards, tensors
from mea_jax.data.tokenizers import train_bpe

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def make_model(folder: Path, layers: int, experts: int, width: int) -> tuple[int, int]:
    """Write a folder as published, with random weights.

    Return the number of tensors, and the bytes of the largest.
    """
    folder.mkdir()
    counts = {"num_hidden_layers": layers, "num_experts": experts, "moe_intermediate_size": width}
    config = CONFIG | counts
    (folder / "config.json").write_text(json.dumps(config))
    train_bpe(iter(["no text is read here"]), 300).save(folder)
    entries = tensors.entries(config_reading.model_config(config, "config.json"))
    rng = np.random.default_rng(0)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            scale = np.float32(entry.hf_shape[-1] ** -0.5)
            yield entry.name, rng.standard_normal(entry.hf_shape, np.float32) * scale

    plan = [(entry.name, entry.hf_shape) for entry in entries]
    shards.write_folder(folder, plan, arrays(), "bfloat16", 10**9)
    return len(plan), max(shards.size_of([item], "bfloat16") for item in plan)


def run_import(model: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Run the command; return its seconds, its peak memory and the bytes of its output."""
    command = [
        *(sys.executable, "-m", "mea_jax.convert", "from_hf", "--model", str(model)),
        *("--out", str(out), "--dtype", dtype),
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
        sys.exit("the import failed: see its messages above")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"seconds": time.monotonic() - began, "peak_gib": peak, "bytes": size, "dtype": dtype}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = (arguments.layers, arguments.experts, arguments.width)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        count, largest = make_model(Path(scratch) / "model", *shape)
        found = run_import(Path(scratch) / "model", Path(scratch) / "run", arguments.dtype)
    found |= {"tensors": count, "largest_gib": largest / 2**30}
    print(f"{count:,} tensors, the largest of {found['largest_gib']:.2f} GiB")
    print(
        f"{found['bytes'] / 1e9:.2f} GB of {found['dtype']} written in {found['seconds']:.0f} s, "
        f"peak {found['peak_gib']:.2f} GiB of anonymous memory"
    )
    if arguments.json:
        names = ("layers", "experts", "width")
        write_json(arguments.json, [dict(zip(names, shape, strict=True)) | found])


if __name__ == "__main__":
    main()
