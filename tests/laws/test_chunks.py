"""A prompt read in chunks is the prompt read whole, wherever its images are."""

from __future__ import annotations

import numpy as np
import pytest

from lmm_jax import strategies
from tests.tiny import IMAGES

NAMES = strategies.names()
NEW = 4


def interleaved(batch, seed: int = 0):
    """The same batch, each image of each row somewhere else in its text."""
    rng = np.random.default_rng(seed)
    out = {name: x.copy() for name, x in batch.items()}
    spans = np.split(np.arange(batch["visual_valid"].shape[1]), IMAGES)
    for row, valid in enumerate(batch["valid"]):
        text = np.flatnonzero(valid)
        there = [span[batch["visual_valid"][row, span]] for span in spans]
        before = np.sort(rng.integers(1, len(text) - NEW, IMAGES))  # text tokens
        out["positions"][row, text] = np.arange(len(text))
        for slots, at in zip(there, before):
            behind = text[at:]
            start = out["positions"][row, behind[0]]
            out["visual_positions"][row, slots] = start + np.arange(len(slots))
            out["positions"][row, behind] += len(slots)
    return out


def test_images_lie_at_different_places(tiny):
    """So that a chunk holds parts of images, others in each row."""
    batch = interleaved(tiny.batch(tiny.plan()))
    first, second = batch["visual_positions"][:, :: tiny.geometry.patches].T
    assert first[0] != first[1] and second[0] - first[0] > tiny.geometry.patches
    places = (batch["positions"], batch["valid"])
    visual = (batch["visual_positions"], batch["visual_valid"])
    for rows in zip(*places, *visual):
        taken = np.sort(np.r_[rows[0][rows[1]], rows[2][rows[3]]])
        np.testing.assert_array_equal(taken, np.arange(len(taken)))


def same(tiny, plan, chunk):
    """Logits of the first token, and of those read one by one after it."""
    batch = interleaved(tiny.batch(plan))
    whole, _ = tiny.decoded(plan, batch, NEW)
    found, _ = tiny.decoded(plan, batch, NEW, chunk=chunk)
    np.testing.assert_allclose(found, whole, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_chunks_equals_whole_prefill(name, tiny):
    same(tiny, tiny.plan(tiny.strategy(name)), chunk=7)


@pytest.mark.parametrize("chunk", [1, 30, 1000])
def test_of_any_size(chunk, tiny):
    same(tiny, tiny.plan(tiny.strategy("deepstack")), chunk)


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_rows_of_a_stack_follow_the_tokens_that_a_cut_leaves(mode, tiny):
    stack = tiny.strategy("deepstack", start=1, interval=2)
    same(tiny, tiny.plan((*stack, *tiny.strategy("fastv")), mode=mode), chunk=7)
