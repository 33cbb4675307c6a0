"""A checkout with a fake of every program, and example arguments, for the tests of launchers."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.paths import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
LAUNCHERS = [name for name in SCRIPTS if name != "common.sh"]

# Arguments that change if a layer of quoting is missing or superfluous.
TRAINING = [
    "--config",
    "configs/mea_1b.py",
    "--config.data.sources=({'source': 'text', 'path': 'a b/*.txt'},)",
    r'--config.evaluate.sample_prompt=$HOME "it" isn\t; $(exit 3) `x` {a,b}',
    "",
]
ASSIGNMENTS = ["XLA_FLAGS=--xla_a=1 --xla_b='2 3'"]
AFTER = ["--", *ASSIGNMENTS, *TRAINING]

TPU = {"TPU_NAME": "mea", "ZONE": "us-east5-b", "TPU_TYPE": "v6e-64", "BUCKET": "bucket"}
GKE = {"CLUSTER": "mea", "WORKLOAD": "mea-1b"} | {"JOBS": "2"}
GKE |= {k: TPU[k] for k in ("ZONE", "TPU_TYPE", "BUCKET")}
SLURM = {"GPUS_PER_NODE": "8", "TASKS": "3", "NODES": "2", "WORKDIR": "/shared/run 1"}
BOX = {"SSH_HOST": "user@box"}
VARIABLES = {"tpu_pod": TPU, "gke_xpk": GKE, "slurm": SLURM | {"JOB": "12"}, "gpu_box": BOX}
SUBCOMMANDS = {
    "tpu_pod": "create status install run logs stop delete all",
    "gke_xpk": "create storage run study list logs delete delete-cluster",
    "slurm": "install submit study logs cancel",
    "gpu_box": "install run logs stop",
    "worker": "install start logs stop",
}
TRAINS = ("run", "all", "submit", "study", "start")
EVERY = [(script, sub) for script, subs in SUBCOMMANDS.items() for sub in subs.split()]

# Programs that launchers call. A dry run must call none of them, not even mkdir.
CLOUD = ["gcloud", "xpk", "kubectl", "sbatch", "scancel", "srun", "ssh", "scp", "nvidia-smi"]
LOCAL = ["uv", "curl", "sudo", "gcsfuse", "mountpoint", "pip", "python", "python3"]
BASIC = ["git", "tar", "mkdir", "rm", "setsid", "tail", "sleep"]
PROGRAMS = CLOUD + LOCAL + BASIC
FAKE = """#!/bin/bash
{ printf '%s\\0' "$#" "${0##*/}" "$@"; } >>"$FAKES/record"
"""


class Machine:
    """A checkout, a home folder and fake programs that record their calls."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.home = folder, folder / "bin", folder / "home"
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for path in (self.bin, self.home):
            path.mkdir()
        for name in PROGRAMS:
            self.fake(name, "echo called in a dry run >&2; exit 99")

    def fake(self, name: str, body: str = "") -> None:
        path = self.bin / name
        path.write_text(FAKE + body + "\n")
        path.chmod(0o755)

    def real(self, *names: str) -> None:
        """Remove the fakes of `names`, so that the real programs are called."""
        for name in names:
            (self.bin / name).unlink(missing_ok=True)

    def calls(self) -> list[list[str]]:
        """Return every call of a fake, in order."""
        record, calls = self.folder / "record", []
        words = record.read_text().split("\0")[:-1] if record.exists() else []
        while words:
            end = int(words[0]) + 2
            calls.append(words[1:end])
            words = words[end:]
        return calls

    def launch(self, script, *words, path=None, stdin="", **variables):
        env = {
            "PATH": path or f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKES": str(self.folder),
            "CLOUDSDK_CONFIG": str(self.home / "gcloud"),
        } | variables
        return subprocess.run(
            [self.checkout / "launch" / f"{script}.sh", *words],
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
        )

    def dry_run(self, script, subcommand, after=None, **changes) -> list[list[str]]:
        """Return the words of each printed command; a here-document is the last word."""
        if after is None:
            after = AFTER if subcommand in TRAINS else []
        variables = VARIABLES.get(script, {}) | changes
        done = self.launch(script, subcommand, "--dry-run", *after, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert self.calls() == []
        return parse(done.stdout)


def parse(text: str) -> list[list[str]]:
    commands, lines = [], iter(text.splitlines())
    for line in lines:
        if " <<" in line:
            line, end = line.split(" <<")
            body = list(iter(lambda: next(lines), shlex.split(end)[0]))
            commands.append([*shlex.split(line), "\n".join(body)])
        else:
            commands.append(shlex.split(line))
    return commands


def training_words(command: list[str]) -> list[str]:
    """Return the words of the innermost command that trains, unquoted from all shells around it."""
    for i, word in enumerate(command):
        if word in ("mea_jax.train", "mea_jax.study", "start") and i + 1 < len(command):
            return command
        if word in ("mea_jax.train", "mea_jax.study", "start"):
            continue
        if " mea_jax.train " in word or " mea_jax.study " in word or "worker.sh start" in word:
            text = word.split("&& ")[-1] if "\n" not in word else word.splitlines()[-1]
            return training_words(shlex.split(text.removeprefix("--command=")))
    raise AssertionError(f"no training in {command}")


def assert_one_error(done, *parts):
    """Assert exit status 2, no output, and one error line on stderr that contains `parts`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, (part, line)
