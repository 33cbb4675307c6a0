"""Plans of compressions: counts against hand formulas and a real pass, and what grows."""

import dataclasses
import json
import os
from collections import Counter
from typing import Any

import jax
import pytest

from mea_jax.compress import repair, stream
from mea_jax.compress.options import Options
from mea_jax.compress.run import compress
from mea_jax.config.schema import DataConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.plan import compression, compression_report, output, target
from mea_jax.plan.chips import CHIPS
from mea_jax.plan.compiling import DoesNotFit
from mea_jax.plan.roofline import roofline
from mea_jax.train.run import train
from tests.helpers import PLAIN, tiny_model
from tests.unit.plan.test_plan import command, machine

B, T, D, N, K, H, F = 8, 64, 32, 4, 4, 8, 48  # of `tiny_model`; 8 windows a device
OPTIONS = Options(repair="layerwise", calibration_tokens=65536, held_out_tokens=512 * 64)


def planned(devices: int = 8, names=compression.PROGRAMS, options=OPTIONS, **changes):
    """The resolved config, its target, and programs by name."""
    here = dataclasses.replace(machine(), devices=jax.devices()[:devices])
    model = tiny_model(**(PLAIN | changes))
    config = TrainConfig(model=model, data=DataConfig(context_length=T))
    config = compression.resolved(config, here)
    return config, here, dict(compression.compress_programs(config, here, options, names))


@pytest.fixture(scope="module")
def whole():
    return planned()


def test_products_of_calibrating_a_layer(whole):
    """A layer of plain attention, all pairs of positions, and moments of K H features twice."""
    programs = whole[2]
    forward = 2 * D * H * (2 * N + 2 * K) + 2 * 2 * N * H * T + 3 * 2 * D * F
    moments = 2 * 2 * (K * H) ** 2 + 2 * N * H + 2 * N  # and powers of queries and outputs
    assert programs["pass"].costs.flops == B * T * forward
    assert programs["calibrate"].costs.flops == B * T * (forward + moments)


def test_moments_are_added_up_over_devices_once(whole):
    """Two matrices (K H, K H), powers (N, H) and (N,), a count of tokens; nothing without them."""
    _, here, programs = whole
    (row,) = roofline(programs["calibrate"], here).traffic
    assert (row.kind, row.axes, row.calls) == ("all-reduce", "data", 1)
    assert row.nbytes == 4 * (2 * (K * H) ** 2 + N * H + N + 1)
    assert roofline(programs["pass"], here).traffic == []


def test_the_compressed_layer_is_what_is_repaired(whole):
    """Half of the K heads stay, as components with a mixing each; beside it two moments (Adam), and
    one beside each projection (Muon)."""
    for keep, components in ((0.5, 2), (0.25, 1)):
        options = dataclasses.replace(OPTIONS, keep=keep)
        program = planned(names=("repair",), options=options)[2]["repair"]
        projections, mixing = 2 * D * N * H + 2 * D * components * H, 2 * components * K
        assert program.held["compressed attention"] == 4 * (projections + mixing)
        assert program.held["optimizer"] == pytest.approx(4 * (projections + 2 * mixing), abs=32)
        assert program.held["original attention"] == 4 * (2 * D * N * H + 2 * D * K * H + D)


def test_memory_is_that_of_one_layer(whole):
    """Three times the layers: the same programs, three times the time and as much on the disk."""
    config, here, programs = whole
    deep, _, deeper = planned(n_layers=6)
    assert {n: p.peak for n, p in deeper.items()} == {n: p.peak for n, p in programs.items()}
    two, six = (compression.work_of(c, here, OPTIONS) for c in (config, deep))
    assert six.disk == two.disk
    for stage, more in zip(two.stages, six.stages, strict=True):
        for name, count in stage.runs.items():
            assert more.runs[name] == count * (1 if name in ("loss", "compare") else 3)
    wider = planned(names=("calibrate",), d_ff=4 * F)[2]["calibrate"]
    assert wider.peak >= programs["calibrate"].peak + 3 * 4 * 3 * D * F


def test_memory_is_that_of_any_number_of_devices(whole):
    """Each brings its own windows: more devices are fewer batches."""
    config, here, programs = whole
    _, half, fewer = planned(devices=4, names=("calibrate",))
    assert fewer["calibrate"].costs.flops == programs["calibrate"].costs.flops
    assert fewer["calibrate"].held == programs["calibrate"].held
    eight, four = (compression.work_of(config, t, OPTIONS) for t in (here, half))
    assert (eight.text, four.text) == (65536 // (64 * T), 65536 // (32 * T))


def test_repair_keeps_its_text_on_the_devices(whole):
    """Beside a step's arguments: the original layer, and two arrays (B, T, D) of each batch."""
    program = whole[2]["repair"]
    held = sum(program.held.values()) - program.held["batch"]  # of which a part is not read
    assert program.peak >= held + program.temporaries
    options = dataclasses.replace(OPTIONS, repair_tokens=2 * OPTIONS.calibration_tokens)
    more = planned(names=("repair", "calibrate"), options=options)[2]
    each = 2 * B * T * D * 4 + 4 * B * T * 4  # and four arrays of integers (B, T)
    assert more["repair"].peak - program.peak == 16 * each
    assert more["calibrate"].peak == whole[2]["calibrate"].peak


def test_runs_are_those_of_a_real_compression(tiny, devices, tmp_path, monkeypatch):
    """Counted on the way, with windows of two devices."""
    here = target.Target("local", devices(2), None, exact=True)
    config = tiny(**{f"model.{name}": value for name, value in PLAIN.items()})
    train(config, tmp_path / "run")
    counted: Counter[str] = Counter()

    def count(module: Any, function: str, name: str) -> None:
        inner = getattr(module, function)

        def counting(*arguments):
            counted[name] += 1
            return inner(*arguments)

        monkeypatch.setattr(module, function, counting)

    count(stream, "watch_block", "calibrate")
    count(stream, "run_block", "pass")
    count(stream, "loss_sums", "loss")
    count(stream, "compared_sums", "compare")
    count(repair, "run_attention", "target")
    count(repair, "_step", "repair")
    options = Options(
        repair="layerwise",
        repair_steps=5,
        calibration_tokens=1500,
        repair_tokens=3000,
        held_out_tokens=256,
        dtype="float32",
    )
    compress(tmp_path / "run", tmp_path / "out", options)
    work = compression.work_of(compression.resolved(config, here), here, options)
    assert (work.windows, work.text, work.repair_text, work.held_out) == (16, 3, 6, 1)
    expected: Counter[str] = Counter()
    for stage in work.stages:
        expected.update(stage.runs)
    assert counted == expected


def test_a_plan_as_text_json_and_picture(whole, tmp_path):
    config, here, programs = whole
    plan = compression_report.summary(programs, config, here, OPTIONS)
    output.write(plan, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["programs"].keys() == programs.keys()
    output.picture(plan["programs"], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    calibrating = plan["stages"][0]
    runs = {"calibrate": 2 * 16, "pass": 2 * 8, "loss": 8}  # 64 windows a batch, 512 held out
    assert calibrating["runs"] == runs
    times = {name: plan["programs"][name]["step_seconds"] for name in runs}
    assert calibrating["seconds"] == pytest.approx(sum(runs[n] * times[n] for n in runs))
    # bfloat16 on a GPU: read and written around a layer, read once for the loss.
    moved = 2 * (2 * 16 + 2 * 8) + 8
    assert calibrating["disk_bytes_moved"] == moved * 64 * T * D * 2
    text = compression_report.text(plan)
    assert len({line.index("calibrate") for line in text.splitlines() if " calibrate " in line})
    assert "16 batches, 65,536 tokens" in text
    unknown = dataclasses.replace(here, chip=None)
    plain = compression_report.summary(programs, config, unknown, OPTIONS)
    assert "seconds" not in plain["stages"][0]
    assert "in all" in compression_report.text(plain)


def test_which_program_does_not_fit_is_said(monkeypatch):
    def refuse(*_, **__):
        raise DoesNotFit(2e9, 1e9)

    monkeypatch.setattr(compression, "measured", refuse)
    for name, words in (
        ("calibrate", "chips with more memory"),
        ("repair", "fewer --repair_tokens"),
    ):
        with pytest.raises(DoesNotFit) as refused:
            planned(names=(name,))
        assert refused.value.program == name
        assert words in compression.remedy(name)


def test_one_process_drives_one_machine():
    pod = dataclasses.replace(machine(), devices=jax.devices() * 2)
    with pytest.raises(UserError, match="16 devices; compress runs on one machine of at most 8"):
        compression.check_machine(pod)
    v5p = dataclasses.replace(machine(), chip=CHIPS["v5p"])
    with pytest.raises(UserError, match="at most 4 v5p"):
        compression.check_machine(v5p)
    compression.check_machine(machine())


def test_attention_that_no_method_fits():
    with pytest.raises(UserError, match="differential_v2"):
        planned(variant="differential_v2")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--keep=0.5"], ["--keep", "--step compress", "not to --step train"]),
        (["--step=compress", "--batch=4"], ["--batch", "--step decode", "--step compress"]),
        (["--step=compress", "--keep=0.01"], ["--keep=0.01", "less than one"]),
        (["--step=compress", "--calibration_tokens=0"], ["--calibration_tokens", "at least 1"]),
        (["--step=compress", "--method=align"], ["--method align", "'aligned'"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts):
    run = command("--topology=gpu:2", *arguments)
    assert run.returncode == 2
    lines = run.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in run.stderr
    for part in parts:
        assert part in lines[-1]


def test_a_plan_by_the_command(tmp_path):
    """Each program's text in a file of its own."""
    out = tmp_path / "plan"
    run = command(
        *("--topology=gpu:2", "--step=compress", "--calibration_tokens=16384"),
        *(f"--out={out}", f"--hlo={tmp_path / 'text.hlo'}"),
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(out.with_suffix(".json").read_text())["calibration_batches"] == 4
    found = {name for name in os.listdir(tmp_path) if name.endswith(".hlo")}
    assert found == {f"text_{name}.hlo" for name in compression.PROGRAMS}
    assert "with repair *" in run.stdout
