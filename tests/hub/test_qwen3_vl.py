"""Qwen3-VL folders against `transformers`."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
import tokenizers
import torch
import transformers

from lmm_jax import convert, experiment, hub, strategies, weights
from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import Question
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from tests.golden import native, reference
from tests.hub.test_vision import scramble
from tests.test_full_size import get_config

NEW, PATCH = 32, 4
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
MARKS += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# Ids behind the 256 bytes.
PAD, _, _, START, END, IMAGE, VIDEO = range(256, 256 + len(MARKS))
TEXT = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
)
VISION = dict(
    depth=4,
    hidden_size=24,
    intermediate_size=40,
    num_heads=2,
    patch_size=PATCH,
    out_hidden_size=32,
    num_position_embeddings=36,
)
VARIANTS = {
    "untied": (dict(head_dim=12), [2, 2, 2], [0, 2], False),
    "tied": (dict(head_dim=16), [4, 2, 2], [1, 2, 3], True),
    "no taps": (dict(head_dim=8), [2, 1, 1], [], False),
}
# For each row the (rows, columns) of its images in patches, and text tokens after them.
ROWS = (([(4, 6)], 5), ([(2, 2), (6, 4)], 2), ([], 7), ([(8, 2)], 1))


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tmp_path_factory):
    text, section, taps, tied = VARIANTS[request.param]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=section)
    config = transformers.Qwen3VLConfig(
        text_config=dict(TEXT, rope_parameters=rope, **text),
        vision_config=dict(VISION, deepstack_visual_indexes=taps),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    model = scramble(transformers.Qwen3VLForConditionalGeneration(config))
    path = tmp_path_factory.mktemp("qwen3_vl")
    model.save_pretrained(path)
    return path, model


@functools.cache
def prompts() -> reference.Fixture:
    """Rows of unequal length, padded on the left, with packed pixels."""
    rng = np.random.default_rng(0)
    rows, kinds, grids = [], [], []
    for images, after in ROWS:
        row, kind = [7], [0]
        for height, width in images:
            tokens = height * width // 4
            row += [START, *[IMAGE] * tokens, END]
            kind += [0, *[1] * tokens, 0]
            grids.append((1, height, width))
        rows.append([*row, *rng.integers(1, 60, after)])
        kinds.append([*kind, *[0] * after])
    width = max(map(len, rows))

    def left_padded(values, empty=0):
        return np.array(
            [[empty] * (width - len(v)) + list(map(int, v)) for v in values]
        )

    pixels = sum(h * w for _, h, w in grids)
    return reference.Fixture(
        {
            "in/input_ids": left_padded(rows, PAD),
            "in/mm_token_type_ids": left_padded(kinds),
            "in/attention_mask": left_padded([[1] * len(row) for row in rows]),
            "in/image_grid_thw": np.array(grids),
            "in/pixel_values": rng.normal(size=(pixels, 6 * PATCH**2)).astype("f"),
        },
        {},
    )


def theirs_in() -> dict[str, torch.Tensor]:
    f = prompts()
    return {
        name.removeprefix("in/"): torch.tensor(value)
        for name, value in f.arrays.items()
    }


def ours(path):
    opened, f = hub.Folder(path), prompts()
    spec = hub.lmm_spec(path)
    patches = max(h * w for _, h, w in native.frames(f))
    spec = dataclasses.replace(
        spec, vision=dataclasses.replace(spec.vision, native=patches)
    )
    width = f["in/input_ids"].shape[1]
    sizes = lmm.geometry(spec, images=2, crops=0, prefix=0, suffix=width)
    model = lmm.LMM(spec, make_plan(sizes, lmm.own_edits(spec, sizes)))
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = jax.device_put(hub.load(opened, spec, abstract))
    return model, params, native.batch(f, model)


def test_logits(folder):
    path, theirs = folder
    model, params, batch = ours(path)
    with torch.no_grad():
        expected = theirs(**theirs_in()).logits.numpy()
    state, logits = reference.run(model, params, batch)
    bound = 1e-5 * np.abs(expected).max()
    seen = prompts()["in/attention_mask"] == 1
    for row, mine in enumerate(reference.in_order(logits, state)):
        right = expected[row][seen[row]]
        np.testing.assert_allclose(mine, right, rtol=0, atol=bound)


@pytest.mark.parametrize("chunk", [0, 5])
def test_greedy_generation_of_unequal_prompts(folder, chunk):
    path, theirs = folder
    model, params, batch = ours(path)
    theirs.model.rope_deltas = None  # it remembers those of the last prompt
    with torch.no_grad():
        out = theirs.generate(
            **theirs_in(),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            suppress_tokens=None,
        )
    expected = out[:, -NEW:].numpy()
    answers = Generator(model, NEW, end=-1, chunk=chunk)(params, batch)
    np.testing.assert_array_equal(answers, expected)


def test_round_trip_is_bit_equal(folder, tmp_path):
    path, theirs = folder
    model, params, _ = ours(path)
    saved = hub.save(
        tmp_path / "back", model.spec, params, kind="qwen3_vl", shard_bytes=30_000
    )
    assert len(list(saved.glob("*.safetensors"))) > 2
    assert (
        dataclasses.replace(hub.lmm_spec(saved).vision, native=model.spec.vision.native)
        == model.spec.vision
    )
    assert hub.lmm_spec(saved).language == model.spec.language
    again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(saved)
    mine, right = again.state_dict(), theirs.state_dict()
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[name], right[name]) for name in mine)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "out_hidden_size", 16),
        ("vision_config", "window_size", 112),
        ("text_config", "attention_bias", True),
        ("text_config", "num_experts", 8),
    ],
)
def test_what_would_change_the_maths_is_refused(folder, part, field, value):
    config = hub.Folder(folder[0]).config
    changed = {**config, part: {**config[part], field: value}}
    with pytest.raises(ValueError, match=field):
        hub.read_spec(changed, "somewhere")


def test_a_picture_and_a_question_through_the_config(folder, tmp_path):
    """Template, tokenizer, processor and weights of a folder, with nothing else said."""
    path, theirs = complete(folder, tmp_path / "model")
    picture = np.random.default_rng(1).integers(0, 256, (37, 61, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "page.png")
    config = get_config("qwen3_vl", f"folder={path},pixels=1600")
    config.workdir = str(tmp_path / "run")
    exp = experiment.build(config)
    model = exp.model(train=False)
    question = Question("q", (str(tmp_path / "page.png"),), "What is it?")
    batch = next(pipeline.prompts([question], exp.samples(model.plan), 1))
    assert not batch["visual_valid"].all(), "the image does not fill its slots"
    params = weights.to_run(exp, model)
    answer = Generator(model, NEW, end=-1)(params, exp.place(batch))

    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(
        path, size=dict(shortest_edge=256, longest_edge=1600)
    )
    seen = processor(Image.fromarray(picture), return_tensors="pt")
    pads = MARKS[5] * int(seen["image_grid_thw"].prod() // 4)
    tokens = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokens.ids])
    theirs.model.rope_deltas = None
    with torch.no_grad():
        out = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).int(),
            **seen,
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
    np.testing.assert_array_equal(answer[0], out[0, ids.shape[1] :].numpy())


def complete(folder, path):
    """The folder with tokenizer and image processor, as it is downloaded."""
    shutil.copytree(folder[0], path)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(MARKS)
    made.save(str(path / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    half = [0.5, 0.5, 0.5]
    transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        image_mean=half,
        image_std=half,
        size=dict(shortest_edge=256, longest_edge=16_777_216),
    ).save_pretrained(path)
    return path, folder[1]


def test_tokens_are_cut_as_in_any_model(folder):
    """Coordinates and injected features follow the tokens that stay."""
    base, params, batch = ours(folder[0])
    sizes = base.plan.geometry
    cut = strategies.build({"fastv": dict(layer=1, keep=5)}, sizes)
    edits = (*lmm.own_edits(base.spec, sizes), *cut)
    answers = {}
    for mode in ("drop", "mask"):
        model = lmm.LMM(base.spec, make_plan(sizes, edits, mode=mode))
        answers[mode] = Generator(model, NEW, end=-1)(params, batch)
    np.testing.assert_array_equal(answers["drop"], answers["mask"])
    plain = Generator(base, NEW, end=-1)(params, batch)
    assert (answers["drop"] != plain).any(), "the cut does nothing here"


def test_what_needs_images_of_one_shape_is_refused(folder):
    sizes = ours(folder[0])[0].plan.geometry
    for chosen, says in (
        ("random", "before language layer 0"),
        ("uniform", "one shape"),
    ):
        with pytest.raises(ValueError, match=says):
            make_plan(sizes, strategies.build({chosen: dict(keep=4)}, sizes))


def test_conversion_there_and_back(folder, tmp_path):
    path, _ = complete(folder, tmp_path / "model")
    convert.from_hub(path, tmp_path / "kept")
    convert.to_hub(tmp_path / "kept", tmp_path / "back")
    first, second = hub.Folder(path), hub.Folder(tmp_path / "back")
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name][:], second[name][:])
    again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(second.path)
    assert again.config.image_token_id == IMAGE
    assert hub.image_spec(second.path / hub.PROCESSOR, hub.lmm_spec(path).vision)
