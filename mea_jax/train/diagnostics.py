"""Measure MEA on held-out text: head norms, mixing distances, attention entropy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mea_jax.config.schema import Side, TrainConfig
from mea_jax.model.transformer import Decoder, runs_of_equal_layers
from mea_jax.ops import hlc
from mea_jax.parallel import sharding
from mea_jax.train.step import Batch, split_batch, state_shardings


def mixing_distance(config: TrainConfig, params: Any) -> dict[str, jax.Array]:
    """Return the distance of each layer's W_lc from the block identity M_0.

    The distance is |M - M_0| / |M_0| (Frobenius), also where `hlc_init` is "normal". It is NaN in
    layers whose component count does not divide K (in compressed models): these have no block
    identity. The result is {"mixing_distance/key": (L,), "mixing_distance/value": (L,)}, limited to
    the sides that the model mixes.
    """
    model, result = config.model, {}
    for side in Side:
        if not model.mixes(side):
            continue
        rows = []
        for first, length, layer in runs_of_equal_layers(model):
            components = layer.components(side)[0]
            if model.n_kv_heads % components:
                rows.append(jnp.full((length,), jnp.nan))
                continue
            mixings = params[f"layers_{first}"]["attention"][f"{side}_mixing"]
            kind = model.mixing_kind(side)
            start = hlc.initial(kind, components, model.n_kv_heads, model.head_dim)
            difference = (mixings - start[None]).reshape(length, -1)
            rows.append(jnp.linalg.norm(difference, axis=1) / jnp.linalg.norm(start.reshape(-1)))
        result[f"mixing_distance/{side}"] = jnp.concatenate(rows)
    return result


def compile_diagnostics(config: TrainConfig, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """Return a jitted function (params, batch) -> float32 diagnostics by name.

    The batch is a held-out batch. Only the first of its `config.accumulate` parts is measured, so
    the function fits in memory wherever a training step does. It returns `attention_entropy` (L, N)
    in nats, `attention_logit_max` (L, N), `head_output_rms` (L, N) before the head norm, and the
    result of `mixing_distance`.

    Call it under `jax.set_mesh(mesh)` if the mesh has several devices, otherwise it raises
    `RuntimeError`. Devices among which the mesh splits the sequence all do the same work, on
    complete windows.
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
            for first, *_ in runs_of_equal_layers(config.model)
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
