"""The FLOPs convention against what the compiler counts."""

import jax
import pytest

from mea_jax.model import flops
from mea_jax.train.step import batch_loss
from tests.helpers import params_of, random_batch, tiny_model

LENGTH, BATCH = 64, 2
# Wide enough that products outweigh norms, softmax and rotary positions.
SHAPE = {
    "d_model": 128,
    "d_ff": 384,
    "vocab_size": 1024,
    "n_heads": 8,
    "head_dim": 16,
    "n_kv_heads": 8,
}


def compiler_flops(tiny, model):
    """Of the loss and its gradient, nothing hidden in a loop: the compiler counts those once."""
    config = tiny(model=model)
    batch = random_batch(0, BATCH, LENGTH, model.vocab_size)
    grad = jax.jit(jax.value_and_grad(lambda p: batch_loss(config, p, batch)[0]))
    analysis = grad.lower(params_of(model)).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def attention_flops(model):
    """Scores and weighted values over the causal half, forward and backward, of the batch."""
    pairs = BATCH * LENGTH * LENGTH / 2
    return 3 * model.n_layers * 2 * 2 * pairs * model.n_heads * model.head_dim


@pytest.mark.parametrize(
    "changes",
    [
        {"hlc_form": "folded"},
        {"hlc_form": "explicit", "key_components": 4, "value_components": 2},
        {"hlc": "none", "head_norm": False, "n_kv_heads": 2},
        {"hlc_form": "folded", "tie_embeddings": False, "key_components": (4, 2)},
    ],
)
def test_the_convention_is_the_compilers_count(tiny, changes):
    """Plus the masked half of T x T, which plain einsums compute and the convention leaves out.

    The compiler also counts elementwise work (norms, softmax, rotary positions, the loss): a few
    per cent at this shape, so 0 to 8% above.
    """
    model = tiny_model(**SHAPE | changes, scan_unroll=2)
    expected = flops.step_flops(model, LENGTH, BATCH * LENGTH) + attention_flops(model)
    ratio = compiler_flops(tiny, model) / expected
    assert 1.0 <= ratio < 1.08


def test_forward_flops_by_hand():
    """One layer, D 4, N 2, K 2, H 3, F 5, V 7, windows of 8, two FLOPs a multiply-add."""
    model = tiny_model(
        d_model=4, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=3, d_ff=5, vocab_size=7
    )
    projections = 4 * (4 * 2 * 3)
    attention = 2 * (8 / 2) * 2 * 3
    assert flops.forward_flops_per_token(model, 8) == 2 * (
        projections + attention + 3 * 4 * 5 + 4 * 7
    )


def test_mixing_is_counted():
    """Explicit: C K H multiply-adds a token. Folded: D C K H a step, none a token."""
    shape = {"n_layers": 1, "key_components": 2, "hlc": "k"}
    plain = tiny_model(n_layers=1, hlc="none")
    folded, explicit = (tiny_model(**shape, hlc_form=form) for form in ("folded", "explicit"))
    d, c, k, h = 32, 2, 4, 8
    tokens = 1000
    base = flops.step_flops(plain, 32, tokens)
    assert flops.step_flops(folded, 32, tokens) - base == 3 * 2 * d * c * k * h
    fewer = 2 * d * (k - c) * h  # only C heads are projected
    assert flops.step_flops(explicit, 32, tokens) - base == 3 * tokens * (2 * c * k * h - fewer)


def test_peak_of_known_devices():
    assert flops.peak_flops("TPU v5 lite") == flops.peak_flops("TPU v5e") == 197e12
    assert flops.peak_flops("TPU v5p") == 459e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("cpu") is None
