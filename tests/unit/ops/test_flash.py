"""Tests of the accelerators' flash kernels: results against plain attention, and lowered calls.

No accelerator is needed. The TPU kernel runs interpreted, and compiles ahead of time where libtpu
is installed. For cuDNN, the arguments run through XLA, and the calls are read from lowered text.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mea_jax.config.schema import MeshConfig
from mea_jax.errors import UserError
from mea_jax.ops.context_parallel import zigzag
from mea_jax.ops.flash import (
    _CausalAt,
    _splash_blocks,
    cudnn_attention,
    cudnn_supports,
    splash_attention,
    splash_supports,
)
from mea_jax.parallel import sharding, topology
from tests import references

N, K, SCALE = 4, 2, 0.11  # not a power of two

# Both are float32 sums of up to 256 terms of size about 1, in a different order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


def reference(q_BTNH, k_BTKH, v_BTKW, segment_ids_BT, window=0):
    seen_BTS = references.visible(segment_ids_BT, window)
    k_BTNH, v_BTNW = (jnp.repeat(x, N // K, axis=2) for x in (k_BTKH, v_BTKW))
    logits_BNTS = SCALE * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
    p_BNTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], logits_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnw->btnw", p_BNTS, v_BTNW)


def draw(batch, length, head_dim, value_dim, seed=0):
    """Return q, k, v (logits of size 1), a cotangent, and segment ids with varied packing."""
    rng = np.random.default_rng(seed)
    sizes = (N, head_dim), (K, head_dim), (K, value_dim), (N, value_dim)
    q, k, v, g = (rng.standard_normal((batch, length, *s), dtype=np.float32) for s in sizes)
    cuts = [length], [length // 3, length // 3 + 1, length - 9], [5, length // 2], [length - 1]
    segment_ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        starts = [0, *cuts[row % 4]]
        for i, (start, stop) in enumerate(itertools.pairwise(starts)):
            segment_ids[row, start:stop] = i + 1  # the rest of the row stays 0, padding
    return q, k, v, g, segment_ids


def values_and_gradients(attend, q, k, v, g, segment_ids):
    o, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *backward(g)), strict=True))


def assert_equals_reference(attend, *arrays, window=0):
    attend = functools.partial(attend, window=window)
    found = jax.jit(lambda *a: values_and_gradients(attend, *a))(*arrays)
    expected = values_and_gradients(functools.partial(reference, window=window), *arrays)
    for name, array in found.items():
        assert array.shape == expected[name].shape, name
        np.testing.assert_allclose(array, expected[name], err_msg=name, **TOLERANCE)


def interpreted(q, k, v, segment_ids, window=0):
    return splash_attention(q, k, v, segment_ids, scale=SCALE, interpret=True, window=window)


def through_xla(q, k, v, segment_ids, **options):
    return cudnn_attention(q, k, v, segment_ids, scale=SCALE, implementation="xla", **options)


SHAPES = {
    "whole blocks": (2, 256, 64, 64),
    "length to fill": (2, 137, 64, 64),
    "wide values": (2, 128, 32, 64),
    "narrow values, odd widths": (2, 131, 20, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_splash_kernel_is_attention(shape):
    assert_equals_reference(interpreted, *draw(*shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "block", "fused"), [(1024, 1024, True), (1152, 384, True), (1408, 128, False)]
)
def test_splash_kernel_is_attention_over_several_blocks(length, block, fused):
    """The kernel agrees with a block of keys in two halves, with three blocks, and with eleven.

    The last case uses the two separate backward kernels.
    """
    blocks = _splash_blocks(length, 64)
    assert (blocks.block_q, blocks.use_fused_bwd_kernel) == (block, fused)
    assert_equals_reference(interpreted, *draw(1, length, 16, 16))


# Windows of one, below, equal to and above a block, and above T, on each backward kernel.
WINDOWED = [(256, 256, [1, 100, 256, 300, 2**31 - 1]), (384, 384, [130]), (1408, 128, [128, 200])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "block", "window"), [(*case[:2], window) for case in WINDOWED for window in case[2]]
)
def test_splash_kernel_with_a_window(length, block, window):
    assert _splash_blocks(length, 64).block_q == block
    assert_equals_reference(interpreted, *draw(1, length, 16, 16), window=window)


@pytest.mark.parametrize("order", [np.arange(48), zigzag(48, 2), zigzag(48, 3)])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 19, 48, 2**31 - 1])
def test_the_mask_of_a_kernel_is_right_in_all_of_its_blocks(order, window):
    """The cached blocks, those that are computed, and the function that the kernel evaluates."""
    mask = _CausalAt(order, window)
    behind = order[:, None] - np.arange(48)[None]
    expected = (behind >= 0) & (behind < (window or 48))
    for size in (1, 4, 8, 48):
        for i, j in itertools.product(range(0, 48, size), repeat=2):
            block = (slice(i, i + size), slice(j, j + size))
            np.testing.assert_array_equal(mask[block], expected[block])
    keys = np.arange(48, dtype=np.int32)[None]
    np.testing.assert_array_equal(mask.mask_function(mask.q_sequence[:, None], keys), expected)
    assert mask == _CausalAt(order, window)
    assert mask != _CausalAt(order, 7)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [interpreted, through_xla], ids=["splash", "cudnn"])
def test_on_a_mesh_each_device_computes_its_rows_and_heads(attend):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    arrays = draw(4, 130, 16, 8)
    with jax.set_mesh(mesh):
        assert_equals_reference(attend, *arrays)
        o = jax.jit(attend)(*arrays[:3], arrays[4])
        text = jax.jit(attend).lower(*arrays[:3], arrays[4]).as_text()
    assert {shard.data.shape for shard in o.addressable_shards} == {(1, 130, N // 2, 8)}
    assert "manual_axes" in text, "the kernel was left to the partitioner"


@pytest.mark.parametrize("attend", [interpreted, through_xla], ids=["splash", "cudnn"])
def test_nothing_passes_between_segments(attend):
    """A segment's output does not depend on its neighbours or on padding, bit for bit."""
    q, k, v, _, segment_ids = draw(2, 130, 16, 16)
    inside = segment_ids == segment_ids[1, 60]
    inside[0] = False
    noise = np.where(inside[:, :, None, None], 0, np.float32(100))
    one = attend(q, k, v, segment_ids)
    other = attend(q + noise, k + noise, v + noise, segment_ids)
    assert inside.sum() > 20
    np.testing.assert_array_equal(one[inside], other[inside])
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cudnn_arguments_are_attention(shape):
    assert_equals_reference(through_xla, *draw(*shape))


@pytest.mark.parametrize("window", [1, 20, 137, 500])
def test_cudnn_arguments_with_a_window(window):
    assert_equals_reference(through_xla, *draw(2, 137, 20, 12), window=window)


@pytest.mark.parametrize("window", [0, 1, 20, 500])
def test_one_segment_needs_no_mask(window):
    """Rows of one segment with padding at the end give equal outputs wherever there is text."""
    q, k, v, _, segment_ids = draw(1, 63, 16, 16)
    segment_ids[:, 50:] = 0
    found = through_xla(q, k, v, segment_ids, one_segment=True, window=window)
    expected = reference(q, k, v, segment_ids, window)
    np.testing.assert_allclose(found[:, :50], expected[:, :50], **TOLERANCE)


# -- lowering for a GPU -----------------------------------------------------------------------


@pytest.fixture
def cudnn_installed(monkeypatch):
    """Patch the check of cuDNN's version, which fails in tracing without CUDA's packages."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )


def lowered_for_cuda(shape, **options):
    def gradients(q, k, v, g, segment_ids):
        attend = lambda *a: cudnn_attention(*a, scale=SCALE, **options)  # noqa: E731
        return values_and_gradients(attend, q, k, v, g, segment_ids)

    *arrays, segment_ids = draw(*shape)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    traced = jax.jit(gradients).trace(*arrays, segment_ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Return the name, backend configuration and operand types of each call of cuDNN."""
    pattern = r"@(__cudnn\$\w+)\(.*backend_config = \"(.*?)\", .* : \((.*?)\) -> "
    found = re.findall(pattern, text)
    return [(name, config, re.findall(r"tensor<(\w+)>", types)) for name, config, types in found]


def square(text, length):
    """Return the types of the arrays over pairs of positions in lowered text."""
    return set(re.findall(rf"tensor<((?:\d+x)*{length}x{length}x\w+)>", text))


def test_cudnn_lowers_to_its_kernel_with_one_mask_for_all_heads(cudnn_installed):
    text = lowered_for_cuda((2, 192, 64, 64))
    (forward, config, operands), (backward, _, _) = calls(text)
    assert forward == "__cudnn$fmhaScaleBiasSoftmax"
    assert backward == "__cudnn$fmhaScaleBiasSoftmaxBackward"
    # The kernel masks causally; keys and values are not repeated; the mask has 2 B T^2 bytes.
    assert r"\22mask_type\22: \22CAUSAL\22" in config
    assert operands == [
        f"2x192x{N}x64xbf16",
        f"2x192x{K}x64xbf16",
        f"2x192x{K}x64xbf16",
        "2x1x192x192xbf16",
    ]
    assert not [size for size in square(text, 192) if size.startswith(f"2x{N}x")]


def test_cudnn_of_one_segment_has_no_mask_at_all(cudnn_installed):
    text = lowered_for_cuda((2, 192, 64, 64), one_segment=True)
    assert [name for name, *_ in calls(text)] == [
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    ]
    assert not square(text, 192)


def test_cudnn_of_one_segment_gets_the_window_as_a_number(cudnn_installed):
    text = lowered_for_cuda((2, 192, 64, 64), one_segment=True, window=48)
    for _, config, _ in calls(text):
        assert r"\22sliding_window_length\22: 48" in config
    assert not square(text, 192)


def test_cudnn_gets_the_widths_and_lengths_that_it_takes(cudnn_installed):
    """Odd T, a width that is not a multiple of 8 and wider values are padded to a single call."""
    (_, _, operands), _ = calls(lowered_for_cuda((2, 191, 20, 44)))
    assert operands[:3] == [f"2x192x{heads}x48xbf16" for heads in (N, K, K)]


def test_cudnn_on_a_mesh_is_called_with_each_devices_part(cudnn_installed):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        text = lowered_for_cuda((4, 192, 64, 64))
    (_, _, operands), (_, _, backward) = calls(text)
    assert operands[0] == backward[0] == f"1x192x{N // 2}x64xbf16"
    assert operands[3] == backward[5] == "1x1x192x192xbf16"


def test_why_a_kernel_cannot_run(monkeypatch):
    bf16, f16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)
    assert splash_supports(bf16, 64, 128) is None
    assert splash_supports(f32, 20, 256) is None
    assert "not float16" in str(splash_supports(f16, 64, 64))
    assert "wider than 256 (512)" in str(splash_supports(bf16, 256, 512))
    assert cudnn_supports(bf16, 64, 128) is None
    assert cudnn_supports(f16, 20, 12) is None
    assert "not float32" in str(cudnn_supports(f32, 64, 64))
    assert "up to 128 wide (256 on Hopper), not 256" in str(cudnn_supports(bf16, 128, 256))

    def with_gpu(capability):
        gpu = type("Gpu", (), {"compute_capability": capability})()
        monkeypatch.setattr(jax, "devices", lambda: [gpu])

    with_gpu("9.0")
    assert cudnn_supports(bf16, 256, 256) is None
    assert "up to 256 wide, not 264" in str(cudnn_supports(bf16, 264, 64))
    with_gpu("10.0")
    assert "up to 128 wide" in str(cudnn_supports(bf16, 256, 256))
    with_gpu("7.5")
    assert "needs compute capability 8.0 (Ampere), this GPU has 7.5" in str(
        cudnn_supports(bf16, 64, 64)
    )


# -- compilation for a TPU --------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed (pip install 'jax[tpu]')",
)


@pytest.mark.process
@needs_libtpu
def test_splash_compiles_for_a_tpu_mesh():
    """Both passes compile for head widths 64 and 128 on fsdp 2 x tensor 2 of a v5e."""
    requests = ["splash:64:64", "splash:128:128", "plain:64:64"]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        "PYTHONPATH": os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", ""))),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.system.tpu_compile", "v5e:2x2", *requests],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    for request in requests[:2]:
        result, width = found[request], int(request.split(":")[1])
        forward, backward = result["kernels"]
        assert forward.startswith("splash_mha_fwd")
        assert backward.startswith("splash_mha_dkv")  # fused: it also computes dq
        for shapes in result["kernels"].values():
            # Each of 4 devices has half of the 4 rows, the 8 query heads and the 4 key heads.
            assert [2, 4, 2048, width] in shapes
            assert [2, 2, 2048, width] in shapes
            assert [4, 8, 2048, width] not in shapes
        assert not result["collectives"]
        assert not [shape for shape in result["shapes"] if shape.count(2048) > 1]
    # The same search finds the logits of plain einsums.
    plain = found["plain:64:64"]
    assert [2, 2, 2, 2048, 2048] in plain["shapes"]
    assert not plain["kernels"]
    assert plain["temporary_bytes"] > 10 * found["splash:64:64"]["temporary_bytes"]


@needs_libtpu
def test_unknown_topology():
    with pytest.raises(UserError, match=r"no TPU topology 'v5e' .*: write the generation and"):
        topology.describe("v5e")
    assert len(topology.describe("v5e:2x2")) == 4


def test_topology_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"libtpu, which is not installed: pip install 'jax\[tpu\]"):
        topology.describe("v5e:2x2")
