"""Kernels compute the attention that XLA computes, whatever the storage order."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.depth import Keys, Place
from lmm_jax.models import specs
from lmm_jax.nn import kernels
from lmm_jax.nn.attention import attention, sight
from lmm_jax.nn.kernels import Cudnn, Exchanged, Splash
from lmm_jax.parallel.axes import Axes
from lmm_jax.parallel.mesh import MeshConfig, make_mesh

BLOCK = specs.named("language", "tiny-lm").block
BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH = 4, 37, 4, 2, 128


def arrays(seed: int):
    """Queries, keys and what weighs their result: two samples a row, both shuffled, with
    holes."""
    rng = np.random.default_rng(seed)
    q, k, v, weights = (
        rng.standard_normal((BATCH, TOKENS, heads, WIDTH)).astype(np.float32)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    places = np.stack([rng.permutation(TOKENS) for _ in range(BATCH)])
    segment = (places >= 20).astype(np.int32)
    valid = rng.random(places.shape) < 0.8
    place = Place(
        jnp.array(places - 20 * segment), jnp.array(valid), jnp.array(segment)
    )
    weights = weights * valid[..., None, None]
    return (q, k, v), place, weights


def found(kernel, seed: int):
    """Attention of real tokens, and the gradients of a weighted sum of it."""
    qkv, place, weights = arrays(seed)
    seen = sight(place, place, causal=True)
    fused = kernel and kernel.fused(place, seen)
    seen = seen.replace(fused=fused)

    @jax.jit
    def run(q, k, v):
        out = attention(q, ((Keys(k, v), seen),))
        return (out * weights).sum(), out

    (_, out), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(*qkv)
    return out * (weights != 0), *gradients


def mesh(**sizes: int) -> Axes:
    return Axes(make_mesh(MeshConfig(**sizes)))


@pytest.mark.parametrize(
    "kernel",
    [
        Splash(interpret=True),
        Splash(mesh(fsdp=4, tensor=2), interpret=True),
        Splash(mesh(fsdp=2, tensor=4), interpret=True),
        Splash(mesh(fsdp=2, context=2, tensor=2), interpret=True),
        Exchanged(mesh(fsdp=2, context=2, tensor=2)),
        Cudnn(implementation="xla"),
        Cudnn(mesh(fsdp=4, context=2), implementation="xla"),
    ],
    ids=[
        "splash",
        "splash on a mesh",
        "splash with fewer keys than devices",
        "splash of divided tokens",
        "xla of divided tokens",
        "cudnn's mask",
        "cudnn's mask and divided tokens",
    ],
)
def test_same_numbers_and_gradients_as_xla(kernel):
    for ours, theirs in zip(found(kernel, 0), found(None, 0)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_model_with_a_kernel_is_the_same_model(tiny):
    """Two images, padding, an observed layer and a cut."""
    plan = tiny.plan(tiny.strategy("fastv"))
    batch = tiny.batch(plan)
    real = batch["valid"] & (batch["positions"] > 0)

    def logits(kernel):
        model = dataclasses.replace(tiny.model(plan), kernel=kernel)
        run = jax.jit(lambda p, b: model.apply({"params": p}, b, method="score")[0])
        return np.asarray(run(tiny.params, batch))[real]

    np.testing.assert_allclose(
        logits(Splash(interpret=True)), logits(None), rtol=1e-4, atol=1e-4
    )


def test_auto_takes_what_the_platform_has():
    whole = dataclasses.replace(BLOCK, dtype="bfloat16", head_dim=64)
    assert kernels.named("auto", "cpu", whole) is None
    assert isinstance(kernels.named("auto", "tpu", whole), Splash)
    assert isinstance(kernels.named("auto", "gpu", whole), Cudnn)


@pytest.mark.parametrize(
    ("name", "platform", "change", "told"),
    [
        ("splash", "tpu", dict(window=8), "no window"),
        ("cudnn", "gpu", dict(dtype="float32"), "of 64 float32 values"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_or_left_to_xla(
    name, platform, change, told
):
    block = dataclasses.replace(BLOCK, **{"head_dim": 64, "dtype": "bfloat16"} | change)
    assert kernels.named("auto", platform, block) is None
    with pytest.raises(ValueError, match=told):
        kernels.named(name, platform, block)


def test_shares_of_merged_tokens_are_left_to_xla():
    _, place, _ = arrays(0)
    merged = place.replace(gate=jnp.full(place.valid.shape, 2.0))
    seen = sight(merged, merged, causal=True)
    assert Splash(interpret=True).fused(merged, seen) is None
    divided = Splash(mesh(fsdp=4, context=2), interpret=True).fused(merged, seen)
    (q, k, v), *_ = arrays(0)
    ours = jax.jit(lambda *heads: divided(heads[0], Keys(*heads[1:])))(q, k, v)
    real = np.asarray(place.valid)
    theirs = np.asarray(attention(q, ((Keys(k, v), seen),)))
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=2e-5)
