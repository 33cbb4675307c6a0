"""The experts of a device, applied to the tokens that the router sends to them.

`run_experts` applies all experts, `run_local_experts` a part of them. Both sort the pairs of token
and expert by expert and multiply them group by group (ops/grouped.py). So no expert has a capacity
and no token is dropped. A weight p_e multiplies the F features before W_down. W_down is linear, so
the gradient of p_e does not need an expert's D outputs.

Letters as in docs/architecture.md. T is all tokens of a device, A also those gathered from its
neighbours, S = T k or A k the pairs of token and expert, R the pairs in a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mea_jax.ops.backend import Backend
from mea_jax.ops.grouped import grouped_product

Array = jax.Array
PRODUCTS = "expert_products"  # of gate and up; remat "dots" saves them like other products


class Experts(NamedTuple):
    """The weights of a layer's experts, or of a device's part of them."""

    gate_EDF: Array
    up_EDF: Array
    down_EFD: Array


class Routed(NamedTuple):
    """The experts that each token is sent to, and their weights."""

    weights_Tk: Array  # float32; 0 for padding
    ids_Tk: Array  # int32; E for padding


@jax.custom_vjp
def dispatch(x_TD: Array, order_S: Array, place_S: Array) -> Array:
    """Gather the token of each sorted pair: (S, D).

    `order_S` lists the pairs t k + i (choice i of token t) in sorted order; `place_S` is its
    inverse. This is the transpose of `combine`; both only gather.
    """
    return x_TD[order_S // (order_S.shape[0] // x_TD.shape[0])]


@jax.custom_vjp
def combine(y_SD: Array, order_S: Array, place_S: Array, shape: Array) -> Array:
    """Sum each token's sorted pairs in float32: (T, D), where `shape` has T rows."""
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


def apply_experts(
    backend: Backend, rows_SD: Array, weight_S: Array, sizes_E: Array, experts: Experts
) -> Array:
    """Apply each row's expert, times the row's weight: (S, D), in the activation dtype.

    Rows are sorted by expert, and `sizes_E` is the number of rows of each expert. The results of
    rows past their sum are zero.
    """

    def product(x, w):
        return grouped_product(x, w, sizes_E, backend)

    gate_SF = checkpoint_name(product(rows_SD, experts.gate_EDF), PRODUCTS)
    up_SF = checkpoint_name(product(rows_SD, experts.up_EDF), PRODUCTS)
    hidden_SF = backend.gated("silu", gate_SF, up_SF).astype(jnp.float32) * weight_S[:, None]
    return product(hidden_SF.astype(backend.activation), experts.down_EFD)


def _sorted(ids_S: Array, experts: int) -> tuple[Array, Array]:
    """Return the order (S,) of the pairs by expert, and the number of pairs of each expert (E,).

    Pairs whose expert is not one of the first `experts` come last.
    """
    sizes_E = jnp.sum(ids_S[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    return jnp.argsort(jnp.minimum(ids_S, experts), stable=True), sizes_E


def run_experts(backend: Backend, x_TD: Array, routed: Routed, experts: Experts) -> Array:
    """Return the sum of the experts' outputs for each token, (T, D), in the activation dtype."""
    order_S, sizes_E = _sorted(routed.ids_Tk.reshape(-1), experts.gate_EDF.shape[0])
    numbers_S = jnp.arange(order_S.shape[0], dtype=order_S.dtype)
    place_S = jnp.zeros_like(order_S).at[order_S].set(numbers_S, unique_indices=True)
    weight_S = routed.weights_Tk.reshape(-1)[order_S]
    rows_SD = dispatch(x_TD, order_S, place_S)
    y_SD = apply_experts(backend, rows_SD, weight_S, sizes_E, experts)
    return combine(y_SD, order_S, place_S, x_TD[:, :0])


class _Chunks(NamedTuple):
    """The sorted pairs of a device's experts, in chunks of R."""

    pair_R: Callable[[Array | int], Array]  # pairs of a chunk by number; arbitrary past the last
    sizes_E: Callable[[Array | int], Array]  # rows of each expert in a chunk
    number: Array  # number of chunks; depends on the router


def _chunks(ids_Ak: Array, experts: int, share: int) -> _Chunks:
    """Split the pairs into chunks of 9/8 of an even share, so that one is usually enough."""
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


def _later_chunks(chunks: _Chunks, body: Callable[..., Any], start: Any) -> Any:
    """Run `carry = body(pairs (R,), sizes (E,), carry)` for each chunk except the first."""
    with jax.named_scope("about_0_rounds"):  # for plan.hlo, which cannot derive the count
        return jax.lax.fori_loop(
            1,
            chunks.number,
            lambda i, carry: body(chunks.pair_R(i), chunks.sizes_E(i), carry),
            start,
        )


def run_local_experts(
    backend: Backend, share: int, x_AD: Array, routed: Routed, experts: Experts
) -> Array:
    """Return the sum over one part in `share` of all experts for each token, (A, D), float32.

    The indices `routed.ids_Tk` (A, k) count from the first of `experts`; indices past the last
    belong to other devices.

    The router may send all A k pairs to these experts. Memory for all of them would be `share`
    times that of an even load, so pairs are processed in chunks, and one chunk is usually enough.
    The first chunk is differentiated like any other product; the others run in a loop.
    """
    chunks = _chunks(routed.ids_Tk, experts.gate_EDF.shape[0], share)
    pair_R = chunks.pair_R(0)
    y_RD = _chunk_of(backend, pair_R, chunks.sizes_E(0), x_AD, routed, experts)
    start_AD = jnp.zeros(x_AD.shape, jnp.float32)
    y_AD = start_AD.at[pair_R // routed.ids_Tk.shape[1]].add(y_RD.astype(jnp.float32))
    return _run_later(backend, share, y_AD, x_AD, routed, experts)


def _chunk_of(backend, pair_R, sizes_E, x_AD, routed, experts):
    """Return the experts' outputs for the pairs of a chunk, (R, D)."""
    weight_R = routed.weights_Tk.reshape(-1)[pair_R]
    x_RD = x_AD[pair_R // routed.ids_Tk.shape[1]]
    return apply_experts(backend, x_RD, weight_R, sizes_E, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_later(backend, share, y_AD, x_AD, routed, experts):
    """Add the outputs of all chunks after the first to `y_AD`.

    Their number depends on the router. So only the inputs are kept for the gradient, which runs
    these experts again.
    """
    k = routed.ids_Tk.shape[1]

    def body(pair_R, sizes_E, y_AD):
        y_RD = _chunk_of(backend, pair_R, sizes_E, x_AD, routed, experts)
        return y_AD.at[pair_R // k].add(y_RD.astype(jnp.float32))

    return _later_chunks(_chunks(routed.ids_Tk, experts.gate_EDF.shape[0], share), body, y_AD)


def _later_forward(backend, share, y_AD, x_AD, routed, experts):
    return _run_later(backend, share, y_AD, x_AD, routed, experts), (x_AD, routed, experts)


def _later_backward(backend, share, saved, g_AD):
    """Return the gradients, accumulated in float32."""
    x_AD, routed, experts = saved
    k = routed.ids_Tk.shape[1]

    def body(pair_R, sizes_E, sums):
        token_R = pair_R // k
        _, pull = jax.vjp(
            lambda x_RD, weight_R, experts: apply_experts(
                backend, x_RD, weight_R, sizes_E, experts
            ),
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
    sums = _later_chunks(chunks, body, zeros)
    d_x_AD, d_weight_S, d_experts = jax.tree.map(lambda d, x: d.astype(x.dtype), sums, whole)
    nothing: Any = None  # the gradient of integers
    d_routed = Routed(d_weight_S.reshape(routed.weights_Tk.shape), nothing)
    return g_AD, d_x_AD, d_routed, d_experts


_run_later.defvjp(_later_forward, _later_backward)
