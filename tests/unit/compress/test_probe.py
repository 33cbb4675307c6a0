"""Tests of the divergence that a change of one layer causes, and of standard errors."""

import math

import jax
import numpy as np
import pytest

from mea_jax.compress.damage import _compared, _overall
from mea_jax.compress.layer import split_heads
from mea_jax.compress.moments import of_weights
from mea_jax.compress.probe import SensitivityProbe, plain_layer
from mea_jax.compress.stream import Stream
from mea_jax.config.schema import MeshConfig
from mea_jax.model.transformer import Decoder
from mea_jax.parallel import sharding
from tests.helpers import params_of, random_batch, tiny_model

MODEL = tiny_model(hlc="none", head_norm=False, tie_embeddings=False)
PARAMS = params_of(MODEL, noise=0.3)
ROWS = [[12, 9], [20], [7, 5, 4], [24]]  # documents of two windows per batch; some end with padding
BATCHES = [random_batch(i, 2, 24, 264, ROWS[2 * i : 2 * i + 2]) for i in range(2)]
LAYERS = [jax.tree.map(lambda x, i=i: x[i], PARAMS["layers_0"]) for i in range(2)]
TOP = {name: leaf for name, leaf in PARAMS.items() if name != "layers_0"}


@pytest.fixture
def measurer(tmp_path):
    stream = Stream(
        BATCHES, ["a", "b"], tmp_path, sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    )
    stream.embed(MODEL, TOP)
    heads = [split_heads(MODEL, layer["attention"]) for layer in LAYERS]
    plain = [plain_layer(h, layer) for h, layer in zip(heads, LAYERS, strict=True)]
    return SensitivityProbe(MODEL, TOP, plain, stream)


def log_probabilities(params):
    """Yield each batch's log probabilities from `Decoder`, without padding: float64 (tokens, V)."""
    for batch in BATCHES:
        read = (batch["inputs"], batch["positions"], batch["segment_ids"])
        logits = Decoder(MODEL).apply({"params": params}, *read, method="logits")
        real = np.asarray(logits, np.float64)[batch["segment_ids"] > 0]
        yield real - np.log(np.exp(real).sum(axis=-1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_change_costs_the_divergence_of_predictions(measurer, which):
    """The cost is KL(original || changed), computed from all logits of the complete model."""
    for _ in range(which):
        measurer.advance()
    kernel = LAYERS[which]["attention"]["value"]
    moved = kernel * np.linspace(0.2, 1.5, kernel.shape[1])[:, None].astype(np.float32)
    tree = measurer.trees[which]
    changed_tree = tree | {"attention": tree["attention"] | {"value": moved}}
    found = measurer.moved(measurer.specs[which], changed_tree, which)
    stack = jax.tree.map(np.array, PARAMS["layers_0"])
    stack["attention"]["value"][which] = moved
    changed = PARAMS | {"layers_0": stack}
    pairs = list(zip(log_probabilities(PARAMS), log_probabilities(changed), strict=True))
    expected = np.concatenate([(np.exp(p) * (p - q)).sum(axis=-1) for p, q in pairs]).mean()
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=1e-4)


def test_all_heads_cost_nothing_and_fewer_cost_something(measurer):
    attention = LAYERS[0]["attention"]
    moments = of_weights(*(attention[name] for name in ("query", "key", "value")))
    for row in measurer.sensitivity("aligned", split_heads(MODEL, attention), moments):
        assert row.losses[-1] == 0
        assert all(loss > 1e-4 for loss in row.losses[:-1]), row
        assert row.losses[0] > 2 * row.losses[-2]
    same = measurer.moved(measurer.specs[0], measurer.trees[0], 0)
    assert abs(same) < 1e-6


def test_errors_of_increases_are_those_of_many_samples():
    """The estimates equal the spread over samples, even if both losses vary together much more."""
    rng = np.random.default_rng(0)

    def sample():
        tokens = rng.integers(50, 150, 40).astype(float)
        before = tokens * rng.normal(3.0, 1.0, 40)
        after = before + tokens * rng.normal(0.02, 0.1, 40)
        moved = tokens * rng.exponential(0.01, 40)
        old, new = zip(before, tokens, strict=True), zip(after, tokens, moved, strict=True)
        return _compared(list(old), list(new))

    found = [sample() for _ in range(400)]
    increases = np.array([row["increase"] for row in found])
    assert increases.mean() == pytest.approx(0.02, abs=0.003)
    assert np.mean([row["error"] for row in found]) == pytest.approx(increases.std(), rel=0.12)
    moved = np.array([row["divergence"] for row in found])
    assert moved.mean() == pytest.approx(0.01, rel=0.03)
    assert np.mean([row["divergence_error"] for row in found]) == pytest.approx(
        moved.std(), rel=0.12
    )


def test_one_batch_has_no_error_to_speak_of():
    found = _compared([(3.0, 2.0)], [(4.0, 2.0, 0.5)])
    assert found["increase"] == 0.5
    assert found["divergence"] == 0.25
    assert math.isnan(found["error"])
    assert math.isnan(found["divergence_error"])


def test_of_all_domains_errors_are_those_within():
    """If no domain has spread, the error of the mean is 0, although the domains differ."""
    one = _compared([(3.0, 2.0), (6.0, 4.0)], [(4.0, 2.0, 0.2), (8.0, 4.0, 0.4)])
    other = _compared([(2.0, 2.0), (2.0, 2.0)], [(12.0, 2.0, 2.0), (12.0, 2.0, 2.0)])
    assert (one["error"], other["error"]) == pytest.approx((0, 0), abs=1e-12)
    both = _overall([one, other], [6.0, 4.0])
    assert both["increase"] == pytest.approx((3 + 20) / 10)
    assert both["divergence"] == pytest.approx((0.6 + 4) / 10)
    assert both["error"] == pytest.approx(0, abs=1e-12)
    apart = [{"error": 0.3, "increase": 1.0}, {"error": 0.4, "increase": 3.0}]
    assert _overall(apart, [5.0, 5.0]) == pytest.approx({"error": 0.25, "increase": 2.0})
