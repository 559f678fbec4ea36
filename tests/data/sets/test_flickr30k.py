"""Captions of a split, and those that belong to other images."""

from __future__ import annotations

import pickle

import pytest

from lmm_jax.data.sets.flickr30k import Flickr30k

TRAIN = [0, 1, 3, 4, 5, 6]  # captions, of images 0, 0, 2, 2, 2, 3


def test_captions_of_a_split(flickr):
    source = pickle.loads(pickle.dumps(Flickr30k(flickr, flickr.parent)))
    pairs = [source[i] for i in range(len(source))]
    assert [pair.text for pair in pairs] == [f"Caption {n}." for n in TRAIN]
    files = [f"{image}.jpg" for image in (0, 0, 2, 2, 2, 3)]
    assert [pair.images for pair in pairs] == [
        (str(flickr.parent / file),) for file in files
    ]
    assert source.name(3).endswith("flickr30k.json[1][1]")


def test_others_are_all_captions_of_other_images(flickr):
    source = Flickr30k(flickr, flickr.parent)
    for index, own in enumerate(
        [(0, 1), (0, 1), (3, 4, 5), (3, 4, 5), (3, 4, 5), (6,)]
    ):
        others = [f"Caption {n}." for n in TRAIN if n not in own]
        assert list(source[index].others) == others


def test_the_gallery(flickr):
    gallery = Flickr30k(flickr, flickr.parent).gallery
    assert gallery.captions == tuple(f"Caption {n}." for n in TRAIN)
    assert gallery.image_of.tolist() == [0, 0, 1, 1, 1, 2]
    assert gallery.images == tuple(str(flickr.parent / f"{i}.jpg") for i in (0, 2, 3))


def test_a_split_that_is_not_there(flickr):
    with pytest.raises(
        ValueError, match=r"split 'dev'; choose from \['test', 'train'\]"
    ):
        Flickr30k(flickr, flickr.parent, "dev")
