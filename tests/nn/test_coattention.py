"""Layers of two streams against those of `transformers`, and one order against another."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.roberta.modeling_roberta import RobertaLayer

from lmm_jax.checkpoint.params import from_published
from lmm_jax.depth import Context, Scan
from lmm_jax.models import heads, meter
from lmm_jax.nn import coattention
from lmm_jax.nn.coattention import CoAttentionStack
from tests.hub.test_vision import scramble

WIDTH, HEADS, HIDDEN = 24, 3, 40
BLOCK = meter.co_block(WIDTH, HEADS, HIDDEN)


@functools.cache
def layers() -> dict[str, RobertaLayer]:
    config = transformers.RobertaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    pair = torch.nn.ModuleList([RobertaLayer(config), RobertaLayer(config)])
    return dict(zip(("text", "image"), scramble(pair)))


def streams() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (2, 5, WIDTH), (2, 9, WIDTH)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def theirs(order: str) -> list[np.ndarray]:
    pair, (x, y) = layers(), map(torch.tensor, streams())

    def run(layer, x, other):
        return layer(x, encoder_hidden_states=other)

    with torch.no_grad():
        text = run(pair["text"], x, y)
        image = run(pair["image"], y, text if order == "sequential" else x)
    return [text.numpy(), image.numpy()]


def ours(order: str, text: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    stack = CoAttentionStack(BLOCK, 1, order)
    tensors = {
        f"cross_modal_{stream}_layers.0.{name}": value.detach().numpy()
        for stream, layer in layers().items()
        for name, value in layer.named_parameters()
    }
    state = heads.entrance(text, image, np.ones(text.shape[:2], bool))
    arguments = state, (Scan(0, 1),), Context()

    def init(key):
        return stack.init(key, *arguments, method="run")["params"]

    rows = coattention.params(BLOCK, meter.LAYERS, meter.BLOCK)
    params = from_published(tensors, rows, jax.eval_shape(init, jax.random.key(0)))
    hidden = stack.apply({"params": params}, *arguments, method="run").state.hidden
    return np.split(np.asarray(hidden), [text.shape[1]], axis=1)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_layer_equals_two_of_transformers(order):
    for mine, right in zip(ours(order, *streams()), theirs(order)):
        bound = 1e-5 * np.abs(right).max()
        np.testing.assert_allclose(mine, right, rtol=0, atol=bound)


def test_orders_differ_by_the_text_that_the_image_reads():
    text, image = streams()
    new, after = ours("sequential", text, image)
    old, before = ours("parallel", text, image)
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)
    assert np.abs(after - before).max() > 0.1
    _, told = ours("parallel", new, image)
    np.testing.assert_allclose(told, after, rtol=0, atol=1e-5)
