"""Diagnostics of MEA: head norms, mixing distances, attention entropy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.schema import TrainConfig
from mea_jax.model.transformer import Decoder, stretches
from mea_jax.ops import hlc
from mea_jax.parallel import sharding
from mea_jax.train.step import Batch, split_batch, state_shardings


def mixing_distance(config: TrainConfig, params: Any) -> dict[str, jax.Array]:
    """Return the distance of each W_lc from its start, |M - M_0| / |M_0| (Frobenius), per layer.

    {"mixing_distance/key": (L,), "mixing_distance/value": (L,)} for what the model mixes. A
    component count that does not divide K has no initialisation (a compressed model): nan. Of
    `hlc_init="normal"` it is the distance from the block identity all the same.
    """
    model, result = config.model, {}
    for which in ("key", "value"):
        if not model.mixes(which):
            continue
        rows = []
        for first, length, c_key, c_value in stretches(model):
            components = c_key if which == "key" else c_value
            if model.n_kv_heads % components:
                rows.append(jnp.full((length,), jnp.nan))
                continue
            mixings = params[f"layers_{first}"]["attention"][f"{which}_mixing"]
            kind = model.mixing_kind(which)
            start = hlc.initial(kind, components, model.n_kv_heads, model.head_dim)
            moved = (mixings - start[None]).reshape(length, -1)
            rows.append(jnp.linalg.norm(moved, axis=1) / jnp.linalg.norm(start.reshape(-1)))
        result[f"mixing_distance/{which}"] = jnp.concatenate(rows)
    return result


def compile_diagnostics(config: TrainConfig, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """(params, batch) -> arrays by name, float32, of the first part of one held-out batch.

    A part is what a training step takes at a time (`config.accumulate`): it fits where that does.

    `attention_entropy` (L, N) in nats, `attention_logit_max` (L, N), `head_output_rms` (L, N)
    before the head norm, and `mixing_distance/...` (L,).

    To be called under `jax.set_mesh(mesh)` if that has several devices: `RuntimeError` otherwise.
    Where the mesh splits the sequence, its devices do the same work on whole windows.
    """

    def run(params: Any, batch: Batch) -> dict[str, jax.Array]:
        sharding.require(mesh)
        part = {name: x[0] for name, x in split_batch(config, batch).items()}
        part = {name: sharding.constrain(x, "batch", None) for name, x in part.items()}
        inputs = (part["inputs"], part["positions"], part["segment_ids"])
        _, variables = Decoder(config.model).apply(
            {"params": params}, *inputs, mutable=["statistics"]
        )
        stacks = [
            variables["statistics"][f"layers_{first}"]["attention"]["attention"][0]
            for first, *_ in stretches(config.model)
        ]
        names = {
            "entropy": "attention_entropy",
            "logit": "attention_logit_max",
            "output_rms": "head_output_rms",
        }
        statistics = {
            name: jnp.concatenate([stack[key] for stack in stacks]) for key, name in names.items()
        }
        return statistics | mixing_distance(config, params)

    return jax.jit(
        run,
        in_shardings=(state_shardings(config, mesh).params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
