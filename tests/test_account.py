"""Products, traffic and collectives of programs, against counts by hand and against the compiler's where it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hypervl_jax import account
from hypervl_jax.account import Collective

DEPTH, WIDTH, ROWS = 5, 64, 16


def layers(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


# --- products --------------------------------------------------------------------------------------------------------


def test_products_are_those_of_the_unrolled_program():
    """Forward one product a layer, backward two, and one more where activations are made anew."""
    w, x = jnp.zeros((DEPTH, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    one = 2 * ROWS * WIDTH * WIDTH
    assert account.flops(layers, w, x) == DEPTH * one
    assert account.flops(jax.grad(layers, argnums=(0, 1)), w, x) == 3 * DEPTH * one
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
    anew = jax.grad(lambda w, x: jax.lax.scan(block, x, w)[0].sum(), argnums=(0, 1))
    assert account.flops(anew, w, x) == 4 * DEPTH * one
    batched = account.flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6)))
    assert batched == 2 * 3 * 4 * 5 * 6


def test_of_alternatives_the_dearest_counts():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert account.flops(either, True, jnp.zeros((8, 8))) == 2 * 2 * 8**3


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="unknown length"):
        account.flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.zeros((8, 8)))


# --- collectives -----------------------------------------------------------------------------------------------------


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
    """By hand: each of five layers gathers its matrix, and eight devices add up one number."""

    def step(w, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "data", tiled=True)), None

        return jax.lax.psum(jax.lax.scan(layer, x, w)[0].sum(), "data")

    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(None, "data"), P("data")), out_specs=P()))
    shapes = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    found = account.read(f.lower(*shapes).compile().as_text(), 8)
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == DEPTH
    assert {(c.size, c.group) for c in gathers} == {(WIDTH * WIDTH * 4, 8)}
    assert sum(c.received for c in gathers) == pytest.approx(DEPTH * WIDTH * WIDTH * 4 * 7 / 8)
    assert Collective("all-reduce", 4, 8, 1) in found.collectives


TPU = """HloModule jit_f, is_scheduled=true

%region_1.2_spmd (wide.param.1: (s32[], f32[4,256])) -> pred[] {
  %constant.53 = s32[]{:T(128)} constant(5)
  %wide.param.1 = (s32[]{:T(128)}, f32[4,256]{1,0:T(4,128)S(1)}) parameter(0)
  %gte.220 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%gte.220, %constant.53), direction=LT, metadata={op_name="jit(f)/lt"}
}

%fused.6 (param_0.46: bf16[5,16,256], param_1.45: s32[]) -> bf16[1,16,256] {
  %param_0.46 = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.45 = s32[]{:T(128)S(6)} parameter(1)
  %constant.93 = s32[]{:T(128)} constant(0)
  ROOT %ds.25 = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.46, %param_1.45, %constant.93, %constant.93)
}

%started (param_0.59: bf16[1,16,256]) -> (bf16[1,16,256], bf16[1,256,256]) {
  %param_0.59 = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.19 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.59), channel_id=8, replica_groups=mesh['a'=16] {'a'}
  ROOT %cc = (bf16[1,16,256]{2,1,0}, bf16[1,256,256]{2,1,0}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%ended (param_0.67: bf16[1,16,256]) -> bf16[1,256,256] {
  %param_0.67 = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.23 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.67), channel_id=8, replica_groups=mesh['a'=16] {'a'}
}

%body (wide.param.4: (s32[], bf16[5,16,256])) -> (s32[], bf16[5,16,256]) {
  %wide.param.4 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %w = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.4), index=1
  %slice = bf16[1,16,256]{2,1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%fused.6
  %start = (bf16[1,16,256]{2,1,0}, bf16[1,256,256]{2,1,0:S(1)}) fusion(%slice), kind=kCustom, calls=%started
  %done = bf16[1,256,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%slice), kind=kCustom, calls=%ended
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}) tuple(%i, %w)
}

ENTRY %main.6_spmd (param.5: bf16[5,16,256]) -> f32[] {
  %zero = s32[]{:T(128)} constant(0)
  %param.5 = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="w"}
  %tuple.2 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %param.5)
  %while.30 = (s32[]{:T(128)}, bf16[5,16,256]{2,1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%region_1.2_spmd, body=%body
  %x = f32[4]{0:T(128)} constant({1, 2, 3, 4})
  %all-reduce.1 = f32[4]{0:T(128)} all-reduce(%x), channel_id=6, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %out = f32[]{:T(128)} reduce(%all-reduce.1, %x), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


INNER = """HloModule nested

%cut (p.0: f32[8,64], i.0: s32[]) -> f32[1,64] {
  %p.0 = f32[8,64]{1,0} parameter(0)
  %i.0 = s32[] parameter(1)
  %zero.0 = s32[] constant(0)
  ROOT %cut.0 = f32[1,64]{1,0} dynamic-slice(%p.0, %i.0, %zero.0), dynamic_slice_sizes={1,64}
}

%product (p.1: f32[8,64], i.1: s32[], q.1: f32[64]) -> f32[1] {
  %p.1 = f32[8,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %q.1 = f32[64]{0} parameter(2)
  %same.1 = f32[8,64]{1,0} bitcast(%p.1)
  %row.1 = f32[1,64]{1,0} fusion(%same.1, %i.1), kind=kLoop, calls=%cut
  ROOT %dot.1 = f32[1]{0} dot(%row.1, %q.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: f32[8,64], i: s32[], q: f32[64]) -> f32[1] {
  %p = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = f32[64]{0} parameter(2)
  ROOT %out = f32[1]{0} fusion(%p, %i, %q), kind=kOutput, calls=%product
}
"""


def test_a_slice_in_a_fusion_of_a_fusion_is_read_as_a_slice():
    assert account.read(INNER, 1).traffic == 4 * (64 + 1 + 64 + 1)  # a row, its number, the vector, the result


def test_a_tpus_program_as_its_compiler_writes_it():
    """No trip counts but in conditions, one gather written as its start and its end, arrays in on-chip memory."""
    found = account.read(TPU, 16)
    gather, reduce = found.collectives
    assert gather == Collective("all-gather", 256 * 256 * 2, 16, 5)
    assert reduce == Collective("all-reduce", 16, 4, 1)
    assert reduce.received == 16 * 2 * 3 / 4
    part, whole = 16 * 256 * 2, 256 * 256 * 2
    # A layer reads its slice and writes it; start and end read it, and start also writes what goes along.
    want = 5 * (2 * part + (part + part) + part) + 32 + 36
    assert found.traffic == pytest.approx(want, rel=0.02)
    assert whole not in (found.traffic, want)  # what is gathered never leaves the chip here


@pytest.mark.parametrize(
    ("rest", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", 2), ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['a'=2,'b'=8] {'b'}", 8), ("replica_groups=mesh['a'=2,'b'=8] {'a','b'}", 16),
        ("replica_groups=mesh['a'=16] {'a':(1)4}", 4), ("replica_groups={}", 8),
    ],
)  # fmt: skip
def test_groups_in_each_of_the_ways_they_are_written(rest, group):
    assert account._group(rest, 8) == group


# --- traffic ---------------------------------------------------------------------------------------------------------


def test_traffic_is_the_compilers_where_nothing_loops(mesh):
    w, x = jax.ShapeDtypeStruct((256, 256), np.float32), jax.ShapeDtypeStruct((64, 256), np.float32)
    compiled = jax.jit(lambda w, x: jnp.tanh(x @ w) @ w).lower(w, x).compile()
    said = compiled.cost_analysis()["bytes accessed"]
    assert account.read(compiled.as_text(), 1).traffic == pytest.approx(said, rel=0.1)


def test_a_loop_reads_its_weights_once_each():
    """A layer's slice at each turn, not the stack at each turn."""
    depth = 40
    w, x = jax.ShapeDtypeStruct((depth, 256, 256), np.float32), jax.ShapeDtypeStruct((8, 256), np.float32)
    found = account.read(jax.jit(layers).lower(w, x).compile().as_text(), 1).traffic
    weights = depth * 256 * 256 * 4
    assert weights <= found < 6 * weights


def test_placed_batches_sum_their_gradients(mesh):
    """By hand again, as the compiler writes it: rows spread, weights repeated, one gradient of the whole stack."""
    w = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), np.float32, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32, sharding=NamedSharding(mesh, P("data")))
    found = account.read(jax.jit(jax.grad(layers)).lower(w, x).compile().as_text(), 8)
    reduced = sum(c.size * c.times for c in found.collectives if c.kind == "all-reduce")
    assert reduced == DEPTH * WIDTH * WIDTH * 4
