"""The baselines in other number formats: quantisers, bytes, the hook in attention, the command."""

import dataclasses
import json

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from mea_jax.errors import UserError
from mea_jax.train.run import train
from studies import cache_formats, number_formats
from studies.number_formats import FORMATS, POSITIONS, CacheFormat
from tests.helpers import (
    PLAIN,
    apply_logits,
    assert_one_error,
    packed,
    params_of,
    random_batch,
    tiny_model,
)

HALF = 2.0**-11  # the relative rounding error of float16
seeds = st.integers(0, 2**31 - 1)


def heads(seed, positions=20, width=64):
    """Return float32 heads (2, T, 3, H) whose features differ in size and mean."""
    rng = np.random.default_rng(seed)
    size_KH, mean_KH = rng.lognormal(size=(3, width)), rng.normal(size=(3, width))
    x = mean_KH + size_KH * rng.standard_normal((2, positions, 3, width))
    return x.astype(np.float32)


def reference(x_XG, bits):
    """Quantise each row, with its minimum and step in float16."""
    low_X1, most = x_XG.min(1, keepdims=True), 2**bits - 1
    step_X1 = (np.ptp(x_XG, 1, keepdims=True) / np.float32(most)).astype(np.float16)
    step_X1, low_X1 = (x.astype(np.float16).astype(np.float32) for x in (step_X1, low_X1))
    step_X1 = np.where(step_X1 > 0, step_X1, 1)
    return np.clip(np.round((x_XG - low_X1) / step_X1), 0, most) * step_X1 + low_X1


def allowed(x_XG, bits):
    """Return the largest error that the docstring of `to_levels` allows for each row, (X, 1)."""
    low_X1, range_X1 = x_XG.min(1, keepdims=True), np.ptp(x_XG, 1, keepdims=True)
    step_X1 = range_X1 / (2**bits - 1)
    return step_X1 / 2 + 1.01 * HALF * (np.abs(low_X1) + range_X1) + 1e-6


@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64]))
def test_features_are_rounded_in_groups(seed, bits, group):
    x = heads(seed)
    found = np.asarray(number_formats.quantise_features(jnp.asarray(x), bits, group))
    assert (found.dtype, found.shape) == (np.float32, x.shape)
    rows = x.reshape(-1, group)
    error = np.abs(found.reshape(-1, group) - rows)
    assert (error <= allowed(rows, bits)).all()
    # A number half way between two levels may round either way in float32: allow one in 1,000.
    same = np.isclose(found.reshape(-1, group), reference(rows, bits), rtol=1e-5, atol=1e-5)
    assert same.mean() > 0.999


@given(seeds, st.sampled_from([2, 4, 8]))
def test_numbers_on_the_levels_are_exact(seed, bits):
    """Levels with a float16 minimum and step; every group has the lowest and the highest."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (2, 5, 3, 4, 16))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    step = 2.0 ** rng.integers(-4, 4, (2, 5, 3, 4, 1))
    x = ((codes - rng.integers(0, 9, step.shape)) * step).reshape(2, 5, 3, 64)
    x = x.astype(np.float32)
    found = number_formats.quantise_features(jnp.asarray(x), bits, 16)
    np.testing.assert_array_equal(np.asarray(found), x)
    equal = jnp.full((1, 40, 1, 32), 0.5, jnp.float32)  # a group without a range
    at = jnp.arange(40)[None]
    np.testing.assert_array_equal(number_formats.quantise_tokens(equal, at, bits, 32), equal)


@given(seeds, st.sampled_from([2, 4]), st.sampled_from([0, 4]))
def test_tokens_are_rounded_in_groups_of_one_text(seed, bits, sinks):
    """Packed texts, each in groups of 8 positions; first positions do not widen a group."""
    sizes, x = [[19, 1, 30], [50]], heads(seed, positions=50, width=4)
    positions, segments = packed(sizes, 50)
    for row, at in zip(*np.nonzero((positions < sinks) & (segments > 0)), strict=True):
        x[row, at] *= 100
    found = number_formats.quantise_tokens(jnp.asarray(x), jnp.asarray(positions), bits, 8, sinks)
    for row, texts in enumerate(sizes):
        for number, size in enumerate(texts, start=1):
            own = x[row][segments[row] == number].reshape(size, -1)
            back = np.asarray(found)[row][segments[row] == number].reshape(size, -1)
            for first in range(0, size, 8):
                chosen = slice(max(first, sinks), first + 8)
                if len(own[chosen]):
                    error = np.abs(own[chosen] - back[chosen]).T
                    assert (error <= allowed(own[chosen].T, bits)).all()


@given(seeds, st.sampled_from([2, 8, 64]))
def test_hadamard_keeps_products_and_is_its_own_inverse(seed, width):
    x, q = (jnp.asarray(heads(seed + i, width=width)) for i in range(2))
    np.testing.assert_allclose(number_formats.rotate(number_formats.rotate(x)), x, atol=2e-5)
    turned = (number_formats.rotate(q) * number_formats.rotate(x)).sum(-1)
    np.testing.assert_allclose(turned, (q * x).sum(-1), rtol=1e-4, atol=1e-3)


def test_rotation_spreads_an_outlier():
    """At 4 bits a feature 50 times larger than the others costs them less after a rotation."""
    x = np.random.default_rng(0).standard_normal((1, 64, 1, 64)).astype(np.float32)
    x[..., 5] *= 50
    at = jnp.arange(64)[None]
    names = ("int4_g64", "hadamard_int4_g64")
    small = np.delete(np.arange(64), 5)
    plain, rotated = (
        np.square(np.asarray(number_formats.stored(FORMATS[n], jnp.asarray(x), at, True)) - x)[
            ..., small
        ].mean()
        for n in names
    )
    assert rotated < plain


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("keys", [True, False])
def test_first_positions_of_each_text_are_exact(name, keys):
    x, (positions, _) = heads(3, positions=60), packed([[40, 20], [60]], 60)
    args = (jnp.asarray(x), jnp.asarray(positions), keys)
    form = FORMATS[name]
    found = np.asarray(number_formats.stored(form, *args))
    first = positions < 4
    np.testing.assert_array_equal(found[first], x[first])
    assert not np.array_equal(found[~first], x[~first])
    without = np.asarray(number_formats.stored(dataclasses.replace(form, sinks=0), *args))
    assert not np.array_equal(without[first], x[first])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_bytes_are_those_of_arrays(name):
    """Sizes of arrays of 4,096 positions: codes in bytes, float16 scales and zeros, bfloat16."""
    form, k, h = FORMATS[name], 3, 64
    old = POSITIONS - form.recent
    codes = np.zeros((old, k, h * form.bits // 8), np.uint8)
    scales = np.zeros((old // form.group, form.group, k, h // form.group), np.float16)
    if form.keys_along == "tokens":
        along = np.zeros((old // form.group, k, h), np.float16)
        assert along.nbytes == scales.nbytes
    exact = np.zeros((form.recent + form.sinks, k, h), jnp.bfloat16)
    total = codes.nbytes + 2 * scales.nbytes + exact.nbytes
    assert number_formats.share(form) == pytest.approx(total / (2 * POSITIONS * k * h), rel=1e-12)
    assert number_formats.bytes_per_position(form, k, h) == -(-total // POSITIONS)


@given(seeds)
def test_recent_positions_are_exact_for_each_query(seed):
    """Compare with one query at a time, which reads a cache of its own."""
    rng, recent = np.random.default_rng(seed), 8
    positions, segments = packed([[5, 21], [20]], 26)
    q = rng.standard_normal((2, 26, 4, 8)).astype(np.float32)
    k, v, coarse, rough = rng.standard_normal((4, 2, 26, 2, 8)).astype(np.float32)
    found = number_formats.attend_recent(
        jnp.asarray(q),
        (jnp.asarray(k), jnp.asarray(coarse)),
        (jnp.asarray(v), jnp.asarray(rough)),
        jnp.asarray(positions),
        jnp.asarray(segments),
        0.3,
        recent,
    )
    for b, t in zip(*np.nonzero(segments), strict=True):
        at = positions[b]
        seen = np.flatnonzero((segments[b] == segments[b, t]) & (at <= at[t]))
        packed_keys = (at[t] + 1) // recent * recent  # full groups
        for n in range(4):
            key = np.where((at < packed_keys)[:, None], coarse[b, :, n // 2], k[b, :, n // 2])
            old = (at <= at[t] - recent)[:, None]
            value = np.where(old, rough[b, :, n // 2], v[b, :, n // 2])
            p = np.exp(0.3 * key[seen] @ q[b, t, n])
            expected = p @ value[seen] / p.sum()
            np.testing.assert_allclose(found[b, t, n], expected, rtol=1e-4, atol=1e-5)


# -- in a model -------------------------------------------------------------------------------

WIDE = PLAIN | {"n_kv_heads": 2, "head_dim": 32}


def logits_with(form, **changes):
    """Return the logits of a tiny model with packed texts, whose cache has the format `form`."""
    model = tiny_model(**(WIDE | changes))
    batch = random_batch(0, 2, 40, model.vocab_size, [[25, 15], [40]])
    read = [jnp.asarray(batch[n]) for n in ("inputs", "positions", "segment_ids")]
    if form is None:
        return apply_logits(model, params_of(model), *read)
    with nn.intercept_methods(cache_formats.reading(form)):
        return apply_logits(model, params_of(model), *read)


def divergence(logits, other):
    logits, other = (jax.nn.log_softmax(x) for x in (logits, other))
    return float((jnp.exp(logits) * (logits - other)).sum(-1).mean())


@pytest.mark.parametrize("changes", [{}, {"head_norm": True, "qk_norm": True}], ids=str)
def test_fewer_bits_move_predictions_more(changes):
    original = logits_with(None, **changes)
    found = [
        divergence(original, logits_with(FORMATS[f"int{b}_g32"], **changes)) for b in (8, 4, 2)
    ]
    assert 0 < found[0] < found[1] < found[2]


@pytest.mark.parametrize(
    "form",
    [
        CacheFormat("fine", 8, 1),
        CacheFormat("rotated", 16, 16, rotated=True),
        CacheFormat("all recent", 2, 32, keys_along="tokens", recent=128),
    ],
    ids=lambda form: form.name,
)
@pytest.mark.parametrize("norm", [False, True])
def test_formats_without_loss_keep_logits(form, norm):
    """Groups of one number, 16 bits after a rotation, or windows of recent positions only."""
    original = logits_with(None, head_norm=norm)
    # float16 minima and steps are off by up to 2^-11, logits are about 1.
    np.testing.assert_allclose(logits_with(form, head_norm=norm), original, atol=2e-2)
    assert divergence(original, logits_with(form, head_norm=norm)) < 1e-5


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny(steps=8, **{f"model.{name}": value for name, value in WIDE.items()}), workdir)
    return workdir


def arguments(run, corpus, out, formats):
    return [
        f"--checkpoint={run}", f"--formats={formats}", f"--out={out}", "--held_out_tokens=1024",
        "--calibration_tokens=0", "--windows=2", f"--held_out_source=text:{corpus}",
        "--dtype=float32",
    ]  # fmt: skip


def test_the_command_writes_a_file_for_each_format(run, corpus, tmp_path, in_process, monkeypatch):
    """Summaries are those of compressions; a finished format is read, not computed again."""
    out, names = tmp_path / "formats", "int8_g32,int2_g32,kivi2"
    read = arguments(run, corpus, out, names)
    status, printed, err = in_process("studies.cache_formats", *read, count=2)
    assert status == 0, err
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in names.split(",")}
    assert [f"| {name} |" in printed for name in found] == [True] * 3
    lost = {name: one["held_out"]["divergence"] for name, one in found.items()}
    assert 0 < lost["int8_g32"] < lost["int2_g32"]
    assert lost["kivi2"] == pytest.approx(0, abs=1e-6)  # windows of 32 positions are all recent
    assert found["int8_g32"]["held_out"]["divergence_error"] > 0
    cache = found["int2_g32"]["cache_bytes_per_token"]
    assert cache["before"] == 2 * 2 * 2 * 2 * 32  # layers, sides, bytes, heads, features
    assert cache["after"] == 2 * 2 * number_formats.bytes_per_position(FORMATS["int2_g32"], 2, 32)
    assert not list(out.glob("*.part"))
    monkeypatch.setattr(nn, "intercept_methods", lambda *args: 1 / 0)
    assert in_process("studies.cache_formats", *read, count=2)[1] == printed
    changed = [*read, "--held_out_tokens=512"]
    status, _, err = in_process("studies.cache_formats", *changed, count=2)
    assert_one_error(status, err, "was made with another held_out_tokens", "choose another folder")


def test_a_stopped_format_goes_on_after_its_last_layer(
    run, corpus, tmp_path, in_process, monkeypatch
):
    out = tmp_path / "formats"
    advance = cache_formats.run_block

    def killed(form, spec, params, x_BTD, batch, index):
        if index == 1:
            raise KeyboardInterrupt
        return advance(form, spec, params, x_BTD, batch, index)

    def study():
        options = cache_formats.Options(
            calibration_tokens=0, held_out_tokens=512, held_out_source=f"text:{corpus}"
        )
        return cache_formats.FormatStudy(run, out, [FORMATS["int2_g32"]], options)

    monkeypatch.setattr(cache_formats, "run_block", killed)
    with pytest.raises(KeyboardInterrupt):
        study().run()
    assert (out / "int2_g32.part" / "residual-1.npy").exists()
    indices = []

    def watched(*inputs):
        indices.append(inputs[-1])
        return advance(*inputs)

    monkeypatch.setattr(cache_formats, "run_block", watched)
    summary = study().run()[0]
    assert set(indices) == {1}
    assert summary["held_out"]["divergence"] > 0


def test_what_is_refused(run, corpus, tmp_path, in_process):
    read = arguments(run, corpus, tmp_path / "out", "int4_g3")
    status, _, err = in_process("studies.cache_formats", *read)
    assert_one_error(status, err, "--formats int4_g3 is unknown", "did you mean", "kivi2")
    status, _, err = in_process("studies.cache_formats", f"--checkpoint={run}")
    assert_one_error(status, err, "--checkpoint, --out or --formats is missing")
    for changes, form, words in (
        ({}, "int4_g32", r"needs heads of a multiple of 32 features.*head_dim=8"),
        (PLAIN | {"head_dim": 48}, "hadamard_int4_g16", "a Hadamard matrix of a power of two"),
        ({"hlc": "kv"}, "int4_g16", "choose a checkpoint with variant=mea and hlc=none"),
        (PLAIN | {"positions": "alibi"}, "int4_g16", "without ALiBi"),
    ):
        model = tiny_model(**(PLAIN | changes))
        with pytest.raises(UserError, match=words):
            number_formats.check_model(FORMATS[form], model)


def test_without_sinks_has_its_own_name():
    (form,) = number_formats.named("kivi2", sinks=False)
    assert (form.name, form.sinks, form.recent) == ("kivi2-no_sinks", 0, 128)
