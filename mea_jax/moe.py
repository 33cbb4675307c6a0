"""Mixture of experts in place of the feed-forward half of a block, dropless.

A router gives each token probabilities over E experts, softmax(x W_r) in float32; the k most
probable run, each a SwiGLU of its own of width F, and their outputs are summed by those
probabilities (divided by their sum where `normalise_router` says so, as in Qwen3-MoE):

    y = sum over chosen e of p_e W_down,e (silu(x W_gate,e) * x W_up,e).

No expert has a capacity, so no token is dropped: the T k pairs of token and expert are sorted by
expert and multiplied group by group (grouped.py). A weight p_e multiplies the F features before
W_down, which is linear: so an expert's D outputs need not be kept for the gradient of p_e.

On a mesh the experts are divided over the axis `expert`, as rows of the batch are. Each device
gathers its neighbours' tokens along that axis, computes what its own experts add, and the sums are
scattered back: exact whatever the router does, and on every backend. See docs/scaling.md for what
that moves. Padding, segment 0, is sent to no expert and counts in no loss.

Letters as in STYLE.md; T here all tokens of a device, S = T k.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mea_jax.backends import Backend, make_backend
from mea_jax.config import ModelConfig
from mea_jax.grouped import grouped_product
from mea_jax.layers import Context
from mea_jax.parameters import kernel, residual_gain
from mea_jax.sequence_parallel import lay_out
from mea_jax.sharding import mesh_axes, on_a_mesh, spec, ways

Array = jax.Array
PRODUCTS = "expert_products"  # of gate and up, under remat "dots" saved like other products
_AGAIN = ("all_gather", "gather")  # operations that the backward pass does again
_AXES = {  # logical axes of the parameters
    "router": ("embed", "router"),
    "gate": ("experts", "expert_embed", "mlp"),
    "up": ("experts", "expert_embed", "mlp"),
    "down": ("experts", "mlp", "expert_embed"),
}


class Experts(NamedTuple):
    """Of a layer, or of a device's part of it."""

    gate_EDF: Array
    up_EDF: Array
    down_EFD: Array


class Routed(NamedTuple):
    """What each token asks for."""

    weights_Tk: Array  # float32; 0 for padding
    ids_Tk: Array  # int32; E for padding


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


@jax.custom_vjp
def dispatch(x_TD: Array, order_S: Array, place_S: Array) -> Array:
    """The token of each sorted pair: (S, D). `order_S` lists pairs t k + i as they are sorted,
    `place_S` is its inverse. The transpose of `combine`; both only gather."""
    return x_TD[order_S // (order_S.shape[0] // x_TD.shape[0])]


@jax.custom_vjp
def combine(y_SD: Array, order_S: Array, place_S: Array, shape: Array) -> Array:
    """The sum of each token's sorted pairs: (T, D), summed in float32. T is that of `shape`."""
    y_TkD = y_SD[place_S].reshape(shape.shape[0], -1, y_SD.shape[1])
    return jnp.sum(y_TkD, axis=1, dtype=jnp.float32).astype(y_SD.dtype)


def _dispatch_forward(x_TD, order_S, place_S):
    return dispatch(x_TD, order_S, place_S), (order_S, place_S, x_TD[:, :0])


def _dispatch_backward(saved, g_SD):
    order_S, place_S, shape = saved
    return combine(g_SD, order_S, place_S, shape), None, None


def _combine_forward(y_SD, order_S, place_S, shape):
    return combine(y_SD, order_S, place_S, shape), (order_S, place_S)


def _combine_backward(saved, g_TD):
    return dispatch(g_TD, *saved), None, None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)


def run_experts(
    backend: Backend, share: int, x_TD: Array, routed: Routed, experts: Experts
) -> Array:
    """What `experts` add for each token: (T, D), of the activation dtype.

    `routed.ids_Tk` count from the first of `experts`; numbers past the last are others' affair.
    `share`: of how many such parts of all experts these are one.
    """
    count = experts.gate_EDF.shape[0]
    ids_S = jnp.minimum(routed.ids_Tk.reshape(-1), count)
    order_S = jnp.argsort(ids_S, stable=True)
    place_S = (
        jnp.zeros_like(order_S)
        .at[order_S]
        .set(jnp.arange(len(ids_S), dtype=order_S.dtype), unique_indices=True)
    )
    sizes_E = jnp.sum(ids_S[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    rows_SD = dispatch(x_TD, order_S, place_S)

    def product(x, w):
        return grouped_product(x, w, sizes_E, backend, share)

    gate_SF = checkpoint_name(product(rows_SD, experts.gate_EDF), PRODUCTS)
    up_SF = checkpoint_name(product(rows_SD, experts.up_EDF), PRODUCTS)
    weight_S1 = routed.weights_Tk.reshape(-1)[order_S][:, None]
    hidden_SF = backend.swiglu(gate_SF, up_SF).astype(jnp.float32) * weight_S1
    y_SD = product(hidden_SF.astype(backend.activation), experts.down_EFD)
    return combine(y_SD, order_S, place_S, x_TD[:, :0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_sources(
    backend: Backend, share: int, x_nTD: Array, routed_nTk: Routed, experts: Experts
) -> Array:
    """`run_experts` for the tokens of n devices, one after another: (n, T, D).

    Any of them may ask for these experts only, so memory is set aside for all pairs of one device.
    For the same reason nothing is kept for the gradient but the inputs: it runs the experts again,
    and sums the gradients of their weights in float32.
    """
    return jax.lax.map(
        lambda source: run_experts(backend, share, *source, experts), (x_nTD, routed_nTk)
    )


def _sources_forward(backend, share, x_nTD, routed_nTk, experts):
    return over_sources(backend, share, x_nTD, routed_nTk, experts), (x_nTD, routed_nTk, experts)


def _sources_backward(backend, share, saved, g_nTD):
    x_nTD, routed_nTk, experts = saved

    def one(total, source):
        x_TD, routed, g_TD = source

        def run(x_TD, weights_Tk, experts):
            return run_experts(
                backend, share, x_TD, routed._replace(weights_Tk=weights_Tk), experts
            )

        _, pull = jax.vjp(run, x_TD, routed.weights_Tk, experts)
        d_x_TD, d_weights_Tk, d_experts = pull(g_TD)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, d_experts), (
            d_x_TD,
            d_weights_Tk,
        )

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
    total, (d_x_nTD, d_weights_nTk) = jax.lax.scan(one, zeros, (x_nTD, routed_nTk, g_nTD))
    d_experts = jax.tree.map(lambda d, w: d.astype(w.dtype), total, experts)
    return d_x_nTD, Routed(d_weights_nTk, None), d_experts


over_sources.defvjp(_sources_forward, _sources_backward)


def _tokens(x_BTD: Array, segment_ids_BT: Array) -> tuple[Array, Array]:
    return x_BTD.reshape(-1, x_BTD.shape[-1]), segment_ids_BT.reshape(-1) > 0


def _on_a_mesh(model, backend, x_BTD, segment_ids_BT, router_DE, experts):
    """`mixture` on the mesh of `jax.set_mesh`."""
    divided = all(
        size % ways(name) == 0
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
            y_TD = run_experts(backend, 1, x_TD, routed, experts)
        else:
            if divided:
                gather = functools.partial(jax.lax.all_gather, axis_name=exchange)
            else:
                gather = functools.partial(jnp.expand_dims, axis=0)
            x_nTD, routed = jax.tree.map(gather, (x_TD, routed))
            held = experts.gate_EDF.shape[0]
            ids_nTk = routed.ids_Tk - jax.lax.axis_index(exchange) * held
            ids_nTk = jnp.where(ids_nTk < 0, held, ids_nTk)
            routed = routed._replace(ids_Tk=ids_nTk)
            y_nTD = over_sources(backend, ways("experts"), x_nTD, routed, experts)
            y_TD = jax.lax.psum_scatter(y_nTD, exchange) if divided else y_nTD[0]
        return y_TD.reshape(1, *x_BTD.shape), jax.tree.map(lambda s: s[None], sums)

    split = jax.shard_map(
        _again(shard),
        in_specs=(
            of_x,
            of_ids,
            spec(_AXES["router"]),
            Experts(*map(spec, list(_AXES.values())[1:])),
        ),
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
        return run_experts(backend, 1, x_TD, routed, experts).reshape(x_BTD.shape), sums

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
        ids_BT = lay_out({"ids": context.segment_ids_BT}, context.shards)["ids"]
        y_BTD, sums = mixture(c, x_BTD, ids_BT, router_DE, experts)
        self.sow("router", "sums", sums)
        return y_BTD
