"""Random configs: each one trains, or is refused in one line that names a key."""

import contextlib
import dataclasses
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mea_jax.config.model_checks import validate_from_scratch
from mea_jax.config.parse import from_config_dict, from_dict
from mea_jax.config.schema import TrainConfig, default_config, flatten
from mea_jax.data.pipeline import held_out_batches, train_batches
from mea_jax.data.prepare import prepare
from mea_jax.errors import UserError
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.model.params import TrainState
from mea_jax.ops.resolve import resolve
from mea_jax.ops.sampling import Sampling
from mea_jax.parallel import sharding
from mea_jax.train import memory
from mea_jax.train.diagnostics import compile_diagnostics
from mea_jax.train.step import abstract_state, compile_eval_step, compile_train_step, create_state
from mea_jax.train.warm_start import Start
from tests.helpers import random_batch

from .config_trees import Example, examples

STRATEGY = examples()
RUN_ONE_IN = 3  # one in so many traced configs also takes two steps
GENERATE_ONE_IN = 10  # one in so many also generates two tokens
LONGEST_LINE = 500


def refusal(error: UserError) -> str:
    """Return the key that a refusal names; raise `AssertionError` unless it is one short line."""
    line = str(error)
    assert len(line.splitlines()) == 1, f"not one line: {line!r}"
    assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:LONGEST_LINE]}"
    key = re.search(r"config\b[\w.\[\]]*", line)
    assert key is not None, f"names no key: {line}"
    return re.sub(r"\[\d+\]", "[]", key[0])


def _build(example: Example) -> TrainConfig:
    if not example.through_file:
        return from_dict(example.tree)
    config = default_config()
    try:
        config.update(example.tree)
    except Exception as error:  # the command prints whatever a config file raises as one line
        raise UserError(f"config file: {type(error).__name__}: correct the file") from error
    return from_config_dict(config)


def _resolve(example: Example) -> tuple[TrainConfig, jax.sharding.Mesh]:
    """Repeat the steps of `mea_jax.train.run.train` before it reads data, in the same order."""
    config, devices = _build(example), jax.devices()[: example.devices]
    mesh = sharding.make_mesh(config.mesh, devices)
    split = (mesh.shape["tensor"], mesh.shape["sequence"])
    model = resolve(config.model, devices, config.data.context_length, *split)
    config = dataclasses.replace(config, model=model)
    sharding.check_divisible(config, mesh)
    start = Start(config, mesh, str)
    if start.source is None:
        validate_from_scratch(config.model)
    _ = start.teacher  # like the source, it must exist if it is named
    memory.check_fits(config, mesh)
    return config, mesh


def _batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Return random windows, some with two documents and some with padding."""
    length = config.data.context_length
    kinds = [[length], [length // 3, length - length // 3], [max(length - 2, 1)]]
    rows = [[size for size in kinds[i % 3] if size] for i in range(config.batch_size)]
    return random_batch(config.seed, config.batch_size, length, config.model.vocab_size, rows)


def _steps(config: TrainConfig, mesh: jax.sharding.Mesh, finite: bool) -> TrainState:
    """Run two compiled updates, then an evaluation and the diagnostics; return the state."""
    where = sharding.batch_sharding(mesh)
    batch = {name: jax.device_put(x, where) for name, x in _batch(config).items()}
    state, step = create_state(config, mesh), compile_train_step(config, mesh)
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch)
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    sums = compile_eval_step(config, mesh)(state.params, batch)
    losses.append(float(sums["nll"]))
    statistics = jax.device_get(compile_diagnostics(config, mesh)(state.params, batch))
    if finite:
        assert np.isfinite(losses).all(), f"losses {losses}"
        for name, values in statistics.items():
            assert np.isfinite(values).all(), f"{name}: {values}"
    return state


def _generate(config: TrainConfig, params: Any) -> None:
    """Sample two tokens as a finished run does, on its mesh, from its parameters."""
    model = dataclasses.replace(config.model, attention_kernel="auto")
    length = config.data.context_length
    generator = Generator(model, params, length=length)
    sampling = Sampling(config.evaluate.sample_temperature)
    (new,) = generator.run(
        [[0] * min(2, length - 1)], Decoding(2, sampling=sampling, seed=config.seed)
    )
    assert 1 <= len(new) <= 2, new


def _prepare(config: TrainConfig, folder: Path) -> None:
    """Prepare and read a small corpus with these options; a refusal must be one line."""
    if any(s.source.startswith(("tfds:", "python_stdlib")) for s in config.data.sources):
        return  # these take seconds, whatever the config
    (folder / "somewhere").mkdir()
    for i in range(4):
        (folder / "somewhere" / f"{i}.txt").write_text("some words " * (i + 3))
    if config.data.cache_dir.startswith("/"):
        return
    with contextlib.chdir(folder):
        data = dataclasses.replace(config.data, cache_dir=config.data.cache_dir or "cache")
        try:
            prepared = prepare(data, None, log=lambda line: None)
            batches = held_out_batches(prepared, batch_size=1, max_batches=config.evaluate.batches)
            assert all(b["inputs"].shape == (1, data.context_length) for b in batches)
            batches = train_batches(
                prepared,
                seed=config.seed,
                batch_size=2,
                threads=data.read_threads,
                prefetch=data.prefetch,
            )
            assert next(batches)["inputs"].shape == (2, data.context_length)
        except UserError as error:
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"not one line: {error}") from error


def _chance(example: Example, one_in: int, salt: str) -> bool:
    """Return whether an example is one in `one_in`, always the same for equal arguments."""
    return zlib.crc32(f"{salt} {example!r}".encode()) % one_in == 0


def _small(config: TrainConfig) -> bool:
    """Return whether no size in a config is far above those of coherent configs."""
    sizes = [config.batch_size, config.data.context_length, config.data.prefetch]
    sizes += [v for v in flatten(dataclasses.asdict(config.model)).values() if type(v) is int]
    return max(sizes) <= 1024


def check(example: Example, folder: Path) -> str:
    """Return "ran" or "refused: <key>"; any exception is a defect."""
    try:
        config, mesh = _resolve(example)
    except UserError as error:
        key = refusal(error)
        if example.coherent:
            raise AssertionError(f"a coherent config was refused: {error}") from error
        return f"refused: {key}"
    if config.data.context_length <= 1024:
        _prepare(config, folder)
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        shape = (config.batch_size, config.data.context_length)
        names = ("inputs", "targets", "positions", "segment_ids")
        batch = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
        jax.eval_shape(compile_train_step(config, mesh), state, batch)
        jax.eval_shape(compile_eval_step(config, mesh), state.params, batch)
        jax.eval_shape(compile_diagnostics(config, mesh), state.params, batch)
        if not _small(config):
            return "ran"
        made = None
        if _chance(example, RUN_ONE_IN, "run"):
            made = _steps(config, mesh, finite=example.coherent)
        if shape[1] > 1 and _chance(example, GENERATE_ONE_IN, "generate"):
            _generate(config, (made or create_state(config, mesh)).params)
    return "ran"
