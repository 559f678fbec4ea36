"""Recall of retrieval."""

from __future__ import annotations

import numpy as np
import pytest

from lmm_jax.eval.scores.recall import recalls
from tests.golden import reference


def test_equals_the_reference():
    f = reference.load("pumer/retrieval_metrics")
    ours = recalls(f["in/scores"], f["in/text_image_idx"])
    for name, value in ours.items():
        theirs = f[f"out/{name.replace('@', '_r')}"]
        assert value == pytest.approx(float(theirs), abs=1e-6), name
    assert ours["ir@1"] == pytest.approx(float(f["out/metric"]))


def test_a_perfect_and_a_reversed_ranking():
    image_of = np.repeat(np.arange(12), 2)
    right = (image_of[None] == np.arange(12)[:, None]).astype(float)
    assert set(recalls(right, image_of).values()) == {1.0}
    wrong = recalls(-right, image_of)
    assert wrong["ir@10"] == wrong["tr@10"] == 0.0


@pytest.mark.parametrize("image_of", [[0, 0], [0, 2, 1], [0, 1]])
def test_texts_that_do_not_fit_are_refused(image_of):
    with pytest.raises(ValueError, match="every image a text"):
        recalls(np.zeros((2, 3)), image_of)
