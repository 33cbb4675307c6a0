"""Define the state of a run and the compiled functions on it: training and evaluation steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mea_jax.config.schema import ModelConfig, TrainConfig
from mea_jax.model.moe import RouterSums
from mea_jax.model.params import TrainState, _placed, init_params, param_shardings
from mea_jax.model.transformer import apply_hidden, apply_routed
from mea_jax.ops.backend import make_backend
from mea_jax.ops.context_parallel import lay_out
from mea_jax.ops.cross_entropy import (
    LossOptions,
    cross_entropy,
    distilled_cross_entropy,
    positions_within,
)
from mea_jax.parallel import sharding
from mea_jax.train.optimizer import (
    advance_schedule,
    make_optimizer,
    make_schedule,
    merge_params,
    trainable,
)

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class Teacher(NamedTuple):
    """The teacher of a distillation: its resolved model, and its parameters on the mesh."""

    model: ModelConfig
    params: Any


def first_state(config: TrainConfig, params: Any) -> TrainState:
    """Return the state of a run that begins with `params`: step 0, moments of zero."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    opt_state = optimizer.init(trainable(params, config.start.trainable))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def init_state(config: TrainConfig, key: jax.Array) -> TrainState:
    """Return a freshly initialised state, without logical axes."""
    return first_state(config, nn.unbox(init_params(config.model, key)))


def state_shardings(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return a `TrainState` of `NamedSharding`s; moments are sharded like their parameters."""
    params = param_shardings(config.model, mesh)
    abstract = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    whole = sharding.replicated(mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    opt_state = optax.tree_utils.tree_map_params(
        lambda placeholder: jax.eval_shape(lambda: optimizer.init(placeholder)),
        lambda _, param_sharding: param_sharding,
        abstract.opt_state,
        trainable(params, config.start.trainable),
        transform_non_params=lambda _: whole,
    )
    return TrainState(step=whole, params=params, opt_state=opt_state)


def create_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return a freshly initialised state on `mesh`.

    Each shard is created on its own device, so no device ever holds the full state.
    """
    with jax.set_mesh(mesh):
        init = jax.jit(lambda k: init_state(config, k), out_shardings=state_shardings(config, mesh))
        return init(jax.random.key(config.seed))


def start_state(config: TrainConfig, mesh: Mesh, params: Any) -> TrainState:
    """Return the state of a run that begins with `params`, which are placed on `mesh` and donated.

    They are read from a checkpoint with the shardings of `state_shardings`, so none is computed.
    """
    shardings = state_shardings(config, mesh)
    with jax.set_mesh(mesh):
        init = jax.jit(lambda p: first_state(config, p), out_shardings=shardings, donate_argnums=0)
        return init(params)


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    return _placed(shapes, state_shardings(config, mesh))


def batch_loss(
    config: TrainConfig, params: Any, batch: Batch, teacher: Teacher | None = None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return sums over the tokens of a batch: objective, (nll in nats, number of tokens, ...).

    With a `teacher`, the objective is mixed as `config.start.distillation` says, and the second
    result continues with KL(teacher || model) in nats. With experts, the objective includes the
    router losses, and the second result ends with the sums that `_with_router` adds. `reported`
    returns the names of these additional sums.

    If the mesh of `jax.set_mesh` splits the sequence, the batch is laid out for its shards here.
    Raises `ValueError` for talking heads on such a mesh.
    """
    shards = sharding.shard_count("length")
    if shards > 1 and config.model.variant == "talking_heads":
        raise ValueError("talking heads cannot take split windows: set config.mesh.sequence=1")
    segment_ids_BT, batch = batch["segment_ids"], lay_out(batch, shards)
    (x_BTD, kernel_DV), router = apply_routed(
        config.model, params, batch["inputs"], batch["positions"], segment_ids_BT, shards
    )
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    arrays = (x_BTD, kernel_DV, batch["targets"], weights_BT)
    products, z_loss = make_backend(config.model), config.optimizer.z_loss
    words = kernel_DV.shape[1] // sharding.shard_count("vocab")
    if teacher is None:
        chunk = positions_within(config.model.loss_chunk, words)
        objective, nll = cross_entropy(*arrays, products, chunk, z_loss)
        return _with_router(config, router, objective, (nll, weights_BT.sum()))
    teacher_args = apply_hidden(
        teacher.model, teacher.params, batch["inputs"], batch["positions"], segment_ids_BT, shards
    )
    chunk = positions_within(config.model.loss_chunk, 2 * words)  # the teacher has logits, too
    options = LossOptions(products, chunk, z_loss, config.start.distillation)
    objective, nll, kl = distilled_cross_entropy(*arrays, teacher_args, options)
    return _with_router(config, router, objective, (nll, weights_BT.sum(), kl))


def reported(config: TrainConfig, teacher_args: bool) -> tuple[str, ...]:
    """Return the names of the sums that `batch_loss` reports after the nll and the tokens."""
    router = ("load_balance", "router_z", "busiest_expert") if config.model.n_experts else ()
    return (("kl",) if teacher_args else ()) + router


def _with_router(
    config: TrainConfig, router: RouterSums | None, objective: jax.Array, sums: tuple
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the objective and sums with the router losses added, each a mean over layers.

    Each mean is added times the number of tokens, so that the sums of a batch in parts give the
    mean of its parts. The busiest expert's load, relative to the mean load, is that of the layer
    where it is largest. Without experts (`router` None) nothing is added.
    """
    if router is None:
        return objective, sums
    tokens, optim = sums[1], config.optimizer
    balance, z = jnp.mean(router.load_balance()), jnp.mean(router.z_loss())
    objective += tokens * (optim.load_balance * balance + optim.router_z_loss * z)
    return objective, (
        *sums,
        tokens * balance,
        tokens * z,
        tokens * jnp.max(router.load_imbalance()),
    )


def split_batch(config: TrainConfig, batch: Batch) -> Batch:
    """Return a batch (B, T) as `accumulate` parts (n, B/n, T) for a scan.

    Part i takes rows i, i + n, ..., so that on a mesh each device keeps its own rows.
    """
    n = config.accumulate
    return {name: jnp.swapaxes(x.reshape(-1, n, x.shape[1]), 0, 1) for name, x in batch.items()}


def _constrained(batch: Batch) -> Batch:
    return {name: sharding.constrain(x, "batch", None) for name, x in batch.items()}


def _gradients(config: TrainConfig, params: Any, batch: Batch, teacher: Teacher | None = None):
    """Return the summed gradients of the trainable parameters, then the sums of `batch_loss`.

    The batch is computed in `accumulate` parts, one after another. Gradients are summed, not
    averaged: a single division by the tokens of the entire batch weights every token equally,
    however padding is distributed over the parts.
    """
    trained = trainable(params, config.start.trainable)
    grad = jax.value_and_grad(
        lambda p, b: batch_loss(config, merge_params(params, p), b, teacher), has_aux=True
    )
    if config.accumulate == 1:
        (_, sums), gradients = grad(trained, batch)
        return gradients, *sums

    def part(carry, part_batch):
        (_, sums), gradients = grad(trained, _constrained(part_batch))
        return jax.tree.map(jnp.add, carry, (gradients, *sums)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    count = 2 + len(reported(config, teacher is not None))
    start = (zeros, *(jnp.zeros((), jnp.float32) for _ in range(count)))
    return jax.lax.scan(part, start, split_batch(config, batch))[0]


def train_step(
    config: TrainConfig, state: TrainState, batch: Batch, teacher: Teacher | None = None
) -> tuple[TrainState, Metrics]:
    """Return the state after one AdamW update on a global batch, and the metrics of the step.

    If the norm of the gradient is not finite, the update is left out: only the step counters
    advance, and parameters and moments stay as if the batch had not existed. Parameters that
    `config.start.trainable` excludes pass through unchanged, bit for bit.

    The metrics are float32 scalars:

    - `loss`: the mean nll in nats per token, without z-loss and distillation.
    - `kl`: the mean KL(teacher || model), if there is a teacher.
    - `load_balance`, `router_z`, `busiest_expert`: those of `moe.RouterSums`, if there are experts.
    - `grad_norm`: the norm of the gradient before clipping.
    - `param_norm`: the norm of the parameters before the update.
    - `learning_rate`, and `tokens`, the number of tokens.
    - `skipped`: 1 if the update is left out, otherwise 0.
    - `empty_windows`: the number of windows without a token. Stored windows that cannot be read
      become such windows.
    """
    gradients, nll, tokens, *others = _gradients(config, state.params, batch, teacher)
    gradients = jax.tree.map(lambda g: g / tokens, gradients)
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained = trainable(state.params, config.start.trainable)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(grad_norm)
    metrics = {
        "loss": nll / tokens,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(state.params),
        "learning_rate": make_schedule(config.optimizer, config.steps)(state.step),
        "tokens": tokens,
        "skipped": 1.0 - finite.astype(jnp.float32),
        "empty_windows": jnp.sum(jnp.all(batch["segment_ids"] == 0, axis=1)).astype(jnp.float32),
    }
    names = reported(config, teacher is not None)
    metrics |= {name: x / tokens for name, x in zip(names, others, strict=True)}
    new_params = optax.apply_updates(trained, updates)
    new_params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (new_params, opt_state),
        (trained, advance_schedule(state.opt_state)),
    )
    params = merge_params(state.params, new_params)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Return options for the devices' compiler, or None.

    By default the TPU compiler turns products with gathered weights into loops of partial products
    that overlap with permutes. By its own cycle estimate that is far slower here (docs/scaling.md).
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


def compile_train_step(
    config: TrainConfig, mesh: Mesh, teacher: ModelConfig | None = None
) -> jax.stages.Wrapped:
    """Return `train_step` under jit with explicit shardings; it donates the old state.

    If `teacher`, a resolved model, is given, the parameters of the teacher are the function's third
    argument. Call the function under `jax.set_mesh(mesh)` if the mesh has several devices,
    otherwise it raises `RuntimeError`.

    Raises `ValueError` if `teacher` is given without `config.start.distillation`, or not with it.
    """
    if (teacher is not None) != (config.start.distillation > 0):
        raise ValueError(
            f"distillation={config.start.distillation} does not fit teacher {teacher}: give a "
            "teacher if and only if it is above 0"
        )
    shardings, where = state_shardings(config, mesh), sharding.batch_sharding(mesh)
    teacher_args = () if teacher is None else (param_shardings(teacher, mesh),)

    def step(state: TrainState, batch: Batch, *given: Any) -> tuple[TrainState, Metrics]:
        sharding.require(mesh)
        return train_step(config, state, batch, Teacher(teacher, *given) if teacher else None)

    return jax.jit(
        step,
        in_shardings=(shardings, where, *teacher_args),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=_compiler_options(mesh),
    )


def eval_sums(config: TrainConfig, params: Any, batch: Batch) -> Metrics:
    """Return {"nll", "tokens"}, sums over a batch in `accumulate` parts, without a teacher."""

    def part(sums, part_batch):
        _, new = batch_loss(config, params, _constrained(part_batch))
        return jax.tree.map(jnp.add, sums, new[:2]), None

    zero = jnp.zeros((), jnp.float32)
    nll, tokens = jax.lax.scan(part, (zero, zero), split_batch(config, batch))[0]
    return {"nll": nll, "tokens": tokens}


def compile_eval_step(config: TrainConfig, mesh: Mesh) -> Callable[..., Metrics]:
    """Return a jitted function (params, batch) -> `eval_sums`, float32.

    The function computes a batch in parts like the training step, so it fits in memory wherever
    that does. Call it under `jax.set_mesh(mesh)` if the mesh has several devices, otherwise it
    raises `RuntimeError`.
    """

    def step(params, batch):
        sharding.require(mesh)
        return eval_sums(config, params, batch)

    return jax.jit(
        step,
        in_shardings=(state_shardings(config, mesh).params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
