"""Try meshes, remat policies and sizes of microbatches, and rank those that fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from mea_jax.config.schema import REMAT_POLICIES, MeshConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.plan.compiling import Compiled, DoesNotFit
from mea_jax.plan.programs import train_program
from mea_jax.plan.roofline import Roofline, roofline
from mea_jax.plan.target import Target


def meshes(config: TrainConfig, devices: int, slices: int) -> list[MeshConfig]:
    """Return the meshes worth compiling: all of fsdp x tensor, with tensor up to 8.

    The data axis replicates only between slices, or where fsdp alone would leave less than a tile
    of the residual to a device. Experts, if any, are not divided, or divided over 4 or 16 devices.
    """
    found = []
    per_slice, experts = devices // slices, config.model.n_experts
    tensor = 1
    while tensor <= min(8, config.model.n_kv_heads, per_slice):
        rest = per_slice // tensor
        for expert, data in itertools.product((1, 4, 16) if experts else (1,), (1, 4)):
            if rest % (data * expert) == experts % expert == 0 and (data == 1 or rest >= 16):
                mesh = dataclasses.replace(
                    config.mesh,
                    data=data * slices,
                    fsdp=rest // data // expert,
                    expert=expert,
                    tensor=tensor,
                    slices=slices,
                )
                found.append(mesh)
        tensor *= 2
    return found


def microbatches(config: TrainConfig, copies: int) -> list[int]:
    """Return values of `accumulate` for which a device computes 1, 2, 4, ... windows at a time."""
    per_copy = config.batch_size // copies
    if config.batch_size % copies:
        return []
    sizes = [n for n in (1, 2, 4, 8, 16) if per_copy % n == 0]
    return [per_copy // n for n in sizes]


def candidates(config: TrainConfig, devices: int, slices: int) -> Iterator[TrainConfig]:
    """Yield all configs to try; for each mesh and policy, the smallest memory first."""
    for mesh, remat in itertools.product(meshes(config, devices, slices), REMAT_POLICIES):
        model = dataclasses.replace(config.model, remat=remat)
        for accumulate in microbatches(config, mesh.data * mesh.fsdp * mesh.expert):
            yield dataclasses.replace(config, mesh=mesh, model=model, accumulate=accumulate)


def describe(config: TrainConfig) -> str:
    """Return the overrides of a candidate as command-line flags."""
    mesh = config.mesh
    expert = f"--config.mesh.expert={mesh.expert} " if config.model.n_experts else ""
    return (
        f"--config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp} {expert}"
        f"--config.mesh.tensor={mesh.tensor} --config.model.remat={config.model.remat} "
        f"--config.accumulate={config.accumulate}"
    )


def sweep(
    config: TrainConfig, target: Target, slices: int, log: Callable[[str], Any]
) -> list[tuple[TrainConfig, Compiled, Roofline]]:
    """Return the candidates that fit, the shortest step first.

    After a microbatch that does not fit, larger ones of the same mesh and policy are skipped.
    Raises `UserError` if no mesh divides the batch.
    """
    tried = list(candidates(config, len(target.devices), slices))
    if not tried:
        raise UserError(
            f"no mesh of {len(target.devices)} devices divides config.batch_size="
            f"{config.batch_size}: set it to a multiple of the devices"
        )
    results, full = [], set()
    for number, candidate in enumerate(tried, start=1):
        name, key = describe(candidate), (candidate.mesh, candidate.model.remat)
        if key in full:
            log(f"[{number}/{len(tried)}] {name}: a smaller microbatch did not fit")
            continue
        try:
            compiled = train_program(candidate, target)
        except DoesNotFit as error:
            full.add(key)
            log(f"[{number}/{len(tried)}] {name}: {error}")
            continue
        except UserError as error:
            log(f"[{number}/{len(tried)}] {name}: {error}")
            continue
        if target.chip is not None and compiled.peak > target.chip.memory:
            full.add(key)
            log(f"[{number}/{len(tried)}] {name}: does not fit, {compiled.peak / 1e9:.2f} GB")
            continue
        roof = roofline(compiled, target)
        took = f", {roof.step:.3f} s per step, {roof.binding} binds" if roof.step else ""
        log(f"[{number}/{len(tried)}] {name}: {compiled.peak / 1e9:.2f} GB{took}")
        results.append((candidate, compiled, roof))
    # By the compiler's cycles, if any, since they include the vector work of recomputation.
    return sorted(results, key=lambda r: max(r[2].step or 0.0, r[2].estimated or 0.0))


def what_fits(config: TrainConfig, target: Target, log: Callable[[str], Any]) -> TrainConfig | None:
    """Return a change of `config` that fits, or None; smaller microbatches before full remat."""
    copies = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    if copies < 0:
        fixed = config.mesh.tensor * max(config.mesh.sequence, 1)
        copies = len(target.devices) // fixed
    smaller = [n for n in microbatches(config, copies) if n > config.accumulate]
    policies = [config.model.remat] + (["full"] if config.model.remat != "full" else [])
    for remat in policies:
        model = dataclasses.replace(config.model, remat=remat)
        for accumulate in reversed(smaller or [config.accumulate]):
            candidate = dataclasses.replace(config, model=model, accumulate=accumulate)
            log(f"trying accumulate={accumulate}, remat={remat}")
            try:
                compiled = train_program(candidate, target)
            except UserError:
                continue
            if target.chip is None or compiled.peak <= target.chip.memory:
                return candidate
    return None
