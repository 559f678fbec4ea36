"""LLaVA-NeXT folders against `transformers`: pixels, tokens, logits, answers."""

from __future__ import annotations

import jax
import numpy as np
from PIL import Image
import pytest
import torch
import transformers

from lmm_jax import convert, experiment, hub, weights
from lmm_jax.data.conversation import Encoded
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.placement import Slots, counts, look, place
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.hub.families.llava_next import grids
from lmm_jax.models import lmm
from tests.golden import reference
from tests.hub.test_llava import IMAGE_TOKEN, LANGUAGES, NEW, TEXT, TOWERS, VISION
from tests.hub.test_vision import scramble
from tests.small import small_config

PIXELS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
SIZES = ((31, 20), (9, 40), (24, 24), (70, 11), (5, 5))  # width, height
LENGTHS = (5, 9, 2, 7, 4)  # of the texts, BOS included
PAD = TEXT["pad_token_id"]


@pytest.fixture(scope="module", params=[("clip", "llama"), ("siglip", "qwen2")])
def folder(request, tmp_path_factory):
    tower, language = request.param
    make_vision, strategy = TOWERS[tower]
    config = transformers.LlavaNextConfig(
        vision_config=make_vision(**VISION),
        text_config=LANGUAGES[language](**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=PIXELS,
    )
    model = scramble(transformers.LlavaNextForConditionalGeneration(config))
    path = tmp_path_factory.mktemp("llava_next")
    model.save_pretrained(path)
    processor(model).save_pretrained(path)
    return path, model


def processor(model) -> transformers.LlavaNextImageProcessorPil:
    tower = model.config.vision_config
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": tower.image_size},
        crop_size={"height": tower.image_size, "width": tower.image_size},
        image_grid_pinpoints=PIXELS,
        **(half if tower.model_type.startswith("siglip") else {}),
    )


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in SIZES
    ]


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[1, *rng.integers(3, 60, length - 1).tolist()] for length in LENGTHS]


def ours(path):
    """Model, parameters, and the batch: the image stands after BOS."""
    opened = hub.Folder(path)
    spec = hub.lmm_spec(path)
    slots = (1, max(LENGTHS) - 1)
    sizes = lmm.geometry(
        spec,
        images=1,
        crops=4,
        prefix=slots[0],
        suffix=slots[1],
        pinpoints=spec.pinpoints,
    )
    plan = make_plan(sizes, lmm.own_edits(spec, sizes))
    model = lmm.LMM(spec, plan)
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = hub.load(opened, spec, abstract)
    image = hub.image_spec(path / hub.PROCESSOR, spec.vision)
    capacity = plan.tokens_per_image
    places = Slots(*slots, 1, capacity, rows=capacity, varies=True)
    rows = [row(ids, one, image, places) for ids, one in zip(texts(), pictures())]
    return model, params, {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def row(ids, picture, image: ImageSpec, slots: Slots) -> dict[str, np.ndarray]:
    zeros = np.zeros(len(ids), np.int32)
    encoded = Encoded(
        np.array(ids, np.int32),
        np.ones(len(ids), np.int8),
        zeros,
        zeros.astype(np.float32),
        np.array([1], np.int32),
    )
    counted = counts([picture], image, slots)
    return {
        **look([picture], image, slots),
        **place(encoded, slots, 1, pad_id=0, counts=counted),
    }


def theirs_reads(model) -> dict[str, torch.Tensor]:
    """What `transformers` reads, from its own processor; padded on the left."""
    found = processor(model)(pictures(), return_tensors="pt")
    sizes = found["image_sizes"]
    with torch.no_grad():
        features = model.get_image_features(**found).pooler_output
    rows = [
        [text[0], *[IMAGE_TOKEN] * len(image), *text[1:]]
        for text, image in zip(texts(), features)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    return dict(
        input_ids=ids,
        attention_mask=(ids != PAD).long(),
        pixel_values=found["pixel_values"],
        image_sizes=sizes,
    )


def test_logits_of_images_of_different_aspect(folder):
    path, theirs = folder
    model, params, batch = ours(path)
    read = theirs_reads(theirs)
    seen = read["attention_mask"]
    with torch.no_grad():
        out = theirs(**read, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    state, logits = reference.run(model, params, batch)
    expected = out.logits.numpy()
    bound = 1e-5 * np.abs(expected).max()
    lengths = set()
    for i, mine in enumerate(reference.in_order(logits, state)):
        right = expected[i][seen[i].numpy() == 1]
        np.testing.assert_allclose(mine, right, rtol=0, atol=bound)
        lengths.add(len(mine) - LENGTHS[i])
    assert len(lengths) > 3  # of visual tokens


def test_greedy_generation(folder):
    path, theirs = folder
    model, params, batch = ours(path)
    read = theirs_reads(theirs)
    with torch.no_grad():
        out = theirs.generate(
            **read, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
        )
    answers = Generator(model, NEW, end=-1)(params, batch)
    np.testing.assert_array_equal(answers, out[:, read["input_ids"].shape[1] :].numpy())


def test_round_trip_is_bit_equal(folder, tmp_path):
    path, theirs = folder
    model, params, _ = ours(path)
    ids = {"image_token_index": IMAGE_TOKEN, "pad_token_id": PAD}
    saved = hub.save(
        tmp_path / "back", model.spec, params, kind=model.spec.kind, config=ids
    )
    assert hub.lmm_spec(saved) == model.spec
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(saved)
    mine, right = again.state_dict(), theirs.state_dict()
    head = "vision_tower.head."  # of SigLIP, which no connector reads
    assert mine.keys() == {name for name in right if head not in name}
    assert all(torch.equal(mine[name], right[name]) for name in mine)


def test_a_folder_brings_its_tiles_along(folder, tmp_path):
    """No strategy in the config; sizes and values survive conversion."""
    path, theirs = folder
    config = small_config(tmp_path, "llava")
    config.image.mode = "auto"
    convert.from_hub(path, tmp_path / "kept")
    for init in (dict(load=str(path)), dict(run=str(tmp_path / "kept"))):
        config.init = init
        exp = experiment.build(config)
        model = exp.model(train=False)
        assert model.plan.connect.name == "anyres"
        assert model.plan.tokens_per_image == 9 + 6 * 7
        assert exp.images.pinpoints == grids(PIXELS, 12)
        params = weights.initial(exp, model)
        newline = theirs.state_dict()["model.image_newline"].numpy()
        np.testing.assert_array_equal(params["strategy_anyres"]["newline"], newline)
    config.image.mode = "pad"
    with pytest.raises(ValueError, match=r"set image\.mode='anyres'"):
        experiment.build(config).plan(train=False)
    convert.to_hub(tmp_path / "kept", tmp_path / "back")
    back = hub.image_spec(tmp_path / "back" / hub.PROCESSOR, exp.spec.vision)
    assert back == exp.images
    first, second = hub.Folder(path), hub.Folder(tmp_path / "back")
    assert len(second) == sum("vision_tower.head." not in name for name in first)


def test_a_config_may_name_what_the_folder_brings(folder, tmp_path):
    config = small_config(tmp_path, "anyres")
    config.image.update(mode="anyres", pinpoints=((1, 2),))
    config.init = dict(load=str(folder[0]))
    assert experiment.build(config).plan(train=True).tokens_per_image == 9 + 6 * 4


def test_grids_are_columns_and_rows():
    assert grids([[336, 672], [1008, 336]], 336) == ((2, 1), (1, 3))
    with pytest.raises(ValueError, match=r"\[336, 500\], which tiles of 336 pixels"):
        grids([[336, 500]], 336)
