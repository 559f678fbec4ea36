"""Embedded queries on their own against the reference's numbers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmm_jax.checkpoint.params import flatten, from_published, to_published
from lmm_jax.depth import Memory, Place
from lmm_jax.nn.attention import Sight
from lmm_jax.nn.query import EmbeddedQuery, QuerySpec
from tests.golden import reference

NAMES = ("h24", "odd", "nomask", "empty_row", "all_empty")
CLOSE = dict(rtol=0, atol=1e-5)
# Mathematically zero: what shifts all keys alike shifts all logits of a query alike.
NOISE = ("t2q_attn.k_proj.bias", "i2q_attn.k_proj.bias", "ln_kv.bias")


def build(name: str):
    """The module, its parameters, the arguments of `read`, and the fixture."""
    f = reference.load(f"flashsloth/embq_{name}")
    c = f.meta["config"]
    spec = QuerySpec(
        count=c["num_queries"],
        most=1,
        width=c["hidden_size"],
        vision=c["d_vision"],
        patches=c["image_tokens"],
        bottleneck=c["d_bottleneck"],
        heads=c["num_heads"],
        norm_eps=c["layer_norm_eps"],
    )
    module = EmbeddedQuery(spec)
    groups, text, patches = f["in/queries"], f["in/text"], f["in/image"]
    count = groups.shape[:2]
    mask = f.arrays.get("in/text_mask", np.ones(text.shape[:2], bool)) > 0
    place = Place(*(np.zeros(patches.shape[:2], np.int32) for _ in range(3)))
    arguments = (
        groups,
        text,
        Memory(patches, place),
        Sight(np.broadcast_to(mask[:, None], (*count, text.shape[1]))),
        Sight(np.ones((*count, patches.shape[1]), bool)),
    )

    def init(key):
        whole = np.ones((*count, 1), bool)
        words = (groups, groups[:, :1], arguments[2], Sight(whole), arguments[4])
        return module.init(key, *words, method="read")["params"]

    abstract = jax.eval_shape(init, jax.random.key(0))
    tokens = {"learnable_tokens.token": np.zeros((spec.count, spec.width), np.float32)}
    theirs = {f"lqformer.{key}": value for key, value in f.params.items()}
    params = from_published({**tokens, **theirs}, module.params(), abstract)
    return module, params, arguments, f


def read(module, params, *arguments):
    return module.apply({"params": params}, *arguments, method="read")


@pytest.mark.parametrize("name", NAMES[:-1])
def test_what_is_added(name):
    module, params, arguments, f = build(name)
    added = jax.jit(read, static_argnums=0)(module, params, *arguments)
    np.testing.assert_allclose(added, f["out/delta"], **CLOSE)


def test_without_any_text_at_all():
    """The reference then means nothing, zeros; we do only where it gives no text."""
    module, params, (queries, _, *rest), f = build("all_empty")
    assert f["in/text"].shape[1] == 0
    meant = np.zeros((*queries.shape[:2], module.spec.bottleneck), np.float32)
    np.testing.assert_array_equal(f["out/text_attended"], meant)
    added = module.apply({"params": params}, meant, rest[0], rest[2], method="look")
    np.testing.assert_allclose(added, f["out/delta"], **CLOSE)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_gradients(name):
    module, params, (queries, text, memory, *sights), f = build(name)

    @jax.jit
    @jax.grad
    def gradient(inputs):
        params, queries, text, patches = inputs
        seen = memory.replace(hidden=patches)
        after = queries + read(module, params, queries, text, seen, *sights)
        return (after * f["in/cotangent"]).sum()

    ours = gradient((params, queries, text, memory.hidden))
    found = to_published(ours[0], module.params())
    inputs = dict(zip(("in/queries", "in/text", "in/image"), ours[1:]))
    found = {f"param/{k.removeprefix('lqformer.')}": v for k, v in found.items()}
    theirs = {k.removeprefix("grad/"): v for k, v in f.arrays.items() if "grad/" in k}
    assert len(theirs) == 27
    # Tokens of no question have a part in the reference's empty question.
    theirs["in/text"] = theirs["in/text"] * sights[0].visible[:, 0, :, None]
    for key, right in theirs.items():
        if not key.endswith(NOISE):
            mine = {**found, **inputs}[key]
            bound = 1e-4 * np.abs(right).max()
            np.testing.assert_allclose(mine, right, rtol=0, atol=bound, err_msg=key)


def test_parameters():
    module, params, _, _ = build("h24")
    rows = {row.path for row in module.params()}
    assert rows == set(flatten(params)) and len(rows) == 25
