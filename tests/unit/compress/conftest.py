"""A trained run for the tests of methods; modules with a fixture `run` of their own use that."""

import pytest

from mea_jax.train.run import train
from tests.helpers import PLAIN


@pytest.fixture(scope="module", params=[{}, {"qk_norm": True, "n_kv_heads": 1}], ids=str)
def run(request, tiny, tmp_path_factory):
    """Train a model of two layers: MHA, and MQA with normed queries and keys."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    changes = PLAIN | request.param
    train(tiny(steps=8, **{f"model.{name}": value for name, value in changes.items()}), workdir)
    return workdir
