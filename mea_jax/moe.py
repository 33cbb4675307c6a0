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

Letters as in STYLE.md; T here all tokens of a device, A those gathered from its neighbours too,
S = T k or A k pairs of a token and an expert, R of them in a chunk.
"""

import functools
from collections.abc import Callable
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


def experts_of(
    backend: Backend, rows_SD: Array, weight_S: Array, sizes_E: Array, experts: Experts
) -> Array:
    """Each row's expert times its weight: (S, D), of the activation dtype. Rows sorted by expert,
    of which `sizes_E` says how many each has; rows past them are zero."""

    def product(x, w):
        return grouped_product(x, w, sizes_E, backend)

    gate_SF = checkpoint_name(product(rows_SD, experts.gate_EDF), PRODUCTS)
    up_SF = checkpoint_name(product(rows_SD, experts.up_EDF), PRODUCTS)
    hidden_SF = backend.swiglu(gate_SF, up_SF).astype(jnp.float32) * weight_S[:, None]
    return product(hidden_SF.astype(backend.activation), experts.down_EFD)


def _sorted(ids_S: Array, experts: int) -> tuple[Array, Array]:
    """The pairs of tokens and experts in the order of their experts (S,), and how many each expert
    has (E,). Pairs whose expert is not one of the first `experts` come last."""
    sizes_E = jnp.sum(ids_S[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    return jnp.argsort(jnp.minimum(ids_S, experts), stable=True), sizes_E


def run_experts(backend: Backend, x_TD: Array, routed: Routed, experts: Experts) -> Array:
    """What `experts`, all there are, add for each token: (T, D), of the activation dtype."""
    order_S, sizes_E = _sorted(routed.ids_Tk.reshape(-1), experts.gate_EDF.shape[0])
    numbers_S = jnp.arange(order_S.shape[0], dtype=order_S.dtype)
    place_S = jnp.zeros_like(order_S).at[order_S].set(numbers_S, unique_indices=True)
    weight_S = routed.weights_Tk.reshape(-1)[order_S]
    rows_SD = dispatch(x_TD, order_S, place_S)
    y_SD = experts_of(backend, rows_SD, weight_S, sizes_E, experts)
    return combine(y_SD, order_S, place_S, x_TD[:, :0])


class _Chunks(NamedTuple):
    """The pairs that a device's experts are sent, sorted, in chunks of R."""

    pair_R: Callable[[Array], Array]  # of a chunk's number; past the last pair, any
    sizes_E: Callable[[Array], Array]  # how many rows of the chunk each expert has
    number: Array  # of chunks; depends on the router


def _chunks(ids_Ak: Array, experts: int, share: int) -> _Chunks:
    """Chunks of an even share and an eighth: as a rule one of them is enough."""
    order_S, sizes_E = _sorted(ids_Ak.reshape(-1), experts)
    rows = len(order_S)
    size = min(-(-rows * 9 // (8 * share)), rows)
    order_S = jnp.pad(order_S, (0, -rows % size))
    last_E = jnp.cumsum(sizes_E)

    def sizes_of(i):
        stop_E, start_E = (jnp.clip(x - i * size, 0, size) for x in (last_E, last_E - sizes_E))
        return stop_E - start_E

    return _Chunks(
        lambda i: jax.lax.dynamic_slice_in_dim(order_S, i * size, size),
        sizes_of,
        -(-last_E[-1] // size),
    )


def _each_chunk(chunks: _Chunks, body: Callable[..., Any], start: Any) -> Any:
    """`body(pairs (R,), sizes (E,), carry)` for each chunk."""
    with jax.named_scope("about_1_rounds"):  # for plan.hlo, which cannot know the count
        return jax.lax.fori_loop(
            0,
            chunks.number,
            lambda i, carry: body(chunks.pair_R(i), chunks.sizes_E(i), carry),
            start,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_share(backend: Backend, share: int, x_AD: Array, routed: Routed, experts: Experts) -> Array:
    """What one part in `share` of all experts adds for each token: (A, D), float32.

    `routed.ids_Ak` count from the first of `experts`; numbers past the last are others' affair.

    Any number of the A k pairs may ask for these experts, and memory for all of them would be
    `share` times what an even load needs. So they come in chunks, in a loop that stops after the
    last. For the same reason nothing is kept for the gradient but the inputs: it runs the experts
    again. Gradients are summed in float32.
    """
    k = routed.ids_Tk.shape[1]

    def body(pair_R, sizes_E, y_AD):
        weight_R = routed.weights_Tk.reshape(-1)[pair_R]
        y_RD = experts_of(backend, x_AD[pair_R // k], weight_R, sizes_E, experts)
        return y_AD.at[pair_R // k].add(y_RD.astype(jnp.float32))

    chunks = _chunks(routed.ids_Tk, experts.gate_EDF.shape[0], share)
    return _each_chunk(chunks, body, jnp.zeros(x_AD.shape, jnp.float32))


def _share_forward(backend, share, x_AD, routed, experts):
    return run_share(backend, share, x_AD, routed, experts), (x_AD, routed, experts)


def _share_backward(backend, share, saved, g_AD):
    x_AD, routed, experts = saved
    k = routed.ids_Tk.shape[1]

    def body(pair_R, sizes_E, sums):
        token_R = pair_R // k
        _, pull = jax.vjp(
            lambda x_RD, weight_R, experts: experts_of(backend, x_RD, weight_R, sizes_E, experts),
            *(x_AD[token_R], routed.weights_Tk.reshape(-1)[pair_R], experts),
        )
        d_x_RD, d_weight_R, d_experts = pull(g_AD[token_R].astype(backend.activation))
        d_x_AD, d_weight_S, total = sums
        return (
            d_x_AD.at[token_R].add(d_x_RD.astype(jnp.float32)),
            d_weight_S.at[pair_R].add(d_weight_R),
            jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, d_experts),
        )

    whole = (x_AD, routed.weights_Tk.reshape(-1), experts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), whole)
    chunks = _chunks(routed.ids_Tk, experts.gate_EDF.shape[0], share)
    sums = _each_chunk(chunks, body, zeros)
    d_x_AD, d_weight_S, d_experts = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, whole)
    nothing: Any = None  # the gradient of integers
    d_routed = Routed(d_weight_S.reshape(routed.weights_Tk.shape), nothing)
    return d_x_AD, d_routed, d_experts


run_share.defvjp(_share_forward, _share_backward)


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
            y_TD = run_experts(backend, x_TD, routed, experts)
        else:
            if divided:
                x_TD, routed = jax.tree.map(
                    lambda x: jax.lax.all_gather(x, exchange, tiled=True), (x_TD, routed)
                )
            held = experts.gate_EDF.shape[0]
            ids_Ak = routed.ids_Tk - jax.lax.axis_index(exchange) * held
            routed = routed._replace(ids_Tk=jnp.where(ids_Ak < 0, held, ids_Ak))
            y_TD = run_share(backend, ways("experts"), x_TD, routed, experts)
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
        ids_BT = lay_out({"ids": context.segment_ids_BT}, context.shards)["ids"]
        y_BTD, sums = mixture(c, x_BTD, ids_BT, router_DE, experts)
        self.sow("router", "sums", sums)
        return y_BTD
