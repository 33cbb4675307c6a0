"""Launchers with fake programs: they run what a dry run prints; every option exists."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.system.launch_machine import (
    AFTER,
    ASSIGNMENTS,
    BOX,
    EVERY,
    GKE,
    LAUNCHERS,
    PROGRAMS,
    ROOT,
    SLURM,
    SUBCOMMANDS,
    TPU,
    TRAINING,
    TRAINS,
    VARIABLES,
    parse,
    training_words,
)

# -- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "subcommand"),
    [
        *(("tpu_pod", sub) for sub in SUBCOMMANDS["tpu_pod"].split()),
        *(("gke_xpk", sub) for sub in SUBCOMMANDS["gke_xpk"].split()),
        *(("gpu_box", sub) for sub in SUBCOMMANDS["gpu_box"].split()),
        ("slurm", "cancel"),
    ],
)
def test_what_is_printed_is_what_is_run(machine, script, subcommand):
    printed = machine.dry_run(script, subcommand)
    for name in PROGRAMS:
        machine.fake(name)
    after = AFTER if subcommand in TRAINS else []
    done = machine.launch(script, subcommand, "--yes", *after, **VARIABLES[script])
    assert done.returncode == 0, done.stderr
    shown = [line.removeprefix("+ ") for line in done.stderr.splitlines()]
    assert parse("\n".join(shown)) == printed
    # bash is real and calls git and tar, in any order.
    outer = [command for command in printed if command[0] != "bash"]
    assert [call for call in machine.calls() if call[0] not in ("git", "tar")] == outer


RECORDER = """#!/bin/bash
# In place of Python: writes its arguments and environment, then runs as long as training would.
python3 - "$@" <<'END'
import json, os, sys
with open("called.json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
END
echo "step 1"
sleep 30
"""
REMOTE = """
for word; do
  case $word in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac
done
[[ $4 == scp ]] && cp "$5" "$HOME/${6#*:}"
"""


@pytest.fixture
def cloud(machine):
    """Return a machine whose `gcloud` and `ssh` run remote commands here, in the home folder."""
    machine.real(*PROGRAMS)
    machine.fake("uv", "mkdir -p .venv/bin; cp $FAKES/recorder .venv/bin/python")
    machine.fake("gcloud", REMOTE)
    machine.fake("ssh", 'cd "$HOME" && exec bash -c "$2"')
    machine.fake("scp", 'cp "$1" "$HOME/${2#*:}"')
    machine.fake("mountpoint")
    machine.fake("gcsfuse")
    (machine.folder / "recorder").write_text(RECORDER)
    (machine.folder / "recorder").chmod(0o755)
    spaced = machine.folder / "check out"  # the path must be quoted too
    machine.checkout.rename(spaced)
    machine.checkout = spaced
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    (spaced / "configs").mkdir()
    (spaced / "configs" / "new file.py").write_text("untracked")
    (spaced / ".gitignore").write_text("runs/\nbuild/\n.venv/\n")
    (spaced / "runs").mkdir()
    (spaced / "runs" / "large").write_text("ignored")
    subprocess.run([git, "init", "-q", spaced], check=True)
    return machine


def eventually(path: Path) -> str:
    """Wait until a background process has written a file; return its text."""
    for _ in range(200):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize("script", ["tpu_pod", "gpu_box"])
def test_code_is_sent_and_trained_in_the_background(cloud, script):
    def launch(*words, **changes):
        return cloud.launch(script, *words, **(VARIABLES[script] | changes))

    done = launch("install")
    assert done.returncode == 0, done.stderr
    remote = cloud.home / "mea_jax"
    assert (remote / "configs" / "new file.py").read_text() == "untracked"
    assert not (remote / "runs" / "large").exists()
    extra = {"tpu_pod": ".[tpu]", "gpu_box": ".[cuda]"}[script]
    (install,) = [c for c in cloud.calls() if c[:3] == ["uv", "pip", "install"]]
    assert install[-2:] == ["--editable", extra]

    began = time.monotonic()
    done = launch("run", *AFTER)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20, "ssh waited for training"
    try:
        assert eventually(remote / "runs" / "train.log") == "step 1\n"
        words, environment = json.loads((remote / "called.json").read_text())
        given = ["--distributed", "--workdir", "/mnt/bucket/runs/mea"] * (script == "tpu_pod")
        assert words == ["-u", "-m", "mea_jax.train", *given, *TRAINING]
        assert environment["XLA_FLAGS"] == ASSIGNMENTS[0].removeprefix("XLA_FLAGS=")
        cache = {"tpu_pod": "/mnt/bucket/mea_jax_cache", "gpu_box": None}[script]
        assert environment.get("MEA_JAX_CACHE") == cache
        pid = int((remote / "runs" / "train.pid").read_text())
        assert os.getsid(pid) == pid, "training has no session of its own, so a hangup would end it"

        (remote / "called.json").unlink()
        done = launch("run", *AFTER)
        assert done.returncode == 2
        assert f"training is already running as process {pid}" in done.stderr
        assert not (remote / "called.json").exists()
    finally:
        began = time.monotonic()
        done = launch("stop")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20, "training was not stopped, but ended by itself"
    command = Path(f"/proc/{pid}/cmdline")  # empty for a zombie process
    assert not command.exists() or not command.read_bytes()
    assert "no training is running here" in launch("stop").stdout


def test_training_waits_for_the_mounted_bucket(cloud):
    """Without the mounted bucket, training would fill the local disk, so it does not start."""
    assert cloud.launch("tpu_pod", "install", **TPU).returncode == 0
    cloud.fake("mountpoint", "exit 1")
    done = cloud.launch("tpu_pod", "run", *AFTER, **TPU)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: /mnt/bucket is not mounted")
    assert not (cloud.home / "mea_jax" / "called.json").exists()


def test_repo_is_cloned_at_the_commit(cloud, tmp_path):
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", cloud.checkout, *name, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("add", "-A")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    git("commit", "-qm", "second", "--allow-empty")
    for commit in (first, git("rev-parse", "HEAD")):  # the clone already exists for the second
        variables = BOX | {"REPO": str(cloud.checkout), "COMMIT": commit}
        done = cloud.launch("gpu_box", "install", **variables)
        assert done.returncode == 0, done.stderr
        head = (cloud.home / "mea_jax" / ".git" / "HEAD").read_text().strip()
        assert head == commit


def test_a_queued_resource_that_fails_ends_the_wait(machine):
    machine.fake("gcloud", "[[ $4 != describe ]] || echo FAILED")
    done = machine.launch("tpu_pod", "all", *AFTER, **TPU, QUEUED="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: queued resource mea is FAILED: ")
    assert [call[4] for call in machine.calls()] == ["create", "describe"]


def test_the_batch_job_passes_the_words_on(machine):
    """Training gets its arguments unchanged from fakes of sbatch and srun that run their input."""
    machine.real("mkdir", "sleep", "python3")
    machine.fake("sbatch", "exec bash")
    machine.fake("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    recorder = machine.folder / "recorder"
    recorder.write_text(RECORDER.replace("sleep 30", "true"))
    recorder.chmod(0o755)
    done = machine.launch("slurm", "submit", *AFTER, **SLURM, PYTHON=str(recorder))
    assert done.returncode == 0, done.stderr
    words, environment = json.loads((machine.checkout / "called.json").read_text())
    given = ["--distributed", "--workdir", SLURM["WORKDIR"]]
    assert words == ["-u", "-m", "mea_jax.train", *given, *TRAINING]
    assert environment["XLA_FLAGS"] == ASSIGNMENTS[0].removeprefix("XLA_FLAGS=")


def test_the_container_passes_the_words_on(machine):
    """Training gets its arguments unchanged from a fake xpk that runs --command with bash."""
    for name in ("rm", "mkdir", "git", "tar", "pip"):
        machine.fake(name)
    machine.real("sleep", "python3")
    machine.fake("xpk", 'while [[ $1 != --command ]]; do shift; done; cd "$HOME"; bash -c "($2)"')
    machine.fake("python", f'exec "{machine.folder}/recorder" "$@"')
    recorder = machine.folder / "recorder"
    recorder.write_text(RECORDER.replace("sleep 30", "true"))
    recorder.chmod(0o755)
    done = machine.launch("gke_xpk", "run", *AFTER, **GKE)
    assert done.returncode == 0, done.stderr
    words, environment = json.loads((machine.home / "called.json").read_text())
    given = ["--distributed", "--workdir", "/mnt/bucket/runs/mea-1b"]
    assert words == ["-u", "-m", "mea_jax.train", *given, *TRAINING]
    assert environment["MEA_JAX_CACHE"] == "/mnt/bucket/mea_jax_cache"
    assert ["pip", "install", "--quiet", "--editable", ".[tpu]"] in machine.calls()


# -- options of other programs ---------------------------------------------------------------


def test_every_flag_of_training_exists(machine):
    """The flags in dry runs, help texts and docs/launch.md are flags of mea_jax.train."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    help_text = subprocess.run(
        [sys.executable, "-m", "mea_jax.train", "--helpfull"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=120,
    ).stdout
    known = set(re.findall(r"^\s+--(?:\[no\])?(\w+)", help_text, re.MULTILINE))
    assert {"config", "workdir"} <= known

    from mea_jax.config.schema import TrainConfig, flatten

    keys = {f"config.{key}" for key in flatten(TrainConfig().to_dict())}
    commands = [
        training_words(machine.dry_run(script, subcommand)[-1])
        for script, subcommand in (
            ("tpu_pod", "run"),
            ("gke_xpk", "run"),
            ("slurm", "submit"),
            ("gpu_box", "run"),
            ("worker", "start"),
        )
    ]
    texts = [machine.launch(name.removesuffix(".sh"), "--help").stdout for name in LAUNCHERS]
    texts.append((ROOT / "docs" / "launch.md").read_text())
    for text in texts:
        for line in re.findall(r"\.sh (?:run|submit|start|all) -- (.*)", text):
            commands.append(["mea_jax.train", *shlex.split(line)])
    assert len(commands) > 8
    for words in commands:
        if "mea_jax.train" in words:
            words = words[words.index("mea_jax.train") + 1 :]
        else:  # the worker's command, which adds nothing
            words = words[words.index("--") + 1 :]
        for word in words:
            if flag := re.match(r"--([\w.]+)", word):
                assert flag[1] in known | keys, flag[1]
            elif word.startswith("configs/"):
                assert (ROOT / word.partition(":")[0]).is_file(), word


def test_gcloud_has_every_option(machine):
    """Every option is in the option table of the installed SDK, which is read, not run."""
    gcloud = shutil.which("gcloud")
    table = Path(gcloud or "").resolve().parents[1] / "data" / "cli" / "gcloud_completions.py"
    if gcloud is None or not table.is_file():
        pytest.skip("the Google Cloud SDK is not installed")
    spec = importlib.util.spec_from_file_location("gcloud_completions", table)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = module.STATIC_COMPLETION_CLI_TREE
    checked = 0
    for script, subcommand in EVERY:
        for changes in ({}, {"SPOT": "1", "PROJECT": "p"}, {"SLICES": "2"}, {"QUEUED": "1"}):
            if script != "tpu_pod" and changes:
                continue
            for words in machine.dry_run(script, subcommand, **changes):
                if words[0] != "gcloud":
                    continue
                node, rest = root, words[1:]
                while rest and rest[0] in node["commands"]:
                    node, rest = node["commands"][rest[0]], rest[1:]
                assert not node["commands"], words
                flags = node["flags"].keys() | root["flags"].keys()
                used = {word.partition("=")[0] for word in rest if word.startswith("--")}
                assert used <= flags, used - flags
                checked += 1
    assert checked > 20


def test_xpk_has_every_option(machine):
    """The parser of the installed XPK accepts every command."""
    pytest.importorskip("xpk", reason="xpk is not installed; its versions are pinned tightly")
    import argparse

    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser()
    set_parser(parser=parser)
    accepted = []
    for changes in ({}, {"SPOT": "1", "PROJECT": "p"}, {"IMAGE": "i"}, {"BUCKET": ""}):
        for subcommand in SUBCOMMANDS["gke_xpk"].split():
            if not changes.get("BUCKET", "b"):
                if subcommand == "storage":
                    continue
                changes["WORKDIR"] = "/mnt/nfs"
            for words in machine.dry_run("gke_xpk", subcommand, **changes):
                if words[0] == "xpk":
                    # The previous command creates this folder, which must exist.
                    words = [str(ROOT) if w.endswith("/build/image") else w for w in words]
                    accepted.append(parser.parse_args(words[1:]))  # exits at an unknown option
    assert len(accepted) > len(SUBCOMMANDS["gke_xpk"].split())
