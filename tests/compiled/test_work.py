"""What compiled programs do, against programs whose work is known."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.compiled import hlo
from lmm_jax.compiled.work import flops, work
from lmm_jax.parallel.mesh import MeshConfig, make_mesh

LAYERS, ROWS, WIDTH = 5, 16, 32


def compiled(function, *arrays) -> str:
    return jax.jit(function).lower(*arrays).compile().as_text()


def done(function, *arrays):
    return work(hlo.read(compiled(function, *arrays)))


def scanned(x, layers, each=lambda layer: layer):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ each(w)), None), x, layers)[0]


def test_a_loop_counts_as_often_as_it_runs():
    x, layers = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    found = done(scanned, x, layers)
    assert found.flops == LAYERS * 2 * ROWS * WIDTH**2
    assert found.unknown == 0
    # Each layer is read once in each round, not the whole stack.
    least = 4 * (LAYERS * WIDTH**2 + 2 * ROWS * WIDTH)
    assert least <= found.bytes < 6 * least


def test_loops_in_loops_multiply():
    def twice(x, layers):
        return jax.lax.fori_loop(0, 3, lambda _, x: scanned(x, layers), x)

    x, layers = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    assert done(twice, x, layers).flops == 3 * LAYERS * 2 * ROWS * WIDTH**2


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))
    found = done(until, x, w)
    assert (found.flops, found.unknown) == (2 * ROWS * WIDTH**2, 1)
    assert flops(compiled(until, x, w)) is None


def test_products_of_a_library_are_not_guessed():
    call = 'f32[2] custom-call(), custom_call_target="__onednn$matmul"'
    assert (
        flops(f"HloModule m\n\nENTRY %main () -> f32[2] {{\n  ROOT %a = {call}\n}}\n")
        is None
    )


def test_a_backward_pass_has_two_products_for_each():
    x, layers = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    both = jax.grad(lambda x, w: scanned(x, w).sum(), argnums=(0, 1))
    assert flops(compiled(both, x, layers)) == 3 * LAYERS * 2 * ROWS * WIDTH**2


def test_parameters_gathered_in_a_loop():
    mesh = make_mesh(MeshConfig(fsdp=8))

    def put(*names):
        return jax.NamedSharding(mesh, jax.P(*names))

    def gathered(layer):
        return jax.lax.with_sharding_constraint(layer, put())

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32, sharding=put("fsdp"))
    layers = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, WIDTH), np.float32, sharding=put(None, "fsdp")
    )
    found = done(functools.partial(scanned, each=gathered), x, layers)
    assert found.volume("all-gather") == (LAYERS, LAYERS * 4 * WIDTH**2)
    (op,) = found.collectives
    assert (op.group, op.loops) == (tuple(range(8)), 1)
    assert found.flops == LAYERS * 2 * ROWS * WIDTH**2 / 8


def test_a_sum_over_one_axis_of_a_mesh():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    put = functools.partial(jax.NamedSharding, mesh)
    x = jax.ShapeDtypeStruct(
        (ROWS, WIDTH), np.float32, sharding=put(jax.P(None, "tensor"))
    )
    w = jax.ShapeDtypeStruct((WIDTH, 8), np.float32, sharding=put(jax.P("tensor")))
    found = done(jnp.matmul, x, w)
    assert found.volume("all-reduce") == (1, 4 * ROWS * 8)
    assert found.collectives[0].group == (0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_convolutions_count_what_is_not_padding(seed):
    rng = np.random.default_rng(seed)
    stride, spread, apart = (tuple(rng.integers(1, 4, 2).tolist()) for _ in range(3))
    pad = [tuple(rng.integers(0, 5, 2).tolist()) for _ in range(2)]
    run = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=stride,
        padding=pad,
        lhs_dilation=spread,
        rhs_dilation=apart,
    )
    arrays = jnp.ones((2, 3, 12, 10)), jnp.ones((4, 3, 3, 2))
    found = done(run, *arrays)
    theirs = jax.jit(run).lower(*arrays).cost_analysis()["flops"]
    assert found.flops == theirs


# What only a TPU's compiler writes: S(1) is memory on the chip, an exchange beside other
# work is cut into pieces of one channel, a sum of which a slice is kept is one fusion.
TPU = """HloModule test

%start (p: bf16[8,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %g.1 = bf16[64,4]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
}

%piece (p: bf16[8,4], x: bf16[16,64]) -> bf16[16,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %x = bf16[16,64]{1,0} parameter(1)
  %g.2 = bf16[64,4]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  ROOT %c = bf16[16,4]{1,0} convolution(%x, %g.2), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (p: f32[64,4]) -> f32[8,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %r = f32[64,4]{1,0} all-reduce(%p), channel_id=8, replica_groups=[2,8]<=[8,2]T(1,0), to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = f32[8,4]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={8,4}
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[], /*index=1*/bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = bf16[8,4]{1,0} get-tuple-element(%t), index=1
  %x = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %started = bf16[64,4]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%start
  %product = bf16[16,4]{1,0} fusion(%w, %x), kind=kOutput, calls=%piece
  %y = f32[64,4]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %sum = f32[8,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%i, %w)
}

%condition (t: (s32[], bf16[8,4])) -> pred[] {
  %t = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[8,4]) -> bf16[8,4] {
  %w = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(2)
  %copy = s32[] copy(%zero)
  %t = (s32[], bf16[8,4]{1,0}) tuple(%copy, %w)
  %loop = (s32[], bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_only_tpus_write():
    found = work(hlo.read(TPU))
    assert found.unknown == 0
    assert found.flops == 4 * 2 * 16 * 64 * 4
    assert found.volume("all-gather") == (4, 4 * 64 * 4 * 2)
    assert found.volume("reduce-scatter") == (4, 4 * 64 * 4 * 4)
    gather, scatter = found.collectives
    assert not gather.waits and scatter.waits
    assert gather.group == scatter.group == tuple(range(0, 16, 2))
    fusions = [op.bytes for op in found.ops if op.kind == "fusion"]
    assert fusions == [64, 64 + 128]  # the shard; the shard and the product


SPLASH = """HloModule test

ENTRY %main (m: s8[1,4,4], q: bf16[8,2,2048,64]) -> bf16[8,2,2048,64] {
  %m = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[8,2,2048,64]{3,2,1,0} parameter(1)
  ROOT %splash_mqa_fwd_segmented.1 = bf16[8,2,2048,64]{3,2,1,0} custom-call(%m, %q)
}
"""


def test_splash_attention_counts_the_blocks_that_it_visits():
    found = work(hlo.read(SPLASH))
    assert found.flops == 2 * 2 * (8 * 2) * 2048**2 * 64 * 10 / 16
    assert found.bytes == 16 + 2 * (2 * 8 * 2 * 2048 * 64)


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match=r"Compiled\.as_text"):
        hlo.read("HloModule empty")
