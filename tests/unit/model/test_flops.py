"""Tests of the FLOPs convention against the compiler's count."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.model import flops
from mea_jax.train.step import batch_loss
from tests.helpers import change, params_of, random_batch, tiny_model

LENGTH, BATCH = 64, 2
# Wide enough that products dominate norms, softmax and rotary positions.
SHAPE = {
    "d_model": 128,
    "d_ff": 384,
    "vocab_size": 1024,
    "n_heads": 8,
    "head_dim": 16,
    "n_kv_heads": 8,
}


def compiler_flops(tiny, model):
    """Return the compiler's FLOPs of the loss and its gradient.

    `model` must have no loops, because the compiler counts the body of a loop once.
    """
    config = tiny(model=model)
    batch = random_batch(0, BATCH, LENGTH, model.vocab_size)
    grad = jax.jit(jax.value_and_grad(lambda p: batch_loss(config, p, batch)[0]))
    analysis = grad.lower(params_of(model)).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def attention_flops(model):
    """Return a batch's FLOPs of scores and weighted values over the causal half, both passes."""
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
    """The compiler counts 0 to 8% more than the convention and the masked half of T x T.

    Plain einsums compute the masked half, which the convention omits. The compiler also counts
    elementwise work (norms, softmax, rotary positions, the loss): a few percent at this shape.
    """
    model = tiny_model(**SHAPE | changes, scan_unroll=2)
    expected = flops.step_flops(model, LENGTH, BATCH * LENGTH) + attention_flops(model)
    ratio = compiler_flops(tiny, model) / expected
    assert 1.0 <= ratio < 1.08


def test_forward_flops_by_hand():
    """The FLOPs are right for one layer, D 4, N 2, K 2, H 3, F 5, V 7 and windows of 8.

    A multiply-add counts as two FLOPs.
    """
    model = tiny_model(
        d_model=4, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=3, d_ff=5, vocab_size=7
    )
    projections = 4 * (4 * 2 * 3)
    attention = 2 * (8 / 2) * 2 * 3
    assert flops.forward_flops_per_token(model, 8) == 2 * (
        projections + attention + 3 * 4 * 5 + 4 * 7
    )


@given(length=st.integers(1, 60), windows=st.lists(st.integers(0, 70), min_size=2, max_size=2))
def test_a_window_limits_the_keys_that_are_counted(length, windows):
    """Query t counts t + 1/2 keys, as half of T x T does, or a window if that is less."""
    model = tiny_model(hlc="none", n_layers=2)
    limited = change(model, window=tuple(windows))
    pair = 2 * 2 * model.n_heads * model.head_dim

    def keys(window):
        return sum(min(t + 0.5, window or length) for t in range(length)) / length

    saved = sum(keys(0) - keys(window) for window in windows)
    full, found = (flops.forward_flops_per_token(m, length) for m in (model, limited))
    assert full - found == pytest.approx(pair * saved, rel=1e-9, abs=1e-6)


def test_mixing_is_counted():
    """Explicit mixing costs C K H multiply-adds per token; folding costs D C K H per step."""
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
