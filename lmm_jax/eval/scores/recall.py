"""Recall at k of retrieval, from the scores of all images with all texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AT = (1, 5, 10)


def recalls(scores: np.ndarray, image_of: Sequence[int]) -> dict[str, float]:
    """Shares of texts whose image, and of images one of whose texts, is among the best k.

    Ties go to the lower index.

    Args:
        scores: [images, texts].
        image_of: the image that each text belongs to.

    Returns:
        "ir@1", "ir@5", "ir@10" (image of a text) and "tr@1", ... (text of an image).

    Raises:
        ValueError: a text without image, an image without text, or shapes that disagree.
    """
    scores, image_of = np.asarray(scores), np.asarray(image_of)
    images, texts = scores.shape
    if len(image_of) != texts or set(image_of.tolist()) != set(range(images)):
        raise ValueError(
            f"{images} x {texts} scores and {len(image_of)} texts of "
            f"{len(np.unique(image_of))} images: every text needs its image among these, "
            "and every image a text."
        )
    belongs = image_of[None] == np.arange(images)[:, None]
    found = {}
    for name, of, right in (("ir", scores.T, belongs.T), ("tr", scores, belongs)):
        ranked = np.argsort(-of, axis=1, kind="stable")
        first = np.take_along_axis(right, ranked, axis=1).argmax(axis=1)
        found |= {f"{name}@{k}": float((first < k).mean()) for k in AT}
    return found
