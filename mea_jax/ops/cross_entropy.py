"""Cross-entropy, alone or with distillation, without the logits of an entire batch.

The logits of a 128,256-token vocabulary are the largest activation of a small model. Here the
logits of only one chunk of positions exist at a time. When the loss is differentiated, the
gradients of hidden states and kernel are computed in the same pass, while those logits exist. So
nothing is recomputed and nothing of size T x V is saved.

On a mesh each device runs this loop over its own positions and its own part of the vocabulary. The
kernel is gathered once before the loop and the gradients are reduced once after it; left to the
partitioner, the kernel's gradient would be reduced in every chunk. Within the loop only three
numbers per position (with a teacher six) are reduced over the vocabulary's axis.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mea_jax.parallel.sharding import has_mesh, mesh_axes, spec


class Products(Protocol):
    """The matrix products of a backend: inputs of `dtype`, float32 results. Hashable."""

    @property
    def dtype(self) -> jnp.dtype: ...

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiply (..., D) by (D, F): (..., F)."""
        ...

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        """Multiply (..., F) by the transpose of (D, F): (..., D)."""
        ...

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Sum the outer products of (..., D) and (..., F) over the leading axes: (D, F)."""
        ...


class LossOptions(NamedTuple):
    """The static options of a loss; hashable.

    Attributes:
      products: the backend's matrix products.
      chunk: number of positions per device whose logits exist at a time; 0 means all.
      z_loss: weight of logsumexp(logits)^2.
      share: weight of the divergence from a teacher; the targets have the weight 1 - share.
    """

    products: Products
    chunk: int
    z_loss: float = 0.0
    share: float = 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    products: Products,
    chunk: int,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Return float32 sums over tokens: (objective, negative log-likelihood in nats).

    objective = sum of weight * (nll + z_loss * logsumexp(logits)^2). Logits of up to `chunk`
    positions per device exist at a time (0 means all positions; see `positions_within`). Only the
    objective is differentiated; the second output is only reported, and its cotangent is ignored.
    Gradients flow to `x_BTD` and `kernel_DV`.

    Under a mesh of `jax.set_mesh`, rows, positions, D and V must be divisible by the axes that
    split them (jax raises otherwise), and each device stores a float32 gradient (D, V / tensor)
    until the end.
    """
    arrays = (x_BTD, kernel_DV, targets_BT, weights_BT)
    return _sums(arrays, LossOptions(products, chunk, z_loss), False)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def distilled_cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    teacher: tuple[jax.Array, jax.Array],
    options: LossOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute `cross_entropy` with distillation from a teacher: (objective, nll, KL), float32.

    KL = sum of weight * KL(teacher || model) over entire vocabularies, at temperature 1, in nats;
    objective = sum of weight * ((1 - share) * nll + share * KL + z_loss * logsumexp(logits)^2).
    `teacher` is its hidden states (B, T, E) and unembedding (E, V); they get no gradient. Two
    arrays of logits exist at a time.
    """
    arrays = (x_BTD, kernel_DV, targets_BT, weights_BT)
    return _sums(arrays, options, False, teacher)[0]


def positions_within(mebibytes: int, vocabulary: int) -> int:
    """Return the number of positions whose float32 logits fit in `mebibytes`; 0 means no limit.

    The number is a multiple of 128, a matrix unit's side, if at least 128 fit, and otherwise 1 or
    more.
    """
    positions = mebibytes * 2**20 // (4 * vocabulary)
    if mebibytes and positions < 128:
        return max(positions, 1)
    return positions // 128 * 128


def _sums(arrays, options, differentiate, teacher=()):
    """Return ((objective, nll), gradients of x and kernel or None), with or without a mesh.

    `arrays` are x (B, T, D), kernel (D, V), targets and weights (B, T). With a `teacher`, its
    hidden states and unembedding, return ((objective, nll, KL), gradients).
    """
    arrays = (*arrays[:3], arrays[3].astype(jnp.float32))
    run = functools.partial(_local_sums, options, differentiate)
    if not has_mesh():
        return run((), arrays, teacher)
    rows, embed, vocab = mesh_axes("batch", "length"), mesh_axes("embed"), mesh_axes("vocab")
    # Each device's part of the sum over rows is scattered over `embed`, then summed over the rest.
    rest = tuple(axis for axis in rows if axis not in embed)
    assert set(embed) <= set(rows)

    def gathered(kernel_DV):
        # Gathered once and in the products' dtype: half the bytes, none of them inside the loop.
        kernel_DV = kernel_DV.astype(options.products.dtype)
        return jax.lax.all_gather(kernel_DV, embed, tiled=True) if embed else kernel_DV

    def shard(x_BTD, kernel_DV, targets_BT, weights_BT, *teacher):
        kernel_DV = gathered(kernel_DV)
        if teacher:
            teacher = (teacher[0], gathered(teacher[1]))
        sums, gradients = run(vocab, (x_BTD, kernel_DV, targets_BT, weights_BT), teacher)
        sums = jax.lax.psum(sums, rows)
        if not differentiate:
            return sums, None
        d_x_BTD, d_kernel_DV = gradients
        if embed:
            d_kernel_DV = jax.lax.psum_scatter(d_kernel_DV, embed, tiled=True)
        return sums, (jax.lax.psum(d_x_BTD, vocab), jax.lax.psum(d_kernel_DV, rest))

    of_rows, of_x = spec(("batch", "length")), spec(("batch", "length", None))
    of_kernel = spec(("embed", "vocab"))
    split = jax.shard_map(
        shard,
        in_specs=(of_x, of_kernel, of_rows, of_rows, *((of_x, of_kernel) if teacher else ())),
        out_specs=(PartitionSpec(), (of_x, of_kernel) if differentiate else None),
        check_vma=False,  # it cannot infer that sums over all axes are equal everywhere
    )
    return split(*arrays, *teacher)


def _local_sums(options, differentiate, vocab, arrays, teacher):
    """Compute `_sums` of one device's positions and part of the vocabulary.

    `vocab` are the mesh axes that split the vocabulary, inside `shard_map`; () if none does. All
    sums over the vocabulary are reduced over them, except in the gradients: that of x lacks the
    other devices' parts of the vocabulary, that of the kernel their positions.
    """
    x_BTD, kernel_DV, targets_BT, weights_BT = arrays
    products, chunk, z_loss, share = options
    dtype, width = products.dtype, x_BTD.shape[2]
    positions, words = targets_BT.size, kernel_DV.shape[1]
    kernel_DV = kernel_DV.astype(dtype)
    teacher_hidden, teacher_kernels = teacher[:1], [w.astype(dtype) for w in teacher[1:]]
    chunk = min(chunk or positions, positions)
    count = -(-positions // chunk)
    even = -(-positions // count)  # the least padding for this number of chunks
    chunk = min(chunk, -(-even // 128) * 128)
    first = jax.lax.axis_index(vocab) * words if vocab else 0

    def chunks(y):  # (B, T, ...) to (chunks, positions per chunk, ...), padded with zeros
        y = y.reshape(positions, *y.shape[2:])
        y = jnp.pad(y, ((0, count * chunk - positions),) + ((0, 0),) * (y.ndim - 1))
        return y.reshape(count, chunk, *y.shape[1:])

    def over_vocabulary(reduce, x):
        return reduce(x, vocab) if vocab else x

    def divergence(y_CE, logits_CV, lse_C):
        """Return KL(teacher || model) (C,) and the teacher's probabilities (C, V)."""
        teacher_CV = products.matmul(y_CE.astype(dtype), teacher_kernels[0])
        top_C = over_vocabulary(jax.lax.pmax, jnp.max(teacher_CV, axis=-1))
        total_C = jnp.sum(jnp.exp(teacher_CV - top_C[:, None]), axis=-1)
        teacher_lse_C = top_C + jnp.log(over_vocabulary(jax.lax.psum, total_C))
        log_p_CV = teacher_CV - teacher_lse_C[:, None]
        p_CV = jnp.exp(log_p_CV)
        kl_C = jnp.sum(p_CV * (log_p_CV - (logits_CV - lse_C[:, None])), axis=-1)
        return over_vocabulary(jax.lax.psum, kl_C), p_CV

    def body(carry, xs):
        (objective, nll, *kl), d_kernel_DV = carry
        x_CD, targets_C, weights_C, *y_CE = xs
        x_CD = x_CD.astype(dtype)
        logits_CV = products.matmul(x_CD, kernel_DV)
        top_C = over_vocabulary(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        total_C = jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1)
        # A comparison, not a gather: on devices without the target's logit nothing matches.
        hit_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == (
            targets_C[:, None] - first
        )
        right_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1)
        total_C, right_C = over_vocabulary(jax.lax.psum, (total_C, right_C))
        lse_C = top_C + jnp.log(total_C)
        nll_C = lse_C - right_C
        objective_C = nll_C
        if teacher:
            kl_C, teacher_CV = divergence(y_CE[0], logits_CV, lse_C)
            objective_C = (1.0 - share) * nll_C + share * kl_C
            kl = [kl[0] + jnp.sum(weights_C * kl_C)]
        objective += jnp.sum(weights_C * (objective_C + z_loss * lse_C**2))
        nll += jnp.sum(weights_C * nll_C)
        sums = (objective, nll, *kl)
        if not differentiate:
            return (sums, d_kernel_DV), None
        # d nll / d logits = softmax - hit; d lse^2 / d logits = 2 lse softmax.
        p_CV = jnp.exp(logits_CV - lse_C[:, None])
        slope_C = weights_C * (1.0 + 2.0 * z_loss * lse_C)
        # With a teacher, (1 - share) of hit plus share of its probabilities p: d KL = softmax - p.
        hit_C = (1.0 - share) * weights_C if teacher else weights_C
        d_CV = slope_C[:, None] * p_CV - jnp.where(hit_CV, hit_C[:, None], 0.0)
        if teacher:
            d_CV = d_CV - (share * weights_C)[:, None] * teacher_CV
        d_CV = d_CV.astype(dtype)
        d_x_CD = products.matmul_transposed(d_CV, kernel_DV)
        d_kernel_DV += products.weight_gradient(x_CD, d_CV)
        return (sums, d_kernel_DV), d_x_CD.astype(x_BTD.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = jnp.zeros(kernel_DV.shape if differentiate else (), jnp.float32)
    xs = (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT), *map(chunks, teacher_hidden))
    zeros = (zero,) * (3 if teacher else 2)
    (sums, d_kernel_DV), d_x = jax.lax.scan(body, (zeros, start), xs)
    if not differentiate:
        return sums, None
    return sums, (d_x.reshape(-1, width)[:positions].reshape(x_BTD.shape), d_kernel_DV)


def _forward(x_BTD, kernel_DV, targets_BT, weights_BT, *options):
    return _sums((x_BTD, kernel_DV, targets_BT, weights_BT), LossOptions(*options), True)


def _scaled(gradients, cotangents):
    d_x_BTD, d_kernel_DV = gradients
    scale = cotangents[0]
    return d_x_BTD * scale.astype(d_x_BTD.dtype), d_kernel_DV * scale, None, None


def _backward(products, chunk, z_loss, gradients, cotangents):
    return _scaled(gradients, cotangents)


cross_entropy.defvjp(_forward, _backward)


def _distilled_forward(x_BTD, kernel_DV, targets_BT, weights_BT, teacher, options):
    return _sums((x_BTD, kernel_DV, targets_BT, weights_BT), options, True, teacher)


def _distilled_backward(options, gradients, cotangents):
    return *_scaled(gradients, cotangents), None


distilled_cross_entropy.defvjp(_distilled_forward, _distilled_backward)
