"""Selections by path and layer; split and join are exact inverses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from lmm_jax import partition
from lmm_jax.nn import halves


def stack(layers: int, offset: float) -> dict:
    size = layers * 2 * 3
    kernel = jnp.arange(size, dtype=jnp.float32).reshape(layers, 2, 3) + offset
    return {
        "mlp": {"kernel": kernel, "bias": kernel[:, 0]},
        "norm": {"scale": kernel[:, 1]},
    }


@pytest.fixture(name="params")
def _params() -> dict:
    return {
        "connector": {"up": {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}},
        "language": {"embed": {"table": jnp.ones((5, 2))}, "layers": stack(8, 0.5)},
        "vision": {"layers": stack(4, 100.0)},
    }


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("language/layers[0::4]", (0, 4)),
        ("language/layers[1,3,5]/.*", (1, 3, 5)),
        ("language/layers[:2]/mlp/.*", (0, 1)),
        ("language/layers[-1]", (7,)),
        ("language/layers[5:2:-1]/mlp/kernel", (3, 4, 5)),
    ],
)
def test_a_layer_suffix_selects_rows(params, pattern, layers):
    selection = partition.select(params, [pattern])
    assert ("language/layers/mlp/kernel", layers) in selection.leaves
    learning, frozen = partition.split(params, selection)
    kernel = params["language"]["layers"]["mlp"]["kernel"]
    others = [i for i in range(8) if i not in layers]
    np.testing.assert_array_equal(
        learning["language"]["layers"]["mlp"]["kernel"], kernel[np.array(layers)]
    )
    np.testing.assert_array_equal(
        frozen["language"]["layers"]["mlp"]["kernel"], kernel[np.array(others)]
    )


def test_a_pattern_limits_what_is_below_the_stack(params):
    selection = partition.select(params, ["language/layers[:2]/mlp/.*"])
    assert selection.paths() == (
        "language/layers/mlp/bias",
        "language/layers/mlp/kernel",
    )


def test_branch_and_wildcard_mean_the_same(params):
    assert partition.select(params, ["connector"]) == partition.select(
        params, ["connector/.*"]
    )


def test_matching_is_full(params):
    params["connector_two"] = {"kernel": jnp.ones(1)}
    assert partition.select(params, ["connector"]).paths() == (
        "connector/up/bias",
        "connector/up/kernel",
    )


def test_patterns_add_up_and_all_rows_are_the_whole(params):
    halves = ["vision/layers[:2]/norm", "vision/layers[2:]/norm"]
    assert partition.select(params, halves).leaves == (
        ("vision/layers/norm/scale", None),
    )
    either_order = (
        ["vision/layers", "vision/layers[0]"],
        ["vision/layers[0]", "vision/layers"],
    )
    for patterns in either_order:
        assert all(
            rows is None for _, rows in partition.select(params, patterns).leaves
        )


@pytest.mark.parametrize(
    "patterns",
    [
        [],
        [".*"],
        ["connector"],
        ["language/layers[1,2,6]", "vision/layers[0]/mlp/bias"],
        ["language/layers[1::2]", "language/embed", "connector/up/bias"],
    ],
)
def test_join_inverts_split_inside_jit(params, patterns):
    selection = partition.select(params, patterns)

    @jax.jit
    def there_and_back(params):
        return partition.join(*partition.split(params, selection), selection)

    for run in (there_and_back, there_and_back.__wrapped__):
        back = run(params)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_selection_is_a_static_argument(params):
    one = partition.select(params, ["language/layers[0]"])
    same = partition.select(jax.eval_shape(lambda: params), ["language/layers[:1]"])
    assert one == same and hash(one) == hash(same)


def test_gradients_reach_exactly_the_learning_rows(params):
    selection = partition.select(params, ["language/layers[2,5]/mlp/kernel"])
    learning, frozen = partition.split(params, selection)
    weight = jnp.arange(48.0).reshape(8, 2, 3)

    def loss(learning):
        full = partition.join(learning, frozen, selection)
        return jnp.sum(full["language"]["layers"]["mlp"]["kernel"] * weight)

    gradient = jax.grad(loss)(learning)
    assert jax.tree.structure(gradient) == jax.tree.structure(learning)
    np.testing.assert_array_equal(
        gradient["language"]["layers"]["mlp"]["kernel"], weight[np.array([2, 5])]
    )


def test_abstract_leaves_keep_their_sharding(params):
    mesh = Mesh(np.array(jax.devices()[:1]), "d")
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
    del params["connector"]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    selection = partition.select(abstract, ["language/layers[:3]"])
    learning, frozen = partition.split(abstract, selection)
    leaf = learning["language"]["layers"]["mlp"]["kernel"]
    assert leaf.shape == (3, 2, 3) and leaf.sharding == sharding
    assert frozen["language"]["layers"]["mlp"]["kernel"].shape == (5, 2, 3)
    assert partition.join(learning, frozen, selection) == abstract


def test_counts(params):
    selection = partition.select(params, ["connector", "vision/layers[0]"])
    total = sum(x.size for x in jax.tree.leaves(params))
    learning = 2 * 4 + 4 + (6 + 3 + 3)
    assert partition.count(params, selection) == (learning, total - learning)


def test_an_unmatched_pattern_shows_the_top_of_the_tree(params):
    with pytest.raises(ValueError, match=r"'conector'.*connector/up.*language/embed"):
        partition.select(params, ["conector"])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("language/layers[9]", "8 layers"),
        ("language/layers[a:b]", "must be a slice"),
        ("language/layers[]", "must be a slice"),
        ("language/layers[0:4:0]", "must be a slice"),
        ("language/layers[8:]", "none of 8"),
        ("language/layers[0]/layers[1]", "use one"),
        ("(language", "not a regex"),
    ],
)
def test_bad_patterns_are_refused(params, pattern, says):
    with pytest.raises(ValueError, match=says):
        partition.select(params, [pattern])


def test_a_lone_string_is_not_a_list(params):
    with pytest.raises(ValueError, match=r"write \['connector'\]"):
        partition.select(params, "connector")


def test_halves_of_another_selection_are_refused(params):
    one = partition.select(params, ["language/layers[0]"])
    two = partition.select(params, ["language/layers[0,1]"])
    with pytest.raises(ValueError, match="1 learning layers and the leaf 2"):
        partition.join(*partition.split(params, two), one)
    with pytest.raises(ValueError, match="connector"):
        partition.join(
            *partition.split(params, one), partition.select(params, ["connector"])
        )
    del params["language"]
    with pytest.raises(ValueError, match="not in the tree"):
        partition.split(params, one)


def through(kernel, runs):
    """Layers in loops of their own, each row read as a training step reads it."""
    hidden = jnp.ones((2, 8))
    for run in runs:

        def step(hidden, one, run=run):
            return jnp.tanh(hidden @ halves.row(kernel, run, one)), None

        hidden, _ = jax.lax.scan(step, hidden, halves.rows(kernel, run))
    return hidden.sum()


def square(layers: int) -> dict:
    # Of a size that lets gradients neither grow nor vanish over the layers.
    kernel = jax.random.normal(jax.random.key(0), (layers, 8, 8)) / 8**0.5
    return {"layers": {"kernel": kernel}}


@pytest.mark.parametrize(
    ("pattern", "runs"),
    [
        ("layers[3]", (range(3), range(3, 4))),
        ("layers[1,2,5]", (range(1), range(1, 3), range(3, 5), range(5, 6))),
        ("layers[2:]", (range(2), range(2, 6, 2), range(3, 6, 2))),
        ("layers[1,4]", (range(3), range(3, 6))),  # runs that mix both
        ("layers", (range(6),)),
    ],
)
def test_halves_beside_each_other_are_the_whole(pattern, runs):
    """Also where loops step, or run over layers of both."""
    params = square(6)
    selection = partition.select(params, [pattern])
    learning, frozen = partition.split(params, selection)

    def loss(learning):
        tree = partition.beside(learning, frozen, selection)
        return through(tree["layers"]["kernel"], runs)

    def whole(params):
        return through(params["layers"]["kernel"], runs)

    value, gradients = jax.jit(jax.value_and_grad(loss))(learning)
    expected, theirs = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    rows = dict(selection.leaves)["layers/kernel"] or range(6)
    theirs = theirs["layers"]["kernel"][np.array(rows)]
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(gradients["layers"]["kernel"], theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "runs", "products"),
    [
        (0, (range(1), range(1, 6)), 2 + 2 + 1),  # forward, of x, of the weight
        (5, (range(5), range(5, 6)), 2 + 1 + 1),  # no gradient below the last layer
    ],
)
def test_frozen_rows_are_neither_copied_nor_differentiated(layer, runs, products):
    """On the program: what its loops, one per run and direction, hold."""
    params = square(6)
    selection = partition.select(params, [f"layers[{layer}]"])
    learning, frozen = partition.split(params, selection)

    def loss(learning):
        tree = partition.beside(learning, frozen, selection)
        return through(tree["layers"]["kernel"], runs)

    text = str(jax.make_jaxpr(jax.grad(loss))(learning))
    assert text.count("dot_general") == products
    assert "f32[6,8,8]" not in text and " slice[" not in text


def test_halves_keep_their_dtypes():
    params = square(4)
    selection = partition.select(params, ["layers[1,2]"])
    learning, frozen = partition.split(params, selection)
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    kernel = partition.beside(learning, frozen, selection)["layers"]["kernel"]
    assert [x.dtype for x in kernel.learning] == [jnp.float32]
    assert kernel.frozen is frozen["layers"]["kernel"]
    joined = partition.join(learning, frozen, selection)["layers"]["kernel"]
    assert joined.dtype == jnp.bfloat16


def test_layers_of_which_anything_learns():
    paths = {
        "language/stack/layers/q/kernel": range(8),
        "language/stack/layers/q/lora_a": (2, 5),
    }

    def layers(*patterns):
        return partition.learning_layers(patterns, paths, 8)

    assert layers("connector", "language/stack/layers[0::4]") == (0, 4)
    assert layers("language/.*/layers[1]/q", "language/.*/layers[-1]/.*") == (1, 7)
    assert (
        layers("language/.*/lora_[ab]") == layers("language/.*/lora_a", "x") == (2, 5)
    )
    assert layers("language/.*/q/kernel") == tuple(range(8))
    assert layers("connector") == layers("language/embed") == layers() == ()
    with pytest.raises(ValueError, match="8 layers"):
        layers("language/stack/layers[8]")
