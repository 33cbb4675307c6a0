"""`python -m mea_jax.compress` planned: its programs, and how often one compression runs each.

The pass over a checkpoint has one layer on the devices at a time, whole on each of them, and
batches of so many windows a device: what a program needs does not depend on depth, and the time is
the sum over programs of how often each runs. Only repair keeps all of its text on the devices.

| program | what it is |
|---|---|
| calibrate | a layer's forward pass over a batch, with second moments of its keys and values |
| pass | the same without moments: text to repair with, and held-out text before and after |
| loss | the held-out loss of a batch, behind the last layer |
| compare | the compressed model's loss, and how far its predictions are from the original's |
| target | the original layer's attention, which the compressed one is to equal |
| repair | a step of `--repair layerwise` towards it |

Left out: solving, on the host; the embedding; and what repair does once a layer beside its steps
(the refit of the output projection, errors, temperatures: passes over a layer's attention).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mea_jax.checkpoint.load import unresolved
from mea_jax.compress import budgets, methods, repair, stream
from mea_jax.compress.calibration import WINDOWS, held_out_share
from mea_jax.compress.options import Options, repair_text
from mea_jax.config.schema import MeshConfig, ModelConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.layer_spec import LayerSpec, layer_specs, plain_spec
from mea_jax.model.params import abstract_params
from mea_jax.ops.backend import resolve
from mea_jax.parallel import sharding
from mea_jax.plan.collectives import slices_of
from mea_jax.plan.compiling import Compiled, DoesNotFit, measured, per_device_bytes, portable
from mea_jax.plan.programs import described
from mea_jax.plan.target import Target

PROGRAMS = ("calibrate", "pass", "loss", "compare", "target", "repair")
REPAIRING = ("target", "repair")  # those that only --repair layerwise runs


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the stages that the command names as it goes.

    Attributes:
      runs: how often each program runs in it.
      optional: only `--repair layerwise` has it.
    """

    name: str
    runs: dict[str, int]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What one compression goes through. Batches are of `windows` windows, all devices together."""

    layers: int
    windows: int
    length: int
    text: int  # batches to calibrate on
    repair_text: int  # batches to repair on
    held_out: int  # batches, at most: the data may have fewer held-out windows
    repair_steps: int
    window_bytes: float  # of a window's residual, on disk between two layers

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.windows * self.length

    @property
    def stages(self) -> list[Stage]:
        layers, looked = self.layers, {"pass": self.layers * self.held_out}
        text = layers * self.repair_text
        repairs = {"pass": text, "target": text, "repair": layers * self.repair_steps}
        return [
            Stage(
                "calibrating", {"calibrate": layers * self.text, **looked, "loss": self.held_out}
            ),
            Stage("repairing", repairs, optional=True),
            Stage("looking at the loss", looked | {"compare": self.held_out}),
        ]

    @property
    def disk(self) -> float:
        """Bytes at most: residuals of calibration and held-out text, one of them before and after a
        layer; or those of a repair's text or of held-out text, beside what the original gave.
        Without those of measured budgets' text, which come and go between."""
        calibrating = self.text + self.held_out + max(self.text, self.held_out)
        batches = max(calibrating, self.held_out + 2 * max(self.repair_text, self.held_out))
        return batches * self.windows * self.window_bytes

    def moved(self, stage: Stage) -> float:
        """Bytes of residuals that a stage reads from and writes to the disk."""
        times = {"calibrate": 2, "pass": 2, "loss": 1, "target": 1, "compare": 2}
        batches = sum(times.get(name, 0) * count for name, count in stage.runs.items())
        return batches * self.windows * self.window_bytes


def check_machine(target: Target) -> None:
    """Raises `UserError` for more than one machine: compress is a single process."""
    count, chip = len(target.devices), target.chip
    if slices_of(target.devices) > 1 or (chip is not None and count > chip.host):
        most = f" of at most {chip.host} {chip.name}" if chip is not None else ""
        raise UserError(
            f"--topology {target.name}: {count} devices; compress runs on one machine{most}"
        )


def remedy(program: str) -> str:
    """What would fit where `program` does not, as the end of a line."""
    if program in REPAIRING:
        return "; all else fits: fewer --repair_tokens, or no --repair layerwise"
    return (
        f"; a device takes {WINDOWS} windows and a whole layer however many there are: "
        "take chips with more memory"
    )


def resolved(config: TrainConfig, target: Target) -> TrainConfig:
    """`config` with its model as compress runs it."""
    model = dataclasses.replace(unresolved(config.model), dtype="auto", remat="none")
    model = resolve(portable(model, target), target.devices, config.data.context_length)
    return dataclasses.replace(config, model=model)


def work_of(config: TrainConfig, target: Target, options: Options) -> Work:
    """Of a resolved config."""
    model, length = config.model, config.data.context_length
    windows = WINDOWS * len(target.devices)
    sources = max(len(config.data.sources), 1)
    share = held_out_share(options.held_out_tokens, windows * length, sources)

    def batches(tokens: int) -> int:
        return max(math.ceil(tokens / (windows * length)), 1)

    # In the place of others, CPU devices compile in float32 what is bfloat16 there.
    item = stream.make_backend(model).activation.itemsize if target.exact else 2
    return Work(
        layers=model.n_layers,
        windows=windows,
        length=length,
        text=batches(options.calibration_tokens),
        repair_text=batches(repair_text(options)),
        held_out=sources * share,
        repair_steps=options.repair_steps,
        window_bytes=float(length * model.d_model * item),
    )


def _one_layer(spec: LayerSpec) -> Any:
    """Abstract parameters of a layer, as they are stored: float32."""
    stacked = abstract_params(dataclasses.replace(spec.alone, n_layers=1))["layers_0"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def layer_bytes(config: TrainConfig) -> tuple[int, float]:
    """Numbers and bytes of a layer's parameters; of the widest, where layers differ."""
    leaves = jax.tree.leaves(_one_layer(_widest(config.model)))
    return sum(x.size for x in leaves), float(sum(x.size * x.dtype.itemsize for x in leaves))


def measuring_bytes(config: TrainConfig) -> float:
    """Bytes of the parameters that `--budget measured` puts on each device: every layer, and the
    top. Two residuals of each window that it measures on come on top."""
    layer, top = _one_layer(plain_spec(config.model)), _top(config.model)
    size = {"layer": 0.0, "top": 0.0}
    for name, tree in (("layer", layer), ("top", top)):
        size[name] = float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))
    return config.model.n_layers * size["layer"] + size["top"]


def _widest(model: ModelConfig) -> LayerSpec:
    return max(layer_specs(model), key=lambda spec: sum(spec.components))


def _top(model: ModelConfig) -> Any:
    """Abstract parameters outside the layers."""
    params = abstract_params(model).items()
    return {name: leaf for name, leaf in params if not name.startswith("layers_")}


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Abstract arguments of the programs, on the mesh: batches split, all else on every device."""

    mesh: Mesh
    work: Work
    model: ModelConfig

    def array(self, shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def place(self, tree: Any) -> Any:
        where = sharding.replicated(self.mesh)
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype, where), tree)

    @property
    def batch(self) -> Any:
        rows = self.work.windows, self.work.length
        tokens = self.array(rows, jnp.int32, sharding.batch_sharding(self.mesh))
        return dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), tokens)

    @property
    def residual(self) -> Any:
        """(B, T, D)."""
        shape = self.work.windows, self.work.length, self.model.d_model
        dtype = stream.make_backend(self.model).activation
        return self.array(shape, dtype, sharding.batch_sharding(self.mesh))


@dataclasses.dataclass(frozen=True)
class _Program:
    """How it is traced, what of its arguments lies on a device, and what lies there beside them."""

    lower: Callable[[], Any]
    held: dict[str, Any]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


def _programs(inputs: _Arguments, options: Options) -> dict[str, _Program]:
    model, steps = inputs.model, inputs.work.repair_steps
    # Measured budgets give some layers more: this is a layer at the mean, rounded up.
    heads = math.ceil(budgets.heads_kept(options.keep, model.n_kv_heads))
    counts = [heads] * model.n_layers
    original = _widest(model)
    compressed = layer_specs(methods.target_model(model, options.method, counts, counts))[0]
    layer, top = inputs.place(_one_layer(original)), inputs.place(_top(model))
    attention, scale = layer["attention"], layer["attention_norm"]["scale"]
    params = inputs.place(_one_layer(compressed)["attention"])
    state = inputs.place(jax.eval_shape(repair._optimizer(steps).init, params))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    sizes = inputs.place(jax.tree.map(lambda _: scalar, params))
    x_BTD, batch = inputs.residual, inputs.batch
    normed, wanted = x_BTD, x_BTD  # of the residual's shape and dtype
    moved, text = {"layer": layer, "residual": x_BTD}, {"batch": batch}
    attended = (original, attention, scale, x_BTD, batch, 0)
    stepped = (False, compressed, steps, params, state, sizes, normed, wanted, 0.0, batch, 0)
    own = {"compressed attention": params}
    before = {"original attention": (attention, scale)}
    # What the original layer reads and gives is kept for as long as that layer is repaired.
    others = {"other batches": [(normed, wanted, batch)] * (inputs.work.repair_text - 1)}
    return {
        "calibrate": _Program(
            lambda: stream.watch_block.lower(original, layer, x_BTD, batch, 0), moved | text
        ),
        "pass": _Program(
            lambda: stream.run_block.lower(original, layer, x_BTD, batch, 0), moved | text
        ),
        "loss": _Program(
            lambda: stream.loss_sums.lower(model, top, x_BTD, batch),
            {"embeddings": top, "residual": x_BTD} | text,
        ),
        "compare": _Program(
            lambda: stream.compared_sums.lower(model, top, x_BTD, x_BTD, batch),
            {"embeddings": top, "residuals": (x_BTD, x_BTD)} | text,
        ),
        "target": _Program(
            lambda: stream.run_attention.lower(*attended),
            before | {"residual": x_BTD} | text,
            own | others,
        ),
        "repair": _Program(
            lambda: repair._step.lower(*stepped),
            own | {"optimizer": state, "input, target": (normed, wanted)} | text,
            before | others,
        ),
    }


def compress_programs(
    config: TrainConfig, target: Target, options: Options, names: tuple[str, ...] = PROGRAMS
) -> Iterator[tuple[str, Compiled]]:
    """The programs of a compression of a resolved config, each as it is compiled.

    Raises `UserError` for what cannot be, such as attention that no method fits, before anything is
    compiled, and `DoesNotFit` with the program's name.
    """
    mesh = sharding.make_mesh(MeshConfig(), target.devices)
    inputs = _Arguments(mesh, work_of(config, target, options), config.model)
    programs, params = _programs(inputs, options), abstract_params(config.model)
    for name in names:
        program = programs[name]
        with jax.set_mesh(mesh):
            lowered = program.lower()
        try:
            compiled = measured(
                lowered,
                target,
                config=config,
                mesh=mesh,
                held={part: per_device_bytes(tree) for part, tree in program.held.items()},
                params=params,
                describe=described(config.model),
                beside={part: per_device_bytes(tree) for part, tree in program.beside.items()},
            )
        except DoesNotFit as error:
            error.program = name
            raise
        compiled.held["results"] = compiled.results
        yield name, compiled
