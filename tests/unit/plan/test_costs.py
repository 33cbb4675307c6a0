"""Tests of a plan's counts: products, bytes and collectives, with loops multiplied out."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mea_jax.plan import collectives, costs, hlo
from mea_jax.plan.chips import CHIPS

D = 64


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def counted(executable) -> costs.Costs:
    return costs.count(hlo.parse(executable.as_text()))


def test_without_loops_products_and_bytes_are_those_of_xla():
    """FLOPs and bytes agree with XLA's in a program without elementwise work (not counted)."""

    def function(x, w, v):
        return (x @ w) @ v

    executable = compiled(function, (32, D), (D, 3 * D), (3 * D, D))
    mine, xla = counted(executable), executable.cost_analysis()
    assert mine.flops == xla["flops"] == 2 * 32 * D * 3 * D * 2
    # XLA also counts temporary memory of the library for products.
    assert mine.hbm_bytes == pytest.approx(xla["bytes accessed"], rel=0.05)


@pytest.mark.parametrize("outer", [1, 3])
def test_loops_are_multiplied_out(outer):
    """A scan of 5 layers within a scan is multiplied out; XLA's total counts each body once."""

    def layers(x, w_LDD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LDD)[0]

    def function(x_PBD, w_LDD):
        return jax.lax.map(lambda x: layers(x, w_LDD), x_PBD)

    executable = compiled(function, (outer, 32, D), (5, D, D))
    mine = counted(executable)
    assert mine.flops == outer * 5 * 2 * 32 * D * D
    assert not mine.unknown_loops
    assert executable.cost_analysis()["flops"] < mine.flops


def test_a_slice_of_a_large_array_is_read_once_a_turn():
    """Each of 16 iterations reads one layer of the stack, not the stack."""
    layers, size = 16, 1 << 16

    def function(x, w):
        return jax.lax.scan(lambda x, w: (x * w + 1, None), x, w)[0]

    moved = counted(compiled(function, (size,), (layers, size))).hbm_bytes
    once = layers * size * 4
    assert 3 * once <= moved < 5 * once, "an iteration must read x and a layer, and write x"


def test_a_loop_of_unknown_length_is_said():
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    mine = counted(compiled(function, (8, 8)))
    assert len(mine.unknown_loops) == 1
    assert mine.flops == 2 * 8**3


WINDOWS = """HloModule m

ENTRY %main (a: bf16[2,8192,2048,1], b: bf16[2048,8,64,1]) -> bf16[2,8192,8,64] {
  %a = bf16[2,8192,2048,1]{2,1,0,3:T(8,128)(2,1)} parameter(0)
  %b = bf16[2048,8,64,1]{2,1,0,3:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[2,8192,8,64]{3,1,2,0:T(8,128)(2,1)} convolution(%a, %b), LABELS
}
"""


def test_a_tpu_writes_head_axes_as_windows():
    """8 heads are a window of size 8 over one position, padded by 7 on both sides."""
    labels = "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
    mine = costs.count(hlo.parse(WINDOWS.replace("LABELS", labels)))
    assert mine.flops == 2 * 2 * 8192 * 2048 * 8 * 64
    # b is in on-chip memory.
    assert mine.hbm_bytes == 2 * (2 * 8192 * 2048 + 2 * 8192 * 8 * 64)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert collectives.groups_of(text, 8) == groups


def test_axes_are_those_along_which_a_group_differs():
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    assert collectives.axes_of([[0, 1]], shape) == ("tensor",)
    assert collectives.axes_of([[0, 2, 4, 6]], shape) == ("data", "fsdp")
    assert collectives.axes_of([[0, 1], [2, 3]], shape) == ("tensor",)


@pytest.mark.parametrize(
    ("kind", "spec", "factor"),
    [
        ("all-gather", PartitionSpec("x"), 3 / 4),
        ("all-reduce", PartitionSpec(None, "x"), 2 * 3 / 4),
    ],
)
def test_collectives_of_a_real_program(kind, spec, factor):
    """A product with split rows gathers them; one with a split contraction is all-reduced."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole, split = (NamedSharding(mesh, s) for s in (PartitionSpec(), spec))
    other = NamedSharding(mesh, PartitionSpec("x")) if kind == "all-reduce" else whole
    step = jax.jit(lambda x, w: x @ w, in_shardings=(split, other), out_shardings=whole)
    executable = step.lower(jnp.zeros((32, D)), jnp.zeros((D, D))).compile()
    (found,) = counted(executable).collectives
    assert (found.kind, found.nbytes, found.times) == (kind, 32 * D * 4, 1)
    group = collectives.groups_of(found.groups, 4)[0]
    assert collectives.axes_of([group], {"x": 4}) == ("x",)
    assert collectives.wire_bytes(found, 4) == factor * 32 * D * 4


def torus(*sizes, slices=1):
    return [
        SimpleNamespace(coords=coords, slice_index=s)
        for s in range(slices)
        for coords in np.ndindex(*sizes)
    ]


def collective(kind: str, nbytes: float) -> costs.Collective:
    return costs.Collective(kind, nbytes, 1, "", "")


def test_links_of_a_torus():
    """On v5p, axes of 4 or more chips are rings with both directions.

    Every axis that a group spans adds its links.
    """
    chip, devices = CHIPS["v5p"], torus(4, 4, 4)
    gathered = collective("all-gather", 1e9)
    line = [d for d in range(64) if devices[d].coords[:2] == (0, 0)]
    one = collectives.seconds(gathered, line, devices, chip)
    assert one == pytest.approx(0.75 * 1e9 / (2 * chip.link))
    cube = collectives.seconds(gathered, range(64), devices, chip)
    assert cube == pytest.approx(63 / 64 * 1e9 / (6 * chip.link))
    # Two chips are not a ring.
    two = torus(2, 1, 1)
    assert collectives.seconds(gathered, [0, 1], two, chip) == pytest.approx(0.5e9 / chip.link)


SLICES = """HloModule m

ENTRY %main (a: f32[4,8,128]) -> f32[4,8,128] {
  %a = f32[4,8,128]{2,1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[4,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%a, %after-all), \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.2_0",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=4, is_host_transfer=true
  ROOT %b = f32[4,8,128]{2,1,0} copy(%a)
}
"""


def test_what_slices_exchange_goes_through_the_hosts():
    (found,) = costs.count(hlo.parse(SLICES)).collectives
    assert (found.kind, found.nbytes, found.between_slices) == ("all-reduce", 4 * 8 * 128 * 4, True)
    assert collectives.slices_of(torus(2, 2, slices=2)) == 2


def test_splash_counts_the_causal_half():
    """Splash runs 2 products forward, and 5 backward or, as two kernels, 3 and 4.

    The shape is N 4, K 2, T 256, H 64.
    """
    q = hlo.Array("bf16", (1, 4, 256, 64), fast=False)
    k = hlo.Array("bf16", (1, 2, 256, 64), fast=False)
    partial = hlo.Array("bf16", (2, 1, 4, 256, 64), fast=False)
    product = 2 * 4 * 256 * 256 * 64 / 2
    qkv, two = [q, k, k], "splash_mha_dkv_segmented_no_residuals"
    assert costs.kernel_flops("splash_mha_fwd_segmented", qkv, [q]) == 2 * product
    assert costs.kernel_flops("splash_mha_dq_segmented_no_residuals", qkv, [q]) == 3 * product
    assert costs.kernel_flops(two, qkv, [k, k]) == 4 * product
    assert costs.kernel_flops(two, qkv, [partial, k, k]) == 5 * product
    assert costs.kernel_flops("another_kernel", qkv, [q]) == 0
