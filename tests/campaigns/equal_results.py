"""Record the results of the commands, to compare them before and after a change to the code.

    python -m tests.campaigns.equal_results --out before.json
    ... change the code ...
    python -m tests.campaigns.equal_results --out after.json --against before.json

All results come from commands that users type, so modules may move in between. They are the losses
of 50 steps of three configs, greedy texts of three attention variants, compressions by each method,
and a plan. The second call prints each value that differs, and then exits with status 1. A call
takes about six minutes on two CPU cores. Results are equal only on the same kind of machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 50
# A model of two layers for commands that run many times.
TINY = (
    "--config.model.d_model=64",
    "--config.model.n_layers=2",
    "--config.model.d_ff=128",
    "--config.model.n_heads=4",
    "--config.model.n_kv_heads=4",
    "--config.model.head_dim=16",
    "--config.model.scan_unroll=2",
)
SHAPES = {
    "quickstart": (),
    "mea_125m": (
        "--config.batch_size=2",
        "--config.accumulate=1",
        "--config.data.context_length=128",
        "--config.data.tokenizer=bpe:4096",
    ),
    "moe_quickstart": ("--config.batch_size=2",),
}
VARIANTS = ("no_norm", "gqa", "differential_v2")
METHODS = ("svd", "calibrated", "aligned", "frequency", "gqa_mean", "gqa_aligned")
# Wall times and values derived from them, text that a change may reword, and paths of this call.
_MEASURED = {"compile_seconds", "mfu", "text", "versions", "out", "checkpoint"}


def _command(module: str, *arguments: str) -> str:
    """Run a command of the package and return its standard output."""
    words = [sys.executable, "-m", f"mea_jax.{module}", *arguments]
    print("+", " ".join(words[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout


def _train(config: str, workdir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train for `STEPS` steps and return the rows of metrics.jsonl."""
    _command(
        "train",
        f"--config=configs/{config}",
        f"--workdir={workdir}",
        f"--config.steps={STEPS}",
        "--config.log_every=1",
        "--config.optimizer.warmup_steps=10",
        "--config.evaluate.every=25",
        "--config.evaluate.batches=2",
        "--config.checkpoint.every=50",
        *overrides,
    )
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _generate(run: Path) -> str:
    """Return the most likely continuation of a fixed prompt by the model in `run`."""
    flags = ("--prompt=def main(", "--temperature=0", "--max_tokens=48", "--dtype=float32")
    return _command("generate", f"--checkpoint={run}", *flags)


def _compress(run: Path, out: Path, method: str) -> dict[str, Any]:
    """Compress the model in `run` to half its cache and return the content of compression.json."""
    tokens = ("--calibration_tokens=8192", "--held_out_tokens=8192")
    flags = (f"--checkpoint={run}", f"--out={out}", f"--method={method}", "--keep=0.5")
    _command("compress", *flags, *tokens)
    return json.loads((out / "compression.json").read_text())


def _without_measured(tree: Any) -> Any:
    """Return `tree` without the entries that differ from one run of the same code to the next."""
    if isinstance(tree, dict):
        return {
            key: _without_measured(value)
            for key, value in tree.items()
            if key not in _MEASURED and not key.endswith("per_second")
        }
    if isinstance(tree, list):
        return [_without_measured(value) for value in tree]
    return tree


def record(folder: Path) -> dict[str, Any]:
    """Run every command below `folder` and return its results as JSON values."""
    found: dict[str, Any] = {"training": {}, "texts": {}, "compressions": {}}
    for name, overrides in SHAPES.items():
        found["training"][name] = _train(f"{name}.py", folder / name, *overrides)
    for variant in VARIANTS:
        run = folder / variant
        _train(f"quickstart.py:{variant}", run, *TINY)
        found["texts"][variant] = _generate(run)
    original = folder / "mha"
    _train("quickstart.py:mha", original, *TINY)
    for method in METHODS:
        found["compressions"][method] = _compress(original, folder / f"mha_{method}", method)
    _command(
        "plan", "--config=configs/quickstart.py", "--topology=gpu:8", f"--out={folder / 'plan'}"
    )
    found["plan"] = json.loads((folder / "plan.json").read_text())
    return {name: _without_measured(value) for name, value in found.items()}


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Yield a line for each value that is not exactly equal in `before` and `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif before != after:
        yield f"{where}: {before!r} before, {after!r} after"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier call")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    lines = sorted(differences(json.loads(options.against.read_text()), found))
    print("\n".join(lines) if lines else "every recorded number is equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
