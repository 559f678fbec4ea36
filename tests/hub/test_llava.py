"""LLaVA-1.5 folders against `transformers`."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from lmm_jax import hub
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.models import lmm
from tests.golden import reference
from tests.hub.test_vision import scramble

TEXT = dict(
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=66,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=65,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
TOWERS = {
    "clip": (transformers.CLIPVisionConfig, "default"),
    "siglip": (transformers.SiglipVisionConfig, "full"),
}
LANGUAGES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "phi3": transformers.Phi3Config,
    "phi": transformers.PhiConfig,
    "mistral": functools.partial(transformers.MistralConfig, sliding_window=9),
    "qwen3": functools.partial(transformers.Qwen3Config, head_dim=10),
}
PAIRS = [("clip", "llama"), ("siglip", "qwen2"), ("clip", "phi3")]
MORE = [("siglip", "phi"), ("clip", "mistral"), ("siglip", "qwen3")]
IMAGE_TOKEN, PATCHES, NEW = 64, 9, 32
LENGTHS = (5, 9, 2, 7)  # of the text, BOS included


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def folder(request, tmp_path_factory):
    tower, language = request.param
    torch.manual_seed(0)  # not those of whatever ran before
    make_vision, strategy = TOWERS[tower]
    config = transformers.LlavaConfig(
        vision_config=make_vision(**VISION),
        text_config=LANGUAGES[language](**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
    )
    model = scramble(transformers.LlavaForConditionalGeneration(config))
    path = tmp_path_factory.mktemp("llava")
    model.save_pretrained(path)
    return path, model


def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids with one placeholder per row, padded on the left; mask; pixels [B, 3, H, W]."""
    rng = np.random.default_rng(0)
    width = max(LENGTHS) + 1
    ids, mask = np.zeros((4, width), int), np.zeros((4, width), int)
    for row, length in enumerate(LENGTHS):
        text = [1, *rng.integers(3, 60, length - 1)]
        placed = [text[0], reference.IMAGE, *text[1:]]
        ids[row, width - len(placed) :], mask[row, width - len(placed) :] = placed, 1
    return ids, mask, rng.normal(size=(4, 3, 12, 12)).astype(np.float32)


def expanded(ids: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What `transformers` reads: the image token once per patch."""
    rows = []
    for row, seen in zip(ids, mask):
        row = np.where(seen == 1, row, 65)
        at = int(np.argmax(row == reference.IMAGE))
        image = [IMAGE_TOKEN] * PATCHES
        rows.append([*row[:at], *image, *row[at + 1 :]])
    tokens = torch.tensor(rows)
    return tokens, (tokens != 65).long()


def ours(path):
    opened = hub.Folder(path)
    spec = hub.read_spec(opened.config, opened.path)
    ids, mask, pixels = prompts()
    sizes = lmm.geometry(spec, images=1, crops=0, prefix=0, suffix=ids.shape[1])
    model = lmm.LMM(spec, make_plan(sizes, ()))
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    params = hub.load(opened, spec, abstract)
    arrays = {f"in/pixel_values_{i}": pixels[i : i + 1] for i in range(4)}
    arrays["in/grids_wh"] = np.zeros((4, 2), np.int32)
    batch = reference.batch(reference.Fixture(arrays, {}), model.plan, ids, mask)
    return model, params, batch


def test_image_features_and_logits(folder):
    compare(*folder)


def compare(path, theirs):
    """Logits of a folder, ours and those of `transformers`."""
    model, params, batch = ours(path)
    ids, mask, pixels = prompts()
    tokens, seen = expanded(ids, mask)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = theirs(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=positions,
            pixel_values=torch.tensor(pixels),
        )
    state, logits = reference.run(model, params, batch)
    expected = out.logits.numpy()
    bound = 1e-5 * np.abs(expected).max()
    for row, mine in enumerate(reference.in_order(logits, state)):
        right = expected[row][seen[row].numpy() == 1]
        np.testing.assert_allclose(mine, right, rtol=0, atol=bound)


@pytest.mark.parametrize("folder", PAIRS + MORE, indirect=True, ids="-".join)
def test_greedy_generation_of_unequal_prompts(folder):
    path, theirs = folder
    model, params, batch = ours(path)
    ids, mask, pixels = prompts()
    tokens, seen = expanded(ids, mask)
    with torch.no_grad():
        out = theirs.generate(
            input_ids=tokens,
            attention_mask=seen,
            pixel_values=torch.tensor(pixels),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            use_cache=True,
        )
    expected = out[:, tokens.shape[1] :].numpy()
    answers = Generator(model, NEW, end=-1)(params, batch)
    np.testing.assert_array_equal(answers, expected)


def test_round_trip_is_bit_equal(folder, tmp_path):
    path, theirs = folder
    model, params, _ = ours(path)
    ids = {"image_token_index": IMAGE_TOKEN, "pad_token_id": 65}
    saved = hub.save(
        tmp_path / "back",
        model.spec,
        params,
        kind="llava",
        config=ids,
        shard_bytes=9000,
    )
    assert len(list(saved.glob("*.safetensors"))) > 2
    again = transformers.LlavaForConditionalGeneration.from_pretrained(saved)
    mine, right = again.state_dict(), theirs.state_dict()
    head = "vision_tower.head."  # of SigLIP, which no connector reads
    assert mine.keys() == {name for name in right if head not in name}
    assert all(torch.equal(mine[name], right[name]) for name in mine)
