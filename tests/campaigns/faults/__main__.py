"""Run the campaign of faults.

    python -m tests.campaigns.faults --trials 3 --seed 0

Each trial starts real training processes, causes a fault, restarts them if a user would do so, and
compares the result with that of a run without the fault, bit for bit: parameters and moments, all
rows of metrics except for measured speeds, and the batch of every step.

`--remove GUARD` disables one guard of the program (`--remove all`: each in turn) and expects the
campaign to detect this: a campaign that passes without a guard has not tested it.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from tests.campaigns.faults.kinds import KINDS, SHOWN_BY
from tests.campaigns.faults.runs import Failed, Scratch, write_corpus

_NOTICED_WITHIN = 6  # trials until a disabled guard must be detected


def trial(campaign: Path, kind: str, seed: int, number: int, remove: str | None) -> str | None:
    """Run one trial, which seed, kind and number determine; return None or how it failed."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    scratch = Scratch(campaign, f"{kind}-{number}{f'-{remove}' if remove else ''}", rng, remove)
    problem: str | None = None
    try:
        KINDS[kind](scratch)
    except Failed as error:
        problem = str(error)
    except OSError as error:
        if "not permitted" not in str(error):
            problem = traceback.format_exc()
        else:
            return f"left out: {error}"
    except Exception:
        problem = traceback.format_exc()
    finally:
        scratch.close(keep=problem is not None)
    return problem


def campaign(arguments: argparse.Namespace, folder: Path) -> int:
    """Run all trials of the requested kinds; return the number of failures."""
    results: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    jobs = [(kind, number) for number in range(arguments.trials) for kind in arguments.kinds]
    began, done = time.monotonic(), 0

    def work(job: tuple[str, int]) -> tuple[str, int, str | None]:
        return *job, trial(folder, job[0], arguments.seed, job[1], None)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for kind, number, problem in pool.map(work, jobs):
            done += 1
            outcome = "passed" if problem is None else "left out"
            if problem is not None and not problem.startswith("left out"):
                outcome = "failed"
                print(f"FAILED {kind} {number}: {problem}", flush=True)
            results[kind][outcome] += 1
            if arguments.out:
                row = {"kind": kind, "number": number, "outcome": outcome, "problem": problem}
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row | {"seed": arguments.seed}) + "\n")
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            if done % 10 == 0 or done == len(jobs):
                print(f"{done}/{len(jobs)} trials, {left:.0f} s left", file=sys.stderr, flush=True)
    width = max(map(len, arguments.kinds))
    print(f"\n{'fault':<{width}}  trials  passed  failed  left out")
    for kind in arguments.kinds:
        r = results[kind]
        counts = (r.total(), r["passed"], r["failed"], r["left out"])
        print(f"{kind:<{width}}" + "".join(f"{count:8d}" for count in counts))
    print(f"in {time.monotonic() - began:.0f} s, seed {arguments.seed}")
    return sum(r["failed"] for r in results.values())


def without(guards: list[str], arguments: argparse.Namespace, folder: Path) -> int:
    """Disable each guard, run the faults that must detect it; return how many went undetected."""
    missed = 0
    for guard in guards:
        problem = None
        for number in range(_NOTICED_WITHIN):
            for kind in SHOWN_BY[guard]:
                problem = problem or trial(folder, kind, arguments.seed, number, guard)
            if problem:
                break
        words = " ".join((problem or "NOT NOTICED").split())[:110]
        print(f"without {guard:<11} {', '.join(SHOWN_BY[guard])}: {words}", flush=True)
        missed += problem is None
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=1, help="trials of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated faults")
    parser.add_argument("--remove", choices=[*SHOWN_BY, "all"], help="guard to disable")
    parser.add_argument("--workers", type=int, default=2, help="trials that run at the same time")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append a row per trial to")
    parser.add_argument("--keep", type=Path, help="new folder that keeps failed trials")
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds has unknown faults {', '.join(unknown)}; known: {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        write_corpus(folder / "corpus")
        if arguments.remove:
            guards = [*SHOWN_BY] if arguments.remove == "all" else [arguments.remove]
            return 1 if without(guards, arguments, folder) else 0
        return 1 if campaign(arguments, folder) else 0


if __name__ == "__main__":
    sys.exit(main())
