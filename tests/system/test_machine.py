"""Missing accelerators and full output devices: one error line each."""

import os
import subprocess
import sys
import types

import jax
import pytest

from mea_jax import cli
from mea_jax.errors import UserError
from tests.helpers import assert_one_error, run_train_in_subprocess
from tests.paths import ROOT


def refuses(error):
    def devices(*_):
        raise error

    return devices


HELD = "ABORTED: The TPU is already in use by process with pid 17. Not attempting to load libtpu.so"


@pytest.mark.parametrize(
    ("reason", "parts"),
    [
        (f"{HELD} in this process. (set JAX_PLATFORMS='' to ...)", ["holds the TPU", "pid 17"]),
        (
            "INTERNAL: Failed to open libtpu.so: no such file (set ...)",
            ["cannot be used", "libtpu"],
        ),
        ("UNKNOWN: open(/dev/accel0): Device or resource busy", ["another process holds the TPU"]),
    ],
)
def test_no_such_accelerator(command, config_file, monkeypatch, reason, parts):
    error = RuntimeError(f"Unable to initialize backend 'tpu': {reason}")
    monkeypatch.setattr(cli.xla_bridge, "backends", refuses(error))
    monkeypatch.setattr(cli.xla_bridge, "get_backend", refuses(error))
    path = config_file()
    monkeypatch.setattr("mea_jax.train.run.sharding.make_mesh", refuses(error))
    status, _, err = command("--config", path)
    assert_one_error(status, err, *parts)
    assert "(set " not in err
    assert status == 2


@pytest.mark.parametrize("platform", ["cuda", "tpu", "gpu", "nonsense"])
def test_process_no_such_accelerator(monkeypatch, tmp_path, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    status, err = run_train_in_subprocess("--config", "quickstart", cwd=tmp_path)
    assert_one_error(status, err, f"JAX_PLATFORMS={platform} cannot be used", "JAX_PLATFORMS=cpu")


def test_no_silent_fallback_from_a_tpu_that_another_process_holds(monkeypatch):
    jax.devices()
    monkeypatch.setitem(cli.xla_bridge._backend_errors, "tpu", HELD)
    cli._check_fallback()  # no error: the tests request the CPU
    monkeypatch.setattr(cli.jax, "config", types.SimpleNamespace(jax_platforms=None))
    with pytest.raises(UserError, match="another process holds the TPU"):
        cli._check_fallback()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_process_output_to_a_full_device(unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "mea_jax.study", "run", "--config", "lr_study", "--list"]
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert_one_error(finished.returncode, finished.stderr, "output", "No space left on device")
