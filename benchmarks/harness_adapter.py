r"""Compare requests/s of our model in lm-evaluation-harness with the harness's own `hf` model.

    python -m mea_jax.convert to_hf --checkpoint runs/suite --out exported/suite
    python -m studies.harness_suite --out suite
    python -m benchmarks.harness_adapter --checkpoint runs/suite --exported exported/suite \
        --suite suite

The `hf` model is the exported checkpoint in torch. Both use all cores and answer the same requests
in float32, in turn, in one process: log-likelihoods of the suite's choices, and generated answers
to its sums. Loading is not timed, nor is a first round, in which ours compiles and theirs warms up.
--out contains seconds of each round, requests/s, the ratio over the rounds and the largest
difference of a log-likelihood.
"""

import argparse
import logging
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.harness import print_table, write_json
from mea_jax.evaluate.harness import run
from mea_jax.evaluate.harness.model import HarnessModel

TASKS = ("mea_code", "mea_recall", "mea_needle", "mea_arithmetic_choice", "mea_arithmetic")


def collected(tasks: dict[str, Any], limit: int) -> dict[str, list[Instance]]:
    """Return all requests by kind."""
    found: dict[str, list[Instance]] = {}
    for task in tasks["tasks"].values():
        task.build_all_requests(limit=limit)
        for instance in task.instances:
            found.setdefault(instance.request_type, []).append(instance)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--exported", required=True, help="the same model, exported for transformers"
    )
    parser.add_argument("--suite", required=True, help="folder that studies.harness_suite wrote")
    parser.add_argument("--out", default="bench/harness_adapter.json")
    parser.add_argument("--limit", type=int, default=100, help="documents per task")
    parser.add_argument("--batch_size", type=int, default=16, help="batch size of the hf model")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(os.cpu_count() or 1)
    ours = HarnessModel(
        args.checkpoint, max_length=args.max_length, dtype="float32", add_bos_token=False
    )
    theirs = HFLM(
        pretrained=args.exported,
        device="cpu",
        dtype="float32",
        max_length=args.max_length,
        batch_size=args.batch_size,
        add_bos_token=False,
    )
    options = run.Options(tasks=TASKS, include_path=args.suite)
    requests = collected(run.load_tasks(options), args.limit)
    rows = []
    for kind, asked in requests.items():
        seconds: dict[str, list[float]] = {"ours": [], "hf": []}
        answers: dict[str, Any] = {}
        for repeat in range(args.repeats + 1):
            for name, model in (("ours", ours), ("hf", theirs)):
                began = time.perf_counter()
                answers[name] = getattr(model, kind)(asked, disable_tqdm=True)
                if repeat:  # the first one compiles
                    seconds[name].append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["hf"], strict=True)]
        row: dict[str, Any] = {
            "kind": kind,
            "requests": len(asked),
            "ours": len(asked) / statistics.median(seconds["ours"]),
            "hf": len(asked) / statistics.median(seconds["hf"]),
            "times": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "seconds": seconds,
        }
        pairs = list(zip(answers["ours"], answers["hf"], strict=True))
        if kind == "loglikelihood":
            row["difference"] = max(abs(a[0] - b[0]) for a, b in pairs)
            row["same"] = float(np.mean([a[1] == b[1] for a, b in pairs]))
        else:
            row["same"] = float(np.mean([a == b for a, b in pairs]))
        rows.append(row)
    columns = {
        "kind": ("", "s"),
        "requests": ("requests", ",d"),
        "ours": ("ours/s", ",.1f"),
        "hf": ("hf/s", ",.1f"),
        "times": ("ours over hf", ".2f"),
        "least": ("least", ".2f"),
        "most": ("most", ".2f"),
        "difference": ("largest difference", ".1e"),
        "same": ("same answers", ".1%"),
    }
    print_table(rows, columns)
    share = ours.report()
    print(f"{share['log_likelihoods']}\n{share['answers']}\nreal share {share['real_share']:.1%}")
    write_json(args.out, [*rows, {"report": share}])


if __name__ == "__main__":
    main()
