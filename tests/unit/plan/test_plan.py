"""Tests of plans of entire steps, of sweeps, and of the command with bad input."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mea_jax.config.schema import DataConfig, MeshConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model import flops
from mea_jax.parallel import sharding
from mea_jax.plan import output, search, target
from mea_jax.plan.chips import CHIPS
from mea_jax.plan.programs import decode_program, train_program
from mea_jax.plan.roofline import roofline
from tests.helpers import PLAIN, tiny_model
from tests.paths import ROOT

LENGTH = 64
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def machine(memory: float = 1e9) -> target.Target:
    """Return a target of eight GPUs with `memory` bytes each, compiled for 8 CPU devices."""
    chip = dataclasses.replace(CHIPS["h100"], memory=memory)
    return target.Target("h100:8", jax.devices()[:8], chip, exact=False)


def config_of(mesh: MeshConfig | None = None, batch: int = 32, **changes) -> TrainConfig:
    return TrainConfig(
        batch_size=batch,
        steps=1000,
        model=tiny_model(**{"loss_chunk": 16, "d_ff": 128} | changes),
        data=DataConfig(context_length=LENGTH),
        mesh=mesh or MeshConfig(data=1, fsdp=8),
    )


@pytest.fixture(scope="module")
def compiled():
    """Return the plan of a step on fsdp 4 x tensor 2, compiled once for several tests."""
    return train_program(config_of(MeshConfig(data=1, fsdp=4, tensor=2)), machine())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PLAIN, {"key_components": 2, "hlc_form": "explicit"}])
def test_products_of_a_step_are_those_of_the_convention(changes):
    """The FLOPs of eight devices are step_flops and the masked half of attention, within 1%.

    The convention counts pairs that a causal mask keeps; plain einsums compute all pairs.
    """
    config = config_of(**changes)
    plan = train_program(config, machine())
    model, tokens = plan.config.model, config.batch_size * LENGTH
    hidden = model.n_layers * 2 * 2 * model.n_heads * model.head_dim * (LENGTH - LENGTH / 2)
    expected = flops.step_flops(model, LENGTH, tokens) + 3 * hidden * tokens
    assert 8 * plan.costs.flops == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_state_is_split_over_the_mesh(compiled):
    """A device has an eighth of the float32 parameters and of two moments.

    Up to 30% more is for parameters that are not split.
    """
    argument_bytes = compiled.argument_bytes
    whole = 4 * compiled.parameters
    assert whole / 8 <= argument_bytes["parameters"] < 1.3 * whole / 8
    assert argument_bytes["optimizer"] == pytest.approx(2 * argument_bytes["parameters"], rel=0.01)
    assert (
        compiled.peak
        >= argument_bytes["parameters"] + argument_bytes["optimizer"] + compiled.temporaries
    )


def test_collectives_run_over_the_axes_that_split(compiled):
    axes = {row.axes for row in roofline(compiled, machine()).traffic}
    assert {"fsdp", "tensor"} <= axes
    assert "data" not in " ".join(axes), "the data axis has one device"


def test_a_plan_as_text_json_and_picture(compiled, tmp_path):
    gpus = machine()
    roof = roofline(compiled, gpus)
    plan = output.summary(compiled, gpus, roof, "train", 32 * LENGTH, 8)
    output.write(plan, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["binds"] == roof.binding
    output.picture({"here": plan}, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    text = output.text(plan)
    assert "<- binds" in text
    assert text.count("over fsdp") >= 1
    longest = max(s for s in (roof.compute, roof.memory, roof.links) if s is not None)
    assert plan["tokens_per_second"] == pytest.approx(32 * LENGTH / longest)


@pytest.mark.slow
def test_a_smaller_microbatch_is_offered_where_a_plan_does_not_fit():
    config = config_of(d_ff=512)
    whole = train_program(config, machine())
    small = machine(memory=0.8 * whole.peak)
    assert output.fits(whole, small) is False
    found = search.what_fits(config, small, lambda _: None)
    assert found is not None
    assert found.accumulate > 1
    assert train_program(found, small).peak <= 0.8 * whole.peak
    assert search.what_fits(config, machine(memory=1.0), lambda _: None) is None


@pytest.mark.slow
def test_a_sweep_ranks_what_fits(monkeypatch):
    monkeypatch.setattr(search, "REMAT_POLICIES", ("none",))
    said: list[str] = []
    results = search.sweep(config_of(batch=8), machine(), 1, said.append)
    assert len(said) == len(results) > 1
    steps = [roof.step or 0.0 for _, _, roof in results]
    assert steps == sorted(steps)
    assert {c.mesh.tensor for c, _, _ in results} == {1, 2, 4}


@pytest.mark.parametrize(("experts", "ways"), [(0, {1}), (8, {1, 4}), (128, {1, 4, 16})])
def test_a_sweep_divides_experts(experts, ways):
    """Every mesh uses all devices, and its expert axis divides the experts."""
    moe = {"n_experts": experts, "experts_per_token": 2, "d_expert": 64}
    found = search.meshes(config_of(batch=64, **moe), 64, 2)
    assert {mesh.expert for mesh in found} == ways
    assert len(set(found)) == len(found)
    for mesh in found:
        sizes = (mesh.data, mesh.fsdp, mesh.expert, mesh.sequence, mesh.tensor)
        assert math.prod(sizes) == 64, mesh


@pytest.mark.slow
def test_a_sweep_leaves_out_what_does_not_fit(monkeypatch):
    """If two windows at a time do not fit, four and eight are not compiled."""
    monkeypatch.setattr(search, "REMAT_POLICIES", ("none",))
    one_mesh = MeshConfig(data=1, fsdp=8)
    monkeypatch.setattr(search, "meshes", lambda *_: [one_mesh])
    peaks = {n: train_program(config_of(batch=64 // n), machine()).peak for n in (8, 4)}
    said: list[str] = []
    between = machine(sum(peaks.values()) / 2)
    assert peaks[4] > peaks[8], "64 / 4 windows must need more memory, two per device"
    results = search.sweep(config_of(batch=64), between, 1, said.append)
    assert [config.accumulate for config, _, _ in results] == [8]
    assert len(said) == 4
    assert [line.endswith("a smaller microbatch did not fit") for line in said[2:]] == [True, True]


def test_a_decode_step_reads_its_cache():
    model = tiny_model(key_components=2, value_components=2)
    config = dataclasses.replace(config_of(), model=model)
    plan = decode_program(config, machine(), batch=2, context=512)
    # C 2 of K 4 heads of 8 features, keys and values, 2 layers, float32.
    assert plan.argument_bytes["cache"] == 2 * 512 * 2 * 8 * 2 * 2 * 4
    assert plan.costs.hbm_bytes > plan.argument_bytes["cache"] + plan.argument_bytes["weights"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key_components": 2, "value_components": 2}, "fsdp=2,tensor=2"),
        (PLAIN | {"n_experts": 8, "experts_per_token": 2, "d_expert": 16}, "expert=2,tensor=4"),
    ],
    ids=["MEA", "experts"],
)
def test_a_decode_step_is_divided_over_a_mesh(changes, text):
    """A device has its rows and heads of the cache, and its part of all matrices."""
    config = dataclasses.replace(config_of(), model=tiny_model(**changes))
    mesh = sharding.requested_mesh(text, "--mesh")
    one, plan = (decode_program(config, machine(), 4, 512, m) for m in (None, mesh))
    assert one.mesh.size == 1
    assert plan.argument_bytes["cache"] == one.argument_bytes["cache"] / mesh.size
    # Routers, mixing and norms are not split in full.
    weights = one.argument_bytes["weights"] / mesh.size
    assert weights <= plan.argument_bytes["weights"] < 1.3 * weights
    axes = " ".join(row.axes for row in roofline(plan, machine()).traffic)
    assert [axis for axis in mesh.shape if axis in axes] == [
        a for a, n in mesh.shape.items() if n > 1
    ]
    assert not roofline(one, machine()).traffic
    with pytest.raises(
        UserError, match="--batch 3: these rows cannot be divided over the 2 shards"
    ):
        decode_program(config, machine(), 3, 512, mesh)


def test_gpus_must_be_asked_for_before_jax_starts(monkeypatch):
    with pytest.raises(UserError, match=r"already started with .* CPU devices"):
        target.find("h100:5")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    target.prepare_environment("h100:5")
    assert "device_count=5" in os.environ["XLA_FLAGS"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    line = [sys.executable, "-m", "mea_jax.plan", "--config", "configs/quickstart.py", *arguments]
    return subprocess.run(
        line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--topology", "v9:4x4"], ["v9:4x4", "v5e, v5p, v6e"]),
        (["--topology=gpu:8", "--config.mesh.tensor=3"], ["needs 6 devices", "has 8"]),
        (["--topology=gpu:6", "--config.mesh.tensor=6"], ["mesh.tensor=6", "n_heads=8"]),
        (["--topology=gpu:2", "--step=serve"], ["--step=serve", "train|decode"]),
        (["--topology=gpu:2", "--step=decode", "--sweep"], ["--sweep", "--step"]),
        (["--topology=gpu:2", "--mesh=tensor=2"], ["--mesh", "--step decode"]),
        (["--topology=gpu:2", "--step=decode", "--config.mesh.fsdp=2"], ["mesh.fsdp", "--mesh"]),
        (["--topology=gpu:2", "--step=decode", "--mesh=tensor=4"], ["--mesh tensor=4 needs 4"]),
        (["--topology=gpu:3", "--step=decode", "--mesh=tensor=3"], ["tensor=3", "n_heads=8"]),
        (["--topology=gpu:2", "--sweep", "--hlo=x"], ["--hlo writes one program", "--sweep"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts):
    run = command(*arguments)
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in run.stderr
    for part in parts:
        assert part in last


@pytest.mark.process
@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_a_missing_compiler_is_one_line():
    run = command("--topology", "v5e:2x2")
    assert run.returncode == 2
    assert "pip install 'jax[tpu]'" in run.stderr.splitlines()[-1]


@pytest.mark.process
@pytest.mark.skipif(not HAS_LIBTPU, reason="the TPU compiler is not installed")
def test_a_tpu_plan_by_the_command(tmp_path):
    """A plan that fits exits with 0; one that does not fit reports it and exits with 2."""
    out = str(tmp_path / "plan")
    mesh = ["--topology=v5e:2x2", "--config.mesh.data=2", "--config.mesh.fsdp=2", f"--out={out}"]
    run = command(*mesh)
    assert run.returncode == 0, run.stderr
    plan = json.loads(Path(f"{out}.json").read_text())
    assert plan["compiled"].startswith("splash")
    assert plan["pallas_calls"]
    assert plan["fits"]
    assert {row["axes"] for row in plan["collectives"]} <= {"data", "fsdp", "data x fsdp"}
    step = ["--topology=v5e:2x2", "--step=decode"]
    run = command(*step, "--mesh=fsdp=2,tensor=2", f"--out={out}")
    assert run.returncode == 0, run.stderr
    plan = json.loads(Path(f"{out}.json").read_text())
    assert plan["devices"] == 4
    assert {row["axes"] for row in plan["collectives"]} <= {"fsdp", "tensor", "fsdp x tensor"}
    run = command(*step, "--batch=200000", f"--out={out}")
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert "does not fit" in last
    assert "GB over" in last
    assert "fewer rows" in last
