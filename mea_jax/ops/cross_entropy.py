"""Cross-entropy, alone or mixed with distillation, that never holds the logits of a whole batch.

The logits of a 128,256-word vocabulary are the largest activation of a small model. Here those of
one chunk of positions exist at a time; when the loss is differentiated, the gradients of hidden
states and kernel are formed in the same pass, while those logits are there, so nothing is
recomputed and nothing of size T x V is saved.

On a mesh each device runs this loop over its own positions and words, with the kernel gathered
before it and the gradients reduced after it, once: left to the partitioner, the kernel's gradient
would be reduced in every chunk. Within the loop only two numbers a position cross the vocabulary's
axis.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mea_jax.parallel.sharding import mesh_axes, on_a_mesh, spec


class Products(Protocol):
    """The matrix products of a backend: inputs of `dtype`, float32 results. Hashable."""

    @property
    def dtype(self) -> jnp.dtype: ...

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """(..., D) x (D, F) -> (..., F)."""
        ...

    def matmul_transposed(self, g: jax.Array, w: jax.Array) -> jax.Array:
        """(..., F) x (D, F) -> (..., D)."""
        ...

    def weight_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """(..., D) x (..., F) -> (D, F), summed over the leading axes."""
        ...


class LossOptions(NamedTuple):
    """The static options of a loss; hashable.

    Attributes:
      products: how matrices are multiplied.
      chunk: positions of a device whose logits exist at one time; 0: all.
      z_loss: weight of logsumexp(logits)^2.
      share: weight of the divergence from a teacher, 1 - share that of the targets.
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
    """Sums over tokens, float32: (objective, negative log-likelihood in nats).

    objective = sum of weight * (nll + z_loss * logsumexp(logits)^2). Logits of up to `chunk`
    positions of a device exist at one time (0: of all of them; see `positions_within`). Only the
    objective is differentiated: the second output is a report, its cotangent is ignored. Gradients
    flow to `x_BTD` and `kernel_DV`.

    Under a mesh of `jax.set_mesh` rows and positions must divide as they are split, D and V too
    (jax raises otherwise), and each device holds a float32 gradient (D, V / tensor) until the end.
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
    """As `cross_entropy`, towards a teacher's distributions too: (objective, nll, KL), float32.

    KL = sum of weight * KL(teacher || model) over whole vocabularies, at temperature 1, in nats;
    objective = sum of weight * ((1 - share) * nll + share * KL + z_loss * logsumexp(logits)^2).
    `teacher` are its hidden states (B, T, E) and unembedding (E, V): they get no gradient. Two
    arrays of logits exist at one time.
    """
    arrays = (x_BTD, kernel_DV, targets_BT, weights_BT)
    return _sums(arrays, options, False, teacher)[0]


def positions_within(mebibytes: int, vocabulary: int) -> int:
    """Return the number of positions whose float32 logits fit in `mebibytes`; 0 means no limit.

    In whole multiples of 128, a matrix unit's side, if there are as many.
    """
    positions = mebibytes * 2**20 // (4 * vocabulary)
    if mebibytes and positions < 128:
        return max(positions, 1)
    return positions // 128 * 128


def _sums(arrays, options, differentiate, teacher=()):
    """((objective, nll), gradients of x and kernel, or None), on whatever mesh is set.

    `arrays`: x (B, T, D), kernel (D, V), targets and weights (B, T).
    With a `teacher`, its hidden states and unembedding: ((objective, nll, KL), gradients).
    """
    arrays = (*arrays[:3], arrays[3].astype(jnp.float32))
    run = functools.partial(_local, options, differentiate)
    if not on_a_mesh():
        return run((), arrays, teacher)
    rows, embed, vocab = mesh_axes("batch", "length"), mesh_axes("embed"), mesh_axes("vocab")
    # Each device's part of the sum over rows is scattered over `embed`, then added over the rest.
    rest = tuple(axis for axis in rows if axis not in embed)
    assert set(embed) <= set(rows)

    def gathered(kernel_DV):
        # In the products' dtype, and once: half the bytes, and none while the loop runs.
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
        check_vma=False,  # it cannot tell that sums over all axes are alike everywhere
    )
    return split(*arrays, *teacher)


def _local(options, differentiate, vocab, arrays, teacher):
    """`_sums` of one device's positions and words; what `vocab` splits is summed over it.

    `vocab`: mesh axes over which the words are split, inside `shard_map`; () where they are whole.
    Of the gradients that of x lacks the other devices' words, that of the kernel their positions.
    """
    x_BTD, kernel_DV, targets_BT, weights_BT = arrays
    products, chunk, z_loss, share = options
    dtype, width = products.dtype, x_BTD.shape[2]
    positions, words = targets_BT.size, kernel_DV.shape[1]
    kernel_DV = kernel_DV.astype(dtype)
    teacher_hidden, teacher_kernels = teacher[:1], [w.astype(dtype) for w in teacher[1:]]
    chunk = min(chunk or positions, positions)
    count = -(-positions // chunk)
    even = -(-positions // count)  # the least filling up, in as many chunks
    chunk = min(chunk, -(-even // 128) * 128)
    first = jax.lax.axis_index(vocab) * words if vocab else 0

    def chunks(y):  # (B, T, ...) to (chunks, positions of one, ...), filled up with zeros
        y = y.reshape(positions, *y.shape[2:])
        y = jnp.pad(y, ((0, count * chunk - positions),) + ((0, 0),) * (y.ndim - 1))
        return y.reshape(count, chunk, *y.shape[1:])

    def over_vocabulary(reduce, x):
        return reduce(x, vocab) if vocab else x

    def divergence(y_CE, logits_CV, lse_C):
        """(KL(teacher || model) (C,), the teacher's probabilities (C, V))."""
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
        # A comparison, not a gather: elsewhere than on its own device a word is not found.
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
        # With a teacher, (1 - share) of hit and share of its probabilities: d KL = softmax - p.
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
