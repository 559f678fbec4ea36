"""Slots against a plain Python splice; truncation; every refusal."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmm_jax.data.conversation import Encoded
from lmm_jax.data.placement import Slots, place
from lmm_jax.data.sources import BadRecord

PAD = 99


def conversation(length: int, marks: list[int]) -> Encoded:
    """Token i is 100 + i; the last third is the answer."""
    ids = np.arange(length)
    answer = ids >= length - length // 3
    return Encoded(
        tokens=(100 + ids).astype(np.int32),
        role=(1 + answer).astype(np.int8),
        turn=(ids // 4).astype(np.int32),
        loss_mask=answer.astype(np.float32),
        marks=np.array(marks, np.int32),
    )


def splice(encoded: Encoded, counts: list[int]) -> list:
    """The reference sequence: tokens, with (image, k) where an image stands."""
    out = []
    for i in range(len(encoded.tokens) + 1):
        for image in np.flatnonzero(encoded.marks == i):
            out += [(int(image), k) for k in range(counts[image])]
        if i < len(encoded.tokens):
            out.append(int(encoded.tokens[i]))
    return out


def in_order(found: dict, per_image: int) -> dict:
    """position -> what stands there, of everything valid."""
    text = {
        int(position): int(token)
        for position, token, valid in zip(
            found["positions"], found["tokens"], found["valid"]
        )
        if valid
    }
    images = {
        int(position): divmod(slot, per_image)
        for slot, (position, valid) in enumerate(
            zip(found["visual_positions"], found["visual_valid"])
        )
        if valid
    }
    assert not text.keys() & images.keys()
    return text | images


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 20),
    marks=st.lists(st.integers(0, 20), max_size=3),
    prefix=st.integers(0, 8),
    suffix=st.integers(1, 20),
    per_image=st.integers(1, 3),
    data=st.data(),
)
def test_equals_the_splice(length, marks, prefix, suffix, per_image, data):
    """Whatever fits is the reference sequence; what is cut is cut from the right."""
    marks = sorted(min(mark, length) for mark in marks)
    encoded = conversation(length, marks)
    slots = Slots(prefix, suffix, 3, per_image)
    sizes = st.integers(0, per_image)
    counts = data.draw(st.lists(sizes, min_size=len(marks), max_size=len(marks)))
    wanted = splice(encoded, counts)
    head = marks[0] if marks and prefix else 0
    fits = head <= prefix and length - head <= suffix
    options = dict(pad_id=PAD, counts=counts)
    found = place(encoded, slots, len(marks), truncate=True, **options)
    order = in_order(found, per_image)
    assert order == dict(enumerate(wanted[: len(order)]))
    assert (len(order) == len(wanted)) or not fits
    if fits:
        strict = place(encoded, slots, len(marks), **options)
        assert all(np.array_equal(strict[key], found[key]) for key in found)
    else:
        with pytest.raises(BadRecord, match="too long"):
            place(encoded, slots, len(marks), **options)


def test_images_have_all_their_slots_by_default():
    arguments = (conversation(6, [2, 4]), Slots(3, 5, 3, 2), 2)
    found = place(*arguments, pad_id=PAD)
    same = place(*arguments, pad_id=PAD, counts=[2, 2])
    assert all(np.array_equal(same[key], found[key]) for key in found)
    assert found["visual_valid"].tolist() == [True] * 4 + [False] * 2


def test_where_things_go():
    found = place(conversation(6, [2]), Slots(3, 5, 2, 2), 1, pad_id=PAD)
    expected = {
        "tokens": [100, 101, PAD, 102, 103, 104, 105, PAD],
        "positions": [0, 1, 0, 4, 5, 6, 7, 0],
        "valid": [1, 1, 0, 1, 1, 1, 1, 0],
        "segment": [0] * 8,
        "role": [1, 1, 0, 1, 1, 2, 2, 0],
        "turn": [0, 0, 0, 0, 0, 1, 1, 0],
        "loss_mask": [0, 0, 0, 0, 0, 1, 1, 0],
        "visual_positions": [2, 3, 0, 0],
        "visual_valid": [1, 1, 0, 0],
        "visual_segment": [0] * 4,
    }
    assert {key: found[key].astype(int).tolist() for key in found} == expected
    dtypes = {key: found[key].dtype for key in found}
    for key in ("tokens", "positions", "segment", "turn", "visual_positions"):
        assert dtypes[key] == np.int32
    assert {dtypes["valid"], dtypes["visual_valid"]} == {np.dtype(bool)}
    assert (dtypes["role"], dtypes["loss_mask"]) == (np.int8, np.float32)


@pytest.mark.parametrize(
    "slots, marks", [(Slots(0, 8, 1, 2), [2]), (Slots(4, 8, 1, 2), [])]
)
def test_all_text_in_the_suffix(slots, marks):
    found = place(conversation(6, marks), slots, len(marks), pad_id=PAD)
    assert not found["valid"][: slots.prefix].any()
    assert found["valid"][slots.prefix :].sum() == 6


@pytest.mark.parametrize(
    "marks, images, slots, message",
    [
        ([0], 2, Slots(0, 9, 2, 1), "placeholders: 2 images but 1 <image>"),
        ([], 1, Slots(0, 9, 2, 1), "1 images but 0 <image>"),
        ([0, 0], 2, Slots(0, 9, 1, 1), "too many images: 2 images in 1 slots"),
        ([0], 1, Slots(0, 5, 1, 1), r"too long: 6 .* 5 suffix slots.*slots.suffix"),
        ([4], 1, Slots(3, 9, 1, 1), r"too long: 4 .* 3 prefix slots.*slots.prefix"),
    ],
)
def test_refusals(marks, images, slots, message):
    with pytest.raises(BadRecord, match=message):
        place(conversation(6, marks), slots, images, pad_id=PAD)


def test_an_image_of_too_many_tokens():
    with pytest.raises(BadRecord, match=r"too many visual tokens: .* 3 .* in 2 slots"):
        place(conversation(6, [0]), Slots(0, 9, 1, 2), 1, pad_id=PAD, counts=[3])
