"""Eight virtual devices compute what one computes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import experiment, losses, train
from lmm_jax.compiled import hlo
from lmm_jax.compiled.work import work
from lmm_jax.models import lmm
from lmm_jax.parallel.axes import Axes
from lmm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.small import small_config
from tests.tiny import Tiny

MESHES = {
    "one": dict(fsdp=1),
    "fsdp": dict(fsdp=8),
    "fsdp x tensor": dict(fsdp=4, tensor=2),
    "fsdp x context": dict(fsdp=4, context=2),
    "data x fsdp x tensor": dict(data=2, fsdp=2, tensor=2),
    "fsdp x context x tensor": dict(fsdp=2, context=2, tensor=2),
}


def on_mesh(config, mesh: str) -> experiment.Experiment:
    sizes = MESHES[mesh]
    config.mesh = sizes
    devices = jax.devices()[: math.prod(sizes.values())]
    return experiment.build(config, tuple(devices))


def step(tmp_path, mesh: str, strategy: str = "deepstack", rank: int = 0, **changes):
    """One update on a mesh: (parameters before, after, scalars), on the host."""
    config = small_config(tmp_path, strategy, **changes)
    config.lora.rank = rank
    config.optim.clip = None
    config.optim.lr = 1.0
    config.optim.eps = 1.0  # Adam's first step is g / (|g| + 1): nearly linear in g
    config.optim.warmup_ratio, config.optim.weight_decay = 0.0, 0.0
    exp = on_mesh(config, mesh)
    parts = train.make_parts(exp)
    state, frozen = train.initial_state(exp, parts)
    before = jax.device_get(state.learning)
    tiny = Tiny.make()
    plan = parts.model.plan
    tiny = dataclasses.replace(tiny, geometry=plan.geometry)
    batch = tiny.batch(tiny.plan(plan.edits), rows=8)
    state, scalars = parts.update(state, frozen, exp.place(batch))
    return before, jax.device_get(state.learning), jax.device_get(scalars)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`step` on one device, once a strategy."""
    return functools.cache(
        lambda strategy: step(tmp_path_factory.mktemp("one"), "one", strategy)
    )


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        *((mesh, "deepstack") for mesh in MESHES if mesh != "one"),
        ("data x fsdp x tensor", "deepstack_v"),
        ("fsdp x tensor", "fastv"),
    ],
)
def test_same_loss_and_gradients_as_one_device(mesh, strategy, alone, tmp_path):
    _, one, scalars = alone(strategy)
    _, many, others = step(tmp_path, mesh, strategy)
    np.testing.assert_allclose(others["loss"], scalars["loss"], rtol=1e-5)
    np.testing.assert_allclose(others["grad_norm"], scalars["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many, one)


def test_adapters_and_their_dropout_too(tmp_path):
    learn = ("connector",)
    _, one, scalars = step(tmp_path, "one", "llava", rank=4, learn=learn)
    before, many, others = step(tmp_path, "fsdp x tensor", "llava", rank=4, learn=learn)
    np.testing.assert_allclose(others["loss"], scalars["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many, one)
    q = [p["language"]["stack"]["layers"]["q"]["lora_b"] for p in (before, many)]
    assert not q[0].any() and np.abs(q[1]).max() > 1e-4


def test_what_a_strategy_learns_is_sharded_too(tmp_path):
    learn = ("strategy_.*", "language")
    _, one, scalars = step(tmp_path, "one", "slimm_m", learn=learn)
    _, many, others = step(tmp_path, "fsdp x tensor", "slimm_m", learn=learn)
    np.testing.assert_allclose(others["loss"], scalars["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many, one)
    config = small_config(tmp_path, "slimm_m", learn=learn)
    exp = on_mesh(config, "fsdp x tensor")
    placed = exp.placed_params(exp.model(train=True))
    for kernel in (
        placed["strategy_slimm_m"]["mergers"]["first"]["kernel"],
        placed["strategy_slimm_merger"]["merger"]["second"]["kernel"],
    ):
        held = math.prod(kernel.sharding.shard_shape(kernel.shape))
        assert held * 8 == kernel.size


def test_accumulation_is_exact_with_unequal_token_counts(tmp_path):
    _, whole, scalars = step(tmp_path, "one")
    before, parts, others = step(tmp_path, "one", accumulate=4)
    for name in ("loss", "tokens", "accuracy", "grad_norm"):
        np.testing.assert_allclose(others[name], scalars[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts, whole)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, parts)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_parameters_are_really_sharded(tmp_path):
    exp = on_mesh(small_config(tmp_path), "fsdp x tensor")
    state, _ = train.initial_state(exp, train.make_parts(exp))
    shards = {
        "q": (state.learning["language"]["stack"]["layers"]["q"]["kernel"], 8),
        "embed": (state.learning["language"]["embed"]["table"], 8),
        "up": (state.learning["language"]["stack"]["layers"]["up"]["kernel"], 8),
    }
    for name, (array, count) in shards.items():
        held = array.addressable_shards[0].data.size
        assert held * count == array.size, name
    mu = state.opt_state[1][0].mu["language"]["embed"]["table"]
    assert mu.sharding == state.learning["language"]["embed"]["table"].sharding


def test_cuts_add_no_collectives(tmp_path):
    """Rows of a cut are per example: FastV moves nothing between devices, and neither do
    chunks of the prompt, nor a stack of views, which are those of one image."""

    def collectives(strategy, chunk=0):
        exp = on_mesh(small_config(tmp_path, strategy), "fsdp")
        axes, model = exp.axes, exp.model(train=False)
        batch = lmm.abstract_batch(model, 8)
        placed = {
            name: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=axes.sharding("batch")
            )
            for name, x in batch.items()
        }
        run = jax.jit(
            lambda p, b: model.apply({"params": p}, b, chunk=chunk).state.hidden
        )
        text = run.lower(exp.placed_params(model), placed).compile().as_text()
        return set(
            re.findall(r"(all-to-all|collective-permute|reduce-scatter)\(", text)
        )

    least = collectives("llava")
    assert collectives("fastv") <= least
    assert collectives("fastv", chunk=20) <= least
    assert collectives("deepstack_v") <= least


def test_a_sharded_vocabulary_is_never_gathered():
    """Neither logits nor their gradients; each device sums up its own words."""
    axes = Axes(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    rows, tokens, width, words = 4, 16, 8, 1024

    def of(names, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=axes.sharding(names, shape))

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(hidden, kernel, targets, mask):
        logits = axes.constrain(hidden @ kernel, "batch tokens vocab")
        return losses.next_token(logits, targets, mask)

    arguments = (
        of("batch tokens act_embed", jnp.float32, rows, tokens, width),
        of("embed vocab", jnp.float32, width, words),
        of("batch", jnp.int32, rows, tokens),
        of("batch", jnp.float32, rows, tokens),
    )
    text = jax.jit(loss).lower(*arguments).compile().as_text()
    done = work(hlo.read(text))
    assert done.flops == 3 * 2 * rows * tokens * width * words / 8
    # A device's words of the head are gathered over fsdp and their gradient summed up, as
    # all parameters are.
    assert max(op.moved for op in done.collectives) == 4 * width * words / 4
    logits = 4 * (rows / 2) * tokens * (words / 4)
    assert max(op.moved for op in done.collectives) < logits / 3


@pytest.mark.parametrize(
    ("strategy", "mesh", "change", "told"),
    [
        ("fastv", dict(context=2), {}, "fastv chooses among the tokens of a whole row"),
        ("llava", dict(context=8), {}, "4 heads cannot be divided among 8 devices"),
        ("llava", dict(context=2), dict(suffix=161), "use text.suffix=162"),
    ],
)
def test_rows_that_devices_cannot_share_are_refused(
    strategy, mesh, change, told, tmp_path
):
    config = small_config(tmp_path, strategy)
    config.mesh = mesh
    config.text.update(change)
    with pytest.raises(ValueError, match=re.escape(told)):
        experiment.build(config).model(train=True)


@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(data=3, fsdp=1),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=2, fsdp=2),
    ],
)
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(sizes)


def test_axes_that_do_not_divide_stay_whole():
    axes = Axes(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    assert axes.spec("embed kv_heads head_dim", (48, 2, 12)) == jax.P(
        "fsdp", None, None
    )
    assert axes.spec("vocab embed", (128, 48)) == jax.P("tensor", "fsdp")
    assert axes.spec("embed embed", (48, 48)) == jax.P("fsdp", None)
