"""Tests that a step of a mixture of experts is the same on any mesh, and of its communication."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mea_jax.config.schema import MeshConfig
from mea_jax.errors import UserError
from mea_jax.generate.generator import Decoding, Generator
from mea_jax.model.params import init_params
from mea_jax.parallel import sharding
from mea_jax.plan.costs import count
from mea_jax.plan.hlo import parse
from mea_jax.train.step import compile_train_step, create_state, reported
from tests.helpers import assert_close, flat, params_of, random_batch, tiny_model

STEPS = 3
EXPERTS = {"n_experts": 4, "experts_per_token": 2, "d_expert": 24, "loss_chunk": 0}
MESHES = {
    "one": MeshConfig(1, 1, 1),
    "expert 4": MeshConfig(1, 1, 1, expert=4),
    "fsdp, expert and tensor": MeshConfig(1, 2, 2, expert=2),
    "expert and sequence": MeshConfig(1, 1, 1, sequence=2, expert=2),
}
# Windows of several documents with very different amounts of padding.
UNEVEN = [[32], [20, 9], [7], [1], [32], [4], [3], [30]]


def mesh_of(name):
    c = MESHES[name]
    count = c.data * c.fsdp * c.tensor * c.sequence * c.expert
    return sharding.make_mesh(c, jax.devices()[:count])


@pytest.fixture(scope="module")
def config(tiny):
    losses = {"optimizer.load_balance": 0.1, "optimizer.router_z_loss": 0.01}
    return tiny(model=tiny_model(**EXPERTS, n_heads=8), **losses)


@pytest.fixture(scope="module")
def run(config):
    """Return `run(mesh name)`: it trains 3 steps and returns (metrics, last state, program text).

    All runs start from the same seed.
    """

    @functools.cache
    def train(name):
        mesh = mesh_of(name)
        sharding.check_divisible(config, mesh)
        with jax.set_mesh(mesh):
            state, seen = create_state(config, mesh), []
            lowered = compile_train_step(config, mesh).lower(
                state, random_batch(0, 8, 32, 264, UNEVEN)
            )
            step = lowered.compile()
            for i in range(STEPS):
                batch = jax.device_put(
                    random_batch(i, 8, 32, 264, UNEVEN), sharding.batch_sharding(mesh)
                )
                state, metrics = step(state, batch)
                names = ("loss", "grad_norm", *reported(config, False))
                seen.append([float(metrics[n]) for n in names])
        return seen, state, step.as_text()

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_several_devices_take_the_steps_of_one(run, name):
    """Losses, gradient norms and all metrics of routers are equal to those on one device."""
    seen, state, _ = run(name)
    expected, one, _ = run("one")
    # Float32 sums in a different order, magnified by Adam's division. If rounding changed a choice
    # of experts, "busiest_expert" would change by 1/138 or more.
    np.testing.assert_allclose(seen, expected, rtol=2e-5)
    assert_close(state.params, one.params, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_experts_are_split_over_their_axis(run):
    """Experts are split over expert, fsdp and tensor; other parameters over expert as over fsdp."""
    _, state, _ = run("fsdp, expert and tensor")
    leaves = flat(state.params)
    specs = {
        "router": P(None, ("fsdp", "expert", "sequence"), None),
        "gate": P(None, "expert", ("fsdp", "sequence"), "tensor"),
        "up": P(None, "expert", ("fsdp", "sequence"), "tensor"),
        "down": P(None, "expert", "tensor", ("fsdp", "sequence")),
    }
    shapes = {"router": (2, 8, 4), "gate": (2, 2, 16, 12), "up": (2, 2, 16, 12)}
    shapes["down"] = (2, 2, 12, 16)
    for name, spec in specs.items():
        leaf = leaves[f"layers_0/mlp/{name}"]
        assert leaf.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(leaf.sharding.mesh, spec), leaf.ndim
        )
        assert leaf.addressable_shards[0].data.shape == shapes[name]
    assert leaves["embedding"].addressable_shards[0].data.shape == (132, 8)


@pytest.mark.slow
def test_what_crosses_the_expert_axis(run):
    """Tokens cross the axis, not experts.

    In each layer a device gathers the tokens of the axis and scatters the same number of sums. In
    the gradient it gathers the tokens and the gradients of sums, and scatters those of tokens.
    """
    _, _, text = run("expert 4")
    assert text is not None
    tokens = 8 * 32 * 32 * 4  # B T D, float32
    moved = {
        kind: sum(
            c.times
            for c in count(parse(text)).collectives
            if "mlp" in c.source and c.kind == kind and c.nbytes == tokens
        )
        for kind in ("all-gather", "reduce-scatter")
    }
    layers = 2
    assert moved == {"all-gather": 3 * layers, "reduce-scatter": 2 * layers}
    expert = 4 * 32 * 24 * 4  # E D F: the matrices of all experts are not moved
    sizes = [
        c.nbytes
        for c in count(parse(text)).collectives
        if "mlp" in c.source and c.kind in moved  # ignores an all-reduce with groups of one device
    ]
    assert {size for size in sizes if size >= expert} == {tokens}


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ((1, 2, 1, 1, 1, 4), {"model.n_experts": 6}, r"expert=4 does not divide .*n_experts=6"),
        ((1, 2, 4), {"model.d_expert": 22}, r"tensor=4 does not divide .*d_expert=22"),
        ((2, 1, 1, 1, 1, 4), {"batch_size": 12}, r"12 windows .* data x fsdp x expert = 8 devices"),
        ((1, 2, 1, 1, 1, 4), {"model.d_model": 36}, r"fsdp x expert = 2 x 4 does not .*d_model=36"),
    ],
)
def test_meshes_that_do_not_divide_a_mixture(tiny, mesh, changes, message):
    config = tiny(**{"model": tiny_model(**EXPERTS)} | changes)
    with pytest.raises(UserError, match=message):
        sharding.check_divisible(config, sharding.make_mesh(MeshConfig(*mesh)))


@pytest.mark.slow
def test_a_prompt_on_a_mesh_gives_the_tokens_of_one_device():
    """The tokens are equal for a single row, which the expert axis does not divide."""
    model = tiny_model(**EXPERTS)
    params, prompt = params_of(model, noise=0.3), [[5, 9, 200, 31, 7]]
    expected = Generator(model, params, length=32).run(prompt, Decoding(4))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 2, expert=2), jax.devices()[:4])
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        assert Generator(model, placed, length=32).run(prompt, Decoding(4)) == expected
