"""Tests of runs that start from a checkpoint: parameters, frozen parts, teachers, resuming."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mea_jax.checkpoint.manager import Checkpoints, Position
from mea_jax.config.parse import from_dict
from mea_jax.config.schema import CheckpointConfig, MeshConfig, TrainConfig
from mea_jax.data.tokenizers import BytesTokenizer
from mea_jax.errors import UserError
from mea_jax.model.params import TrainState, abstract_params, param_shardings
from mea_jax.parallel import sharding
from mea_jax.train.run import train
from mea_jax.train.step import compile_train_step, create_state, state_shardings
from mea_jax.train.warm_start import Start
from tests.helpers import (
    assert_close,
    assert_equal,
    assert_one_error,
    change,
    flat,
    params_of,
    random_batch,
)
from tests.paths import ROOT
from tests.whole_runs import MEASURED, restore_state, rows_of, train_on_one_device, train_until

CONFIG = ROOT / "configs" / "recover.py"
STEPS = 6
ATTENTION = {"start.trainable": "attention"}


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """Return (run directory, summary) of a model trained on one device."""
    workdir = tmp_path_factory.mktemp("source") / "model"
    return workdir, train_on_one_device(tiny(), workdir)


@pytest.fixture(scope="module")
def recovery(tiny, source):
    """Return `recovery(**changes)`, which returns the config of a run that starts from `source`."""
    start = {"start.checkpoint": str(source[0]), "checkpoint.every": 2}

    def make(**changes) -> TrainConfig:
        return tiny(**{"steps": STEPS, "seed": 1} | start | changes)

    return make


@pytest.fixture(scope="module")
def taught(recovery, source):
    """Return a config that trains only attention, with a teacher, in two microbatches."""
    teacher = {"start.teacher": str(source[0] / "checkpoints" / "4"), "start.distillation": 0.5}
    return recovery(accumulate=2, **ATTENTION, **teacher)


@pytest.fixture(scope="module")
def whole(taught, tmp_path_factory):
    """Return (run directory, summary) of an uninterrupted run of `taught`."""
    workdir = tmp_path_factory.mktemp("recovered") / "whole"
    return workdir, train_on_one_device(taught, workdir)


def one_device(config):
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def store(workdir: Path, config: TrainConfig, params) -> Path:
    """Write a checkpoint with only parameters, as compression does; return `workdir`."""
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        state = TrainState(step=np.int32(0), params=params, opt_state={})
        checkpoints.save(0, state, config, Position(0, "of no data"))
    (workdir / "tokenizer").mkdir()
    BytesTokenizer().save(workdir / "tokenizer")
    return workdir


# -- the start ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_starts_with_the_loss_that_the_source_ended_with(source, whole):
    """The losses are equal up to the rounding of sums over two microbatches.

    A later test has them equal to the bit.
    """
    rows = [row for row in rows_of(whole[0]) if row["kind"] == "held_out"]
    assert [row["step"] for row in rows] == [0, 4, STEPS]
    assert rows[0]["loss"] == pytest.approx(source[1]["held_out_loss"], rel=1e-6)
    assert rows[0]["loss"] == whole[1]["held_out_loss_at_start"]
    assert rows[-1]["loss"] == whole[1]["held_out_loss"] < rows[0]["loss"]
    assert "at the start" in whole[1]["text"]
    assert "held_out_loss_at_start" not in source[1]


@pytest.mark.slow
def test_moments_and_steps_begin_anew(recovery, source):
    config = recovery()
    with Checkpoints(source[0]) as checkpoints:
        params = checkpoints.params(8, abstract_params(config.model))
    state = Start(config, one_device(config), str).state()
    assert_equal(state.params, params)
    fresh = create_state(config, one_device(config))
    assert_equal(state.opt_state, fresh.opt_state)
    assert int(state.step) == 0


@pytest.mark.slow
def test_parameters_alone_are_enough_and_c_need_not_divide_k(tiny, tmp_path, devices):
    """A compressed model without stored moments, with C that does not divide K, can be trained.

    Its layers have 3 and 1 of 4 key heads, and 2 and 3 of 4 value heads.
    """
    devices(1)
    model = {"model.key_components": (3, 1), "model.value_components": (2, 3)}
    config = tiny(**model)
    params = params_of(config.model, noise=0.1)
    run = store(tmp_path / "compressed", config, params)
    summary = train(tiny(**model, **{"start.checkpoint": str(run)}, steps=4), tmp_path / "run")
    assert summary["held_out_loss"] < summary["held_out_loss_at_start"]
    with pytest.raises(UserError, match="does not divide n_kv_heads=4"):
        train(config, tmp_path / "fresh")


@pytest.mark.slow
def test_a_teacher_may_have_another_shape(recovery, tiny, tmp_path, devices):
    devices(1)
    wide = tiny(**{"model.d_model": 40, "model.n_layers": 1, "model.hlc": "none"})
    run = store(tmp_path / "wide", wide, params_of(wide.model))
    config = recovery(**{"start.teacher": str(run), "start.distillation": 1.0}, steps=3)
    train(config, tmp_path / "run")
    rows = [row for row in rows_of(tmp_path / "run") if row["kind"] == "train"]
    assert all(row["kl"] > 0.1 for row in rows)


# -- frozen parameters --------------------------------------------------------------------------


@pytest.mark.slow
def test_only_attention_moves(recovery, source, whole, taught):
    """All other parameters stay the same, bit for bit, with weight decay.

    Only attention has moments.
    """
    assert taught.optimizer.weight_decay > 0
    before, after = (
        restore_state(recovery(), source[0], step=8),
        restore_state(taught, whole[0], STEPS),
    )
    old, new = flat(before.params), flat(after.params)
    assert old.keys() == new.keys()
    for path in old:
        same = np.array_equal(old[path], new[path])
        assert same != ("/attention/" in path), path
    moments = [path for path in flat(after.opt_state) if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * sum("/attention/" in path for path in old) > 0
    assert all("/attention/" in path for path in moments)
    assert "of which" in whole[1]["text"]


@pytest.mark.slow
def test_clipping_and_its_norm_are_of_what_is_trained(recovery):
    batch = random_batch(0, batch=8, length=32, vocab=264)
    norms = {}
    for which in ("all", "attention"):
        config = recovery(**{"start.trainable": which})
        mesh = one_device(config)
        with jax.set_mesh(mesh):
            _, metrics = compile_train_step(config, mesh)(create_state(config, mesh), batch)
        norms[which] = float(metrics["grad_norm"])
    assert 0 < norms["attention"] < 0.9 * norms["all"]


# -- distillation -------------------------------------------------------------------------------


@pytest.mark.slow
def test_its_own_teacher_has_nothing_to_say(recovery):
    """KL(p || p) and its gradient are 0, so without cross-entropy the gradient is 0."""
    config = recovery(**{"start.teacher": "itself", "start.distillation": 1.0})
    mesh, batch = one_device(config), random_batch(0, batch=8, length=32, vocab=264)
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)
        params = jax.tree.map(np.asarray, state.params)
        step = compile_train_step(config, mesh, config.model)
        _, own = step(state, batch, params)
        other = jax.tree.map(lambda p: 1.1 * p, params)
        _, different = step(create_state(config, mesh), batch, other)
    # Softmax minus softmax, of logits that two compilations of a model round differently.
    assert float(own["kl"]) < 1e-6
    assert float(own["grad_norm"]) < 1e-5
    assert float(different["kl"]) > 1e-4
    assert float(different["grad_norm"]) > 1e-3
    assert float(own["loss"]) == pytest.approx(float(different["loss"]), rel=1e-6)


@pytest.mark.slow
def test_recovery_on_a_mesh_is_that_of_one_device(taught):
    """Metrics, updates and the sharding of moments are right on meshes of two and three axes.

    The batch has padding.
    """
    rows = [[32], [20, 9], [7], [1], [32], [4], [3], [1]]
    batch = random_batch(0, batch=8, length=32, vocab=264, rows=rows)
    model = change(taught.model, loss_chunk=1, attention_kernel="chunked")
    # Like SGD, as in test_step: the parameters depend on the values of the gradients.
    options = {"optimizer.eps": 1e3, "optimizer.learning_rate": 1e3, "optimizer.clip_norm": 0.0}
    config = change(taught, model=model, **options)
    params, teacher = params_of(model, seed=1), params_of(model, seed=2, noise=0.1)
    found = []
    for sizes in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 4), MeshConfig(2, 1, 2, 2)):
        there = change(config, mesh=sizes)
        count = 1 if sizes == MeshConfig(1, 1, 1) else 8
        mesh = sharding.make_mesh(sizes, jax.devices()[:count])
        where = state_shardings(there, mesh)
        with jax.set_mesh(mesh):
            fresh = jax.device_put(create_state(there, mesh), where)
            state = dataclasses.replace(fresh, params=jax.device_put(params, where.params))
            placed = jax.device_put(teacher, param_shardings(model, mesh))
            state, metrics = compile_train_step(there, mesh, model)(state, batch, placed)
        for moment, of in (("mu", where.params), ("nu", where.params)):
            for path, leaf in flat(state.opt_state).items():
                if f"/{moment}/" in path:
                    name = path.split(f"/{moment}/")[1]
                    assert leaf.sharding.is_equivalent_to(flat(of)[name], leaf.ndim), path
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, params)
        found.append((metrics, moved))
    assert max(np.abs(x).max() for x in jax.tree.leaves(found[0][1])) > 1e-2
    for metrics, moved in found[1:]:
        # Sums of a few hundred float32 terms in a different order.
        assert_close(metrics, found[0][0], rtol=1e-4, atol=1e-6)
        assert_close(moved, found[0][1], rtol=1e-3, atol=1e-5)


def test_a_step_without_its_teacher_is_not_compiled(recovery, taught):
    for config, teacher in ((taught, None), (recovery(), taught.model)):
        with pytest.raises(ValueError, match="teacher"):
            compile_train_step(config, one_device(config), teacher)


# -- resuming -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])
def test_a_cut_recovery_ends_as_if_it_had_not_been(taught, whole, devices, tmp_path, step):
    """Runs cut at step 2 or 5 end with the same bits and rows, and no row is written twice."""
    devices(1)
    train_until(step, taught, tmp_path)
    train(taught, tmp_path)
    assert_equal(restore_state(taught, tmp_path, STEPS), restore_state(taught, whole[0], STEPS))
    assert rows_of(tmp_path, MEASURED) == rows_of(whole[0], MEASURED)


@pytest.mark.slow
def test_a_run_that_has_begun_needs_its_source_no_more(recovery, source, devices, tmp_path):
    devices(1)
    copy = shutil.copytree(source[0], tmp_path / "copy")
    config = recovery(**{"start.checkpoint": str(copy)})
    train_until(4, config, tmp_path / "run")  # the checkpoint of step 2 is complete
    train_until(1, config, tmp_path / "early")
    shutil.rmtree(copy)
    summary = train(config, tmp_path / "run")
    assert summary["held_out_loss_at_start"] == source[1]["held_out_loss"]
    with pytest.raises(UserError, match=r"config\.start\.checkpoint .*copy: no such folder"):
        train(config, tmp_path / "early")


# -- the command --------------------------------------------------------------------------------


def recover(path, *more):
    return "--config", f"{CONFIG}:{path}", *more


QUICK = ("--config.steps=2", "--config.optimizer.warmup_steps=1")


@pytest.mark.slow
def test_the_config_takes_model_and_data_from_the_checkpoint(source, command, tmp_path):
    kept = json.loads((source[0] / "config.json").read_text())
    given = recover(source[0], *QUICK, "--config.data.prefetch=3", "--config.model.loss_chunk=1")
    status, out, err = command(*given)
    assert status == 0, err
    assert "at the start" in out
    run = tmp_path / "runs" / "model_recovered"
    config = from_dict(json.loads((run / "config.json").read_text()))
    wanted = from_dict(kept)
    # Options that depend on the machine are chosen again.
    chosen = {key: getattr(config.model, key) for key in ("backend", "attention_kernel")}
    assert config.model == change(wanted.model, loss_chunk=1, **chosen)
    assert config.data == change(wanted.data, prefetch=3)
    assert config.start.checkpoint == str(source[0])
    assert config.optimizer.learning_rate == 1.6e-5
    # Without a config the command uses the run's; here the run is finished.
    status, out, err = command("--workdir", run)
    assert status == 0, err
    assert f"{run} is finished: 2 steps are done" in out


@pytest.mark.slow
def test_longer_windows_of_the_same_model(source, command, tmp_path, monkeypatch):
    """`configs/longer.py` adds pass keys, and changes only lengths and text."""
    (tmp_path / "texts").mkdir()
    keys = "".join(json.dumps({"text": f"The pass key is {i}. " * 9}) + "\n" for i in range(200))
    (tmp_path / "texts" / "passkeys.jsonl").write_text(keys)
    monkeypatch.chdir(tmp_path)
    path = f"{CONFIG.with_name('longer.py')}:{source[0]}"
    status, _, err = command("--config", path, *QUICK, "--workdir", tmp_path / "long")
    assert status == 0, err
    old, new = (
        from_dict(json.loads((run / "config.json").read_text()))
        for run in (source[0], tmp_path / "long")
    )
    assert new.data.context_length == 4 * old.data.context_length
    assert [s.path for s in new.data.sources[:-1]] == [s.path for s in old.data.sources]
    assert new.data.sources[-1].weight == sum(s.weight for s in old.data.sources)
    assert new.batch_size == max(old.batch_size // 4, 1)
    assert new.start.checkpoint == str(source[0])


TEACHER = "--config.start.teacher"
SHARE = "--config.start.distillation=0.5"


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ((SHARE,), ("distillation=0.5", "config.start.teacher")),
        ((f"{TEACHER}=x",), ("teacher='x'", "distillation=0")),
        (("--config.start.distillation=1.5",), ("distillation=1.5", "[0, 1]")),
        ((f"{TEACHER}=nowhere", SHARE), ("config.start.teacher nowhere", "no such folder")),
        (("--config.start.trainable=attentoin",), ("trainable", "did you mean 'attention'?")),
        (("--config.model.d_ff=64",), ("config.model", "d_ff: 48 -> 64", "configs/recover.py")),
        (
            ("--config.data.tokenizer=bpe:264",),
            ("tokenizer", "config.start.checkpoint", "model/tokenizer"),
        ),
        (("--config.start.checkpoint=gone",), ("config.start.checkpoint gone", "no such folder")),
    ],
)
def test_what_cannot_start_is_one_line(source, command, more, parts):
    status, _, err = command(*recover(source[0], *QUICK, *more))
    assert_one_error(status, err, *parts)


def test_a_checkpoint_that_is_none_or_damaged_is_one_line(source, command, tmp_path):
    status, _, err = command(*recover(tmp_path / "nothing"))
    assert_one_error(status, err, "nothing: no such folder", "resume it with --workdir and without")
    status, _, err = command("--config", CONFIG)
    assert_one_error(status, err, "configs/recover.py:runs/NAME")
    damaged = shutil.copytree(source[0], tmp_path / "damaged")
    for step in (4, 8):
        where = damaged / "checkpoints" / str(step)
        victim = max(where.rglob("d/*"), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
    status, _, err = command(*recover(damaged, *QUICK))
    assert_one_error(status, err, "every checkpoint", "is damaged", "restore good copies")
    assert "--workdir" not in err, "another --workdir would not fix it"
    status, _, err = command(*recover(damaged / "checkpoints" / "8", *QUICK))
    assert_one_error(status, err, "config.start.checkpoint", "is damaged", "use another step")


def test_one_directory_cannot_be_source_and_run(tiny, tmp_path, devices):
    """A run may not use a compressed checkpoint's folder, which has no config.json of a run."""
    devices(1)
    run = store(tmp_path / "compressed", tiny(), params_of(tiny().model))
    with pytest.raises(UserError, match="own directory: give the run another --workdir"):
        train(tiny(**{"start.checkpoint": str(run)}), run)


@pytest.mark.slow
@pytest.mark.parametrize("change_", ["words", "tokenizer"])
def test_a_teacher_must_share_the_words(recovery, tiny, tmp_path, devices, change_):
    devices(1)
    config = tiny(**{"model.vocab_size": 272 if change_ == "words" else 264})
    run = store(tmp_path / "other", config, params_of(config.model))
    if change_ == "tokenizer":
        trained = tiny(**{"data.tokenizer": "bpe:264"}, steps=1)
        train(trained, tmp_path / "bpe")
        shutil.rmtree(run / "tokenizer")
        shutil.copytree(tmp_path / "bpe" / "tokenizer", run / "tokenizer")
    with pytest.raises(UserError, match=r"config\.start\.teacher .*other") as error:
        train(recovery(**{"start.teacher": str(run), "start.distillation": 0.5}), tmp_path / "run")
    assert ("272 tokens" if change_ == "words" else "tokenizer") in str(error.value)
