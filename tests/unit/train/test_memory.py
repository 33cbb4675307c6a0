"""Tests that runs too large for the memory are refused in one line before they allocate."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea_jax.config.model_checks import least_parameters
from mea_jax.config.schema import DataConfig, MeshConfig, TrainConfig
from mea_jax.errors import UserError
from mea_jax.model.params import abstract_params
from mea_jax.parallel import sharding
from mea_jax.train import memory
from mea_jax.train.step import create_state
from tests.helpers import ATTENTIONS, change, tiny_model

LARGEST = 2**31 - 1


def run(**changes):
    return change(TrainConfig(model=tiny_model(), data=DataConfig(context_length=16)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.vocab_size": LARGEST}, r"config\.model needs 1,024\.0 GiB on each device for par"),
        # Tracing a model makes tables of these sizes, so the check is before it.
        ({"model.head_dim": 2**31 - 2}, r"config\.model needs .* GiB on each device"),
        ({"model.n_heads": LARGEST, "model.positions": "alibi"}, r"config\.model needs .* GiB"),
        ({"data.context_length": LARGEST}, r"config\.batch_size=8 windows .* 4,096\.0 GiB"),
        ({"batch_size": LARGEST}, r"config\.batch_size=2147483647 windows of"),
        ({"data.prefetch": LARGEST}, r"config\.data\.prefetch=2147483647 batches"),
    ],
)
def test_what_cannot_fit(changes, message, monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 2**36)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = run(**{"model.n_kv_heads": 1, "model.hlc": "none"} | changes)
    with pytest.raises(UserError, match=message):
        memory.check_fits(config, mesh)


@pytest.mark.parametrize("fsdp", [1, 8])
def test_the_least_is_what_a_state_and_its_gradients_take(fsdp):
    """The estimate is exact, so a machine of just that size is accepted.

    CPU devices share the memory of the machine.
    """
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:fsdp])
    config = run()
    state = create_state(config, mesh)
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
    gradients = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params)]
    parameters, tokens = memory.least_bytes(config, mesh)
    assert parameters == sum(held) + sum(gradients)
    assert tokens == 8 // fsdp * 16 * 2 * 32 * 4  # rows, positions, layers, d_model, float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "host_bytes", lambda: (parameters + tokens) * fsdp)
        memory.check_fits(config, mesh)
        patch.setattr(memory, "host_bytes", lambda: (parameters + tokens) * fsdp - fsdp)
        with pytest.raises(UserError, match=r"config\.batch_size=8 windows"):
            memory.check_fits(config, mesh)
        patch.setattr(memory, "host_bytes", lambda: parameters * fsdp - fsdp)
        with pytest.raises(UserError, match=r"config\.model needs"):
            memory.check_fits(config, mesh)


@given(name=st.sampled_from(sorted(ATTENTIONS)), tied=st.booleans(), width=st.integers(8, 40))
def test_the_count_by_arithmetic_is_never_too_high(name, tied, width):
    model = tiny_model(**ATTENTIONS[name], tie_embeddings=tied, d_model=width)
    exact = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    assert 0.8 * exact <= least_parameters(model) <= exact
