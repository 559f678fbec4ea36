"""Scores over depth: their definitions, and what they must not depend on."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from lmm_jax import importance
from lmm_jax.depth import Layout
from lmm_jax.importance import METHODS
from lmm_jax.nn import watch
from tests.hub.test_llava import expanded, folder, ours, prompts
from tests.nn.test_chunk import anywhere
from tests.tiny import SPEC

__all__ = ["folder"]  # a fixture

WATCHED = [name for name, method in METHODS.items() if method.program]
DEPTH = SPEC.language.depth


@pytest.fixture(scope="module")
def score(tiny):
    """(batch, method) to scores of the tiny model."""
    model = tiny.model(tiny.plan())
    programs = {make: make(model) for make in {METHODS[n].program for n in WATCHED}}

    def score(batch, name):
        method = METHODS[name]
        return method.score(programs[method.program](tiny.params, batch))

    return score


# --- Of streams -----------------------------------------------------------------------


def layer(after, *, images: int = 1) -> watch.Change:
    """A stack of one layer over 5 image tokens, so many times each, and 18 of text."""
    state = anywhere()
    which = np.concatenate([np.tile(np.arange(5), images), np.arange(5, 23)])
    layout = Layout.of({"visual": 5 * images, "suffix": 18})
    rows = {k: None if x is None else x[:, which] for k, x in state.arrays().items()}
    state = state.replace(**rows, layout=layout)
    seen = watch.change(state, after(state.hidden), None, None)
    return jax.tree.map(lambda x: x[None], seen)


@pytest.mark.parametrize(
    ("after", "influence", "angle"),
    [(lambda x: x, 0, 0), (lambda x: 3 * x, 0, 0), (lambda x: -2 * x, 2, 1)],
    ids=["identity", "scaled", "negated"],
)
def test_simple_layers(after, influence, angle):
    seen = importance.of_layers(layer(after))
    np.testing.assert_allclose(importance.bi(seen), influence, atol=1e-6)
    np.testing.assert_allclose(importance.mbi(seen), influence, atol=1e-6)
    np.testing.assert_allclose(importance.angular(seen), angle, atol=3e-4)


def test_images_and_text_count_alike_in_mbi_alone():
    def turned(x):
        return np.concatenate([x[:, :-18] + 1, x[:, -18:] * 2], axis=1)

    one, two = (importance.of_layers(layer(turned, images=n)) for n in (1, 2))
    np.testing.assert_allclose(importance.mbi(two), importance.mbi(one), rtol=1e-6)
    assert abs(importance.bi(two) - importance.bi(one)) > 1e-2

    seen = importance.of_layers(layer(lambda x: -x))
    np.testing.assert_allclose(importance.mbi(seen), importance.bi(seen), atol=1e-6)


def test_blocks_of_layers():
    seen = importance.of_layers(
        jax.tree.map(lambda *x: np.concatenate(x), *[layer(lambda x: -x)] * 3)
    )
    angles = [importance.angular(seen, block) for block in (1, 2, 3)]
    assert [len(found) for found in angles] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"blocks of 4 layers: use 1\.\.3"):
        importance.angular(seen, 4)


@pytest.mark.parametrize("name", WATCHED)
def test_neither_padding_nor_order_matters(tiny, score, name):
    batch = tiny.batch(tiny.plan())
    one = score(batch, name)
    assert one.shape == (DEPTH,) and np.isfinite(one).all()
    rng = np.random.default_rng(1)
    noisy = dict(batch, tokens=batch["tokens"].copy(), images=batch["images"].copy())
    empty = ~batch["valid"]
    noisy["tokens"][empty] = rng.integers(3, 100, empty.sum())
    noisy["images"][~batch["views"]] = 77
    np.testing.assert_allclose(score(noisy, name), one, rtol=1e-5, atol=1e-7)
    turned = {key: x[[2, 0, 1]] for key, x in batch.items()}
    np.testing.assert_allclose(score(turned, name), one, rtol=1e-5, atol=1e-7)


def test_samples_without_images_have_no_multimodal_score(tiny, score):
    batch = {key: x[[2, 2, 2]] for key, x in tiny.batch(tiny.plan()).items()}
    assert np.isfinite(score(batch, "bi")).all()
    with pytest.raises(ValueError, match="use data with images, or method=bi"):
        score(batch, "mbi")


@pytest.mark.parametrize("folder", [("clip", "llama")], indirect=True, ids="-".join)
def test_scores_are_those_of_the_hidden_states_of_transformers(folder):
    path, theirs = folder
    model, params, batch = ours(path)
    tokens, seen = expanded(*prompts()[:2])
    theirs.set_attn_implementation("eager")
    before_norm = []
    theirs.model.language_model.norm.register_forward_hook(
        lambda module, inputs, output: before_norm.append(inputs[0])
    )
    with torch.no_grad():
        out = theirs(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            pixel_values=torch.tensor(prompts()[2]),
            output_hidden_states=True,
            output_attentions=True,
        )
    streams = torch.stack([*out.hidden_states[:-1], before_norm[0]]).double()
    real = seen.bool()
    image = (tokens == theirs.config.image_token_index) & real
    behind = real & ~image & (image.cumsum(1) > 0)
    cosine = torch.cosine_similarity(streams[:-1], streams[1:], dim=-1)

    def mean(values, where):
        return ((values * where).sum(-1) / where.sum(-1)).mean(-1).numpy()

    ends = torch.cosine_similarity(streams[:-1, :, -1], streams[1:, :, -1], dim=-1)
    shares = [(a.mean(1) * image[:, None]).sum(-1) for a in out.attentions]
    expected = {
        "bi": 1 - mean(cosine, real),
        "mbi": 1 - (mean(cosine, image) + mean(cosine, real & ~image)) / 2,
        "angular_hidden": (ends.acos() / torch.pi).mean(-1).numpy(),
        "image_attention": mean(torch.stack(shares), behind),
    }
    for name, right in expected.items():
        found = METHODS[name].score(METHODS[name].program(model)(params, batch))
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6, err_msg=name)


# --- Of parameters --------------------------------------------------------------------


@pytest.fixture
def layers(tiny):
    return tiny.params["language"]["stack"]["layers"]


@pytest.mark.parametrize("name", ["parameter_change", "angular_param"])
def test_of_equal_parameters_nothing_has_changed(layers, name):
    np.testing.assert_array_equal(METHODS[name].score(layers, layers), np.zeros(DEPTH))


def test_changes_of_parameters(layers):
    rng = np.random.default_rng(0)
    kernels = [name for name in layers if "kernel" in layers[name]]
    assert len(kernels) == 7
    tuned = {
        name: {
            k: x + 0.1 * rng.normal(size=x.shape).astype("f") for k, x in one.items()
        }
        for name, one in layers.items()
    }
    change, over, angle = 0.0, 0.0, 0.0
    for name in kernels:
        new, old = (np.float64(p[name]["kernel"]) for p in (tuned, layers))
        new, old = new.reshape(DEPTH, -1), old.reshape(DEPTH, -1)
        apart = np.linalg.norm(new - old, axis=1)
        change += apart / np.linalg.norm(old, axis=1)
        over += apart / np.linalg.norm(new, axis=1)
        inner = (new * old).sum(1) / np.linalg.norm(new, axis=1)
        angle += np.arccos(inner / np.linalg.norm(old, axis=1)) / np.pi
    close = dict(rtol=1e-5)
    np.testing.assert_allclose(
        importance.parameter_change(tuned, layers), change, **close
    )
    found = importance.parameter_change(tuned, layers, over="tuned")
    np.testing.assert_allclose(found, over, **close)
    np.testing.assert_allclose(importance.angular_param(tuned, layers), angle, **close)
    with pytest.raises(ValueError, match=r"shape .* in the base"):
        importance.angular_param(tuned, jax.tree.map(lambda x: x[:3], layers))
