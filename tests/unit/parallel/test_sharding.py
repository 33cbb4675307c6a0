"""Tests of sharding: equal steps on all meshes, the declared shardings, and errors."""

import functools
import inspect
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mea_jax.config.checks import validate
from mea_jax.config.schema import MeshConfig
from mea_jax.errors import UserError
from mea_jax.parallel import sharding
from mea_jax.train.diagnostics import compile_diagnostics
from mea_jax.train.step import (
    abstract_state,
    batch_loss,
    compile_eval_step,
    compile_train_step,
    create_state,
    state_shardings,
)
from tests.helpers import assert_close, change, flat, random_batch

STEPS = 5
MESHES = {
    "one": MeshConfig(1, 1, 1),
    # each axis alone; files in configs/ use data and fsdp
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 2),
    "sequence": MeshConfig(1, 1, 1, sequence=8),
    "slices": MeshConfig(4, 1, 1, slices=2),
    "mixed": MeshConfig(2, 2, 2),
    "mixed with sequence": MeshConfig(1, 2, 2, sequence=2),
    "data and sequence": MeshConfig(2, 1, 1, sequence=4),
}
# MEA with C < K, and MHA with the other options for the input and output of the model.
MODELS: dict[str, dict[str, Any]] = {
    "MEA": {"model.key_components": 2, "model.value_components": 2, "model.n_heads": 8},
    "MHA": {
        "model.hlc": "none",
        "model.head_norm": False,
        "model.tie_embeddings": False,
        "model.positions": "learned",
        "model.max_positions": 32,
        "model.backend": "cpu",
        "optimizer.z_loss": 0.01,
        "accumulate": 2,
    },
    "MEA, C = K": {"model.n_layers": 1, "model.positions": "alibi", "model.remat": "dots"},
}
# Windows of several documents with very different padding; a microbatch of two rows almost empty.
UNEVEN = [[32], [20, 9], [7], [1], [32], [4], [3], [30]]


def mesh_of(name):
    config = MESHES[name]
    devices = config.data * config.fsdp * config.tensor * config.sequence
    return sharding.make_mesh(config, jax.devices()[:devices])


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(**MODELS["MEA"])


@pytest.fixture(scope="module")
def run(tiny):
    """Return `run(mesh name, model)`: it trains 5 steps and returns (losses, last state).

    All runs start from the same seed.
    """

    @functools.cache
    def train(name, model="MEA"):
        mesh, config = mesh_of(name), tiny(**MODELS[model])
        sharding.check_divisible(config, mesh)
        with jax.set_mesh(mesh):
            state, step = create_state(config, mesh), compile_train_step(config, mesh)
            losses = []
            for i in range(STEPS):
                state, metrics = step(state, random_batch(i, 8, 32, 264, UNEVEN))
                losses.append(float(metrics["loss"]))
        return losses, state

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "MEA") for name in MESHES if name != "one"),
        ("mixed with sequence", "MHA"),
        ("data", "MEA, C = K"),
        ("data and sequence", "MEA, C = K"),
    ],
)
def test_several_devices_give_the_losses_of_one(run, name, model):
    losses, state = run(name, model)
    expected, one = run("one", model)
    assert len(set(expected)) == STEPS
    # Float32 sums in a different order, magnified by Adam's division over 5 steps.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(state.params, one.params, rtol=1e-2, atol=2e-4)


def normalised(spec, ndim):
    """Return `spec` with a tuple of mesh axes for each dimension."""
    axes = [a if isinstance(a, tuple) else (a,) if a else () for a in spec]
    return axes + [()] * (ndim - len(axes))


EMBED = ("fsdp", "expert", "sequence")
SPECS = {
    "embedding": P("tensor", EMBED),
    "final_norm/scale": P(),
    "layers_0/attention/query": P(None, EMBED, "tensor", None),
    "layers_0/attention/key": P(None, EMBED, "tensor", None),
    "layers_0/attention/key_mixing": P(None, None, "tensor"),
    "layers_0/attention/value": P(None, EMBED, "tensor", None),
    "layers_0/attention/value_mixing": P(None, None, "tensor"),
    "layers_0/attention/head_norm/scale": P(),
    "layers_0/attention/out": P(None, "tensor", None, EMBED),
    "layers_0/attention_norm/scale": P(),
    "layers_0/mlp_norm/scale": P(),
    "layers_0/mlp/gate": P(None, EMBED, "tensor"),
    "layers_0/mlp/up": P(None, EMBED, "tensor"),
    "layers_0/mlp/down": P(None, "tensor", EMBED),
}


def check_specs(tree):
    """Check the shardings of parameters, or of moments with the same tree."""
    leaves = flat(tree)
    assert leaves.keys() == SPECS.keys()
    for path, leaf in leaves.items():
        found = normalised(leaf.sharding.spec, leaf.ndim)
        assert found == normalised(SPECS[path], leaf.ndim), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "mixed with sequence"])
def test_parameters_and_moments_are_split_as_declared(run, name):
    """The shardings are as declared after 5 steps.

    The meshes are data 2 x fsdp 2 x tensor 2 and fsdp 2 x sequence 2 x tensor 2.
    """
    _, state = run(name)
    check_specs(state.params)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=has_moments) if has_moments(s))
    check_specs(adam.mu)
    check_specs(adam.nu)


def has_moments(node):
    return hasattr(node, "mu")


@pytest.mark.slow
def test_each_device_holds_only_its_part(run):
    _, state = run("mixed")
    gate = state.params["layers_0"]["mlp"]["gate"]
    assert gate.shape == (2, 32, 48)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16, 24)}
    assert len(gate.addressable_shards) == 8
    embedding = run("fsdp")[1].params["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(264, 4)}
    # A device has an eighth of every parameter except norm scales and mixing.
    for name in ("fsdp", "sequence"):
        sizes, held = {}, {}
        for path, leaf in flat(run(name)[1].params).items():
            sizes[path], held[path] = leaf.size, leaf.addressable_shards[0].data.size
        small = [path for path in sizes if path.endswith(("scale", "_mixing"))]
        assert held == {p: size if p in small else size // 8 for p, size in sizes.items()}


def test_state_is_made_where_it_stays(config):
    """The program of `create_state` is sharded: no device needs memory for a full parameter."""
    mesh = mesh_of("mixed")
    found = flat(create_state(config, mesh))
    for path, abstract in flat(abstract_state(config, mesh)).items():
        assert found[path].sharding.is_equivalent_to(abstract.sharding, found[path].ndim), path


@pytest.mark.parametrize(
    ("name", "shape"), [("mixed", (2, 32, 32)), ("data and sequence", (4, 8, 32))]
)
def test_residual_is_split_by_rows_and_positions(config, name, shape):
    """Activations between blocks are split, as jax reports when it compiles the loss."""
    mesh, seen = mesh_of(name), []
    constrain = sharding.constrain

    def spy(x, *names):
        y = constrain(x, *names)
        # flax's scan traces its body once more to find what does not depend on the carry. There, an
        # effect would count as such a dependency.
        probing = any(frame.frame.f_locals.get("init_mode") is True for frame in inspect.stack(0))
        if names == ("batch", "length", "activation_embed") and not probing:
            jax.debug.inspect_array_sharding(y, callback=lambda s: seen.append((y.shape, s)))
        return y

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr("mea_jax.model.transformer.constrain", spy)
        where = (state_shardings(config, mesh).params, sharding.batch_sharding(mesh))
        loss = jax.jit(lambda p, b: batch_loss(config, p, b)[0], in_shardings=where)
        batch = random_batch(0, 8, 32, 264)
        loss.lower(abstract_state(config, mesh).params, batch).compile()
    assert len(seen) >= 3, "embedding, block input, block output"
    for whole, found in seen:
        assert whole == (8, 32, 32)
        assert found.shard_shape(whole) == shape, found


def test_heads_are_split_inside_the_compiled_step(config):
    """With tensor=2 each device computes half of the 8 heads; no product is over all."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    one = change(config, **{"model.n_layers": 1})
    with jax.set_mesh(mesh):
        where = (state_shardings(one, mesh).params, sharding.batch_sharding(mesh))
        loss = jax.jit(lambda p, b: batch_loss(one, p, b)[0], in_shardings=where)
        batch = random_batch(0, 8, 32, 264)
        text = loss.lower(abstract_state(one, mesh).params, batch).compile().as_text()
    assert text is not None
    sizes = [
        int(np.prod([int(d) for d in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    attention_logits = 8 * 8 * 32 * 32  # B N T T; a device has half of it
    assert attention_logits // 2 in sizes
    assert attention_logits not in sizes


# -- errors and edges -----------------------------------------------------------------------


def test_two_logical_axes_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match=r"two axes .*heads.*mlp.* claim mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match=r"claim mesh axis 'fsdp'"):
        sharding.spec(("batch", "embed"))


def test_unknown_logical_axis_raises():
    with pytest.raises(ValueError, match=r"logical axis 'head'.* has no rule"):
        sharding.spec(("embed", "head"))
    box = nn.LogicallyPartitioned(jnp.zeros((2, 2)), names=("embed", "hedas"))
    with pytest.raises(ValueError, match="'hedas'"):
        sharding.param_shardings({"w": box}, mesh_of("mixed"))
    with pytest.raises(ValueError, match="'lenght'"):
        sharding.constrain(jnp.zeros((2, 2)), "batch", "lenght")


def test_constrain_outside_a_mesh_is_the_identity():
    x = jnp.ones((8, 4, 2))
    assert sharding.constrain(x, "batch", "length", None) is x
    with pytest.raises(ValueError, match="names 2 axes of an array of shape"):
        sharding.constrain(x, "batch", "length")


def test_constrain_inside_a_mesh_is_not_ignored():
    x = jnp.ones((8, 4, 2))
    with jax.set_mesh(mesh_of("mixed")):
        y = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "length", "activation_heads"))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 4, 1)}


def test_constrain_leaves_whole_what_does_not_divide():
    """A prompt of one row on data 2 x fsdp 2 is not padded to four rows."""
    x = jnp.ones((1, 4, 2))
    with jax.set_mesh(mesh_of("mixed")):
        traced = jax.make_jaxpr(
            lambda x: sharding.constrain(x, "batch", "length", "activation_heads")
        )(x)
    assert traced.eqns[0].params["sharding"].spec == P(None, "sequence", "tensor")


@pytest.mark.slow
def test_a_program_without_its_mesh_is_refused(config):
    """Without a mesh its annotations would do nothing; one device needs no mesh."""
    mesh, batch = mesh_of("mixed"), random_batch(0, 8, 32, 264)
    state = abstract_state(config, mesh)
    step = compile_train_step(config, mesh)
    for call in (
        lambda: step.lower(state, batch),
        lambda: compile_eval_step(config, mesh)(state.params, batch),
        lambda: compile_diagnostics(config, mesh)(state.params, batch),
    ):
        with pytest.raises(RuntimeError, match=r"'tensor': 2.* where no mesh is set: .*set_mesh"):
            call()
    with (
        jax.set_mesh(mesh_of("data")),
        pytest.raises(RuntimeError, match=r"the mesh that is set is .*'data': 8"),
    ):
        step.lower(state, batch)
    one = mesh_of("one")
    compile_train_step(config, one).lower(abstract_state(config, one), batch)


def test_minus_one_takes_what_is_left():
    """An axis of -1 takes the remaining devices.

    The order in a config is data, fsdp, tensor, sequence, slices, expert. In a mesh, tensor is
    innermost, because it communicates most.
    """
    shapes = {
        (-1, 1, 1): (8, 1, 1, 1, 1),
        (2, -1, 1): (2, 4, 1, 1, 1),
        (1, 2, -1): (1, 2, 1, 1, 4),
        (8, 1, -1): (8, 1, 1, 1, 1),
        (1, 2, 2, -1): (1, 2, 1, 2, 2),
        (-1, 1, 1, 4, 2): (2, 1, 1, 4, 1),
        (2, -1, 1, 1, 1, 2): (2, 2, 2, 1, 1),
    }
    for sizes, expected in shapes.items():
        mesh = sharding.make_mesh(MeshConfig(*sizes))
        assert tuple(mesh.shape.values()) == expected
        assert mesh.axis_names == ("data", "fsdp", "expert", "sequence", "tensor")


def test_data_runs_over_slices_outermost():
    """Each slice is an equal number of consecutive devices if these report no slices."""
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2, slices=2))
    numbers = np.vectorize(lambda device: device.id)(mesh.devices)
    assert sorted(numbers[:2].reshape(-1)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"leaves data=1 on these 8 devices, no multiple of slices"):
        sharding.make_mesh(MeshConfig(fsdp=8, slices=2))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(slices=0), r"config.mesh.slices=0 must be positive"),
        (MeshConfig(slices=-1), r"config.mesh.slices=-1 must be positive"),
        (MeshConfig(data=3, slices=2), r"config.mesh.data=3 is not a multiple of slices=2"),
        (MeshConfig(sequence=0), r"config.mesh.sequence=0 must be positive, or -1"),
        (MeshConfig(sequence=-1), r"only one axis can be -1"),
    ],
)
def test_meshes_that_cannot_be(tiny, mesh, message):
    with pytest.raises(UserError, match=message):
        validate(tiny(mesh=mesh))


@pytest.mark.parametrize(("found", "said"), [(2, 1), (1, 2), (4, 2)])
def test_slices_that_the_config_does_not_know(monkeypatch, found, said):
    monkeypatch.setattr(sharding, "_slices", lambda devices: found)
    message = rf"form {found} slices?, but config.mesh.slices={said}: set it to {found}"
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(MeshConfig(slices=said))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (1, 16, 1), (-1, 16, 1)])
def test_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(UserError, match=r"config\.mesh needs \d+ devices .* has 8"):
        sharding.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ((4, 1, 1, 1, 1, 2), {}, r"expert=2 splits experts, and .*n_experts=0 has none: use"),
        ((1, 1, 8), {"model.n_heads": 4}, r"tensor=8 does not divide .*n_heads=4"),
        ((2, 1, 4), {"model.n_kv_heads": 2}, r"tensor=4 does not divide .*n_kv_heads=2"),
        ((2, 1, 4), {"model.key_components": 2}, r"key_components \(layer 0\)=2"),
        ((2, 1, 4), {"model.value_components": (4, 1)}, r"value_components \(layer 1\)=1"),
        ((2, 1, 4), {"model.d_ff": 42}, r"d_ff=42"),
        ((2, 1, 4), {"model.vocab_size": 270}, r"vocab_size=270"),
        ((1, 8, 1), {"model.d_model": 36}, r"fsdp=8 does not divide .*d_model=36"),
        ((1, 4, 1, 2), {"model.d_model": 36}, r"fsdp x sequence = 4 x 2 does not .*d_model=36"),
        ((2, 1, 1, 4), {"data.context_length": 36}, r"context_length=36: .* multiple of 8 \(2 x 4"),
        (
            (2, 1, 1, 4),
            {"data.context_length": 512, "model.attention_kernel": "splash"},
            r"sequence=4 does not fit .*context_length=512: .* multiple of 1024 \(2 x 4 x 128",
        ),
        ((8, 1, 1), {"batch_size": 12}, r"12 windows cannot be divided .* 8 devices"),
        ((2, 4, 1), {"accumulate": 2}, r"batch_size / accumulate = 4 windows .* 8 devices"),
    ],
)
def test_mesh_that_does_not_divide_the_model(tiny, mesh, changes, message):
    config = tiny(**changes)
    with pytest.raises(UserError, match=message):
        sharding.check_divisible(config, sharding.make_mesh(MeshConfig(*mesh)))
