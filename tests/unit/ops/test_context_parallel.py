"""Tests of attention over windows split across devices: same results, equal work per device."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import MeshConfig
from mea_jax.errors import UserError
from mea_jax.ops import attention, chunked, flash
from mea_jax.ops import context_parallel as sp
from mea_jax.ops.backend import CpuBackend, HeadNorm, XlaBackend
from mea_jax.ops.resolve import resolve
from mea_jax.parallel import sharding
from mea_jax.train.diagnostics import compile_diagnostics
from mea_jax.train.run import train
from mea_jax.train.step import batch_loss, compile_eval_step, create_state
from tests.helpers import assert_close, packed, random_batch, tiny_model

N, K, SCALE = 4, 2, 0.3
FLOAT32 = jnp.dtype(jnp.float32)


def mesh_of(sequence, tensor=1):
    return sharding.make_mesh(MeshConfig(data=-1, sequence=sequence, tensor=tensor))


# -- the order --------------------------------------------------------------------------------


def test_zigzag_gives_each_shard_an_early_and_a_late_chunk():
    np.testing.assert_array_equal(
        sp.zigzag(16, 4).reshape(4, 4),
        [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
    )
    np.testing.assert_array_equal(sp.zigzag(5, 1), np.arange(5))
    with pytest.raises(ValueError, match="20 positions do not divide into 2 x 4 chunks"):
        sp.zigzag(20, 4)


def test_a_batch_is_laid_out_without_moving_anything():
    mesh = mesh_of(4)
    batch = random_batch(0, 8, 32, 264, [[32], [20, 9], [7], [1], [32], [4], [3], [30]])
    with jax.set_mesh(mesh):
        lay_out = jax.jit(lambda b: sp.lay_out(b, 4), in_shardings=sharding.batch_sharding(mesh))
        found = lay_out(batch)
        text = lay_out.lower(batch).compile().as_text()
    for name, x in found.items():
        np.testing.assert_array_equal(x, batch[name][:, sp.zigzag(32, 4)])
        assert {s.data.shape for s in x.addressable_shards} == {(4, 8)}
    assert not re.findall(r"all-\w+|collective-permute|reduce-scatter", str(text))


# -- the work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "block", "shards"), [(256, 16, 2), (256, 8, 8), (4096, 512, 4)])
def test_all_shards_compute_as_many_pairs_of_blocks(length, block, shards):
    """All shards together compute each pair of the causal triangle once.

    The blocks divide a chunk.
    """
    tables = chunked.pairs(length, block, shards)
    n = length // block
    assert tables.shape == (shards, n * (n + 1) // 2 // shards, 3)
    seen = set()
    for shard, table in enumerate(tables):
        starts = sp.zigzag(length, shards).reshape(shards, -1, block)[shard, :, 0]
        for i, j, ahead in table:
            assert ahead == j * block - starts[i] <= 0
            seen.add((starts[i] // block, j))
    assert len(seen) == n * (n + 1) // 2


@pytest.mark.parametrize(("length", "shards", "block"), [(2048, 2, 512), (8192, 4, 1024)])
def test_splash_skips_what_a_shard_cannot_see(length, shards, block):
    """The kernels run the same number of blocks on each shard, in total those of the triangle."""
    with jax.set_mesh(mesh_of(shards)):
        q, v = (jnp.zeros((1, length, heads, 64), jnp.bfloat16) for heads in (N, K))
        kernel, _ = flash.sharded_splash(q, v, sp.zigzag(length, shards), shards, "saved", True)
    n = length // block
    infos: list[Any] = [kernel.fwd_mask_info, kernel.dkv_mask_info]
    for info in infos:
        runs = np.asarray(info.block_mask)[0] > 0
        assert [int(part.sum()) for part in np.split(runs, shards)] == [
            n * (n + 1) // 2 // shards
        ] * shards


@pytest.mark.parametrize("window", [1, 500, 513, 700])
def test_splash_skips_what_a_window_hides(window):
    """The shards together run the blocks with a visible key, each once."""
    length, shards, block = 2048, 2, 512
    with jax.set_mesh(mesh_of(shards)):
        q, v = (jnp.zeros((1, length, heads, 64), jnp.bfloat16) for heads in (N, K))
        order = sp.zigzag(length, shards)
        kernel, _ = flash.sharded_splash(q, v, order, shards, "saved", True, window)
    starts = np.arange(0, length, block)
    behind = starts[:, None] - starts[None]  # of the first query, from the first key
    expected = (behind >= 0) & (behind < window + block - 1)
    infos: list[Any] = [kernel.fwd_mask_info, kernel.dkv_mask_info]
    for info in infos:
        assert (np.asarray(info.block_mask)[0] > 0).sum() == expected.sum()


# -- the function -----------------------------------------------------------------------------


def draw(batch, length, width=8, value_width=8):
    """Return ([q, k, v, cotangent], segment ids), with rows packed in different ways."""
    rng = np.random.default_rng(0)
    sizes = (N, width), (K, width), (K, value_width), (N, value_width)
    arrays = [rng.standard_normal((batch, length, *s), dtype=np.float32) for s in sizes]
    third = length // 3
    rows = [[length], [third, third + 1, 3], [5, length // 2], [length - 1]]
    return arrays, packed([rows[i % 4] for i in range(batch)], length)[1]


def value_and_gradients(attend, q, k, v, cotangent):
    @jax.jit
    def both(q, k, v, cotangent):
        o, backward = jax.vjp(attend, q, k, v)
        return dict(zip(("o", "dq", "dk", "dv"), (o, *backward(cotangent)), strict=True))

    return both(q, k, v, cotangent)


CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "two shards": ("chunked", 64, 2, 1, {"block": 16}),
    "heads split too": ("chunked", 64, 2, 2, {"block": 8}),
    "chunks no multiple of a block": ("chunked", 168, 4, 1, {"block": 8}),
    "chunks below a block": ("chunked", 48, 8, 1, {"block": 512}),
    "alibi": ("chunked", 72, 4, 2, {"block": 4, "slopes_N": True}),
    "wide values": ("chunked", 64, 4, 2, {"block": 4, "value_width": 12}),
    "window below a block": ("chunked", 64, 2, 1, {"block": 16, "window": 5}),
    "window over several chunks": ("chunked", 72, 4, 2, {"block": 4, "window": 30}),
    "window above T, alibi": ("chunked", 64, 2, 1, {"block": 8, "window": 99, "slopes_N": True}),
    "splash, window": ("splash", 512, 2, 2, {"window": 100}),
    "splash, window over several chunks": ("splash", 1024, 4, 1, {"window": 300}),
    "splash, fused gradient": ("splash", 512, 2, 2, {}),
    "splash, two gradients": ("splash", 1024, 4, 1, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention(case):
    kernel, length, shards, tensor, options = CASES[case]
    options = dict(options)
    arrays, ids = draw(8 // shards // tensor, length, value_width=options.pop("value_width", 8))
    slopes = 2.0 ** -jnp.arange(1.0, N + 1) if options.pop("slopes_N", False) else None
    order = sp.zigzag(length, shards)
    back = np.argsort(order)

    def attend(q, k, v):
        q, k, v = (x[:, order] for x in (q, k, v))
        kwargs = options | {"scale": SCALE, "slopes_N": slopes, "interpret": True}
        return sp.attention(kernel, q, k, v, jnp.asarray(ids), **kwargs)[:, back]

    def expected(q, k, v):
        window = options.get("window", 0)
        return attention.dot_product_attention(q, k, v, jnp.asarray(ids), SCALE, slopes, window)

    with jax.set_mesh(mesh_of(shards, tensor)):
        found = value_and_gradients(attend, *arrays)
    # Both are float32 sums of up to 1024 terms of size about 1, in a different order.
    assert_close(found, value_and_gradients(expected, *arrays), rtol=1e-4, atol=2e-5)


def test_gathered_keys_and_values_are_not_saved(capsys):
    """The gradient gathers keys and values again; saved, they would be n times a device's own."""
    q, k = (jnp.zeros((1, 256, heads, 8)) for heads in (N, K))
    ids = jnp.ones((1, 256), jnp.int32)
    with jax.set_mesh(mesh_of(8)):
        jax.ad_checkpoint.print_saved_residuals(
            lambda q, k, v: sp.attention("chunked", q, k, v, ids, scale=SCALE, block=8), q, k, k
        )
    saved = re.findall(r"f32\[([\d,]+)\] (.*)", capsys.readouterr().out)
    sizes = [np.prod([int(d) for d in dims.split(",")]) for dims, _ in saved]
    assert len([why for _, why in saved if "from the argument" in why]) == 3, "q, k, v"
    # Also saved are the result and its log-sum-exps, but not the gathered keys and values.
    assert sorted(sizes) == [N * 256, *[K * 256 * 8] * 2, *[N * 256 * 8] * 2]


@pytest.mark.parametrize(
    "backend",
    [
        XlaBackend(FLOAT32, "einsum"),
        XlaBackend(FLOAT32, "chunked"),
        CpuBackend(FLOAT32, "cpu"),
        CpuBackend(FLOAT32, "auto"),
    ],
    ids=lambda backend: f"{type(backend).__name__}, {backend.attention_kernel}",
)
@pytest.mark.parametrize("window", [0, 7])
def test_natural_order_on_a_mesh_that_splits_windows(backend, window):
    """Attention in natural order, as in diagnostics and generation, agrees, with a head norm."""
    arrays, ids = draw(2, 32)
    norm = HeadNorm(jnp.linspace(0.5, 1.5, 8), 1e-5)

    def attend(q, k, v):
        q, k, v = (sharding.constrain(x, *sp.HEADS) for x in (q, k, v))
        return backend.attend(q, k, v, jnp.asarray(ids), SCALE, norm=norm, window=window)

    def expected(q, k, v):
        arrays = (q, k, v, jnp.asarray(ids), SCALE)
        return norm.apply(attention.dot_product_attention(*arrays, window=window))

    with jax.set_mesh(mesh_of(2, 2)):
        found = value_and_gradients(attend, *arrays)
    assert_close(found, value_and_gradients(expected, *arrays), rtol=1e-4, atol=2e-5)


def test_splash_in_natural_order_on_a_mesh_that_splits_windows():
    arrays, ids = draw(2, 160)

    def attend(q, k, v):
        q, k, v = (sharding.constrain(x, *sp.HEADS) for x in (q, k, v))
        return flash.splash_attention(q, k, v, jnp.asarray(ids), scale=SCALE, interpret=True)

    def expected(q, k, v):
        return attention.dot_product_attention(q, k, v, jnp.asarray(ids), SCALE)

    with jax.set_mesh(mesh_of(2, 2)):
        found = value_and_gradients(attend, *arrays)
    assert_close(found, value_and_gradients(expected, *arrays), rtol=1e-4, atol=2e-5)


# -- a run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_and_diagnostics_are_those_of_one_device(tiny):
    config = tiny(accumulate=2, **{"model.key_components": 2, "model.n_layers": 1})
    batch = random_batch(0, 8, 32, 264, [[32], [20, 9], [7], [1], [32], [4], [3], [30]])
    found: list[Any] = []
    for mesh in (
        sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
        sharding.make_mesh(MeshConfig(1, 2, 2, sequence=2)),
    ):
        with jax.set_mesh(mesh):
            params = create_state(config, mesh).params
            held = compile_eval_step(config, mesh)(params, batch)
            found.append(held | compile_diagnostics(config, mesh)(params, batch))
    assert_close(found[0], found[1], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_its_sample_is_that_of_one_device(tiny, tmp_path, devices):
    """An entire run agrees: steps, evaluation, checkpoint and the continuation of a prompt."""
    results = []
    for name, mesh, count in (
        ("shared", MeshConfig(1, 2, 2, sequence=2), 8),
        ("one", MeshConfig(1, 1, 1), 1),
    ):
        devices(count)
        options = {"evaluate.sample_prompt": "the lazy", "evaluate.sample_tokens": 8}
        config = tiny(steps=3, mesh=mesh, **{"model.n_layers": 1}, **options)
        results.append(train(config, tmp_path / name))
    shared, one = results
    assert "chunked attention" in shared["text"]
    assert shared["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-5)
    assert shared["sample"] == one["sample"]


def test_what_cannot_split_windows_is_refused():
    for forced in ("einsum", "cpu"):
        with pytest.raises(UserError, match=rf"attention_kernel='{forced}' cannot take windows .*"):
            resolve(tiny_model(attention_kernel=forced, backend="cpu"), jax.devices(), 64, 1, 2)
    talking = tiny_model(variant="talking_heads", hlc="none", head_norm=False)
    with pytest.raises(UserError, match=r"mesh.sequence=2 splits .* talking_heads"):
        resolve(talking, jax.devices(), 64, 1, 2)
    # The same without `resolve`.
    (q, k, v, _), ids = draw(4, 32)
    with jax.set_mesh(mesh_of(2)), pytest.raises(ValueError, match="'cpu' cannot take windows"):
        CpuBackend(FLOAT32, "cpu").attend(q, k, v, ids, SCALE, shards=2)
    with jax.set_mesh(mesh_of(2)), pytest.raises(ValueError, match=r"4 shards .* on a mesh of 2"):
        XlaBackend(FLOAT32).attend(q, k, v, ids, SCALE, shards=4)
    with pytest.raises(ValueError, match="no mesh is set whose sequence axis"):
        sp.attention("chunked", q, k, v, ids, scale=SCALE)


def test_talking_heads_do_not_train_on_split_windows(tiny):
    changes = {"variant": "talking_heads", "hlc": "none", "head_norm": False}
    config = tiny(**{f"model.{key}": value for key, value in changes.items()})
    with jax.set_mesh(mesh_of(2)), pytest.raises(ValueError, match="talking heads cannot"):
        batch_loss(config, {}, random_batch(0, 8, 32, 264))


def test_the_kernel_of_split_windows():
    """On CPUs it is "chunked" at any length, although "cpu" or "einsum" is faster on one device."""
    for backend in ("cpu", "xla"):
        model = tiny_model(backend=backend, attention_kernel="auto")
        assert resolve(model, jax.devices(), 64, 1, 2).attention_kernel == "chunked"
        assert resolve(model, jax.devices(), 64).attention_kernel != "chunked"
