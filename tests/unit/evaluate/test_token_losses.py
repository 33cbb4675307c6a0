"""Tests of held-out losses: per token, per source, per position, and their totals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import MeshConfig, SourceConfig
from mea_jax.data.pipeline import held_out_batches
from mea_jax.data.prepare import prepare
from mea_jax.errors import UserError
from mea_jax.evaluate.token_losses import (
    ALL,
    Losses,
    bucket_edges,
    domain_losses,
    source_names,
    token_nll,
)
from mea_jax.parallel import sharding
from mea_jax.parallel.batches import BatchPlacer
from mea_jax.train.held_out import HeldOut
from tests.helpers import apply_logits, params_of, random_batch, tiny_model

MODEL = tiny_model(key_components=2)
PARAMS = params_of(MODEL, noise=0.3)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Return a config with two text sources (of 40 and 30 documents) and windows of 32 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(1)
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(rng.choice(list("abc \n"), 150 + 5 * i)))
    source = SourceConfig(source="text", path=str(folder))
    data = tiny().data
    return tiny(data=dataclasses.replace(data, sources=(*data.sources, source)))


@pytest.fixture(scope="module")
def prepared(config):
    return prepare(config.data, log=lambda line: None)


@pytest.fixture(scope="module")
def found(prepared):
    return domain_losses(MODEL, PARAMS, prepared, batch_size=4)


@pytest.mark.parametrize("mebibytes", [0, 1], ids=["whole", "chunks"])
def test_loss_of_each_token_is_that_of_the_reference(mebibytes, monkeypatch):
    """The losses agree up to float32 rounding, also in chunks of 4 positions with a padded end."""
    model = dataclasses.replace(MODEL, loss_chunk=mebibytes)
    if mebibytes:
        monkeypatch.setattr("mea_jax.evaluate.token_losses.positions_within", lambda *_: 4)
    batch = random_batch(0, 3, 15, model.vocab_size, [[15], [6, 5], [1, 14]])
    found = jax.jit(token_nll, static_argnums=0)(model, PARAMS, batch)

    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    log_p = jax.nn.log_softmax(apply_logits(model, PARAMS, *map(jnp.asarray, inputs)))
    expected = -np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], 2)[..., 0]
    np.testing.assert_allclose(found, expected * (batch["segment_ids"] > 0), rtol=1e-5, atol=1e-5)


def test_sources_add_up_to_the_held_out_loss_of_training(config, prepared, found):
    """The losses agree to 1e-5, the rounding of float32 sums over a few thousand tokens."""
    config = dataclasses.replace(config, model=MODEL)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        place = BatchPlacer(mesh, config.batch_size, config.data.context_length)
        held_out = HeldOut(config, mesh, prepared, place)
        expected = held_out.loss(PARAMS, held_out.read(None))
    parts = [found[name] for name in source_names(prepared)]
    assert len(parts) == 2
    assert abs(parts[0].loss - parts[1].loss) > 0.01, "a mean without weights would differ"
    total = sum(part.loss * part.tokens for part in parts) / sum(part.tokens for part in parts)
    assert total == pytest.approx(expected["loss"], rel=1e-5)
    assert found[ALL].loss == pytest.approx(expected["loss"], rel=1e-5)
    assert found[ALL].bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-5)


def test_every_document_is_counted_once_whatever_the_windows(prepared, found):
    for name, source in zip(source_names(prepared), prepared.sources, strict=True):
        assert found[name].documents == source.held_out_documents
        assert found[name].tokens == source.held_out_tokens
    other = domain_losses(MODEL, PARAMS, prepared, batch_size=7)[ALL]
    np.testing.assert_array_equal(other.tokens_UP, found[ALL].tokens_UP)
    np.testing.assert_allclose(other.nats_UP, found[ALL].nats_UP, rtol=1e-4)


def test_tokens_of_a_document_lie_where_its_text_does(prepared, found):
    """Each document of the second source has 150 + 5 i bytes and a separator."""
    (source,) = prepared.sources[1:]
    sizes = sorted(found[source_names(prepared)[1]].tokens_UP.sum(1).astype(int))
    assert all((size - 151) % 5 == 0 and 151 <= size < 301 for size in sizes)
    assert sum(sizes) == source.held_out_tokens


def test_buckets_average_back_to_the_total(found):
    for losses in found.values():
        tokens = losses.tokens_UP.sum(0)
        means = np.array([mean for mean, _ in losses.by_position()])
        assert (means * tokens).sum() / tokens.sum() == pytest.approx(losses.loss, rel=1e-9)


@pytest.mark.slow
def test_a_bucket_holds_what_has_so_much_context(prepared, found):
    """Tokens and nats per bucket agree with masks of the stored windows (nats to 1e-5)."""
    losses = found[ALL]
    assert losses.edges == (0, 16, 32)
    near_tokens, near_nats = 0, 0.0
    for batch in held_out_batches(prepared, batch_size=8):
        near = (batch["positions"] < 16) & (batch["segment_ids"] > 0)
        near_tokens += int(near.sum())
        near_nats += float(np.asarray(token_nll(MODEL, PARAMS, batch))[near].sum())
    assert losses.tokens_UP[:, 0].sum() == near_tokens
    assert losses.nats_UP[:, 0].sum() == pytest.approx(near_nats, rel=1e-5)
    assert (losses.tokens_UP[:, 1] > 0).any()


@pytest.mark.parametrize(
    ("length", "edges"),
    [(8, (0, 8)), (16, (0, 16)), (100, (0, 16, 32, 64, 100)), (128, (0, 16, 32, 64, 128))],
)
def test_edges_of_buckets(length, edges):
    assert bucket_edges(length) == edges


def test_the_standard_error_is_that_of_the_spread_over_many_draws():
    """The mean error is within 10% of the spread of 4,000 draws of 50 documents.

    The documents differ in length. 10% allows for the randomness of the draws.
    """
    rng = np.random.default_rng(0)

    def draw():
        tokens = rng.integers(1, 60, (50, 2)).astype(float)
        level = rng.normal(3.0, 0.5, (50, 1))  # a document's tokens have similar losses
        nats = tokens * level + np.sqrt(tokens) * rng.normal(0, 1, tokens.shape)
        return Losses("x", nats, tokens, (0, 16, 32), None)

    draws = [draw() for _ in range(4000)]
    spread = np.std([losses.loss for losses in draws])
    assert np.mean([losses.error for losses in draws]) == pytest.approx(spread, rel=0.1)


def test_increases_are_taken_document_by_document():
    rng = np.random.default_rng(0)
    tokens = np.full((20, 1), 10.0)
    base = Losses("x", rng.normal(30, 10, (20, 1)), tokens, (0, 16), None)
    other = dataclasses.replace(base, nats_UP=base.nats_UP + 1.0)
    more, error = other.increase(base)
    assert more == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12), "all losses rise by the same amount"
    assert other.error > 0.1
    assert base.increase(base) == (0, 0)


def test_a_sample_of_batches_is_near_the_whole(prepared, found):
    sampled = domain_losses(MODEL, PARAMS, prepared, batch_size=2, max_batches=5)[ALL]
    assert sampled.tokens < found[ALL].tokens
    assert sampled.loss == pytest.approx(found[ALL].loss, rel=0.1)


def test_no_held_out_text_is_refused(tiny):
    empty = prepare(tiny(**{"data.held_out_fraction": 0.0}).data, log=lambda line: None)
    with pytest.raises(UserError, match="no held-out text"):
        domain_losses(MODEL, PARAMS, empty)
