"""Mixture of experts in place of the feed-forward half of a block, dropless.

A router gives each token probabilities over E experts, softmax(x W_r) in float32; the k most
probable run, each a SwiGLU of its own of width F, and their outputs are summed by those
probabilities (divided by their sum where `normalise_router` says so, as in Qwen3-MoE):

    y = sum over chosen e of p_e W_down,e (silu(x W_gate,e) * x W_up,e).

No expert has a capacity, so no token is dropped (experts.py).

On a mesh the experts are divided over the axis `expert`, as rows of the batch are. Each device
gathers its neighbours' tokens along that axis, computes what its own experts add, and the sums are
scattered back: exact whatever the router does, and on every backend. See docs/scaling.md for what
that moves. Padding, segment 0, is sent to no expert and counts in no loss.

Letters as in docs/architecture.md; T here all tokens of a device, A those gathered from its
neighbours too.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mea_jax.config.schema import ModelConfig
from mea_jax.model.attention import Context
from mea_jax.model.experts import Experts, Routed, run_experts, run_share
from mea_jax.model.init import kernel, residual_gain
from mea_jax.ops.backend import make_backend
from mea_jax.ops.context_parallel import lay_out
from mea_jax.parallel.sharding import mesh_axes, on_a_mesh, shard_count, spec

Array = jax.Array
_AGAIN = ("all_gather", "gather")  # operations that the backward pass does again
_AXES = {  # logical axes of the parameters
    "router": ("embed", "router"),
    "gate": ("experts", "expert_embed", "mlp"),
    "up": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}


class RouterSums(NamedTuple):
    """Sums over real tokens, float32; stacked over layers (L, ...) by the decoder."""

    chosen_E: Array  # how many chose each expert, of their k choices
    probability_E: Array
    z: Array  # of logsumexp(logits)^2
    tokens: Array

    def load_balance(self) -> Array:
        """E sum_e f_e P_e (arXiv 2101.03961, eq. 4): f_e the share of choices that fell on expert
        e, P_e its mean probability. 1 where both are even, up to E where one expert takes all."""
        share = self.chosen_E / jnp.sum(self.chosen_E, axis=-1, keepdims=True)
        mean = self.probability_E / self.tokens[..., None]
        return self.chosen_E.shape[-1] * jnp.sum(share * mean, axis=-1)

    def z_loss(self) -> Array:
        """The mean of logsumexp(logits)^2 (arXiv 2202.08906, eq. 5)."""
        return self.z / self.tokens

    def busiest(self) -> Array:
        """The most that an expert has to do, over the mean."""
        return jnp.max(self.chosen_E, axis=-1) / jnp.mean(self.chosen_E, axis=-1)


def route(
    x_TD: Array, real_T: Array, router_DE: Array, count: int, normalise: bool
) -> tuple[Routed, RouterSums]:
    """The `count` most probable experts of each token; float32 throughout.

    `real_T`: bool, False for padding. Among equals the expert of the lower number is taken.
    """
    logits_TE = jnp.dot(
        x_TD.astype(jnp.float32),
        router_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    probability_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_Tk, ids_Tk = jax.lax.top_k(probability_TE, count)
    if normalise:
        weights_Tk = weights_Tk / jnp.sum(weights_Tk, axis=-1, keepdims=True)
    real_T1, experts = real_T[:, None], router_DE.shape[1]
    ids_Tk = jnp.where(real_T1, ids_Tk, experts)
    chosen_E = jnp.sum(ids_Tk.reshape(-1, 1) == jnp.arange(experts)[None], axis=0)
    sums = RouterSums(
        chosen_E=chosen_E.astype(jnp.float32),
        probability_E=jnp.sum(jnp.where(real_T1, probability_TE, 0.0), axis=0),
        z=jnp.sum(jnp.where(real_T, jnp.square(jax.nn.logsumexp(logits_TE, axis=-1)), 0.0)),
        tokens=jnp.sum(real_T.astype(jnp.float32)),
    )
    return Routed(jnp.where(real_T1, weights_Tk, 0.0), ids_Tk), sums


def _tokens(x_BTD: Array, segment_ids_BT: Array) -> tuple[Array, Array]:
    return x_BTD.reshape(-1, x_BTD.shape[-1]), segment_ids_BT.reshape(-1) > 0


def _on_a_mesh(model, backend, x_BTD, segment_ids_BT, router_DE, experts):
    """`mixture` on the mesh of `jax.set_mesh`."""
    divided = all(
        size % shard_count(name) == 0
        for size, name in zip(x_BTD.shape[:2], ("batch", "length"), strict=True)
    )  # a lone prompt is not: every device then takes all of its tokens
    of_ids = spec(("batch", "length")) if divided else PartitionSpec()
    of_x = spec(("batch", "length", None)) if divided else PartitionSpec()
    token_axes = mesh_axes("batch", "length") if divided else ()
    exchange, columns = mesh_axes("experts"), mesh_axes("expert_embed")
    # Sums over devices are left to the partitioner, which knows that their results are alike.
    parts = mesh_axes("mlp") if divided else (*exchange, *mesh_axes("mlp"))

    def gathered(w: Array, axis: int) -> Array:
        w = w.astype(backend.dtype)
        if columns:
            w = jax.lax.all_gather(w, columns, axis=axis, tiled=True)
        return w

    def shard(x_BTD, segment_ids_BT, router_DE, experts):
        rows = mesh_axes("embed")
        if rows:
            router_DE = jax.lax.all_gather(router_DE, rows, axis=0, tiled=True)
        experts = Experts(*(gathered(w, axis) for w, axis in zip(experts, (1, 1, 2), strict=True)))
        x_TD, real_T = _tokens(x_BTD, segment_ids_BT)
        routed, sums = route(
            x_TD, real_T, router_DE, model.experts_per_token, model.normalise_router
        )
        if not exchange:
            y_TD = run_experts(backend, x_TD, routed, experts)
        else:
            if divided:
                x_TD, routed = jax.tree.map(
                    lambda x: jax.lax.all_gather(x, exchange, tiled=True), (x_TD, routed)
                )
            held = experts.gate_EDF.shape[0]
            ids_Ak = routed.ids_Tk - jax.lax.axis_index(exchange) * held
            routed = routed._replace(ids_Tk=jnp.where(ids_Ak < 0, held, ids_Ak))
            y_TD = run_share(backend, shard_count("experts"), x_TD, routed, experts)
            y_TD = y_TD.astype(backend.activation)
            if divided:
                y_TD = jax.lax.psum_scatter(y_TD, exchange, tiled=True)
        return y_TD.reshape(1, *x_BTD.shape), jax.tree.map(lambda s: s[None], sums)

    specs: list[Any] = [spec(_AXES[name]) for name in ("gate", "up", "down")]
    of_experts = Experts(*specs)
    split = jax.shard_map(
        _again(shard),
        in_specs=(of_x, of_ids, spec(_AXES["router"]), of_experts),
        out_specs=(PartitionSpec(parts or None, *of_x), PartitionSpec(token_axes or None)),
        check_vma=False,  # it cannot follow loops whose start is alike everywhere
    )
    y, sums = split(x_BTD, segment_ids_BT, router_DE, experts)
    return jnp.sum(y, axis=0), jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)


def _again(function: Any) -> Any:
    """`function` whose gradient gathers weights and rows again: saved, those would be the largest
    arrays of a layer, k times the residual and the experts whole."""

    def policy(primitive, *_, **__) -> bool:
        return primitive.name not in _AGAIN

    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def mixture(
    model: ModelConfig, x_BTD: Array, segment_ids_BT: Array, router_DE: Array, experts: Experts
) -> tuple[Array, RouterSums]:
    """The experts' outputs (B, T, D), of the activation dtype, and the router's sums.

    On a mesh of `jax.set_mesh` the arrays are split as their logical axes say. `model` is resolved.
    """
    backend = make_backend(model)
    if on_a_mesh():
        return _on_a_mesh(model, backend, x_BTD, segment_ids_BT, router_DE, experts)

    def local(x_BTD, router_DE, experts):
        x_TD, real_T = _tokens(x_BTD, segment_ids_BT)
        routed, sums = route(
            x_TD, real_T, router_DE, model.experts_per_token, model.normalise_router
        )
        return run_experts(backend, x_TD, routed, experts).reshape(x_BTD.shape), sums

    return _again(local)(x_BTD, router_DE, experts)


class MoE(nn.Module):
    """`mixture` with its parameters; `RouterSums` go to the collection "router"."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context) -> Array:
        c = self.config
        e, d, f = c.n_experts, c.d_model, c.d_expert

        def parameter(name: str, shape: tuple[int, ...], fan_in: int, gain=1.0) -> Array:
            return kernel(self, name, shape, _AXES[name], fan_in, gain)

        router_DE = parameter("router", (d, e), d)
        experts = Experts(
            parameter("gate", (e, d, f), d),
            parameter("up", (e, d, f), d),
            parameter("down", (e, f, d), f, residual_gain(c)),
        )
        ids_BT = lay_out({"ids": context.real_BT.astype(jnp.int32)}, context.shards)["ids"]
        y_BTD, sums = mixture(c, x_BTD, ids_BT, router_DE, experts)
        self.sow("router", "sums", sums)
        return y_BTD
