"""A dropless mixture of experts, in place of the feed-forward half of a block.

A router gives each token probabilities over E experts, softmax(x W_r) in float32. The k most
probable experts run, each a separate SwiGLU of width F. Their outputs are summed, weighted by
those probabilities (divided by their sum if `normalise_router` is set, as in Qwen3-MoE):

    y = sum over chosen e of p_e W_down,e (silu(x W_gate,e) * x W_up,e).

No expert has a capacity, so no token is dropped (experts.py).

On a mesh the experts are sharded over the axis `expert`, and so are the rows of the batch. Each
device gathers its neighbours' tokens along that axis and computes the outputs of its own experts;
the sums are scattered back. The result is exact for any routing, on every backend. See
docs/scaling.md for the communication. Padding (segment 0) is sent to no expert and counts in no
loss.

Letters as in docs/architecture.md. T is all tokens of a device, A also those gathered from its
neighbours.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mea_jax.config.schema import ModelConfig
from mea_jax.model.context import Context
from mea_jax.model.experts import Experts, Routed, run_experts, run_local_experts
from mea_jax.model.init import kernel, residual_gain
from mea_jax.ops.backend import make_backend
from mea_jax.ops.context_parallel import lay_out
from mea_jax.parallel.sharding import has_mesh, mesh_axes, shard_count, spec

Array = jax.Array
_REGATHERED = ("all_gather", "gather")  # operations that the backward pass repeats
_AXES = {  # logical axes of the parameters
    "router": ("embed", "router"),
    "gate": ("experts", "expert_embed", "mlp"),
    "up": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}


class RouterSums(NamedTuple):
    """Sums over real tokens, float32; the decoder stacks them over layers, (L, ...)."""

    chosen_E: Array  # tokens that chose each expert among their k
    probability_E: Array
    z: Array  # of logsumexp(logits)^2
    tokens: Array

    def load_balance(self) -> Array:
        """Return the load-balancing loss E sum_e f_e P_e (arXiv 2101.03961, eq. 4).

        f_e is the share of choices that fell on expert e, P_e its mean probability. The loss is 1
        if both are even, and up to E if one expert gets all tokens.
        """
        share = self.chosen_E / jnp.sum(self.chosen_E, axis=-1, keepdims=True)
        mean = self.probability_E / self.tokens[..., None]
        return self.chosen_E.shape[-1] * jnp.sum(share * mean, axis=-1)

    def z_loss(self) -> Array:
        """Return the mean of logsumexp(logits)^2 (arXiv 2202.08906, eq. 5)."""
        return self.z / self.tokens

    def load_imbalance(self) -> Array:
        """Return the load of the busiest expert divided by the mean load."""
        return jnp.max(self.chosen_E, axis=-1) / jnp.mean(self.chosen_E, axis=-1)


def route(
    x_TD: Array, real_T: Array, router_DE: Array, count: int, normalise: bool
) -> tuple[Routed, RouterSums]:
    """Return the `count` most probable experts of each token, and sums; float32 throughout.

    `real_T` is bool, False for padding. Of equally probable experts the one of lower index is
    chosen.
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


def _run_on_mesh(model, backend, x_BTD, segment_ids_BT, router_DE, experts):
    """Compute `mixture` on the mesh of `jax.set_mesh`."""
    divided = all(
        size % shard_count(name) == 0
        for size, name in zip(x_BTD.shape[:2], ("batch", "length"), strict=True)
    )  # False for a single prompt: every device then processes all of its tokens
    of_ids = spec(("batch", "length")) if divided else PartitionSpec()
    of_x = spec(("batch", "length", None)) if divided else PartitionSpec()
    token_axes = mesh_axes("batch", "length") if divided else ()
    exchange, columns = mesh_axes("experts"), mesh_axes("expert_embed")
    # The partitioner sums over devices, because it can infer that all results are equal.
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
            y_TD = run_local_experts(backend, shard_count("experts"), x_TD, routed, experts)
            y_TD = y_TD.astype(backend.activation)
            if divided:
                y_TD = jax.lax.psum_scatter(y_TD, exchange, tiled=True)
        return y_TD.reshape(1, *x_BTD.shape), jax.tree.map(lambda s: s[None], sums)

    specs: list[Any] = [spec(_AXES[name]) for name in ("gate", "up", "down")]
    of_experts = Experts(*specs)
    split = jax.shard_map(
        _regather_in_backward(shard),
        in_specs=(of_x, of_ids, spec(_AXES["router"]), of_experts),
        out_specs=(PartitionSpec(parts or None, *of_x), PartitionSpec(token_axes or None)),
        check_vma=False,  # it does not support loops that start from equal values on all devices
    )
    y, sums = split(x_BTD, segment_ids_BT, router_DE, experts)
    return jnp.sum(y, axis=0), jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)


def _regather_in_backward(function: Any) -> Any:
    """Wrap `function` so that its gradient gathers weights and rows again.

    If saved, these would be the largest arrays of a layer: k times the residual, and the complete
    experts.
    """

    def policy(primitive, *_, **__) -> bool:
        return primitive.name not in _REGATHERED

    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def mixture(
    model: ModelConfig, x_BTD: Array, segment_ids_BT: Array, router_DE: Array, experts: Experts
) -> tuple[Array, RouterSums]:
    """Return the experts' outputs (B, T, D), in the activation dtype, and the router's sums.

    On a mesh of `jax.set_mesh` the arrays are sharded by their logical axes. `model` must be
    resolved.
    """
    backend = make_backend(model)
    if has_mesh():
        return _run_on_mesh(model, backend, x_BTD, segment_ids_BT, router_DE, experts)

    def local(x_BTD, router_DE, experts):
        x_TD, real_T = _tokens(x_BTD, segment_ids_BT)
        routed, sums = route(
            x_TD, real_T, router_DE, model.experts_per_token, model.normalise_router
        )
        return run_experts(backend, x_TD, routed, experts).reshape(x_BTD.shape), sums

    return _regather_in_backward(local)(x_BTD, router_DE, experts)


class MoE(nn.Module):
    """A mixture of experts that sows its `RouterSums` in the collection "router"."""

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
