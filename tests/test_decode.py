"""Decoding: parameters apart or stacked, sampling, and where an answer stops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.decode import (
    Generator,
    Sampling,
    TextStream,
    sample,
    words,
)
from lmm_jax.weights import prepared

TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["deepstack", "fastv"])
def test_layers_apart_give_the_same_logits(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    model, batch = tiny.model(plan), tiny.batch(plan)
    stacked = jax.device_put(tiny.params, jax.devices()[0])
    prefill = jax.jit(lambda p, b: model.apply(p, b, slots=2, method="prefill"))
    decode = jax.jit(lambda p, t, c: model.apply(p, t, c, method="decode"))
    both = []
    for params in (stacked, prepared(stacked)):
        first, cache = prefill({"params": params}, batch)
        logits = [first]
        for _ in range(2):
            tokens = logits[-1].argmax(-1)
            now, cache = decode({"params": params}, tokens, cache)
            logits.append(now)
        both.append(np.stack(logits))
    assert isinstance(params["language"]["stack"]["layers"], tuple)
    np.testing.assert_allclose(*both, **TOLERANCE)


@pytest.mark.parametrize("name", ["deepstack", "fastv"])
def test_greedy_answers_are_the_same_in_chunks(name, tiny):
    plan = tiny.plan(tiny.strategy(name))
    model, batch = tiny.model(plan), tiny.batch(plan)
    params = prepared(jax.device_put(tiny.params, jax.devices()[0]))
    whole, parts = (Generator(model, 6, end=-1, chunk=size) for size in (0, 7))
    np.testing.assert_array_equal(parts(params, batch), whole(params, batch))


def test_chunks_of_less_than_a_token(tiny):
    plan = tiny.plan()
    with pytest.raises(ValueError, match="chunks of -1 tokens: use 1 or more, or 0"):
        Generator(tiny.model(plan), 2, end=-1, chunk=-1)(tiny.params, tiny.batch(plan))


def test_layers_apart_are_views(tiny):
    stacked = jax.device_put(tiny.params, jax.devices()[0])
    layers = prepared(stacked)["language"]["stack"]["layers"]
    kernel = stacked["language"]["stack"]["layers"]["up"]["kernel"]
    start = kernel.unsafe_buffer_pointer()
    offsets = [x["up"]["kernel"].unsafe_buffer_pointer() - start for x in layers]
    assert offsets == [i * kernel[0].nbytes for i in range(len(kernel))]


# --- Sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_top_p_draws_as_the_reference(top_p, temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 12)).astype(np.float32) * 2
    warped = torch.tensor(logits)
    for warper in (TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)):
        warped = warper(None, warped)
    expected = torch.softmax(warped, -1)[0].numpy()
    draws = 4000
    many = np.repeat(logits, draws, axis=0)
    found = sample(many, jax.random.key(0), Sampling(temperature, top_p))
    share = np.bincount(found, minlength=12) / draws
    np.testing.assert_array_equal(share[expected == 0], 0)
    np.testing.assert_allclose(share, expected, atol=4 * draws**-0.5)


# --- Text ---------------------------------------------------------------------------------

END = 2  # "</s>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the end of the story"] * 4, 300)


def streamed(tokenizer, text: str, stop=(), end: bool = True) -> list[str]:
    ids = [*tokenizer.encode(text)[0], *([END] if end else [])]
    said = TextStream(tokenizer, END, stop)
    return [*map(said.push, ids), said.close()]


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(
    "text", ["plain words", "¿größer? 日本 🙂", " spaces  \n ", ""]
)
def test_a_stream_adds_up_to_the_answer(text, end, tokenizer):
    pieces = streamed(tokenizer, text, end=end)
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("🙂")[0]
    assert len(ids) == 4, "bytes"
    said = TextStream(tokenizer, END)
    assert [said.push(i) for i in ids] == ["", "", "", "🙂"]
    assert words(np.array(ids[:3]), tokenizer, END) == ""


@given(
    st.text("ab.\n", max_size=30), st.lists(st.text("ab.\n", min_size=1), max_size=3)
)
def test_stop_texts_over_token_boundaries(tokenizer, text, stop):
    ends = range(len(text) + 1)
    heard = next((text[:n] for n in ends if text[:n].endswith(tuple(stop))), None)
    marks = [mark for mark in stop if heard and heard.endswith(mark)]
    expected = text if heard is None else heard[: -max(map(len, marks))]
    ids = np.array([*tokenizer.encode(text)[0], END, 5])
    pieces = streamed(tokenizer, text, stop)
    assert "".join(pieces) == words(ids, tokenizer, END, stop) == expected.strip()


def test_nothing_of_a_stop_text_is_shown(tokenizer):
    pieces = streamed(tokenizer, "the answer\nUSER: more", ["\nUSER:", "xyz"])
    assert "".join(pieces) == "the answer"
