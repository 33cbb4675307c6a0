r"""Measure the speed-up from computing common prefixes of benchmark requests only once.

    python ../shared/tools/real_tasks.py tasks    # or any folder of lm-evaluation-harness tasks
    python -m benchmarks.shared_beginnings --checkpoint runs/smol --tasks r_hellaswag \
        --include_path tasks --limit 25

Two models score the same requests in float32, in turn, in one process: one as token trees
(`mea_jax.evaluate.harness.prefix_trees`), the other as windows of packed texts. --out contains
seconds of each round, the ratio over the rounds and the largest difference of a log-likelihood.
"""

import argparse
import statistics
import time

from benchmarks.harness import print_table, write_json
from benchmarks.harness_adapter import collected
from mea_jax.evaluate.harness import run
from mea_jax.evaluate.harness.model import HarnessModel


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--include_path", help="folder of tasks")
    parser.add_argument("--out", default="bench/shared_beginnings.json")
    parser.add_argument("--limit", type=int, default=25, help="documents of each task")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    trees, rows = (HarnessModel(args.checkpoint, dtype="float32") for _ in range(2))
    rows.scorer.branches = False
    found = []
    for task in args.tasks.split(","):
        options = run.Options(tasks=(task,), include_path=args.include_path)
        (asked,) = collected(run.load_tasks(options), args.limit).values()
        seconds: dict[str, list[float]] = {"trees": [], "rows": []}
        answers = {}
        for repeat in range(args.repeats + 1):
            for name, model in (("trees", trees), ("rows", rows)):
                began = time.perf_counter()
                answers[name] = model.loglikelihood(asked, disable_tqdm=True)
                if repeat:  # the first one compiles
                    seconds[name].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(seconds["trees"], seconds["rows"], strict=True)]
        pairs = zip(answers["trees"], answers["rows"], strict=True)
        found.append(
            {
                "task": task,
                "requests": len(asked),
                "times": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "difference": max(abs(a[0] - b[0]) for a, b in pairs),
                "seconds": seconds,
            }
        )
    columns = {
        "task": ("task", "s"),
        "requests": ("requests", ",d"),
        "times": ("trees over rows", ".2f"),
        "least": ("least", ".2f"),
        "most": ("most", ".2f"),
        "difference": ("largest difference", ".1e"),
    }
    print_table(found, columns)
    write_json(args.out, found)


if __name__ == "__main__":
    main()
