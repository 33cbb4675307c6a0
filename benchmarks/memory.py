"""Measure whether the resident memory of a training process grows over its steps.

    python -m benchmarks.memory [--steps 2000] [--plot memory.png] [--json out.json]
    python -m benchmarks.memory -- --config.model.d_model=256

This trains a small model with the command line, including evaluations and checkpoints, and observes
the process from outside: VmRSS in /proc and the step in metrics.jsonl. The slope is that of a
straight line fitted to all samples after the first fifth of the steps; its interval comes from a
bootstrap over blocks.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import write_json
from mea_jax.checkpoint.metrics import read_metrics

SMALL = (
    *("model.d_model=64", "model.n_layers=2", "model.d_ff=128", "model.n_heads=4"),
    *("model.n_kv_heads=4", "model.head_dim=16", "model.vocab_size=512", "data.tokenizer=bytes"),
    *("data.context_length=64", "evaluate.every=100", "checkpoint.every=50", "log_every=1"),
)
_EVERY = 0.05  # seconds between two samples


def resident(process: int) -> int:
    """Return the resident memory of a process in bytes; 0 after it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(sizes[0]) * 1024 if sizes else 0


def watch(steps: int, overrides: list[str], folder: Path) -> np.ndarray:
    """Train; return (samples, 2), the last step in metrics.jsonl and the resident bytes."""
    command = [
        *(sys.executable, "-m", "mea_jax.train", "--config", "configs/quickstart.py"),
        *("--workdir", str(folder / "run"), f"--config.steps={steps}"),
        *(f"--config.{change}" for change in SMALL),
        *overrides,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics, samples = folder / "run" / "metrics.jsonl", []
    step = position = 0
    while process.poll() is None:
        time.sleep(_EVERY)
        size = metrics.stat().st_size if metrics.exists() else 0
        if size > position:
            with metrics.open() as file:
                file.seek(position)
                step += sum('"kind": "train"' in line for line in file)
            position = size
        samples.append((step, resident(process.pid)))
    if process.returncode:
        sys.exit(
            f"error: the training ended with status {process.returncode}; see its messages above"
        )
    assert read_metrics(metrics)[-1]["step"] == steps
    return np.array([s for s in samples if s[1] and 0 < s[0] < steps], np.float64)


def slope(samples: np.ndarray) -> float:
    """Return the bytes per step of the least-squares line."""
    return float(np.polyfit(samples[:, 0], samples[:, 1], 1)[0])


def interval(samples: np.ndarray, blocks: int = 20, draws: int = 500) -> tuple[float, float]:
    """Return the 95% interval of slopes over resampled blocks of neighbouring samples."""
    rng = np.random.default_rng(0)
    parts = np.array_split(samples, blocks)
    drawn = [
        slope(np.concatenate([parts[i] for i in rng.integers(0, blocks, blocks)]))
        for _ in range(draws)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def plot(samples: np.ndarray, start: int, path: Path) -> None:
    """Plot resident memory by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot(samples[:, 0], samples[:, 1] / 2**20, color="0.3", linewidth=0.8)
    late = samples[samples[:, 0] > start]
    line = np.polyval(np.polyfit(late[:, 0], late[:, 1], 1), late[:, 0])
    axis.plot(late[:, 0], line / 2**20, color="C1", label="straight line after warm-up")
    axis.set(xlabel="step", ylabel="resident memory (MiB)", ylim=(0, None))
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="after --: overrides for mea_jax.train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(arguments.steps, arguments.overrides, Path(folder))
    start = arguments.steps // 5
    late = samples[samples[:, 0] > start]
    low, high = interval(late)
    per = 1000 / 2**20  # bytes per step -> MiB per 1,000 steps
    print(f"{len(late)} samples from step {start} to {arguments.steps}")
    print(f"resident {late[:, 1].min() / 2**20:.0f} to {late[:, 1].max() / 2**20:.0f} MiB")
    print(
        f"slope {slope(late) * per:+.2f} MiB per 1,000 steps "
        f"(95% interval: {low * per:+.2f} to {high * per:+.2f})"
    )
    if arguments.plot:
        plot(samples, start, arguments.plot)
    if arguments.json:
        write_json(arguments.json, [{"step": int(s), "bytes": int(b)} for s, b in samples])


if __name__ == "__main__":
    main()
