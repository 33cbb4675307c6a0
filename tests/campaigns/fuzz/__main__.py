"""Fuzz the package with a given number of examples, and continue after failures.

    python -m tests.campaigns.fuzz --examples 10000 --seed 0 --out failures.jsonl
    python -m tests.campaigns.fuzz --examples 600 --kinds configs

Every kind is a module of this package with a hypothesis `STRATEGY` and `check(example, folder)`,
which returns the outcome of an example ("refused: ..." if it was refused) and raises an exception
for a defect. The exit status is 1 if there was a defect or an example took longer than --limit.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tests import cpu_devices

# Set before jax is imported, as in tests/conftest.py.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_devices.flags(8)}"

import hypothesis
import jax
from hypothesis import find, given, settings

SHARES = {"configs": 1, "jsonl": 2, "tokenizers": 1, "checkpoints": 1}  # of all examples
MODULES = {"jsonl": "data"}  # of kinds whose module has another name
CLEAR_EVERY = 50  # examples between emptying jax's caches
SHRINK_EXAMPLES, SHRINK_SECONDS = 60, 120  # for each distinct failure


class Hang(BaseException):
    """A timeout of an example; not an `Exception`, so that no handler swallows it."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise `Hang` in the main thread after `seconds`, and again each second in case it is lost."""

    def ring(*_):
        raise Hang(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def load(kind: str) -> types.ModuleType:
    """Import the module of a kind; exit with one line if that fails."""
    name = f"tests.campaigns.fuzz.{MODULES.get(kind, kind)}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        sys.exit(f"error: --kinds {kind}: {name} cannot be imported ({error}); choose other kinds")


def where(error: BaseException) -> str:
    """Return the type of a failure and the line that raised it, to group equal failures."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, Hang) and len(frames) > 1:  # the last frame is the alarm's
        frames = frames[:-1]
    ours = [frame for frame in frames if "/mea_jax/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


class Campaign:
    """The examples of one kind and their outcomes."""

    def __init__(self, kind: str, examples: int, seed: int, limit: int, out: TextIO):
        self.kind, self.module = kind, load(kind)
        self.examples, self.seed, self.limit, self.out = examples, seed, limit, out
        self.outcomes: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.firsts: dict[str, tuple[Any, str]] = {}
        self.seen: set[bytes] = set()
        self.done, self.hangs, self.began = 0, 0, time.monotonic()

    def attempt(self, example: Any) -> str:
        """Run `check` in a new folder and within the limit; return its outcome."""
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            with alarm(self.limit):
                return self.module.check(example, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def one(self, example: Any) -> None:
        """Check an example and record its outcome; skip an example that was checked before."""
        digest = hashlib.blake2b(repr(example).encode(errors="surrogatepass")).digest()
        if self.done >= self.examples or digest in self.seen:
            return
        self.seen.add(digest)
        self.done += 1
        began = time.monotonic()
        try:
            self.outcomes[self.attempt(example)] += 1
        except hypothesis.errors.UnsatisfiedAssumption:
            self.outcomes["refused: assumption of the test"] += 1
        except Hang as error:
            self.hangs += 1
            self.record(example, error, began)
        except Exception as error:
            self.record(example, error, began)
        if self.done % CLEAR_EVERY == 0:
            jax.clear_caches()
            self.progress()

    def record(self, example: Any, error: BaseException, began: float) -> None:
        place, text = where(error), "".join(traceback.format_exception(error))
        self.failures[place] += 1
        self.firsts.setdefault(place, (example, text))
        row = {
            "kind": self.kind,
            "number": self.done,
            "seconds": round(time.monotonic() - began, 1),
            "place": place,
            "example": repr(example),
            "traceback": text,
        }
        self.out.write(json.dumps(row) + "\n")
        self.out.flush()
        print(f"{self.kind} {self.done}: {place}: {str(error)[:300]}", flush=True)

    def progress(self) -> None:
        seconds = time.monotonic() - self.began
        left = seconds / self.done * (self.examples - self.done)
        failed = sum(self.failures.values())
        print(
            f"{self.kind}: {self.done}/{self.examples}, {failed} failed, "
            f"{seconds / self.done:.2f} s each, {left / 60:.1f} min left",
            flush=True,
        )

    def run(self) -> None:
        quiet = settings(
            max_examples=3 * self.examples,  # some occur twice
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        body = given(self.module.STRATEGY)(lambda example: self.one(example))
        # A failure never reaches hypothesis, so that the search continues.
        hypothesis.seed(self.seed)(quiet(body))()

    def shrink(self) -> None:
        """Write the smallest example that hypothesis finds for each distinct failure."""
        for place, (example, text) in self.firsts.items():
            if place.startswith("Hang"):
                continue
            until = time.monotonic() + SHRINK_SECONDS

            def same(candidate: Any, place: str = place, until: float = until) -> bool:
                if time.monotonic() > until:
                    return False
                try:
                    self.attempt(candidate)
                except (Exception, Hang) as error:
                    return where(error) == place
                return False

            quick = settings(
                max_examples=SHRINK_EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            try:
                example = find(self.module.STRATEGY, same, settings=quick)
            except (hypothesis.errors.HypothesisException, Hang):
                continue  # rare: only the original example is in the file
            row = {"kind": self.kind, "place": place, "shrunk": repr(example), "traceback": text}
            self.out.write(json.dumps(row) + "\n")
            self.out.flush()

    def row(self) -> tuple[Any, ...]:
        refused = sum(n for outcome, n in self.outcomes.items() if outcome.startswith("refused"))
        accepted = sum(self.outcomes.values()) - refused
        failed = sum(self.failures.values()) - self.hangs
        seconds = (time.monotonic() - self.began) / max(self.done, 1)
        return self.kind, self.done, accepted, refused, failed, self.hangs, f"{seconds:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="examples of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(SHARES), help="comma-separated kinds")
    parser.add_argument("--out", type=Path, default=Path("fuzz_failures.jsonl"))
    parser.add_argument("--limit", type=int, default=120, help="seconds per example")
    parser.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for smaller examples of failures at the end",
    )
    parser.add_argument("--outcomes", action="store_true", help="list every outcome with its count")
    arguments = parser.parse_args()
    kinds = [kind for kind in arguments.kinds.split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in SHARES]:
        parser.error(f"--kinds has unknown {unknown[0]}; known: {', '.join(SHARES)}")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    whole = sum(SHARES[kind] for kind in kinds)
    campaigns = []
    with arguments.out.open("w") as out, tempfile.TemporaryDirectory(prefix="fuzz-") as cache:
        os.environ["MEA_JAX_CACHE"] = cache
        for kind in kinds:
            count = max(arguments.examples * SHARES[kind] // whole, 1)
            campaign = Campaign(kind, count, arguments.seed, arguments.limit, out)
            campaigns.append(campaign)
            campaign.run()
            if arguments.shrink:
                campaign.shrink()
    report(campaigns, arguments.outcomes)
    return int(any(campaign.failures for campaign in campaigns))


def report(campaigns: list[Campaign], outcomes: bool) -> None:
    """Print a table of all kinds, then each failure with its count."""
    heads = ("kind", "examples", "accepted", "refused", "tracebacks", "hangs", "s each")
    rows = [heads, *(campaign.row() for campaign in campaigns)]
    print()
    for row in rows:
        print(f"{row[0]:<12}" + "".join(f"{value!s:>12}" for value in row[1:]))
    for campaign in campaigns:
        for place, count in campaign.failures.most_common():
            print(f"{campaign.kind}: {count} x {place}")
        if outcomes:
            for outcome, count in campaign.outcomes.most_common():
                print(f"{campaign.kind}: {count} x {outcome}")


if __name__ == "__main__":
    sys.exit(main())
